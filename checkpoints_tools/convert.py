"""`megatron-video ckpt convert`: weights of any form into another one, verified bit for bit, by way of our names."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.casts import checked_cast
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_writer import Beside, CoreSink
from checkpoints_tools.forms import (
    Reading,
    adapted,
    add_lora_option,
    add_reading_options,
    find_form,
    open_weights,
    reading_of,
)
from checkpoints_tools.journal import Journal, begin_output, check_absent, check_room, source_identity
from checkpoints_tools.models import KINDS, shard_limit
from checkpoints_tools.released import CONFIG_KEY, released_config, write_config
from checkpoints_tools.released_config import is_same_model
from checkpoints_tools.safetensors_files import GIGABYTE, SUFFIX, SafetensorsSink
from checkpoints_tools.transfer import transfer, verify_digests
from checkpoints_tools.weights import Weights, check_tensors, is_finite, total_digest
from megatron_video.errors import UserError

Target = Literal["core", "released", "file"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """What is to come out."""

    to: Target | None = None
    """None: a file if the output's name ends in .safetensors; else released from core, and core from all others."""
    averaged: bool = False
    """The exponential moving average in a megatron-core checkpoint instead of its weights."""
    dtype: torch.dtype | None = None
    """Of all floating-point tensors; None: each keeps its own."""
    allow_lossy: tuple[str, ...] = ()
    """Patterns of our names of tensors whose values may change by the cast."""
    shard_bytes: int | None = None
    """Largest file of a released folder; None: as released."""
    reading: Reading = field(default_factory=Reading)
    """Of the source."""


@dataclass(frozen=True)
class Conversion:
    """What a conversion did, or would do."""

    source: str
    output: str
    direction: str
    """As "core -> released"."""
    kind: str
    """Key of KINDS."""
    tensors: int
    parameters: int
    bytes: int
    """Of the tensors in the output."""
    cast: int
    """Tensors that change their dtype."""
    verified: bool
    digest: str | None
    """XXH3-128 over all tensors that were written, by our names; None if nothing was."""
    seconds: float


class Converter:
    """One conversion: everything that needs no tensor is checked when it is made."""

    def __init__(self, source_path: Path, output: Path, options: Options) -> None:
        """Check names, shapes, sizes and disk space.

        Raises:
            UserError: the output exists; options contradict; a tensor is missing, unknown or of a wrong shape; the
                released form cannot hold the model; there is no room.
        """
        check_absent(output)
        self.output, self.options = output, options
        self.source_form, self.source = _open(source_path, options)
        self.to = _target(output, self.source_form, options)
        check_tensors(self.source)
        self.model = self.source.model
        self.templates = {
            name: _cast_template(template, options.dtype) for name, template in self.source.templates.items()
        }
        if self.to != "core":
            released_config(self.model, self.templates, tell=lambda line: None)
            shard_limit(KINDS[self.model.kind], self.options.shard_bytes)
        check_room(output, self.bytes)

    @property
    def bytes(self) -> int:
        """Of the tensors in the output."""
        return sum(template.nbytes for template in self.templates.values())

    def run(self, verify: bool = True) -> Mapping[str, str]:
        """Write the output; returns our name -> digest.

        Raises:
            UserError: a tensor is not finite, or a cast would change it; what was written cannot be read back.
            OSError: naming the file that could not be written.
        """
        with begin_output(self.output, self._identity()) as journal:
            sink = self._sink(journal.folder)
            digests = transfer(sink, self._tensor, journal, f"convert {self.source.origin}")
            if self.to == "released":
                write_config(journal.folder, self.model, self.templates)
            if verify:
                self._verify(journal, digests, sink.paths())
            journal.publish(self.output.name if self.to == "file" else None)
        return digests

    def report(self, digests: Mapping[str, str] | None, verified: bool, seconds: float) -> Conversion:
        """What was done; nothing yet without `digests`."""
        before = self.source.templates
        return Conversion(
            source=str(self.source.origin),
            output=str(self.output),
            direction=f"{self.source_form} -> {self.to}",
            kind=self.model.kind,
            tensors=len(self.templates),
            parameters=sum(template.numel() for template in self.templates.values()),
            bytes=self.bytes,
            cast=sum(before[name].dtype != template.dtype for name, template in self.templates.items()),
            verified=verified,
            digest=None if digests is None else total_digest(digests),
            seconds=round(seconds, 3),
        )

    def _identity(self) -> dict[str, Any]:
        options = asdict(replace(self.options, reading=replace(self.options.reading, tell=print)))
        # Functions and types by their names: JSON keeps it.
        values = json.loads(json.dumps(options, default=str))
        values["reading"].pop("tell")
        extra = self.options.reading.files
        return {"command": "convert", "source": source_identity(self.source.origin, *extra), "to": self.to, **values}

    def _sink(self, folder: Path) -> CoreSink | SafetensorsSink:
        if self.to == "core":
            return CoreSink(folder, self.templates, Beside.of_model(self.model))
        kind, names = KINDS[self.model.kind], self.model.released
        stem = self.output.name.removesuffix(SUFFIX) if self.to == "file" else kind.stem
        limit = None if self.to == "file" else shard_limit(kind, self.options.shard_bytes)
        # One file alone has no config.json beside it.
        metadata = {CONFIG_KEY: released_config(self.model, self.templates)} if self.to == "file" else {}
        # In the released order, so that the files are cut where the released ones are.
        return SafetensorsSink(folder, {name: self.templates[name] for name in names}, stem, limit, names, metadata)

    def _tensor(self, name: str) -> Tensor:
        tensor = self.source.tensor(name)
        if not is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{self.source.origin}: {self.source.stored_name(name)} holds NaN or infinite values: "
                f"{count} of {tensor.numel()}"
            )
        where = f"{self.source.origin}: {self.source.stored_name(name)}"
        return checked_cast(tensor, self.templates[name].dtype, name, where, self.options.allow_lossy)

    def _verify(self, journal: Journal, digests: Mapping[str, str], files: Sequence[Path]) -> None:
        written = open_weights(journal.folder / self.output.name if self.to == "file" else journal.folder)
        check_tensors(written)
        if not is_same_model(written.model, self.model):
            raise UserError(f"verification failed: {written.origin} says that it holds another model; it was not kept")
        verify_digests(written.tensor, digests, files)


