"""`megatron-video ckpt upcycle`: a deeper or conditioned stage begins with the weights of a smaller one."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.derived import (
    Derivation,
    Output,
    add_output_options,
    check_output,
    open_source,
    output_of,
    told_output,
    write_derived,
)
from checkpoints_tools.forms import Reading, add_reading_options, reading_of
from checkpoints_tools.models import KINDS
from checkpoints_tools.upcycle_plan import OUTPUT_PROJECTIONS, PATCH_WEIGHT, SCHEDULES, Plan, make_plan
from checkpoints_tools.weights import Model, Weights, check_tensors, digest, total_digest
from megatron_video.config_io import build_config, config_to_dict, read_values
from megatron_video.dit import DiTConfig, transformer_config
from megatron_video.dit.init import initial_value
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig

# Embedders that start anew end in a layer of this name, which is zero: they add nothing at first.
_LAST_LINEAR = "linear_2"
_SEED = 0


class UpcycledWeights:
    """`Weights` of the new model, made of the source's when they are asked for."""

    def __init__(self, source: Weights, plan: Plan) -> None:
        self._source, self.plan = source, plan
        self.model: Model = KINDS["dit"].build(plan.new)
        self.templates: Mapping[str, Tensor] = {
            name: torch.empty(shape, dtype=self._dtype(name), device="meta")
            for name, shape in self.model.shapes.items()
        }
        self._digests: dict[str, str] = {}

    @property
    def origin(self) -> Path:
        """Of the source."""
        return self._source.origin

    def stored_name(self, name: str) -> str:
        """Of what it is made of."""
        return self._source.stored_name(self.plan.source(name) or name)

    def tensor(self, name: str) -> Tensor:
        """Copied, widened by zeros, zero, or drawn as for a model that starts anew."""
        source, template = self.plan.source(name), self.templates[name]
        if source is not None:
            found = self._source.tensor(source)
            self._digests.setdefault(source, digest(found))
            return _widened(found, template) if name == PATCH_WEIGHT else found
        if _LAST_LINEAR in name or name.endswith(OUTPUT_PROJECTIONS):
            return torch.zeros(template.shape, dtype=template.dtype)
        config = transformer_config(self.plan.new, ParallelConfig(), torch.float32)
        return initial_value(name, list(template.shape), config, _SEED).to(template.dtype)

    def source_digest(self) -> str:
        """Of all of the source's tensors, as `convert` reports it; reads those that were not needed."""
        for name in self._source.templates:
            if name not in self._digests:
                self._digests[name] = digest(self._source.tensor(name))
        return total_digest(self._digests)

    def _dtype(self, name: str) -> torch.dtype:
        # New tensors get the type of one that every model has.
        return self._source.templates[self.plan.source(name) or PATCH_WEIGHT].dtype


def _widened(weight: Tensor, template: Tensor) -> Tensor:
    """[D, C, p, p] with zeros for the new channels behind the old ones, where the condition's latents come."""
    wide = torch.zeros(template.shape, dtype=weight.dtype)
    wide[:, : weight.shape[1]] = weight
    return wide


@dataclass(frozen=True)
class Upcycling:
    """What was made of what."""

    source: str
    output: str
    averaged: bool
    """Whether the source's moving averages were taken."""
    changed: dict[str, list[Any]]
    """Field of the model -> [old, new]."""
    layers: list[int]
    """Source of every layer."""
    zeroed_layers: list[int]
    """Copies that add nothing at first: their output projections are zero."""
    new_channels: int
    """Input channels with zero weights."""
    new_tensors: list[str]
    """Tensors without a source, but for zeroed projections."""
    keeps_function: bool
    """Whether the new model computes what the source does, whatever its new inputs hold."""


def describe(weights: UpcycledWeights, output: Output, averaged: bool) -> Upcycling:
    """The report of a plan."""
    plan = weights.plan
    there, here = config_to_dict(plan.old), config_to_dict(plan.new)
    anew = [name for name in weights.templates if plan.source(name) is None]
    return Upcycling(
        source=str(weights.origin),
        output=str(output.path),
        averaged=averaged,
        changed={name: [there[name], here[name]] for name in here if there[name] != here[name]},
        layers=list(plan.layers),
        zeroed_layers=sorted(plan.zeroed),
        new_channels=plan.widened_channels,
        new_tensors=[name for name in anew if not name.endswith(OUTPUT_PROJECTIONS)],
        keeps_function=plan.keeps_function,
    )


