"""The command line of `megatron-video sample`, and the layout that it asks for."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from training.sample_prompts import PROMPT_LISTS

if TYPE_CHECKING:
    from megatron_video.dit.config import DiTConfig
    from megatron_video.layout import Precision
    from megatron_video.parallel import ParallelConfig

# Field of the layout -> option. What is not here would change nothing or help nobody: chunks of a stage (one stage
# works at a time, as every step needs the one before), sharing of optimizer state, recomputation and offloading (there
# is no backward pass), Megatron-FSDP (replicas would have to sample in step).
LAYOUT_OPTIONS = {
    "tensor_model_parallel_size": "--tensor-parallel-size",
    "sequence_parallel": "--sequence-parallel",
    "pipeline_model_parallel_size": "--pipeline-parallel-size",
    "context_parallel_size": "--context-parallel-size",
    "cp_comm_type": "--cp-comm-type",
    "hierarchical_context_parallel_sizes": "--hierarchical-context-parallel-sizes",
    "transformer_impl": "--transformer-impl",
}


def parse_arguments(argv: Sequence[str], program: str, about: str, keeps_latents: bool = False) -> argparse.Namespace:
    """The options of `megatron-video sample`, and of `dpo generate`, which keeps latents always.

    Args:
        argv: the command line.
        program: its name, for the help.
        about: opens the help.
        keeps_latents: whether there is no choice.
    """
    parser = argparse.ArgumentParser(prog=program, description=about)
    _add_inputs(parser, keeps_latents)
    _add_sampling(parser)
    _add_layout(parser)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def layout_of(arguments: argparse.Namespace) -> ParallelConfig:
    """The layout that the options ask for."""
    from megatron_video.parallel import ParallelConfig

    # argparse names values by their options.
    values = {field: getattr(arguments, _attribute(option)) for field, option in LAYOUT_OPTIONS.items()}
    return build_config(ParallelConfig, values, origin="the command line")


def check_layout_options(parallel: ParallelConfig, model: DiTConfig, precision: Precision, ranks: int) -> None:
    """Refuse a layout that cannot work.

    Raises:
        UserError: naming the options, the values and the nearest that work.
    """
    from megatron_video.layout import Hardware, Layout
    from megatron_video.layout_rules import check_layout

    try:
        check_layout(Layout(parallel, model, precision, world_size=ranks, hardware=Hardware.detect()))
    except UserError as refusal:
        raise UserError(_in_options(str(refusal))) from None


def _in_options(text: str) -> str:
    """A refusal in the words of the command line instead of the configuration's."""
    for field, option in LAYOUT_OPTIONS.items():
        name = f"parallel.{field}"
        for value, words in (("=true", option), ("=false", f"no {option}"), ("=null", f"no {option}")):
            text = text.replace(name + value, words)
        text = text.replace(f"{name}=", f"{option} ").replace(name, option)
    return text


def _attribute(option: str) -> str:
    return option.removeprefix("--").replace("-", "_")


def _add_inputs(parser: argparse.ArgumentParser, keeps_latents: bool) -> None:
    add = parser.add_argument_group("models, prompts, output").add_argument
    add("--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint) or checkpoint folder")
    add("--ema", action="store_true", help="use the averaged weights (of a run with ema.decay)")
    add("--precision", choices=("bf16", "fp32"), help="of the model (default: what it was trained in)")
    add("--vae", type=Path, required=True, help="Video-VAE folder, or released .safetensors file")
    add("--text", type=Path, required=True, help="folder with the text encoders: clip/ and step_llm/ in it")
    add("--other-encoders", action="store_true", help="use --vae and --text though the shards were made with others")
    add(
        "--prompts",
        type=Path,
        required=True,
        help='.txt, one a line; .jsonl with {"prompt": ..., "seed": ..., "category": ...}; .csv or .tsv with these '
        "columns; all but the prompt may be left out, and further fields are kept in samples.jsonl",
    )
    add(
        "--categories",
        metavar="NAME=COUNT,...",
        help="categories of a file without, as numbers of its prompts in order, or those of a known list: "
        f"{', '.join(PROMPT_LISTS)}",
    )
    add("--limit", type=int, help="sample only the first N prompts")
    add("--seed", type=int, default=0, help="of prompts that bring none (default: %(default)s)")
    add(
        "--seeds", type=int, default=1, help="videos of every prompt: its seed and the next ones (default: %(default)s)"
    )
    add("--out", type=Path, required=True, help="folder for videos, contact sheets, samples.jsonl, tensorboard/")
    add(
        "--latents",
        action="store_true",
        default=keeps_latents,
        help=argparse.SUPPRESS
        if keeps_latents
        else "keep latents and text states too, as `dpo generate` does; they "
        "are decoded last, when the model is gone, on all ranks",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("sampling").add_argument
    add("--frames", type=int, default=204, help="1 (image) or a multiple of 17 (default: %(default)s)")
    add("--height", type=int, default=544, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=992, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--fps", type=float, default=25.0, help="of the written videos (default: %(default)s)")
    add("--steps", type=int, default=50, help="Euler steps (default: %(default)s)")
    add("--guidance", type=float, default=9.0, help="classifier-free guidance scale; 1 = none (default: %(default)s)")
    add("--time-shift", type=float, default=13.0, help="density of steps near noise; 1 = even (default: %(default)s)")
    add("--negative-prompt", default="", help="what guidance moves away from (default: the empty caption)")
    add("--batch-size", type=int, default=1, help="prompts sampled together (default: %(default)s)")
    add("--round-noise-to-bf16", action="store_true", help="round the initial noise as the released pipeline does")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    about = "A copy of the model takes tensor x pipeline x context ranks; what there is beyond makes more copies."
    add = parser.add_argument_group("layout, under torchrun", about).add_argument
    add("--tensor-parallel-size", type=int, default=1, help="ranks that share every weight (default: %(default)s)")
    add("--sequence-parallel", action="store_true", help="split tokens over the tensor-parallel ranks too")
    add(
        "--pipeline-parallel-size",
        type=int,
        default=1,
        help="ranks that share the layers, one at work at a time: for memory alone (default: %(default)s)",
    )
    add(
        "--context-parallel-size",
        type=int,
        default=1,
        help="ranks that share one video's tokens: what makes a single video fast (default: %(default)s)",
    )
    add(
        "--cp-comm-type",
        choices=("a2a", "all_gather", "p2p", "a2a+p2p"),
        default="a2a",
        help="how they exchange; p2p and a2a+p2p need transformer_engine (default: %(default)s)",
    )
    add(
        "--hierarchical-context-parallel-sizes",
        type=int,
        nargs=2,
        metavar=("GROUP", "RING"),
        help="for a2a+p2p: ranks of one all-to-all group, and of one ring",
    )
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers to use")
