"""`megatron-video curriculum`, or under torchrun `-m training.curriculum`: pretraining stages in order, as one command.

The same command goes on where it stopped: a finished stage is not run again, a stage that was begun continues from its
newest checkpoint. `<output_dir>/curriculum.json` says which stages are finished. Exit codes are those of `pretrain`.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config, save_config
from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import launched_ranks, start_distributed
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, Stage, resolve_stages
from training.dry_run.request import add_dry_run_options, refuse_without_dry_run
from training.pretrain import run_training, set_device_environment
from training.telemetry import write_json

RECORD = "curriculum.json"
_ORIGINS = {
    "weights": "weights of {}",
    "ema": "averaged weights of {}",
    "weights_and_optimizer": "weights and optimizer of {}",
    "nothing": "starts from {}",
}


def main(argv: Sequence[str]) -> int:
    """Read the curriculum, refuse what cannot work in any of its stages, run those that are not finished."""
    arguments = _parse(argv)
    if arguments.dry_run:
        # Planner and views are of no use to a run.
        from training.dry_run.curriculum import dry_run_curriculum

        return dry_run_curriculum(arguments)
    refuse_without_dry_run(arguments)
    curriculum = load_config(CurriculumConfig, arguments.config, arguments.overrides, CURRICULUM_PRESET_DIR)
    stages = up_to(resolve_stages(curriculum), arguments.through)
    if arguments.print_config:
        plain = {stage.name: config_to_dict(stage.config) for stage in stages}
        print(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True), end="")
        return 0
    finished = read_record(Path(curriculum.output_dir))
    ahead = [stage for stage in stages if stage.name not in finished]
    # A mistake in the last stage is to be found now and not after weeks; what is finished had its own job.
    check_stages(ahead, launched_ranks(), Hardware.detect())
    if ahead:
        set_device_environment(ahead[0].config.parallel)
    from megatron_video.device import initialize

    was_running = dist.is_initialized()
    start_distributed(initialize())
    try:
        return run_stages(curriculum, stages)
    finally:
        if not was_running:
            dist.destroy_process_group()


def run_stages(curriculum: CurriculumConfig, stages: Sequence[Stage]) -> int:
    """Run the stages that are not finished, in order.

    Returns:
        0 when all are finished, else the exit code of the stage that stopped.

    Raises:
        UserError: the curriculum is not the one that was begun in this folder.
    """
    root = Path(curriculum.output_dir)
    progress = Progress.agree(root)
    progress.check(root, curriculum, stages)
    for number, stage in enumerate(stages, start=1):
        _say(describe_stage(number, len(stages), stage, progress.finished))
    if dist.get_rank() == 0:
        save_config(curriculum, root / "curriculum.yaml")
    for stage in stages:
        if stage.name in progress.finished:
            continue
        _say(f"curriculum: stage {stage.name}")
        code = run_training(stage.config, keep_distributed=True)
        if code:
            return code
        progress.finish(root, stage)
        # The next stage's model takes the place of this one's.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return 0


@dataclass
class Progress:
    """Which stages are finished, and after how many steps."""

    finished: dict[str, int]

    @staticmethod
    def agree(root: Path) -> Progress:
        """As rank 0 reads it, on all ranks: file systems show new files to some nodes late."""
        found: list[Any] = [None]
        if dist.get_rank() == 0:
            root.mkdir(parents=True, exist_ok=True)
            found = [read_record(root)]
        dist.broadcast_object_list(found, src=0)
        return Progress(found[0])

    def check(self, root: Path, curriculum: CurriculumConfig, stages: Sequence[Stage]) -> None:
        """Refuse stages that were taken out, put in, or changed in length after the next one had begun.

        Raises:
            UserError: naming the stage and the way out.
        """
        names = list(curriculum.stages)
        if list(self.finished) != names[: len(self.finished)]:
            raise UserError(
                f"{root} was run with other stages: {', '.join(self.finished)} are finished there, the curriculum "
                f"begins with {', '.join(names[: len(self.finished)])}; give another output_dir"
            )
        for stage in stages[: len(self.finished)]:
            done, wanted = self.finished[stage.name], stage.config.training.steps
            if done == wanted:
                continue
            place = names.index(stage.name)
            following = names[place + 1] if place + 1 < len(names) else None
            if following is not None and (root / following).exists():
                raise UserError(
                    f"stage {stage.name!r} was finished after {done} steps and {following!r} has begun from there, but "
                    f"training.steps of {stage.name!r} is now {wanted}; set it back, or give another output_dir"
                )
            # Nothing was made from it yet, so it may go on.
            del self.finished[stage.name]

    def finish(self, root: Path, stage: Stage) -> None:
        """Note that a stage is finished."""
        self.finished[stage.name] = stage.config.training.steps
        if dist.get_rank() == 0:
            write_json(root / RECORD, {"finished": self.finished})


def read_record(root: Path) -> dict[str, int]:
    """Finished stages of a curriculum's folder and their steps, as this process sees them."""
    path = root / RECORD
    finished: dict[str, int] = json.loads(path.read_text())["finished"] if path.exists() else {}
    return finished


