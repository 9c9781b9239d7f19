"""`megatron-video pretrain`, or for several ranks `torchrun ... -m training.pretrain`: train the DiT on shards.

The same command continues a run that has a checkpoint. Exit codes: 0 finished, 2 bad input, 143 stopped by SIGTERM or
SIGUSR1 after saving (start it again); launchers may hide them, so <run>/status.json says the same.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config
from megatron_video.errors import UserError
from megatron_video.layout import Hardware
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig, launched_ranks
from training.config import PRESET_DIR, PretrainConfig
from training.dry_run.request import add_dry_run_options, refuse_without_dry_run


def main(argv: Sequence[str]) -> int:
    """Read the configuration, refuse what cannot work, start the ranks' process groups, train."""
    about = "Train the video DiT on pre-encoded shards; continues by itself from <run.output_dir>/checkpoints."
    return run_command_line(argv, "megatron-video pretrain", about, PRESET_DIR)


def run_command_line(
    argv: Sequence[str], program: str, about: str, preset_dir: Path, needs_preferences: bool = False
) -> int:
    """The command line of a training on samples, or on preference pairs.

    Raises:
        UserError: a configuration, layout, data or a checkpoint that cannot work.
    """
    arguments = _parse(argv, program, about, preset_dir)
    load = functools.partial(_load, arguments, preset_dir, needs_preferences)
    if arguments.dry_run:
        # Planner and views are of no use to a run.
        from training.dry_run.command import dry_run_pretrain

        return dry_run_pretrain(arguments, program.removeprefix("megatron-video "), load)
    refuse_without_dry_run(arguments)
    config = load()
    if arguments.print_config:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    return run_training(config)


def _load(arguments: argparse.Namespace, preset_dir: Path, needs_preferences: bool) -> PretrainConfig:
    config = load_config(PretrainConfig, arguments.config, arguments.overrides, preset_dir)
    if needs_preferences != (config.dpo is not None):
        raise UserError(
            f"{arguments.config}: {'has no' if needs_preferences else 'has a'} group `dpo`: "
            f"{'add it, such as dpo.beta=500' if needs_preferences else 'train with `python -m training.dpo`'}"
        )
    return config


def run_training(config: PretrainConfig, keep_distributed: bool = False) -> int:
    """Start the ranks' process groups, train, and tear the groups down; `keep_distributed`: but for torch's own.

    Returns:
        The exit code.

    Raises:
        UserError: a layout, data or a checkpoint that cannot work.
    """
    # Before any process group starts, and before anything slow.
    ranks, hardware = launched_ranks(), Hardware.detect()
    check_layout(config.layout(ranks, hardware))
    set_device_environment(config.parallel)
    # The device comes first: it decides what the imports below may assume. They also take seconds.
    from megatron_video.device import initialize

    device = initialize()
    from megatron_video.parallel import destroy_parallel, initialize_parallel
    from training.data_set import TrainingData
    from training.loop import train

    # Also before: a wrong folder is then one line, not a stack trace of every rank.
    data = TrainingData.open(config.data, pairs=config.dpo is not None)
    data.check_model(config.model)
    check_layout(config.layout(ranks, hardware, list(data.buckets)))
    initialize_parallel(config.parallel, config.run.seed, device)
    try:
        return train(config, data, device)
    finally:
        destroy_parallel(keep_distributed)


def set_device_environment(parallel: ParallelConfig) -> None:
    """Set what CUDA reads once, when it starts."""
    # megatron-core asks for it: with one queue, communication starts in the order in which it was issued. Megatron-FSDP
    # asks for more, so that its gathers run beside the computation.
    if not parallel.use_megatron_fsdp:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _parse(argv: Sequence[str], program: str, about: str, preset_dir: Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog=program,
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Fields and their meaning: training/config.py, or --print-config.",
    )
    presets = ", ".join(sorted(path.stem for path in preset_dir.glob("*.yaml")))
    parser.add_argument("--config", required=True, help=f"a YAML file or a preset ({presets})")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="e.g. training.steps=100")
    add_dry_run_options(parser)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
