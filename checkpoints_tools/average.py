"""`megatron-video ckpt average`: the weighted mean of checkpoints, or the moving average their run would have had."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.convert import DTYPES
from checkpoints_tools.derived import (
    Derivation,
    Output,
    add_output_options,
    check_output,
    open_source,
    output_of,
    told_output,
    total_bytes,
    write_derived,
)
from checkpoints_tools.ema_profiles import Mix
from checkpoints_tools.forms import Reading, add_reading_options, open_weights, reading_of
from checkpoints_tools.mixed_weights import MixedWeights, check_sources
from checkpoints_tools.reconstruct import WantedAverage, reconstruct, recorded_step
from checkpoints_tools.weights import Weights
from checkpoints_tools.wording import weighted_path
from megatron_video.errors import UserError


@dataclass(frozen=True)
class Source:
    """A checkpoint and its share of the mean."""

    path: Path
    """Run folder (its newest checkpoint) or one step's folder."""
    weight: float = 1.0
    """Shares are divided by their sum."""

    @staticmethod
    def parse(text: str) -> Source:
        """Read PATH or PATH=WEIGHT.

        Raises:
            UserError: a weight that is not above 0.
        """
        path, weight = weighted_path(text)
        if weight is None:
            return Source(path)
        if not 0 < weight < math.inf:
            raise UserError(f"{text}: the weight {weight:g} must be above 0; leave the checkpoint out instead")
        return Source(path, weight)


@dataclass(frozen=True)
class Average:
    """What was averaged, and where it lies."""

    output: str
    sources: list[dict[str, object]]
    """Folder, step (None if unknown) and share of each."""
    averaged_averages: bool
    """Whether the sources are moving averages that the run kept."""
    wanted: dict[str, float | None] | None
    """The moving average that was to be reconstructed; None: a weighted mean."""
    residual: float | None
    """Of the wanted profile, the part that no mix of the stored averages reaches (least squares)."""
    before_first: float | None
    """Of the wanted average, the part before the first source."""
    widest_gap: int | None
    """Most updates between two sources, whose weights are taken to lie on a line there."""
    gap_share: float | None
    """Of the wanted average, the part in that gap."""
    amplification: float
    """By how much rounding errors of the sources grow."""
    tensors: int
    parameters: int
    bytes: int
    verified: bool


@dataclass(frozen=True)
class Options:
    """What kind of mean."""

    ema: bool = False
    """Take the moving averages that the run kept instead of the trained weights."""
    wanted: WantedAverage | None = None
    """A moving average to reconstruct; None: the weighted mean."""
    dtype: torch.dtype | None = None
    """Of the output; None: each tensor's, as the first source's trained weights have it."""
    reading: Reading = field(default_factory=Reading)
    """Of the sources."""


class Averaging:
    """One average; everything that needs no values is checked when it is made.

    Args:
        sources: at least two checkpoints of one model, in any form.
        output: where it goes.
        options: what kind of mean.

    Raises:
        UserError: the output exists or has no room; too few, equal or different sources; no such moving average.
    """

    def __init__(self, sources: Sequence[Source], output: Output, options: Options) -> None:
        self.output, self.options = output, options
        opened: list[Weights] = [open_source(source.path, options.ema, options.reading) for source in sources]
        check_sources(opened)
        # The averages are fp32; the model they are for has its own type.
        first = open_weights(sources[0].path, options.reading) if options.ema else opened[0]
        templates = {name: each.to(options.dtype) for name, each in sorted(first.templates.items())}
        self.opened, self.mix = _mix(opened, [source.weight for source in sources], options)
        self.mean = MixedWeights(self.opened, self.mix.shares, templates)
        check_output(self.mean, output)

    def report(self) -> Average:
        """What is done, or would be."""
        templates = self.mean.templates.values()
        return Average(
            output=str(self.output.path),
            sources=[
                {"checkpoint": str(source.origin), "step": recorded_step(source), "share": share}
                for source, share in zip(self.opened, self.mix.shares, strict=True)
            ],
            averaged_averages=self.options.ema,
            wanted=asdict(self.options.wanted) if self.options.wanted else None,
            residual=self.mix.residual,
            before_first=self.mix.before_first,
            widest_gap=self.mix.widest_gap,
            gap_share=self.mix.gap_share,
            amplification=self.mix.amplification,
            tensors=len(templates),
            parameters=sum(each.numel() for each in templates),
            bytes=total_bytes(self.mean),
            verified=self.output.verify and not self.output.dry_run,
        )

    def write(self) -> None:
        """Write it, with what it was made of in average.json; see derived.write_derived."""
        settings = {"shares": self.mix.shares, "ema": self.options.ema, "dtype": str(self.options.dtype)}
        derivation = Derivation("average", [source.origin for source in self.opened], settings, self.options.reading)
        write_derived(self.mean, self.output, derivation, lambda: asdict(self.report()))


