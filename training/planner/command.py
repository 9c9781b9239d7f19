"""`megatron-video plan`: memory, time, MFU and cost of a training run before it is submitted."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import BAD_INPUT_EXIT_CODE, UserError
from megatron_video.flops import SPATIAL_STRIDE, TABLE_3_TEXT_TOKENS, latent_shape, training_flops

_PICTURES = (".png", ".pdf", ".svg")
_SIMULATIONS = {
    "scale": ("training.planner.scale_command", "plan_scale"),
    "stragglers": ("training.planner.scale_command", "plan_stragglers"),
    "failures": ("training.planner.scale_command", "plan_failures"),
    "curriculum": ("training.planner.cost_command", "plan_curriculum"),
    "encoders": ("training.planner.cost_command", "plan_encoders"),
}
_USAGE = """
other commands:
  megatron-video plan flops --frames F --height H --width W
                                    FLOPs, tokens and latent shape of one sample
  megatron-video plan table2        the nine layouts of the paper's Table 2 beside the planner's
  megatron-video plan published     speeds that others published beside the planner's
  megatron-video plan scale ...     strong and weak scaling from 8 to 10,240 GPUs
  megatron-video plan stragglers ...  what the slowest replica costs
  megatron-video plan failures ...  checkpoint interval against effective training time
  megatron-video plan curriculum ...  all stages of a curriculum with their cost
  megatron-video plan encoders ...  GPUs for encoding beside those for training, or encoding ahead
"""


def main(argv: Sequence[str]) -> int:
    """Command line."""
    commands: dict[str, Callable[[Sequence[str]], int]] = {
        "flops": plan_flops,
        "table2": plan_table_2,
        "published": plan_published,
    }
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv and argv[0] in _SIMULATIONS:
        # Slow to import, and not needed by the other commands.
        module, function = _SIMULATIONS[argv[0]]
        return int(getattr(importlib.import_module(module), function)(argv[1:]))
    return plan_run(argv)


def plan_run(argv: Sequence[str]) -> int:
    """The configured layout, or all layouts, of a run on a cluster; exit code 2 if it does not work.

    Raises:
        UserError: a configuration or cluster that cannot be read, or whose sizes of samples are not known.
    """
    arguments = _parse_run(argv)
    if arguments.text_tokens < 1:
        raise UserError(f"--text-tokens {arguments.text_tokens} must be at least 1")
    if arguments.plot is not None:
        _check_picture(arguments.plot)
    # Slow to import, and not needed by the other commands.
    from training.config import PRESET_DIR, PretrainConfig
    from training.planner.cluster import load_cluster
    from training.planner.mix import step_of
    from training.planner.plan import Plan, judge
    from training.planner.plan_plot import draw_plans
    from training.planner.search import search
    from training.planner.show import show_job, show_plan, show_refusal, show_search

    config = load_config(PretrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
    cluster = load_cluster(arguments.cluster, tuple(arguments.set))
    step = step_of(config, arguments.text_tokens)
    if arguments.layouts == "this":
        found = judge(config, cluster, step, config.parallel)
        plans = [found] if isinstance(found, Plan) else []
        text = f"{show_job(found)}\n\n{show_plan(found)}" if isinstance(found, Plan) else show_refusal(found)
        values = found.values()
    else:
        searched = search(config, cluster, step)
        plans = searched.plans
        text = "\n\n".join([*([show_job(plans[0])] if plans else []), show_search(searched)])
        values = searched.values()
    print(json.dumps(values, indent=1) if arguments.json else text)
    if arguments.plot is not None and plans:
        draw_plans(plans, arguments.plot)
    return 0 if plans else BAD_INPUT_EXIT_CODE


def plan_flops(argv: Sequence[str]) -> int:
    """Cost, tokens and latent shape of one sample.

    Raises:
        UserError: sizes that the Video-VAE or the patches do not divide.
    """
    arguments = _parse_flops(argv)
    model = _model(arguments.config)
    shape = latent_shape(arguments.frames, arguments.height, arguments.width)
    if shape.height % model.patch_size or shape.width % model.patch_size:
        raise UserError(
            f"--height {arguments.height} --width {arguments.width}: a latent grid of {shape.height} x {shape.width} "
            f"cannot be cut into patches of {model.patch_size}; take multiples of {SPATIAL_STRIDE * model.patch_size}"
        )
    if arguments.text_tokens < 1:
        raise UserError(f"--text-tokens {arguments.text_tokens} must be at least 1")
    tokens = shape.tokens // model.patch_size**2
    flops = training_flops(model.num_layers, model.hidden_size, tokens, arguments.text_tokens)
    values = {
        "frames": arguments.frames,
        "height": arguments.height,
        "width": arguments.width,
        "text_tokens": arguments.text_tokens,
        "latent_shape": list(shape),
        "tokens": tokens,
        "tflops_per_sample": flops / 1e12,
        "gflops_per_token": flops / tokens / 1e9,
    }
    if arguments.json:
        print(json.dumps(values, indent=1))
    else:
        grid = " x ".join(map(str, shape))
        print(f"{arguments.frames}x{arguments.height}x{arguments.width}: latents {grid}, {tokens:,} tokens")
        print(f"{flops / 1e12:,.2f} TFLOP a sample, forward and backward ({flops / tokens / 1e9:,.1f} GFLOP a token)")
    return 0


def plan_table_2(argv: Sequence[str]) -> int:
    """The paper's Table 2 and the figures in its text."""
    arguments = _parser("table2", "The paper's Table 2 beside the planner's figures.").parse_args(argv)
    from training.planner.tables import paper_claims, table_2

    tables = [table_2(), paper_claims()]
    if arguments.json:
        print(json.dumps({"rows": list(tables[0].rows), "text": list(tables[1].rows)}, indent=1))
    else:
        print("\n\n".join(table.text() for table in tables))
    return 0


