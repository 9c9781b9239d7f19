"""Write docs/slurm/refusals.md: what is refused before submission, and in which words, by asking on a real SLURM.

NODES=3 GPUS=8 tests/slurm/lab/box.sh .venv/bin/python tests/slurm/write_refusals.py
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from refusals import REFUSALS, TRAINING, Refusal, make_inputs, own_inputs, slurm_command  # noqa: E402

TARGET = ROOT / "docs" / "slurm" / "refusals.md"
HEAD = """# What `megatron-video slurm submit` refuses

Written by `NODES=3 GPUS=8 tests/slurm/lab/box.sh .venv/bin/python tests/slurm/write_refusals.py` on the cluster of the
tests: three nodes of 16 CPUs, 200000 MiB and 8 GPUs; partition `gpu` without a limit, `short` with two nodes and ten
minutes. Each is a real command; its exit code is 2, and nothing was submitted. All problems of a submission are told
together. `TINY` stands for the configuration of a tiny training.

"""


def main() -> None:
    """Make every refusal come about, and write down what was said."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder)
        # Each in a folder of its own, so that none meets what another has made.
        with ThreadPoolExecutor(len(REFUSALS)) as pool:
            parts = list(pool.map(lambda refusal: _section(refusal, folder), REFUSALS))
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(HEAD + "\n".join(parts), encoding="utf-8")
    print(f"wrote {TARGET}: {len(parts)} refusals")


def _section(refusal: Refusal, inputs: Path) -> str:
    folder = inputs / f"user{REFUSALS.index(refusal)}"
    own_inputs(inputs, folder)
    if refusal.before is not None:
        refusal.before(folder)
    result = slurm_command(folder, *refusal.command())
    if refusal.after is not None:
        refusal.after(folder)
    if result.returncode != 2:
        raise SystemExit(f"{refusal.what}: exit code {result.returncode} and not 2\n{result.stdout}{result.stderr}")
    words = shlex.join(refusal.command()).replace(shlex.join(TRAINING), "TINY")
    said = result.stderr.strip().replace(str(folder), "/home/you")
    return f"## {refusal.what}\n\n    $ megatron-video slurm {words}\n" + "".join(
        f"    {line}\n" for line in said.splitlines()
    )


if __name__ == "__main__":
    main()
