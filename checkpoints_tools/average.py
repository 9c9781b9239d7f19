"""`megatron-video ckpt average`: the weighted mean of checkpoints, or the moving average their run would have had."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.derived import write_derived
from checkpoints_tools.ema_profiles import Mix
from checkpoints_tools.forms import open_weights
from checkpoints_tools.mixed_weights import MixedWeights, check_sources
from checkpoints_tools.reconstruct import WantedAverage, reconstruct, recorded_step
from checkpoints_tools.weights import Weights
from megatron_video.errors import UserError

RECORD = "average.json"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
        path, separator, weight = text.rpartition("=")
        # A folder may be named runs/lr=1e-4.
        if not separator or Path(text).exists():
            return Source(Path(text))
        try:
            value = float(weight)
        except ValueError:  # the sign belongs to the path
            return Source(Path(text))
        if not 0 < value < math.inf:
            raise UserError(f"{text}: the weight {weight} must be above 0; leave the checkpoint out instead")
        return Source(Path(path), value)


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
    amplification: float
    """By how much rounding errors of the sources grow."""
    tensors: int
    parameters: int
    bytes: int
    verified: bool


@dataclass(frozen=True)
class Options:
    """How to average."""

    ema: bool = False
    """Take the moving averages that the run kept instead of the trained weights."""
    wanted: WantedAverage | None = None
    """A moving average to reconstruct; None: the weighted mean."""
    dtype: torch.dtype | None = None
    """Of the output; None: each tensor's, as the first source's trained weights have it."""
    verify: bool = True
    """Read the output back."""
    dry_run: bool = False
    """Check all that needs no values, and write nothing."""


_DEFAULTS = Options()


def average(sources: Sequence[Source], output: Path, options: Options = _DEFAULTS) -> Average:
    """Write the mean as a checkpoint of step 0, one tensor after the other; it is read back before it gets its name.

    Args:
        sources: at least two checkpoints of one model, in any form.
        output: folder to create.
        options: what kind of mean, and how.

    Raises:
        UserError: the output exists; too few, equal or different sources; a tensor that is not finite.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --out or remove it")
    opened: list[Weights] = [_open(source.path, options.ema) for source in sources]
    check_sources(opened)
    if options.wanted is None:
        total = sum(source.weight for source in sources)
        mix = Mix([source.weight / total for source in sources])
    else:
        if any(source.weight != 1 for source in sources):
            raise UserError("a moving average sets the shares itself: leave the =WEIGHT of the sources out")
        opened, mix = reconstruct(opened, options.wanted, options.ema)
    # The averages are fp32; the model they are for has its own type.
    trained = open_weights(sources[0].path) if options.ema else opened[0]
    templates = {name: each.to(options.dtype) for name, each in sorted(trained.templates.items())}
    mixed = MixedWeights(opened, mix.shares, templates)
    record = _record(output, opened, mix, mixed, options)
    if not options.dry_run:
        write_derived(mixed, output, RECORD, asdict(record), verify=options.verify)
    return record


def _open(path: Path, ema: bool) -> Weights:
    return CoreCheckpoint(path, averaged=True) if ema else open_weights(path)


def _record(
    output: Path, sources: Sequence[Weights], mix: Mix, mixed: MixedWeights, options: Options = _DEFAULTS
) -> Average:
    described: list[dict[str, object]] = [
        {"checkpoint": str(source.origin), "step": recorded_step(source), "share": share}
        for source, share in zip(sources, mix.shares, strict=True)
    ]
    templates = mixed.templates.values()
    return Average(
        output=str(output),
        sources=described,
        averaged_averages=options.ema,
        wanted=asdict(options.wanted) if options.wanted else None,
        residual=mix.residual,
        before_first=mix.before_first,
        amplification=mix.amplification,
        tensors=len(templates),
        parameters=sum(each.numel() for each in templates),
        bytes=sum(each.nbytes for each in templates),
        verified=options.verify and not options.dry_run,
    )


def add_command(commands: Any) -> None:
    """The subcommand `average`."""
    command = commands.add_parser(
        "average",
        help="weighted mean of several checkpoints' weights, or the EMA that their run would have had",
        description="Tensor by tensor, summed in fp32, read back and compared; training and sampling load the result. "
        "Sources are of any form; a moving average needs checkpoints that one run wrote.",
    )
    command.add_argument("sources", nargs="+", metavar="RUN_OR_STEP[=WEIGHT]", help="weights count relatively; none: 1")
    command.add_argument("--out", type=Path, required=True, help="folder to create; an existing one is refused")
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
        default=WantedAverage.tolerance,
        metavar="SHARE",
        help="most of the moving average that the sources may leave open (default 0.25)",
    )
    command.add_argument("--dtype", choices=sorted(DTYPES), help="of the output; the first checkpoint's unless given")
    command.add_argument("--no-verify", action="store_true", help="skip reading the output back and comparing hashes")
    command.add_argument("--dry-run", action="store_true", help="check the sources, show their shares, write nothing")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    sources = [Source.parse(text) for text in arguments.sources]
    wanted = None
    if arguments.ema_decay is not None or arguments.ema_width is not None:
        wanted = WantedAverage(arguments.ema_decay, arguments.ema_width, arguments.tolerance)
    options = Options(
        ema=arguments.ema,
        wanted=wanted,
        dtype=DTYPES.get(arguments.dtype),
        verify=not arguments.no_verify,
        dry_run=arguments.dry_run,
    )
    report = average(sources, arguments.out, options)
    print(json.dumps(asdict(report)) if arguments.json else _told(report, arguments.dry_run))
    return 0


def _told(report: Average, dry_run: bool) -> str:
    lines = [f"{source['share']:.4f} x {source['checkpoint']}" for source in report.sources]
    if report.before_first:
        lines.append(f"{report.before_first:.2%} of the wanted average lie before the first; it stands for them")
    if report.residual is not None:
        lines.append(f"{report.residual:.2%} of the wanted profile is out of reach of the stored averages")
    if report.amplification > 1.01:
        lines.append(f"rounding errors of the sources grow {report.amplification:.1f}-fold (shares below 0)")
    size = f"{report.tensors} tensors, {report.parameters:,} parameters, {report.bytes / 1e9:.3f} GB"
    if dry_run:
        return "\n".join([*lines, f"would write: {report.output}, {size}"])
    checked = "read back and equal" if report.verified else "not read back"
    return "\n".join([*lines, f"written: {report.output}, {size}, {checked}"])
