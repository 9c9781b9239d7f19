"""What is asked of a dry run: for how many GPUs of which cluster, and what is left out."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.flops import TABLE_3_TEXT_TOKENS
from megatron_video.layout import Hardware
from megatron_video.parallel import launched_ranks
from training.dry_run.findings import Findings
from training.planner.cluster import Cluster, load_cluster

SKIPPABLE = ("data", "checkpoint", "disk")
# Compute capability by a part of the GPU's name.
_CAPABILITIES: dict[str, tuple[int, int]] = {
    "V100": (7, 0),
    "A100": (8, 0),
    "A800": (8, 0),
    "L40": (8, 9),
    "H20": (9, 0),
    "H100": (9, 0),
    "H200": (9, 0),
    "H800": (9, 0),
    "GH200": (9, 0),
    "B200": (10, 0),
    "B300": (10, 3),
}
_UNKNOWN_VERSION = "unknown"


def add_dry_run_options(parser: argparse.ArgumentParser, with_json: bool = True) -> None:
    """`--dry-run` and what belongs to it."""
    group = parser.add_argument_group("dry run", "nothing is started and nothing written; exit code 2 if it cannot run")
    group.add_argument(
        "--dry-run", action="store_true", help="check everything, build every rank's model without memory, and leave"
    )
    group.add_argument("--gpus", type=int, metavar="N", help="ranks of the job (those of the cluster, or the launcher)")
    group.add_argument("--cluster", help="a YAML file, or the name of one in training/configs/clusters")
    group.add_argument("--skip", default="", metavar="WHAT", help=f"comma-separated, of {', '.join(SKIPPABLE)}")
    group.add_argument(
        "--text-tokens", type=int, default=TABLE_3_TEXT_TOKENS, help="visible text of a sample, for its cost (256)"
    )
    group.add_argument("--ranks", type=Path, metavar="FILE", help="write what every rank holds as CSV")
    if with_json:
        group.add_argument("--json", action="store_true", help="for programs")


def refuse_without_dry_run(
    arguments: argparse.Namespace, names: tuple[str, ...] = ("gpus", "cluster", "ranks")
) -> None:
    """Options of a dry run would do nothing in a run.

    Raises:
        UserError: naming them.
    """
    given = [f"--{name}" for name in (*names, "skip") if getattr(arguments, name)]
    if given:
        raise UserError(f"{', '.join(given)}: of use with --dry-run only")


@dataclass(frozen=True)
class Request:
    """A dry run that can be made."""

    world_size: int
    """Ranks of the job."""
    cluster: Cluster | None
    """Where it is to run, with so many GPUs; None: not known."""
    skip: frozenset[str]
    """Checks that are left out."""
    text_tokens: int
    """Of a sample."""
    ranks_file: Path | None = None
    """Where every rank's facts go."""

    @staticmethod
    def of(arguments: argparse.Namespace, findings: Findings) -> Request | None:
        """As the options say; None, and a problem each, where they say nothing that can be."""
        cluster: Cluster | None = None
        skip = frozenset(filter(None, arguments.skip.split(",")))
        with findings.check("options"):
            _refuse_options(arguments, skip)
        with findings.check("options"):
            cluster = load_cluster(arguments.cluster) if arguments.cluster is not None else None
        if not findings.passed("options"):
            return None
        for name in sorted(skip):
            findings.leave_out(name, f"--skip {name}")
        if cluster is None:
            findings.leave_out("hardware", "no --cluster is named, so kernels and devices are not known")
            findings.leave_out("memory", "no --cluster is named, so activations, fit and step time are not known")
        world_size = arguments.gpus or (cluster.gpus if cluster is not None else launched_ranks())
        if cluster is not None:
            cluster = replace(cluster, gpus=world_size)
        return Request(world_size, cluster, skip, arguments.text_tokens, arguments.ranks)

    @property
    def hardware(self) -> Hardware | None:
        """Of the cluster's nodes, not of this machine; None where no cluster is named.

        A cluster file says nothing of packages: Transformer Engine is taken to be there.
        """
        if self.cluster is None:
            return None
        return Hardware(True, _capability(self.cluster.gpu), _UNKNOWN_VERSION)


def _refuse_options(arguments: argparse.Namespace, skip: frozenset[str]) -> None:
    unknown = sorted(skip - set(SKIPPABLE))
    if unknown:
        raise UserError(f"--skip {','.join(unknown)}: no such check; {', '.join(SKIPPABLE)} can be left out")
    if arguments.gpus is not None and arguments.gpus < 1:
        raise UserError(f"--gpus {arguments.gpus} must be at least 1")
    if arguments.text_tokens < 1:
        raise UserError(f"--text-tokens {arguments.text_tokens} must be at least 1")
    if arguments.ranks is not None and not arguments.ranks.parent.is_dir():
        raise UserError(f"--ranks {arguments.ranks}: there is no folder {arguments.ranks.parent}")


def _capability(gpu: str) -> tuple[int, int] | None:
    """The longest name that is part of it: GB200 is a B200."""
    found = [name for name in _CAPABILITIES if name in gpu.upper()]
    return _CAPABILITIES[max(found, key=len)] if found else None
