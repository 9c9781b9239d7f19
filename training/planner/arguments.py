"""Arguments that planning commands share, and what becomes of a report."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_video.config_io import load_config
from megatron_video.errors import BAD_INPUT_EXIT_CODE, UserError
from megatron_video.flops import TABLE_3_TEXT_TOKENS
from training.config import PRESET_DIR, PretrainConfig
from training.planner.cluster import Cluster, load_cluster
from training.planner.report import Report

_PICTURES = (".png", ".pdf", ".svg")


@dataclass(frozen=True)
class RunOnCluster:
    """What most commands judge."""

    config: PretrainConfig
    cluster: Cluster
    text_tokens: int


def plan_parser(command: str, description: str, config_help: str) -> argparse.ArgumentParser:
    """With --config, --cluster, --set, --text-tokens, --plot, --json and overrides."""
    parser = argparse.ArgumentParser(prog=f"megatron-video plan {command}".strip(), description=description)
    parser.add_argument("--config", required=True, help=config_help)
    parser.add_argument("--cluster", required=True, help="a YAML file, or the name of one in training/configs/clusters")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the cluster: gpus=1024")
    parser.add_argument("--text-tokens", type=int, default=TABLE_3_TEXT_TOKENS, help="visible text tokens (256)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it: .png, .pdf or .svg")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="of the configuration")
    return parser


def check_common(arguments: argparse.Namespace) -> None:
    """Before the work, not after it.

    Raises:
        UserError: --text-tokens below 1, or a --plot that cannot be written.
    """
    if arguments.text_tokens < 1:
        raise UserError(f"--text-tokens {arguments.text_tokens} must be at least 1")
    if arguments.plot is not None:
        check_picture(arguments.plot)


def check_at_least(name: str, value: int, least: int) -> None:
    """Refuse a number that is too small.

    Raises:
        UserError: naming the option.
    """
    if value < least:
        raise UserError(f"{name} {value} must be at least {least}")


def check_picture(path: Path) -> None:
    """Refuse a picture that cannot be written.

    Raises:
        UserError: another ending, or no such folder.
    """
    if path.suffix not in _PICTURES:
        raise UserError(f"--plot {path}: the name must end in one of {', '.join(_PICTURES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")


def read_run(arguments: argparse.Namespace) -> RunOnCluster:
    """The run and the cluster that are named.

    Raises:
        UserError: what `check_common` refuses, a configuration or a cluster that cannot be read.
    """
    check_common(arguments)
    config = load_config(PretrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
    return RunOnCluster(config, load_cluster(arguments.cluster, tuple(arguments.set)), arguments.text_tokens)


def finish(arguments: argparse.Namespace, report: Report, works: bool, draw: Callable[[Path], None]) -> int:
    """Print a report, draw it if asked to; the exit code: 2 if nothing works."""
    print(report.json() if arguments.json else report.text())
    if arguments.plot is not None and works:
        draw(arguments.plot)
    return 0 if works else BAD_INPUT_EXIT_CODE
