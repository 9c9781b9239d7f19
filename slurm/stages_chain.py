"""`megatron-video slurm submit stages --config CURRICULUM ...`: every stage of a curriculum as a job of its own.

Each starts when the one before has succeeded, on its own number of nodes (--nodes 8, or --nodes t2i=4,t2vi=16), and is
requeued and restarted like any training. The curriculum is resolved and frozen now; finished stages are left out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_video.errors import UserError
from slurm.chain import Chain, ChainStage, safe_name
from slurm.profile import ClusterProfile
from slurm.snapshot import source_root
from slurm.submission import read_profile, read_time
from slurm.submit_chain import Planned, chain_parser, submit_chain
from slurm.submit_training import TRAININGS, Caller, dry_run_of, resolve

_FROZEN = "curriculum.yaml"


def main(argv: Sequence[str]) -> int:
    """Command line of `submit stages`.

    Raises:
        UserError: a configuration that the curriculum or a stage refuses, or the checks of the submission.
    """
    arguments = _parse(argv)
    profile = read_profile(arguments)
    training = TRAININGS["curriculum"]
    resolved = resolve(training, arguments.config, arguments.overrides, _here())
    root = Path(training.output(resolved)).absolute()
    stages = _ahead(resolved, root, arguments.through)
    nodes = {name: int(count) for name, count in _by_stage("--nodes", arguments.stage_nodes, stages).items()}
    times = _by_stage("--time", arguments.time, stages)
    for time in times.values():
        read_time(time)
    checked = _dry_runs(resolved, stages, nodes, profile, arguments)
    chain = Chain(
        name=safe_name(arguments.name or root.name),
        run_dir=str(root),
        stages=[_stage(name, root, nodes[name], times.get(name)) for name in stages],
        output=str(root),
    )
    arguments.time = None
    frozen = yaml.safe_dump(training.relocated(resolved, str(root)), sort_keys=False, allow_unicode=True)
    return submit_chain(Planned(chain, checked, {_FROZEN: frozen}), arguments)


def _here() -> Caller:
    return Caller(Path.cwd(), source_root())


def _stage(name: str, root: Path, nodes: int, time: str | None) -> ChainStage:
    words = ["curriculum", "--config", f"{{chain}}/{_FROZEN}", "--through", name]
    # The records of a training, and the verdict that it is finished, are the stage's.
    return ChainStage(name=name, kind="curriculum", command=words, nodes=nodes, time=time, run_dir=str(root / name))


def _ahead(resolved: dict[str, Any], root: Path, through: str | None) -> list[str]:
    names = list(resolved)
    if through is not None and through not in names:
        raise UserError(f"--through {through}: no such stage; there are {', '.join(names)}")
    record = root / "curriculum.json"
    finished = json.loads(record.read_text(encoding="utf-8"))["finished"] if record.exists() else {}
    ahead = [name for name in names[: names.index(through or names[-1]) + 1] if name not in finished]
    if not ahead:
        raise UserError(f"{root}: {', '.join(finished)} are finished; nothing is left to submit")
    return ahead


def _by_stage(option: str, text: str | None, stages: Sequence[str]) -> dict[str, str]:
    """One value for all stages, or STAGE=VALUE,... with a value for those that are not named in front."""
    if text is None:
        return {}
    values: dict[str, str] = {}
    for part in text.split(","):
        name, equals, value = part.rpartition("=")
        if equals and name not in stages:
            raise UserError(f"{option} {part}: no such stage ahead; there are {', '.join(stages)}")
        values |= {name: value} if equals else dict.fromkeys(stages, value)
    if option == "--nodes":
        missing = [name for name in stages if name not in values]
        wrong = [f"{name}={value}" for name, value in values.items() if not value.isdecimal() or int(value) < 1]
        if missing or wrong:
            what = f"no number for {', '.join(missing)}" if missing else f"{', '.join(wrong)} must be at least 1"
            raise UserError(f"--nodes {text}: {what}; write 8, or {stages[0]}=4,{stages[-1]}=8, or 4,{stages[-1]}=8")
    return values


def _dry_runs(
    resolved: dict[str, Any],
    stages: Sequence[str],
    nodes: dict[str, int],
    profile: ClusterProfile,
    arguments: argparse.Namespace,
) -> list[str]:
    """Every stage by the dry run of `pretrain` on its own number of ranks."""
    if "dry-run" in arguments.no_check:
        return []
    problems, checked = list[str](), list[str]()
    for number, name in enumerate(stages):
        values = json.loads(json.dumps(resolved[name]))
        if number:
            # The stage before has not made them yet.
            values["run"] |= {"initial_weights": None, "initial_from_ema": False, "initial_optimizer": False}
        config = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
        ranks = nodes[name] * profile.ranks_per_node
        wrong, found = dry_run_of(TRAININGS["pretrain"], profile, config, ranks, _here())
        problems += [f"stage {name}: {problem}" for problem in wrong]
        checked += [f"stage {name}: {line}" for line in found]
    if problems:
        raise UserError("not submitted:\n  " + "\n  ".join(problems))
    return checked


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = chain_parser(
        "stages",
        __doc__,
        "Example: megatron-video slurm submit stages --profile h100_pyxis --config step_video_30b \\\n"
        "    --time 3-00:00:00 --nodes 128,t2vi_540_s1=375 output_dir=/lustre/30b common.data.shards=[/data/s1]",
    )
    add = parser.add_argument_group("curriculum").add_argument
    add("--config", required=True, help="a YAML file or a preset of the curriculum")
    add(
        "--nodes",
        dest="stage_nodes",
        default="1",
        metavar="N|STAGE=N,...",
        help="of all stages, and of single ones (default: 1)",
    )
    add("--through", metavar="STAGE", help="the last one to submit")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="of the curriculum")
    return parser.parse_intermixed_args(argv)