def plan_published(argv: Sequence[str]) -> int:
    """Speeds of other systems."""
    arguments = _parser("published", "Others' speeds beside the planner's figures.").parse_args(argv)
    from training.planner.tables import published_speeds

    table = published_speeds()
    print(table.json() if arguments.json else table.text())
    return 0


def _check_picture(path: Path) -> None:
    """Before the work, not after it."""
    if path.suffix not in _PICTURES:
        raise UserError(f"--plot {path}: the name must end in one of {', '.join(_PICTURES)}")
    if not path.parent.is_dir():
        raise UserError(f"--plot {path}: there is no folder {path.parent}")


def _model(config: str | None) -> DiTConfig:
    if config is None:
        return DiTConfig()
    # Slow to import, and only needed here.
    from training.config import PRESET_DIR, PretrainConfig

    return load_config(PretrainConfig, config, (), PRESET_DIR).model


def _parse_run(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video plan",
        description=__doc__,
        epilog=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="a YAML file or preset of pretrain")
    parser.add_argument("--cluster", required=True, help="a YAML file, or the name of one in training/configs/clusters")
    parser.add_argument(
        "--layouts", choices=("this", "all"), default="this", help="the configured layout, or all of them (this)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="of the cluster: gpus=1024")
    parser.add_argument("--text-tokens", type=int, default=TABLE_3_TEXT_TOKENS, help="visible text tokens (256)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw time and memory by part")
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("overrides", nargs="*", metavar="group.field=value", help="of the configuration")
    return parser.parse_args(argv)


def _parse_flops(argv: Sequence[str]) -> argparse.Namespace:
    parser = _parser("flops", "FLOPs, tokens and latent shape of one sample.")
    for name in ("frames", "height", "width"):
        parser.add_argument(f"--{name}", type=int, required=True, help="of the sample, in pixels or frames")
    parser.add_argument("--text-tokens", type=int, default=TABLE_3_TEXT_TOKENS, help="visible text tokens (256)")
    parser.add_argument("--config", help="a YAML file or preset of pretrain, for its model; without it the 30B")
    return parser.parse_args(argv)


def _parser(command: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"megatron-video plan {command}", description=description)
    parser.add_argument("--json", action="store_true", help="for programs")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