def upcycle(weights: UpcycledWeights, output: Output, averaged: bool, reading: Reading) -> Upcycling:
    """Write the new model's weights, and upcycle.json beside them.

    Raises:
        UserError: see derived.check_output and derived.write_derived.
    """
    check_output(weights, output)
    report = describe(weights, output, averaged)
    if not output.dry_run:
        settings = dataclasses.asdict(report) | {"seed": _SEED}

        def record() -> dict[str, Any]:
            return settings | {"source_digest": weights.source_digest()}

        write_derived(weights, output, Derivation("upcycle", [weights.origin], settings, reading), record)
    return report


def table(report: Upcycling) -> Iterator[str]:
    """What becomes what, a line each."""
    for name, (old, new) in report.changed.items():
        yield f"{name}: {old} -> {new}"
    if "num_layers" in report.changed or report.layers != list(range(len(report.layers))):
        for layer, source in enumerate(report.layers):
            yield f"  layers.{layer} <- layers.{source}" + (", adds nothing at first" * (layer in report.zeroed_layers))
    if report.new_channels:
        yield f"  {PATCH_WEIGHT} <- itself, and zeros for {report.new_channels} channels behind its own"
    for name in report.new_tensors:
        yield f"  {name} <- {'zeros' if _LAST_LINEAR in name else 'drawn anew'}"
    yield "  everything else <- itself"
    kept = "is that of the source" if report.keeps_function else "is another: layers came or went"
    yield f"the function at the start {kept}"


def new_config(old: Model, arguments: argparse.Namespace) -> DiTConfig:
    """Sizes that the options ask for.

    Raises:
        UserError: none is asked for, or they contradict each other.
    """
    values = config_to_dict(old.config)
    if arguments.like is not None:
        found = read_values(arguments.like)
        values = config_to_dict(build_config(DiTConfig, found.get("model", found), str(arguments.like)))
    listed = None if arguments.layers is None else len(arguments.layers)
    count = listed if arguments.num_layers is None else arguments.num_layers
    asked = {"num_layers": count, "in_channels": arguments.in_channels}
    asked["use_additional_conditions"] = arguments.use_additional_conditions or None
    values |= {name: value for name, value in asked.items() if value is not None}
    return build_config(DiTConfig, values, origin="the options")


def add_command(commands: Any) -> None:
    """The subcommand `upcycle`."""
    command = commands.add_parser(
        "upcycle",
        help="start a deeper, conditioned or image-to-video stage from the weights of a smaller one",
        description="Copies layers, widens the input by zeros, adds embedders that add nothing at first. Resolution "
        "and number of frames need no change of weights (RoPE): give the checkpoint itself as run.initial_weights. "
        "Hidden width, heads, patch size and text widths cannot change. A killed command goes on when given again.",
    )
    add = command.add_argument
    add("--in", dest="source", type=Path, required=True, help="weights of a video DiT in any form")
    add_output_options(command)
    add("--ema", action="store_true", help="of a run: take its moving averages")
    add("--like", type=Path, metavar="YAML", help="training configuration whose model section says the new sizes")
    add("--in-channels", type=int, metavar="N", help="widen the patch embedding, e.g. 64 -> 128 for image-to-video")
    add("--use-additional-conditions", action="store_true", help="add embedders of resolution, frames and fps")
    add("--num-layers", type=int, metavar="N", help="more layers by copying, or fewer by dropping evenly")
    add(
        "--depth-schedule",
        choices=sorted(SCHEDULES),
        help="of 3 layers to 6, or 4 to 6 for blocks: interleave 0 0 1 1 2 2 (default), stack 0 1 2 0 1 2, blocks "
        "0 1 2 1 2 3",
    )
    add("--layers", type=_numbers, metavar="0,0,1,1", help="source of every new layer, instead of a schedule")
    add("--zero-new", action="store_true", help="zero the output projections of copies: the function stays the same")
    add_reading_options(command)
    command.set_defaults(run=_run)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text} is not a list of numbers such as 0,0,1,1") from None


def _run(arguments: argparse.Namespace) -> int:
    reading = reading_of(arguments)
    source = open_source(arguments.source, arguments.ema, reading)
    if source.model.kind != "dit":
        raise UserError(f"{source.origin} holds a {KINDS[source.model.kind].title}; only a video DiT can be upcycled")
    check_tensors(source)
    new = new_config(source.model, arguments)
    plan = make_plan(source.model.config, new, arguments.layers, arguments.depth_schedule, arguments.zero_new)
    weights, output = UpcycledWeights(source, plan), output_of(arguments)
    report = upcycle(weights, output, arguments.ema, reading)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(report)))
    else:
        print("\n".join([*table(report), told_output(weights, output)]))
    return 0