def convert(
    source_path: Path, output: Path, *, options: Options = Options(), verify: bool = True, dry_run: bool = False
) -> Conversion:
    """Convert weights; the output appears under its name only when it is complete and verified.

    A killed conversion goes on when it is called again with the same arguments.

    Args:
        source_path: of any form (forms.FORMS).
        output: folder, or file ending in .safetensors, to create.
        options: what is to come out.
        verify: read the output back from the disk.
        dry_run: only check what can be checked without reading tensors.

    Raises:
        UserError: see Converter; nothing was written then.
        OSError: naming the file that could not be written.
    """
    start = time.monotonic()
    converter = Converter(source_path, output, options)
    if dry_run:
        return converter.report(None, False, time.monotonic() - start)
    digests = converter.run(verify)
    return converter.report(digests, verify, time.monotonic() - start)


def _open(path: Path, options: Options) -> tuple[str, Weights]:
    if not options.averaged:
        weights = open_weights(path, options.reading)
        return find_form(path, options.reading.form).name, weights
    if not path.exists():
        raise UserError(f"{path} is not there")
    form = find_form(path, options.reading.form).name
    if form != "core":
        raise UserError(f"--ema: {path} is of the form {form}; only megatron-core checkpoints keep averages")
    return form, adapted(CoreCheckpoint(path, averaged=True), options.reading)


def _target(output: Path, source_form: str, options: Options) -> Target:
    is_file = output.suffix == SUFFIX
    chosen: Target = "file" if is_file else "released" if source_form == "core" else "core"
    to = options.to or chosen
    if (to == "file") != is_file:
        raise UserError(f"--to {to} does not fit --out {output}: a file's name ends in {SUFFIX}, a folder's does not")
    if options.shard_bytes is not None and to != "released":
        raise UserError(f"--max-shard-gb cuts released folders; the output here is {to}, which is one file")
    if options.shard_bytes is not None and options.shard_bytes <= 0:
        raise UserError(f"--max-shard-gb {options.shard_bytes / GIGABYTE:g} must be above 0")
    if options.allow_lossy and options.dtype is None:
        raise UserError("--allow-lossy permits a cast to change values, but without --dtype nothing is cast")
    return to


def _cast_template(template: Tensor, dtype: torch.dtype | None) -> Tensor:
    return template.to(dtype) if dtype is not None and template.is_floating_point() else template


def add_command(commands: Any) -> None:
    """The subcommand `convert`."""
    command = commands.add_parser(
        "convert",
        help="weights of any form -> megatron-core checkpoint, released folder, or one safetensors file",
        description="Tensor by tensor and bit for bit. A killed conversion goes on when given again.",
    )
    command.add_argument("--in", dest="source", type=Path, required=True, help="file, run, step or folder of any form")
    command.add_argument("--out", type=Path, required=True, help="folder, or file NAME.safetensors, to create")
    command.add_argument(
        "--to",
        choices=["core", "released", "file"],
        help="default: file if --out ends in .safetensors, else released from core, and core from anything else",
    )
    command.add_argument("--ema", action="store_true", help="of a run: the moving average instead of the weights")
    command.add_argument("--dtype", choices=sorted(DTYPES), help="cast to; default: every tensor keeps its own")
    command.add_argument(
        "--allow-lossy",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors (our names, as 'layers.*') whose values the cast may change; others are refused",
    )
    command.add_argument("--max-shard-gb", type=float, help="largest released file, GB (default: as released)")
    command.add_argument("--dry-run", action="store_true", help="check names, shapes, sizes and room; write nothing")
    command.add_argument("--no-verify", action="store_true", help="do not read the output back")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
    add_lora_option(command)
    add_reading_options(command)
    command.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    options = Options(
        to=arguments.to,
        averaged=arguments.ema,
        dtype=DTYPES.get(arguments.dtype),
        allow_lossy=tuple(arguments.allow_lossy),
        shard_bytes=None if arguments.max_shard_gb is None else int(arguments.max_shard_gb * GIGABYTE),
        reading=reading_of(arguments),
    )
    if arguments.dry_run and arguments.no_verify:
        raise UserError("--dry-run writes nothing that --no-verify could leave unread; give one of them")
    report = convert(
        arguments.source, arguments.out, options=options, verify=not arguments.no_verify, dry_run=arguments.dry_run
    )
    if arguments.json:
        print(json.dumps(asdict(report)))
        return 0
    print(
        f"{report.direction}: {KINDS[report.kind].title}, {report.tensors} tensors, {report.parameters:,} parameters, "
        f"{report.bytes / GIGABYTE:.3f} GB" + (f", {report.cast} tensors cast" if report.cast else "")
    )
    if arguments.dry_run:
        print(f"would be written: {report.output}; nothing was")
        return 0
    checked = "read back and equal" if report.verified else "not read back"
    print(f"written: {report.output}, {checked}, {report.seconds:.1f} s, xxh3 {report.digest}")
    return 0
