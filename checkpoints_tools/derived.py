"""Weights that are made from others, tensor by tensor, written with a record of what they were made of."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_writer import Beside, CoreSink
from checkpoints_tools.forms import Reading, find_form, open_weights
from checkpoints_tools.journal import begin_output, check_absent, check_room, source_identity
from checkpoints_tools.models import KINDS, shard_limit
from checkpoints_tools.released import released_config, write_config
from checkpoints_tools.safetensors_files import GIGABYTE, SafetensorsSink
from checkpoints_tools.transfer import transfer, verify_digests
from checkpoints_tools.weights import Weights, is_finite
from megatron_video.errors import UserError

Target = Literal["core", "released"]


@dataclass(frozen=True)
class Output:
    """Where derived weights go."""

    path: Path
    """Folder to create."""
    to: Target = "core"
    """A megatron-core checkpoint of step 0, or a released folder."""
    verify: bool = True
    """Read it back from the disk."""
    dry_run: bool = False
    """Check all that needs no values, and write nothing."""


@dataclass(frozen=True)
class Derivation:
    """How weights were made; the output depends on nothing else."""

    command: str
    """The subcommand; the record beside the output is called COMMAND.json."""
    sources: Sequence[Path]
    settings: Mapping[str, Any]
    """Plain values."""
    reading: Reading = field(default_factory=Reading)
    """Of the sources."""

    @property
    def identity(self) -> dict[str, Any]:
        """As JSON keeps it."""
        reading = {name: str(value) for name, value in vars(self.reading).items() if name != "tell"}
        source = source_identity(*self.sources, *self.reading.files)
        return {"command": self.command, "source": source, "reading": reading, **self.settings}


def check_output(weights: Weights, output: Output) -> None:
    """What can be checked without values.

    Raises:
        UserError: the output exists, has no room, or the released form cannot hold the model.
    """
    check_absent(output.path)
    if output.to == "released":
        released_config(weights.model, weights.templates, tell=lambda line: None)
    check_room(output.path, total_bytes(weights))


def write_derived(
    weights: Weights, output: Output, derivation: Derivation, record: Callable[[], Mapping[str, Any]]
) -> None:
    """Write one tensor after the other; the output gets its name when all of it is there and read back.

    A killed command goes on when it is given again with the same sources and settings.

    Args:
        weights: what to write.
        output: see `check_output`.
        derivation: what a killed attempt must have in common with this one.
        record: asked when all tensors are written: what COMMAND.json says, plain values.

    Raises:
        UserError: a tensor that is not finite, or that the disk does not give back.
        OSError: naming the file that could not be written.
    """
    with begin_output(output.path, derivation.identity | {"to": output.to}) as journal:
        sink = _sink(journal.folder, weights, output.to)
        digests = transfer(sink, lambda name: _finite(weights, name), journal, f"write {output.path.name}")
        if output.to == "released":
            write_config(journal.folder, weights.model, weights.templates)
        if output.verify:
            verify_digests(open_weights(journal.folder).tensor, digests, sink.paths())
        path = journal.folder / f"{derivation.command}.json"
        path.write_text(json.dumps(record(), indent=1) + "\n", encoding="utf-8")
        journal.publish()


def open_source(path: Path, averaged: bool, reading: Reading) -> Weights:
    """Weights of any form; or the moving averages that a run keeps beside them.

    Raises:
        UserError: nothing there that is known, or no averages.
    """
    if averaged and find_form(path, reading.form).name != "core":
        raise UserError(f"--ema: {path} is no megatron-core checkpoint; only those keep averages")
    return CoreCheckpoint(path, averaged=True) if averaged else open_weights(path, reading)


def total_bytes(weights: Weights) -> int:
    """Of all tensors."""
    return sum(template.nbytes for template in weights.templates.values())


def add_output_options(command: argparse.ArgumentParser) -> None:
    """The options of a command that writes derived weights."""
    command.add_argument("--out", type=Path, required=True, help="folder to create; an existing one is refused")
    command.add_argument(
        "--to", choices=["core", "released"], default="core", help="form of the output (default: megatron-core)"
    )
    command.add_argument("--no-verify", action="store_true", help="skip reading the output back and comparing hashes")
    command.add_argument("--dry-run", action="store_true", help="check all but values, show the plan, write nothing")
    command.add_argument("--json", action="store_true", help="print the report as JSON")


def output_of(arguments: argparse.Namespace) -> Output:
    """What `add_output_options` took."""
    return Output(arguments.out, arguments.to, verify=not arguments.no_verify, dry_run=arguments.dry_run)


def told_output(weights: Weights, output: Output) -> str:
    """A line for the end of a report."""
    templates = weights.templates.values()
    parameters = sum(template.numel() for template in templates)
    size = f"{len(templates)} tensors, {parameters:,} parameters, {total_bytes(weights) / GIGABYTE:.3f} GB"
    if output.dry_run:
        return f"would be written: {output.path}, {size}; nothing was"
    return f"written: {output.path}, {size}, {'read back and equal' if output.verify else 'not read back'}"


def _sink(folder: Path, weights: Weights, to: Target) -> CoreSink | SafetensorsSink:
    if to == "core":
        return CoreSink(folder, weights.templates, Beside.of_model(weights.model))
    kind, names = KINDS[weights.model.kind], weights.model.released
    templates = {name: weights.templates[name] for name in names}
    return SafetensorsSink(folder, templates, kind.stem, shard_limit(kind, None), names)


def _finite(weights: Weights, name: str) -> Tensor:
    tensor = weights.tensor(name)
    if not is_finite(tensor):
        raise UserError(f"{weights.origin}: {weights.stored_name(name)} holds NaN or infinite values as {tensor.dtype}")
    return tensor
