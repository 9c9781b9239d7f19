"""`megatron-video slurm submit convert|reshard --in ... --out ...`: a checkpoint's conversion as a job without GPUs.

The other arguments are those of `megatron-video ckpt convert` and `reshard`, whose own dry run checks names, shapes,
sizes, settings and room now. The job reads its output back; one that was cut off goes on when it is resumed.
--round-trip adds two jobs behind it: back again into OUT.back, and the comparison with the source, tensor by tensor.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError
from slurm.ask_command import ask_json, given
from slurm.chain import Chain, ChainStage, safe_name
from slurm.checks import show_time
from slurm.submit_chain import Planned, chain_parser, read_options, submit_chain

# Peak of a conversion, GiB: measured, and that of the largest tensors of the 30B (tests/benchmarks/README.md).
_MEASURED_PEAK_GB = 1.35
# A third of what was measured there, with the output read back, in MB/s: shared disks are slower and busier.
_ASSUMED_MB_PER_S = 100
_LEAST_SECONDS = 600
_CPUS = 2


def main(argv: Sequence[str]) -> int:
    """Command line of `submit convert`."""
    return submit("convert", argv)


def submit(command: str, argv: Sequence[str]) -> int:
    """Command line of `submit convert` or `submit reshard`.

    Raises:
        UserError: what the conversion's dry run refuses, or the checks of the submission.
    """
    arguments, words = _parse(command, argv)
    out = given("--out", words)
    if out is None or given("--in", words) is None:
        raise UserError(f"submit {command}: --in and --out are needed, as `megatron-video ckpt {command}` takes them")
    found = ask_json("megatron_video", "ckpt", command, *words, "--dry-run", "--json")
    chain = conversion_chain(command, words, Path(out), found, arguments)
    size = f"{found['bytes'] / 1e9:.2f} GB in {found['tensors']} tensors"
    return submit_chain(Planned(chain, checked=[f"dry run: {size}, from {found['source']}"]), arguments)


def conversion_chain(
    command: str, words: Sequence[str], out: Path, found: dict[str, Any], arguments: argparse.Namespace
) -> Chain:
    """The conversion, and with --round-trip the way back and the comparison."""
    time = arguments.time or show_time(needed_seconds(found["bytes"]))
    memory = arguments.memory_gb or needed_memory_gb(found["bytes"])

    def stage(name: str, *command: str) -> ChainStage:
        return ChainStage(name=name, kind="convert", command=list(command), cpus=_CPUS, memory_gb=memory, time=time)

    stages = [stage(command, "ckpt", command, *words, "--json")]
    if arguments.round_trip:
        back = out.with_name(f"{out.name}.back")
        stages.append(stage("back", *_way_back(command, out, back, found)))
        stages.append(stage("compare", "ckpt", "diff", found["source"], str(back)))
    name = safe_name(arguments.name or f"{command}-{out.stem}")
    return Chain(name=name, run_dir=str(out.absolute().parent), stages=stages, output=str(out))


def needed_seconds(size: int) -> int:
    """Wall time of a conversion of so many bytes."""
    return max(_LEAST_SECONDS, math.ceil(size / 1e6 / _ASSUMED_MB_PER_S / 60) * 60)


def needed_memory_gb(size: int) -> float:
    """Memory of a conversion, GiB: it holds two or three tensors, so what a checkpoint has is no measure of it.

    Twice the measured peak, or what a small checkpoint can take at most beside the libraries.
    """
    return round(min(2 * _MEASURED_PEAK_GB, 1.0 + 3 * size / 2**30), 2)


def _way_back(command: str, out: Path, back: Path, found: dict[str, Any]) -> list[str]:
    words = ["ckpt", "convert", "--in", str(out), "--out", str(back), "--json"]
    if command == "reshard":
        # A plain layout is what any checkpoint can be cut to.
        return ["ckpt", "reshard", *words[2:]]
    forms = {"released": "core", "core": "released"}
    target = str(found.get("direction", "")).rpartition("-> ")[2]
    return [*words, "--to", forms[target]] if target in forms else words


def _parse(command: str, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    example = f"Example: megatron-video slurm submit {command} --profile h100_pyxis --in runs/first --out released"
    parser = chain_parser(command, __doc__, example)
    add = parser.add_argument_group("conversion").add_argument
    add("--round-trip", action="store_true", help="afterwards back again, and compared with the source")
    add("--memory-gb", type=float, metavar="GB", help="memory of the job (default: from what was measured)")
    return read_options(parser, argv)
