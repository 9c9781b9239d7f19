"""`megatron-video slurm submit evaluate --checkpoint RUN|--watch RUN --out OUT ...`: samples, and their measure.

Every checkpoint gets a chain: sampling under torchrun, `megatron-video measure` of the videos, and the table of all
checkpoints, OUT/evaluations.md and .json. What is left of the command line is that of `megatron-video sample`. With
--watch every complete checkpoint of a run gets one that has none yet, and so do those that the run writes from now on,
until it has finished or Ctrl-C; the same command given again goes on. A run that deletes old checkpoints must keep them
until they are sampled from (checkpoint.keep_last and the like).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_video.errors import UserError
from slurm.ask_command import given
from slurm.chain import Chain, ChainStage, safe_name
from slurm.chain_record import chains_of
from slurm.profile import ClusterProfile
from slurm.run_files import COMPLETE_FILE, latest_checkpoint
from slurm.scheduler import SlurmAwayError
from slurm.submission import read_profile
from slurm.submit_chain import Planned, chain_parser, read_options, submit_chain

MEASURE_FILE, SAMPLES_FOLDER = "measure.json", "samples"
_LOOK_CPUS, _LOOK_MEMORY_GB = 2, 4.0


def main(argv: Sequence[str]) -> int:
    """Command line of `submit evaluate`."""
    arguments, words = _parse(argv)
    profile = read_profile(arguments)
    _check_files(words)
    if arguments.checkpoint:
        return submit_chain(
            Planned(evaluation_chain(_step_of(arguments.checkpoint), words, arguments, profile)), arguments
        )
    while True:
        try:
            for step in _new_steps(arguments):
                submit_chain(Planned(evaluation_chain(step, words, arguments, profile)), arguments)
        except SlurmAwayError as error:
            if arguments.once:
                raise
            print(f"tried again in {arguments.interval:g} s: {error}", file=sys.stderr, flush=True)
        if arguments.once or arguments.dry_run or _is_finished(arguments.watch):
            return 0
        time.sleep(arguments.interval)


def evaluation_chain(
    checkpoint: Path, words: Sequence[str], arguments: argparse.Namespace, profile: ClusterProfile
) -> Chain:
    """Samples of one checkpoint, their measure, and the table of all of OUT."""
    place = arguments.out / checkpoint.name
    gpus = min(arguments.gpus, profile.slurm.gpus_per_node) if arguments.gpus else profile.slurm.gpus_per_node
    sample = ["sample", "--checkpoint", str(checkpoint), "--out", str(place / SAMPLES_FOLDER), *words]
    generate = ChainStage(
        name="generate",
        kind="evaluate",
        command=sample,
        nodes=arguments.nodes,
        ranks=arguments.ranks or max(1, gpus),
        gpus=gpus,
        time=arguments.time,
    )
    looks = {} if arguments.no_measure else {"measure": ["measure", "--samples", str(place / SAMPLES_FOLDER)]}
    if looks:
        looks["measure"] += ["--out", str(place / MEASURE_FILE), "--json"]
        looks["table"] = ["slurm", "evaluations", str(arguments.out), "--write"]
    stages = [generate]
    for name, command in looks.items():
        stages.append(
            ChainStage(name=name, kind="evaluate", command=command, cpus=_LOOK_CPUS, memory_gb=_LOOK_MEMORY_GB)
        )
    name = safe_name(f"{arguments.name or arguments.out.absolute().name}-{checkpoint.name}")
    return Chain(name=name, run_dir=str(arguments.out), stages=stages, output=str(place))


def complete_steps(run_dir: Path, every: int = 1) -> list[Path]:
    """Complete checkpoints of a run whose step is a multiple of `every`, oldest first."""
    found = sorted((run_dir / "checkpoints").glob("step_" + "[0-9]" * 8))
    return [path for path in found if (path / COMPLETE_FILE).is_file() and int(path.name[5:]) % every == 0]


def _new_steps(arguments: argparse.Namespace) -> Iterator[Path]:
    """Those that no chain of OUT was submitted for."""
    known = {Path(str(record.chain.output)).name for record in chains_of(arguments.out.absolute())}
    yield from (step for step in complete_steps(arguments.watch, arguments.every) if step.name not in known)


def _step_of(path: Path) -> Path:
    """The checkpoint that a run or a step's folder means now: the run may go on meanwhile.

    Raises:
        UserError: there is none that is complete.
    """
    if (path / COMPLETE_FILE).is_file():
        return path
    newest = latest_checkpoint(path) if path.is_dir() else None
    if newest is None:
        raise UserError(
            f"--checkpoint {path}: no complete checkpoint there; give a run's folder or checkpoints/step_..."
        )
    return path / newest.folder


def _is_finished(run_dir: Path) -> bool:
    try:
        status = json.loads((run_dir / "status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(status.get("state") == "finished")


def _check_files(words: Sequence[str]) -> None:
    for option in ("--vae", "--text", "--prompts"):
        path = given(option, words)
        if path is None:
            raise UserError(f"submit evaluate: {option} is missing; `megatron-video sample` needs it")
        if not Path(path).exists():
            raise UserError(f"{option} {path}: not there")


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = chain_parser(
        "evaluate",
        __doc__,
        "Example: megatron-video slurm submit evaluate --profile h100_pyxis --watch runs/first --every 5000 \\\n"
        "    --out eval --vae vae --text text --prompts prompts.txt --gpus 8 --tensor-parallel-size 8",
    )
    add = parser.add_argument_group("evaluation").add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, metavar="RUN", help="one checkpoint, or the newest of a run")
    which.add_argument("--watch", type=Path, metavar="RUN", help="all checkpoints of a run, as they are written")
    add("--out", type=Path, required=True, help="folder for samples and results, OUT/step_... each")
    add("--every", type=int, default=1, metavar="STEPS", help="with --watch: only steps that this divides")
    add("--once", action="store_true", help="with --watch: only those that are there now")
    add("--interval", type=float, default=60.0, metavar="SECONDS", help="with --watch: between looks (default: 60)")
    add("--nodes", type=int, default=1, help="of the sampling (default: %(default)s)")
    add("--gpus", type=int, help="of each node (default: all of it)")
    add("--ranks", type=int, help="of each node (default: one a GPU)")
    add("--no-measure", action="store_true", help="samples only: the prompts are not about coloured shapes")
    arguments, words = read_options(parser, argv)
    for option in ("every", "nodes", "interval"):
        if getattr(arguments, option) <= 0:
            raise UserError(f"--{option} {getattr(arguments, option)} must be above 0")
    if arguments.watch and not arguments.watch.is_dir():
        raise UserError(f"--watch {arguments.watch}: no such run; give the folder run.output_dir")
    return arguments, words
