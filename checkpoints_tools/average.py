"""`megatron-video ckpt average`: the weighted mean of several checkpoints' weights, or of their averages."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.convert import WRITING_SUFFIX
from checkpoints_tools.core import CoreCheckpoint, stream_core
from checkpoints_tools.weights import digest
from megatron_video.config_io import config_to_dict
from megatron_video.errors import UserError
from megatron_video.files import rename_durably
from training.checkpoint import read_state

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
        if not 0 < value < float("inf"):
            raise UserError(f"{text}: the weight {weight} must be above 0; leave the checkpoint out instead")
        return Source(Path(path), value)


@dataclass(frozen=True)
class Average:
    """What was averaged, and where it lies."""

    output: str
    sources: list[dict[str, object]]
    """Folder, step and share of each."""
    averaged_averages: bool
    """Whether the means are of moving averages."""
    tensors: int
    parameters: int


def average(sources: Sequence[Source], output: Path, ema: bool = False, dtype: torch.dtype | None = None) -> Average:
    """Write the mean as a checkpoint of step 0, one tensor after the other; it is read back before it gets its name.

    Args:
        sources: at least two checkpoints of one model.
        output: folder to create.
        ema: average the moving averages instead of the trained weights.
        dtype: of the output; None: each tensor's, as the first source's trained weights have it.

    Raises:
        UserError: the output exists; too few, equal or different sources; a tensor that is not finite.
    """
    if output.exists():
        raise UserError(f"{output} exists already; choose another --out or remove it")
    mean = _Mean([CoreCheckpoint(source.path, averaged=ema) for source in sources], [s.weight for s in sources])
    # The averages are fp32; the model they are for has its own type.
    weights = CoreCheckpoint(sources[0].path)
    templates = {name: template.to(dtype) for name, template in sorted(weights.templates.items())}
    writing = output.with_name(output.name + WRITING_SUFFIX)
    shutil.rmtree(writing, ignore_errors=True)
    writing.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(templates), desc="average", disable=None) as bar:

        def next_tensor(name: str) -> Tensor:
            bar.update()
            return mean.tensor(name, templates[name])

        stream_core(writing, weights.config, templates, next_tensor)
    mean.verify(CoreCheckpoint(writing))
    parameters = sum(template.numel() for template in templates.values())
    record = Average(str(output), mean.describe(), ema, len(templates), parameters)
    (writing / RECORD).write_text(json.dumps(asdict(record), indent=1), encoding="utf-8")
    rename_durably(writing, output)
    return record


class _Mean:
    """The weighted mean of the tensors of checkpoints, and what was made of it."""

    def __init__(self, checkpoints: Sequence[CoreCheckpoint], weights: Sequence[float]) -> None:
        _check_sources(checkpoints)
        self._checkpoints = checkpoints
        self._shares = [weight / sum(weights) for weight in weights]
        self._digests: dict[str, str] = {}

    def tensor(self, name: str, template: Tensor) -> Tensor:
        """The mean of one tensor, summed in fp32, in the template's type."""
        # bf16 would round after every checkpoint; it is rounded once, at the end.
        total = torch.zeros(template.shape, dtype=torch.float32)
        for checkpoint, share in zip(self._checkpoints, self._shares, strict=True):
            found = checkpoint.tensor(name)
            if not torch.isfinite(found).all():
                raise UserError(f"{checkpoint.folder}: {name} holds NaN or infinite values")
            total.add_(found.float(), alpha=share)
        result = total.to(template.dtype)
        self._digests[name] = digest(result)
        return result

    def verify(self, written: CoreCheckpoint) -> None:
        """Compare what lies on the disk with what was made.

        Raises:
            UserError: a tensor that differs.
        """
        wrong = [name for name, expected in self._digests.items() if digest(written.tensor(name)) != expected]
        if wrong:
            raise UserError(f"{written.folder} does not hold what was written: {', '.join(wrong[:5])}; it was not kept")

    def describe(self) -> list[dict[str, object]]:
        """Folder, step and share of each checkpoint."""
        return [
            {"checkpoint": str(checkpoint.folder), "step": read_state(checkpoint.folder).step, "share": share}
            for checkpoint, share in zip(self._checkpoints, self._shares, strict=True)
        ]


def _check_sources(checkpoints: Sequence[CoreCheckpoint]) -> None:
    folders = [checkpoint.folder.resolve() for checkpoint in checkpoints]
    if len(folders) < 2:
        raise UserError("one checkpoint has no mean: give two or more, e.g. RUN/checkpoints/step_*")
    for folder in folders:
        if folders.count(folder) > 1:
            raise UserError(f"{folder} is given twice (a run folder is its newest checkpoint); give it one weight")
    first, *others = checkpoints
    ours = config_to_dict(first.config)
    for other in others:
        theirs = config_to_dict(other.config)
        wrong = [f"{name} {theirs[name]} and {ours[name]}" for name in ours if theirs[name] != ours[name]]
        if wrong:
            raise UserError(f"{other.folder} and {first.folder} hold other models: {'; '.join(wrong)}")
        if other.templates.keys() != first.templates.keys():
            differing = ", ".join(sorted(other.templates.keys() ^ first.templates.keys())[:5])
            raise UserError(f"{other.folder} and {first.folder} hold other tensors: {differing}")


def add_command(commands: Any) -> None:
    """The subcommand `average`."""
    command = commands.add_parser(
        "average",
        help="weighted mean of several checkpoints' weights, as after fine-tuning on several sets",
        description="Tensor by tensor, summed in fp32, read back and compared; training and sampling load the result.",
    )
    command.add_argument("sources", nargs="+", metavar="RUN_OR_STEP[=WEIGHT]", help="weights count relatively; none: 1")
    command.add_argument("--out", type=Path, required=True, help="folder to create; an existing one is refused")
    command.add_argument("--ema", action="store_true", help="of the moving averages instead of the trained weights")
    command.add_argument("--dtype", choices=sorted(DTYPES), help="of the output; the first checkpoint's unless given")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    sources = [Source.parse(text) for text in arguments.sources]
    report = average(sources, arguments.out, arguments.ema, DTYPES.get(arguments.dtype))
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    for source in report.sources:
        print(f"{source['share']:.4f} x {source['checkpoint']}")
    print(f"written: {report.output}, {report.tensors} tensors, {report.parameters:,} parameters, read back and equal")
    return 0
