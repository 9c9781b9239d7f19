"""`megatron-video slurm submit reshard --in ... --out ...`: see slurm/convert_chain.py."""

from __future__ import annotations

from collections.abc import Sequence

from slurm.convert_chain import submit


def main(argv: Sequence[str]) -> int:
    """Command line of `submit reshard`."""
    return submit("reshard", argv)
