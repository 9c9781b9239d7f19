"""A chain: stages of work, each a job or an array of jobs that waits for those before it. A YAML file describes one.

    name: first-look
    run_dir: runs/look            # where records and logs lie: RUN_DIR/slurm
    stages:
      - name: generate
        command: sample --checkpoint runs/first --vae vae --text text --prompts prompts.txt --out runs/look/samples
        ranks: 4                  # under torchrun: `sample` and the trainings
        gpus: 4
        time: 2:00:00
      - name: tag
        command: data tag --in m/a.parquet --out m/b.parquet --shard {task}/{tasks} --workers {cpus}
        array: 64
        throttle: 8
        after: []                 # nothing; without `after` a stage waits for the one above it

What the data, conversion, evaluation and curriculum commands submit are chains too.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import field
from pathlib import Path
from typing import Any

import yaml

from megatron_video.cli import COMMANDS
from megatron_video.config_io import build_config, config_dataclass, read_values
from megatron_video.errors import UserError
from slurm.checks import TRAININGS
from slurm.job import Kind
from slurm.scheduler import parse_time

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@config_dataclass
class ChainStage:
    """One job, or one array of jobs."""

    name: str
    """Of the stage; its job is called CHAIN-STAGE."""
    command: list[str]
    """Words of a `megatron-video` command; {task}, {tasks}, {cpus}, {scratch} (on the node) are filled in."""
    kind: Kind = "command"
    """What it is; trainings (pretrain, curriculum, vae, dpo) are restarted and requeued as `slurm submit` does it."""
    nodes: int = 1
    """Nodes of every task."""
    gpus: int = 0
    """GPUs of each node; 0: the partition for jobs without."""
    ranks: int | None = None
    """Processes of each node under torchrun; null: none of them, the command alone."""
    cpus: int | None = None
    """CPUs of each node; null: what the profile says, most often the whole node."""
    memory_gb: float | None = None
    """Memory of each node, GiB; null: what the profile says."""
    time: str | None = None
    """Wall time as SLURM takes it (2:00:00, 1-12:00:00, minutes); null: the partition's limit."""
    array: int | None = None
    """Units of an array, one a task as long as the cluster allows so many; null: no array."""
    throttle: int | None = None
    """Most tasks of the array that run at once."""
    after: list[str] | None = None
    """Stages that must have succeeded; null: the one above."""
    after_any: list[str] = field(default_factory=list)
    """Stages that must have ended, however."""
    run_dir: str | None = None
    """Of trainings: run.output_dir, in which they keep their own records."""
    locks: list[str] = field(default_factory=list)
    """Lock files of what a task writes; one that a lost node left is removed when the task is done again."""

    def __post_init__(self) -> None:
        """Refuse what no job can be.

        Raises:
            ValueError: naming the field and the value.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r}: letters, digits, _, - and . only, as it becomes a folder")
        if not self.command:
            raise ValueError(f"stage {self.name}: command is empty")
        if self.command[0] not in COMMANDS:
            raise ValueError(
                f"stage {self.name}: command {self.command[0]!r} is none of `megatron-video`: {', '.join(COMMANDS)}"
            )
        for name in ("nodes", "ranks", "cpus", "memory_gb", "array", "throttle"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"stage {self.name}: {name}={value} must be at least 1")
        if self.gpus < 0:
            raise ValueError(f"stage {self.name}: gpus={self.gpus} must not be negative")
        if self.nodes > 1 and self.ranks is None and not self.is_training:
            raise ValueError(f"stage {self.name}: nodes={self.nodes} needs ranks, processes a node under torchrun")
        if self.is_training and (self.array is not None or self.run_dir is None):
            raise ValueError(f"stage {self.name}: a training needs run_dir (its run.output_dir) and is no array")
        if self.throttle is not None and self.array is None:
            raise ValueError(f"stage {self.name}: throttle={self.throttle} needs array")
        self.seconds  # noqa: B018

    @property
    def is_training(self) -> bool:
        """Whether it runs under the supervision that restarts trainings."""
        return self.kind in TRAININGS

    @property
    def seconds(self) -> int | None:
        """Wall time.

        Raises:
            ValueError: not a time as SLURM writes it.
        """
        if self.time is None:
            return None
        # "90" are minutes there, as in sbatch.
        return parse_time(self.time)

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.array or 1

    @property
    def job_command(self) -> list[str]:
        """As slurm.job.Job takes it: under a launcher the module and its arguments, else the words themselves."""
        if self.ranks is None and not self.is_training:
            return list(self.command)
        return ["-m", COMMANDS[self.command[0]][0], *self.command[1:]]


@config_dataclass
class Chain:
    """Stages that are submitted together, all or none."""

    name: str
    """Jobs are called NAME-STAGE."""
    run_dir: str
    """Folder for records and logs, in RUN_DIR/slurm."""
    stages: list[ChainStage]
    """In order; a stage waits for the one above unless it says otherwise."""
    output: str | None = None
    """What the chain makes: `slurm status` and `resume` find it by this path too."""

    def __post_init__(self) -> None:
        """Refuse names that are there twice, and stages that wait for what does not come before them.

        Raises:
            ValueError: naming the stage.
        """
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"name={self.name!r}: letters, digits, _, - and . only, as jobs are called by it")
        if not self.stages:
            raise ValueError("stages is empty: name at least one")
        known: list[str] = []
        for stage in self.stages:
            if stage.name in known:
                raise ValueError(f"stage {stage.name} is there twice")
            for wanted in (*(stage.after or []), *stage.after_any):
                if wanted not in known:
                    above = ", ".join(known) or "none"
                    raise ValueError(f"stage {stage.name} waits for {wanted!r}, which is not above it: {above}")
            known.append(stage.name)

    def awaited(self, stage: ChainStage) -> list[str]:
        """Names of the stages that must have succeeded before this one starts."""
        if stage.after is not None:
            return list(stage.after)
        above = [other.name for other in self.stages[: self.stages.index(stage)]]
        return [name for name in above[-1:] if name not in stage.after_any]

    def stage(self, name: str) -> ChainStage:
        """A stage by its name."""
        return next(stage for stage in self.stages if stage.name == name)


def load_chain(path: Path) -> Chain:
    """Read a chain's file; a command may be one line, as in a shell.

    Raises:
        UserError: no such file, not YAML, an unknown field or command, a wrong type, or a contradiction.
    """
    if not path.is_file():
        raise UserError(f"chain file {path}: no such file")
    values = read_values(path)
    stages, texts = values.get("stages"), _as_texts(path)
    for stage, text in zip(stages, texts, strict=True) if isinstance(stages, list) else []:
        if isinstance(stage, dict) and isinstance(stage.get("command"), str):
            stage["command"] = _words(stage["command"], path)
        if isinstance(stage, dict) and stage.get("time") is not None:
            stage["time"] = text["time"]
    return build_config(Chain, values, origin=str(path))


def safe_name(text: str) -> str:
    """What is left of a text when it becomes the name of jobs and folders."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text).strip("-._") or "chain"


def spread_units(units: list[int], most: int) -> list[list[int]]:
    """Units of every task of an array of at most `most` tasks: neighbours go to different ones."""
    count = min(len(units), most)
    return [units[first::count] for first in range(count)]


def _words(command: str, path: Path) -> list[str]:
    try:
        return shlex.split(command)
    except ValueError as error:
        raise UserError(f"{path}: command {command!r}: {error}") from None


def _as_texts(path: Path) -> list[Any]:
    # To YAML 2:00:00 is a number in base 60, and so is 1:30, which cannot be told from 90 afterwards.
    texts: list[Any] = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)["stages"]
    return texts
