"""What must be refused before it is submitted, as a user would type it, and what the user is told.

Read by test_submit.py and by write_refusals.py, which makes docs/slurm/refusals.md of it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fault_runs import SETTINGS

SHARDS = "shards"
TRAINING = ["--config", "empty.yaml", f"data.shards=[{SHARDS}]", *SETTINGS, "training.steps=4000"]
PROFILE = ["--profile", "cpu_lab"]
HELD = ["--set", 'slurm.extra=["--hold"]']
"""A job that stays in the queue and needs no CPU."""


def slurm_command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`megatron-video slurm WORDS` in a folder, with the user's records of jobs kept there too."""
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state"), "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-m", "megatron_video", "slurm", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


def pretrain(*words: str) -> list[str]:
    """Submission of the tiny training into `run`, unless `words` say otherwise."""
    name = [] if any(word.startswith("run.output_dir=") for word in words) else ["run.output_dir=run"]
    return ["submit", "pretrain", *PROFILE, *TRAINING, *name, *words]


@dataclass(frozen=True)
class Refusal:
    """A submission that must not come about."""

    what: str
    words: list[str]
    """Beside those of `pretrain`."""
    told: tuple[str, ...]
    """Each must stand in the message."""
    before: Callable[[Path], None] | None = None
    """What makes it so."""
    after: Callable[[Path], None] | None = None
    dry_run: bool = False
    """Whether the training's own dry run is what refuses it; else that is left out, for time."""

    def command(self) -> list[str]:
        """All words after `megatron-video slurm`."""
        return pretrain(*self.words, *([] if self.dry_run else ["--no-check", "dry-run"]))


