"""`megatron-video plan`: memory, time, MFU and cost of a training run before it is submitted."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from megatron_video.cli import run_command
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flops import TABLE_3_TEXT_TOKENS, latent_shape, training_flops


def main(argv: Sequence[str]) -> int:
    """Command line."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    run: int = arguments.run(arguments)
    return run


def plan_flops(arguments: argparse.Namespace) -> int:
    """Cost, tokens and latent shape of one sample.

    Raises:
        UserError: sizes that the Video-VAE or the patches do not divide.
    """
    model = _model(arguments.config)
    shape = latent_shape(arguments.frames, arguments.height, arguments.width)
    if shape.height % model.patch_size or shape.width % model.patch_size:
        raise UserError(
            f"--height {arguments.height} --width {arguments.width}: a latent grid of {shape.height} x {shape.width} "
            f"cannot be cut into patches of {model.patch_size}; take multiples of {16 * model.patch_size}"
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


def plan_table_2(arguments: argparse.Namespace) -> int:
    """The paper's Table 2 and the figures in its text."""
    from training.planner.tables import paper_claims, table_2

    tables = [table_2(), paper_claims()]
    if arguments.json:
        print(json.dumps({"rows": list(tables[0].rows), "text": list(tables[1].rows)}, indent=1))
    else:
        print("\n\n".join(table.text() for table in tables))
    return 0


def plan_published(arguments: argparse.Namespace) -> int:
    """Speeds of other systems."""
    from training.planner.tables import published_speeds

    table = published_speeds()
    print(table.json() if arguments.json else table.text())
    return 0


def _model(config: str | None) -> DiTConfig:
    if config is None:
        return DiTConfig()
    # Slow to import, and only needed here.
    from megatron_video.config_io import load_config
    from training.config import PRESET_DIR, PretrainConfig

    return load_config(PretrainConfig, config, (), PRESET_DIR).model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video plan", description=__doc__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    flops = commands.add_parser("flops", help="FLOPs, tokens and latent shape of one sample")
    for name in ("frames", "height", "width"):
        flops.add_argument(f"--{name}", type=int, required=True, help="of the sample, in pixels or frames")
    flops.add_argument("--text-tokens", type=int, default=TABLE_3_TEXT_TOKENS, help="visible text tokens (256)")
    flops.add_argument("--config", help="a YAML file or preset of pretrain, for its model; without it the 30B")
    rows = commands.add_parser("table2", help="the nine layouts of the paper's Table 2 beside the planner's")
    others = commands.add_parser("published", help="speeds that others published beside the planner's")
    for command, run in ((flops, plan_flops), (rows, plan_table_2), (others, plan_published)):
        command.add_argument("--json", action="store_true", help="for programs")
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