_DEFAULTS = Options()


def average(sources: Sequence[Source], output: Output, options: Options = _DEFAULTS) -> Average:
    """Average checkpoints, tensor by tensor; see Averaging."""
    averaging = Averaging(sources, output, options)
    if not output.dry_run:
        averaging.write()
    return averaging.report()


def _mix(opened: list[Weights], weights: Sequence[float], options: Options) -> tuple[list[Weights], Mix]:
    if options.wanted is None:
        return opened, Mix([weight / sum(weights) for weight in weights])
    if any(weight != 1 for weight in weights):
        raise UserError("a moving average sets the shares itself: leave the =WEIGHT of the sources out")
    return reconstruct(opened, options.wanted, options.ema)


def add_command(commands: Any) -> None:
    """The subcommand `average`."""
    command = commands.add_parser(
        "average",
        help="weighted mean of several checkpoints' weights, or the EMA that their run would have had",
        description="Tensor by tensor, summed in fp32, read back and compared; training and sampling load the result. "
        "Sources are of any form; a moving average needs checkpoints that one run wrote. A killed command goes on.",
    )
    command.add_argument("sources", nargs="+", metavar="RUN_OR_STEP[=WEIGHT]", help="weights count relatively; none: 1")
    add_output_options(command)
    command.add_argument("--ema", action="store_true", help="of the moving averages instead of the trained weights")
    wanted = command.add_mutually_exclusive_group()
    wanted.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help="reconstruct the exponential moving average with this decay a step, up to the newest source: from trained "
        "weights by lines between checkpoints, with --ema by least squares from the averages that the run kept",
    )
    wanted.add_argument(
        "--ema-width",
        type=float,
        metavar="W",
        help="the same for a power-function average of this width relative to the run (Karras et al. 2024), e.g. 0.1",
    )
    command.add_argument(
        "--tolerance",
        type=float,
        metavar="SHARE",
        help="most of the moving average that the sources may leave open (default 0.25)",
    )
    command.add_argument("--dtype", choices=sorted(DTYPES), help="of the output; the first checkpoint's unless given")
    add_reading_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    sources = [Source.parse(text) for text in arguments.sources]
    wanted = None
    given = {} if arguments.tolerance is None else {"tolerance": arguments.tolerance}
    if arguments.ema_decay is not None or arguments.ema_width is not None:
        wanted = WantedAverage(arguments.ema_decay, arguments.ema_width, **given)
    elif given:
        raise UserError("--tolerance is for --ema-decay and --ema-width: a mean leaves nothing open")
    options = Options(
        ema=arguments.ema, wanted=wanted, dtype=DTYPES.get(arguments.dtype), reading=reading_of(arguments)
    )
    averaging = Averaging(sources, output_of(arguments), options)
    if not arguments.dry_run:
        averaging.write()
    report = averaging.report()
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    for source in report.sources:
        print(f"{source['share']:.4f} x {source['checkpoint']}")
    print("\n".join([*_told_errors(report), told_output(averaging.mean, averaging.output)]))
    return 0


def _told_errors(report: Average) -> list[str]:
    lines = []
    if report.before_first:
        lines.append(f"{report.before_first:.2%} of the wanted average lie before the first; it stands for them")
    if report.gap_share:
        lines.append(
            f"{report.gap_share:.2%} of the wanted average lie in the widest gap between sources, {report.widest_gap} "
            "updates: a line from one to the other stands for them"
        )
    if report.residual is not None:
        lines.append(f"{report.residual:.2%} of the wanted profile is out of reach of the stored averages")
    if report.amplification > 1.01:
        lines.append(f"rounding errors of the sources grow {report.amplification:.1f}-fold (shares below 0)")
    return lines