def _call(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


def _verdicts(folder: Path) -> None:
    (folder / "run" / "slurm").mkdir(parents=True)
    for name, reason in (
        ("DONE", "all ranks have come to their end"),
        ("NO_RESTART", "diverged: loss is not finite"),
        ("STOP", "cancelled by root"),
    ):
        (folder / "run" / "slurm" / name).write_text(f"{reason}\n")


def _live_job(run: str) -> Callable[[Path], None]:
    def submit(folder: Path) -> None:
        result = slurm_command(folder, *pretrain(*HELD, f"run.output_dir={run}", "--no-check", "dry-run"))
        assert result.returncode == 0, result.stderr

    return submit


def _cancel(name: str) -> Callable[[Path], None]:
    return lambda _: _call("scancel", f"--name={name}")


def _down_and_read_only(folder: Path) -> None:
    """The tests have a mount namespace of their own."""
    (folder / "readonly").mkdir()
    _call("mount", "-t", "tmpfs", "-o", "ro", "none", str(folder / "readonly"))
    _call("scontrol", "update", "partitionname=preempt", "state=DOWN")


def _up_again(folder: Path) -> None:
    _call("scontrol", "update", "partitionname=preempt", "state=UP")
    _call("umount", str(folder / "readonly"))


def _file_in_the_way(folder: Path) -> None:
    (folder / "notes.txt").touch()


REFUSALS = [
    Refusal("no such profile", ["--profile", "none"], ("'none' is neither a file nor a preset", "h100_pyxis")),
    Refusal(
        "unknown field in the profile",
        ["--set", "slurm.partitions=gpu"],
        ("unknown field 'slurm.partitions'", "did you mean 'partition'"),
    ),
    Refusal("a name that is no folder's", ["--name", "a/b"], ("--name 'a/b'",)),
    Refusal("a time that is none", ["--time", "soon"], ("--time soon", "1-12:00:00")),
    Refusal("a field that the configuration does not have", ["model.layers=2"], ("unknown field 'model.layers'",)),
    Refusal(
        "more than the partition's nodes have; things that are missing",
        [
            *("--nodes", "9", "--time", "5", "--after", "4711"),
            *("--set", "slurm.gpus_per_node=16", "--set", "slurm.gpu_type=b200"),
            *("--set", "slurm.cpus_per_node=64", "--set", "slurm.memory_per_node=1T"),
            *("--set", "restarts.warning_seconds=600"),
            *("--set", "software.container=apptainer", "--set", "software.image=/shared/t2v.sif"),
            *("--set", "software.mounts=[/shared/absent:/data]", "--set", "software.host_python=/shared/python3"),
            *("--set", "pass_environment=[ABSENT_TOKEN]"),
        ],
        (
            "11 problems",
            "--nodes 9: partition gpu has 3 nodes",
            "slurm.gpus_per_node=16: the nodes of partition gpu have at most 8 GPUs",
            "slurm.gpu_type=b200: the nodes of partition gpu have gpu:h100:8",
            "slurm.cpus_per_node=64: the largest node has 16",
            "slurm.memory_per_node=1T: the largest node has 200000 MiB",
            "restarts.warning_seconds=600: not less than the wall time of 300 s",
            "software.image=/shared/t2v.sif: does not exist",
            "software.mounts=/shared/absent:/data: /shared/absent does not exist",
            "software.host_python=/shared/python3: no program",
            "ABSENT_TOKEN is not set",
            "SLURM knows no job 4711",
        ),
    ),
    Refusal(
        "over the partition's limits on a job",
        ["--set", "slurm.partition=short", "--nodes", "2", "--spares", "1", "--time", "1:00:00"],
        (
            "--nodes 2 --spares 1: partition short allows 2 nodes a job",
            "--time 01:00:00: partition short allows 00:10:00",
        ),
    ),
    Refusal(
        "unknown partition; run folder below a file",
        ["--set", "slurm.partition=gpus", "run.output_dir=notes.txt/run"],
        ("partition 'gpus': there is none", "preempt", "notes.txt is no folder"),
        before=_file_in_the_way,
    ),
    Refusal(
        "a partition that is down; a run folder that cannot be written",
        ["--set", "slurm.partition=preempt", "run.output_dir=readonly/run"],
        ("partition preempt: it is DOWN", "readonly cannot be written"),
        before=_down_and_read_only,
        after=_up_again,
    ),
    Refusal(
        "a run folder in memory; a second job of one name",
        ["--name", "live", "run.output_dir=/dev/shm/run"],
        ("/dev/shm/run: on tmpfs", "--local-run-folder", "--name live: job ", "is in the queue", "slurm cancel"),
        before=_live_job("live"),
        after=_cancel("live"),
    ),
    Refusal(
        "a second job of one run; a folder that is each node's own",
        ["--name", "other", "run.output_dir=kept", "--set", "shared_folders=[]"],
        ("/kept: job ", "works in it", "/tmp is each node's own", "shared_folders"),
        before=_live_job("kept"),
        after=_cancel("kept"),
    ),
    Refusal(
        "a run that is finished, that must not be started again, that was asked to stop",
        [],
        (
            "it is finished (all ranks have come to their end)",
            "must not be started again (diverged: loss is not finite)",
            "slurm resume RUN --force",
            "it was asked to stop (cancelled by root)",
        ),
        before=_verdicts,
    ),
    Refusal(
        "ranks that do not match the layout",
        ["--nodes", "9"],
        ("dry run on 9 ranks: layout: data.global_batch_size=8, world_size=9", "nearest that work", "has 3 nodes"),
        dry_run=True,
    ),
]


def make_inputs(folder: Path) -> None:
    """Shards and an empty configuration, as the commands name them."""
    from tiny_shards import write_tiny_shards

    write_tiny_shards(folder / SHARDS)
    (folder / "empty.yaml").touch()


def own_inputs(inputs: Path, folder: Path) -> None:
    """A folder that has what `make_inputs` wrote into another."""
    folder.mkdir()
    (folder / SHARDS).symlink_to(inputs / SHARDS)
    (folder / "empty.yaml").touch()