def check_stages(stages: Sequence[Stage], ranks: int, hardware: Hardware) -> None:
    """Refuse a stage that cannot run on these ranks, or not in one job with the others.

    Raises:
        UserError: naming the stage.
    """
    for stage in stages:
        if not stage.config.data.shards:
            raise UserError(
                f"stage {stage.name!r}: data.shards is empty; name the shard folders of all stages with "
                f"common.data.shards=[...], or of this one with stages.{stage.name}.settings.data.shards=[...]"
            )
        try:
            check_layout(stage.config.layout(ranks, hardware))
        except UserError as error:
            raise UserError(f"stage {stage.name!r}: {error}") from None
    check_one_launch(stages, hardware)


def check_one_launch(stages: Sequence[Stage], hardware: Hardware) -> None:
    """Refuse stages that cannot follow each other in the same processes.

    Raises:
        UserError: naming them.
    """
    sharded = [stage.name for stage in stages if stage.config.parallel.use_megatron_fsdp]
    # CUDA_DEVICE_MAX_CONNECTIONS is read once in the life of a process, and the two want other values.
    if hardware.cuda and sharded and len(sharded) < len(stages):
        raise UserError(
            f"parallel.use_megatron_fsdp is set in {', '.join(sharded)} only: stages with and without it need "
            "processes of their own; end this job with --through before the change, and go on in the next one"
        )


def describe_stage(number: int, count: int, stage: Stage, finished: dict[str, int]) -> str:
    """One line about a stage and what was done of it."""
    config, notes = stage.config, ["finished"] if stage.name in finished else []
    absent = [folder for folder in config.data.shards if not Path(folder).is_dir()]
    if absent and not notes:
        notes.append(f"not there yet: {', '.join(absent)}")
    buckets = "all buckets" if config.data.buckets is None else ", ".join(config.data.buckets)
    return (
        f"stage {number}/{count} {stage.name}: {config.training.steps} steps of {config.data.global_batch_size} samples"
        f", learning rate {config.optimizer.learning_rate:g} {config.optimizer.decay}, {buckets}; "
        f"{_ORIGINS[stage.take].format(config.run.initial_weights)}{''.join(f' ({note})' for note in notes)}"
    )


def up_to(stages: list[Stage], last: str | None) -> list[Stage]:
    """The stages of a job that ends after `last`; None: all.

    Raises:
        UserError: there is no such stage.
    """
    names = [stage.name for stage in stages]
    if last is None:
        return stages
    if last not in names:
        raise UserError(f"--through {last}: no such stage; there are {', '.join(names)}")
    return stages[: names.index(last) + 1]


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video curriculum",
        description="Run pretraining stages one after the other, each from the weights of the one before.",
        epilog="Fields and their meaning: training/curriculum_config.py.",
    )
    presets = ", ".join(sorted(path.stem for path in CURRICULUM_PRESET_DIR.glob("*.yaml")))
    parser.add_argument("--config", required=True, help=f"a YAML file or a preset ({presets})")
    parser.add_argument("--through", metavar="STAGE", help="end the job after this stage")
    parser.add_argument("--print-config", action="store_true", help="print every stage's configuration and leave")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="field=value",
        help="e.g. common.data.shards=[shards] stages.sft.settings.training.steps=100",
    )
    add_dry_run_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
