"""`megatron-video plan curriculum | encoders`: what all of it costs."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_video.config_io import load_config
from megatron_video.errors import BAD_INPUT_EXIT_CODE, UserError
from training.curriculum_config import CURRICULUM_PRESET_DIR, CurriculumConfig, resolve_stages
from training.planner.arguments import check_common, finish, plan_parser, read_run
from training.planner.cluster import load_cluster
from training.planner.cost_plots import draw_curriculum, draw_encoding
from training.planner.curriculum_cost import cost_curriculum
from training.planner.encoders import encoding_report, plan_encoding
from training.planner.plan import Refusal
from training.planner.show import show_refusal


def plan_curriculum(argv: Sequence[str]) -> int:
    """All stages of a curriculum; exit code 2 if one of them does not work.

    Raises:
        UserError: bad input.
    """
    presets = ", ".join(sorted(path.stem for path in CURRICULUM_PRESET_DIR.glob("*.yaml")))
    help_text = f"a YAML file or preset of curriculum ({presets})"
    parser = plan_parser("curriculum", "A curriculum, costed stage by stage, failures included.", help_text)
    parser.add_argument(
        "--gpus-of", action="append", default=[], metavar="STAGE=GPUS", help="of one stage, instead of the cluster's"
    )
    parser.add_argument(
        "--layouts",
        choices=("this", "all"),
        default="this",
        help="the configured layouts, or the fastest of all (this)",
    )
    arguments = parser.parse_args(argv)
    check_common(arguments)
    gpus_of = dict(_stage_gpus(text) for text in arguments.gpus_of)
    curriculum = load_config(CurriculumConfig, arguments.config, arguments.overrides, CURRICULUM_PRESET_DIR)
    cluster = load_cluster(arguments.cluster, tuple(arguments.set))
    stages = resolve_stages(curriculum)
    found = cost_curriculum(stages, cluster, arguments.text_tokens, gpus_of, arguments.layouts == "all")
    code = finish(
        arguments, found.report(arguments.config), bool(found.stages), lambda path: draw_curriculum(found, path)
    )
    return BAD_INPUT_EXIT_CODE if found.refused else code


def plan_encoders(argv: Sequence[str]) -> int:
    """GPUs for encoding and for training; exit code 2 if the layout does not work.

    Raises:
        UserError: bad input.
    """
    parser = plan_parser(
        "encoders",
        "GPUs that must encode so that training never waits, or encoding ahead of it.",
        "a YAML file or preset of pretrain",
    )
    parser.add_argument("--headroom", type=float, default=0.1, help="share of encoding GPUs to spare (0.1)")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.headroom <= 10:
        raise UserError(f"--headroom {arguments.headroom} must lie between 0 and 10; 0.1 keeps 10 % to spare")
    run = read_run(arguments)
    found = plan_encoding(run.config, run.cluster, run.text_tokens, arguments.headroom)
    if isinstance(found, Refusal):
        print(show_refusal(found))
        return BAD_INPUT_EXIT_CODE
    report = encoding_report(found, run.config.run.stage)
    return finish(arguments, report, True, lambda path: draw_encoding(found, path))


def _stage_gpus(text: str) -> tuple[str, int]:
    stage, _, gpus = text.rpartition("=")
    if not stage or not gpus.isdecimal() or int(gpus) < 1:
        raise UserError(f"--gpus-of {text}: give STAGE=GPUS, such as sft=1024")
    return stage, int(gpus)
