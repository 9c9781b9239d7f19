"""`megatron-video slurm submit data STAGE --in ... --out ...`, or `data run --recipe ...`: data preparation as arrays.

A stage that takes --shard becomes an array of --shards units, and a job that joins them when all have succeeded; any
other stage becomes one job. What is left is the stage's own command line, which its own parser checks now. A recipe
becomes a chain of its stages. Units that fail cost no others; `megatron-video slurm resume OUT` submits them again.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError
from slurm import scheduler
from slurm.ask_command import ask_json, given
from slurm.chain import Chain, ChainStage, safe_name
from slurm.profile import ClusterProfile
from slurm.submission import read_profile
from slurm.submit_chain import Planned, chain_parser, read_options, submit_chain

# Of a node's memory for the jobs on it: the system keeps some.
_MEMORY_SHARE = 0.95
_DEFAULT_SHARDS = 16
_DEFAULT_CPUS = 4


@dataclass(frozen=True)
class Size:
    """What a job of a stage asks of a node."""

    gpus: int
    cpus: int | None
    memory_gb: float | None


def main(argv: Sequence[str]) -> int:
    """Command line of `submit data`."""
    arguments, words = _parse(argv)
    profile = read_profile(arguments)
    if arguments.stage == "run":
        steps, work = _recipe(words)
        _check_source(steps[0]["command"], arguments)
        chain = recipe_chain(steps, work, words, arguments, profile)
    else:
        (step,) = _steps([arguments.stage, *words])
        _check_source(words, arguments)
        chain = stage_chain(step, words, arguments, profile)
    return submit_chain(Planned(chain), arguments)


def stage_chain(
    step: dict[str, Any], words: Sequence[str], arguments: argparse.Namespace, profile: ClusterProfile
) -> Chain:
    """One stage: array and join, or one job, and on demand its verification.

    Raises:
        UserError: --verify of what is no folder of shards.
    """
    output = step["output"]
    if arguments.verify and not (output and step["shard_folder"]):
        raise UserError(f"--verify: data {step['stage']} makes no folder of shards; leave it out")
    stages = step_stages(step, "shards" if step["spread"] else step["stage"], arguments, profile)
    if arguments.verify:
        stages.append(ChainStage(name="verify", kind="data", command=["data", "verify", f"--in={output}", "--json"]))
        stages[-1] = _sized(stages[-1], size_of(step | {"gpu": False}, arguments, profile), arguments)
    # A stage that only reads makes nothing: its records lie beside what it reads.
    place = Path(output or str(given("--in", words)))
    name = safe_name(arguments.name or f"{step['stage']}-{place.stem}")
    return Chain(name=name, run_dir=str(place.absolute().parent), stages=stages, output=str(place))


def recipe_chain(
    steps: Sequence[dict[str, Any]],
    work: Path,
    words: Sequence[str],
    arguments: argparse.Namespace,
    profile: ClusterProfile,
) -> Chain:
    """All stages of a recipe, each when the one before is joined; then the recipe itself, which writes its report."""
    if arguments.verify:
        raise UserError("--verify: name the stage verify in the recipe instead")
    stages = [stage for step in steps for stage in step_stages(step, step["name"], arguments, profile)]
    # Everything is there by then; it reads what the stages left and writes WORK/report.md.
    report = ChainStage(name="report", kind="data", command=["data", "run", *words, "--json"])
    stages.append(_sized(report, size_of(steps[-1], arguments, profile), arguments))
    return Chain(name=safe_name(arguments.name or work.name), run_dir=str(work), stages=stages, output=str(work))


def step_stages(
    step: dict[str, Any], name: str, arguments: argparse.Namespace, profile: ClusterProfile
) -> list[ChainStage]:
    """The array of a stage and its join, or its one job."""
    size = size_of(step, arguments, profile)
    command = [*step["command"], *([] if "--json" in step["command"] else ["--json"])]
    command += [f"{step['cpu_option']}={{cpus}}"] if step["cpu_option"] else []
    locks = [step["lock"]] if step["lock"] else []
    if not step["spread"] or arguments.shards == 1:
        return [_sized(ChainStage(name=name, kind="data", command=command, locks=locks), size, arguments)]
    share = ChainStage(
        name=name,
        kind="data",
        command=[*command, "--shard={task}/{tasks}"],
        array=arguments.shards,
        throttle=arguments.throttle,
        locks=[f"{lock}.{{task}}-of-{{tasks}}" for lock in locks] + locks,
    )
    # The plain command: it joins what is there, and where all is joined already it does nothing.
    join = ChainStage(name="join" if name == "shards" else f"{name}-join", kind="data", command=command, locks=locks)
    return [_sized(share, size, arguments), _sized(join, size, arguments)]


def size_of(step: dict[str, Any], arguments: argparse.Namespace, profile: ClusterProfile) -> Size:
    """What one job of a stage gets: a GPU where it is worth one, and its share of a node's CPUs and memory.

    Raises:
        UserError: SLURM does not know the partition.
    """
    gpus = 1 if step["gpu"] and profile.slurm.gpus_per_node else 0
    slurm = profile.slurm
    name = slurm.partition if gpus or not slurm.cpu_partition else slurm.cpu_partition
    partition = scheduler.partition(name).name
    nodes = [node for node in scheduler.nodes() if partition in node.partitions]
    if not nodes:
        raise UserError(f"partition {partition}: it has no nodes")
    most = slurm.cpus_per_node or min(node.cpus for node in nodes)
    cpus = arguments.cpus or (max(1, most // slurm.gpus_per_node) if gpus else min(_DEFAULT_CPUS, most))
    memory = min(node.memory_mib / node.cpus for node in nodes) * cpus * _MEMORY_SHARE / 1024
    return Size(gpus, cpus, round(arguments.memory_gb or memory, 2))


def _sized(stage: ChainStage, size: Size, arguments: argparse.Namespace) -> ChainStage:
    return dataclasses.replace(stage, gpus=size.gpus, cpus=size.cpus, memory_gb=size.memory_gb, time=arguments.time)


def _check_source(words: Sequence[str], arguments: argparse.Namespace) -> None:
    source = Path(str(given("--in", words)))
    # What the job waits for may make it.
    if not source.exists() and not arguments.after:
        raise UserError(f"--in {source}: not there; if another job makes it, name that job with --after")


def _recipe(words: Sequence[str]) -> tuple[list[dict[str, Any]], Path]:
    steps = _steps(words)
    outputs = [step["output"] for step in steps if step["output"]]
    return steps, Path(outputs[0]).absolute().parent


def _steps(words: Sequence[str]) -> list[dict[str, Any]]:
    """What data_prep says of a stage or a recipe: the parsers need torch, which this process does not load.

    Raises:
        UserError: in the stage's own words.
    """
    steps: list[dict[str, Any]] = ask_json("data_prep.job_steps", *words)
    return steps


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(
        "data",
        __doc__,
        "Example: megatron-video slurm submit data encode --profile h100_pyxis --shards 64 --throttle 16 --verify \\\n"
        "    --in m/filter.parquet --vae vae --text text --out shards --buckets 68x192x320",
    )
    parser.add_argument("stage", metavar="STAGE", help="of `megatron-video data`, or run with --recipe")
    add = parser.add_argument_group("array").add_argument
    add("--shards", type=int, default=_DEFAULT_SHARDS, metavar="N", help="units of work (default: %(default)s)")
    add("--throttle", type=int, metavar="M", help="most tasks at once (default: as many as there is room for)")
    add("--cpus", type=int, help=f"CPUs of a task (default: {_DEFAULT_CPUS}; with a GPU its share of the node's)")
    add("--memory-gb", type=float, metavar="GB", help="memory of a task (default: its CPUs' share of the node's)")
    add("--verify", action="store_true", help="read all shards again when they are joined")
    arguments, words = read_options(parser, argv)
    for option in ("shards", "throttle", "cpus", "memory_gb"):
        value = getattr(arguments, option)
        if value is not None and value <= 0:
            raise UserError(f"--{option.replace('_', '-')} {value} must be at least 1")
    return arguments, words
