"""Writes a megatron-core checkpoint anew: cut otherwise, or with less in it. What is not to change stays equal."""

from __future__ import annotations

import argparse
import json
import resource
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.casts import checked_cast
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_contents import CoreContents, Entry, Part
from checkpoints_tools.core_writer import Beside, Cut, Cuts, write_core
from checkpoints_tools.journal import (
    Journal,
    begin_output,
    check_absent,
    check_room,
    source_identity,
)
from checkpoints_tools.transfer import verify_digests
from checkpoints_tools.verify import verify as check_files
from checkpoints_tools.weights import check_tensors, is_finite
from checkpoints_tools.wording import Tell, bytes_text, tell_on_stderr
from megatron_video.errors import UserError
from training.checkpoint import read_config, read_model_config
from training.checkpoint_files import read_state_values
from training.optimizer_state import EMA_PREFIX

Averages = Literal["keep", "drop", "replace-weights"]
# The order in which a parameter's tensors are stored and, by a run that loads them, read.
_ROLES = ("param", "exp_avg", "exp_avg_sq", "ema")
# Files that Python, torch and the terminal have open beside the output's.
_OTHER_OPEN_FILES = 64


@dataclass(frozen=True)
class Selection:
    """What of a checkpoint is kept, and in which type."""

    optimizer: bool = True
    """Keep the optimizer's state: fp32 weights and moments."""
    averages: Averages = "keep"
    """What becomes of the moving averages: `replace-weights` puts them in the place of the weights."""
    dtype: torch.dtype | None = None
    """Of the weights; None: as they are, averages in their place fp32."""
    allow_lossy: tuple[str, ...] = ()
    """Patterns of our names of weights whose values may be rounded by the cast."""

    def __post_init__(self) -> None:
        """Refuse what would contradict itself.

        Raises:
            UserError: weights replaced beside the optimizer's fp32 copies of them; rounding permitted without a cast.
        """
        if self.allow_lossy and self.dtype is None:
            raise UserError("--allow-lossy permits a cast to change values, but without --dtype nothing is cast")
        if self.averages == "replace-weights" and self.optimizer:
            raise UserError(
                "the optimizer's state belongs to the trained weights, not to their averages: "
                "--ema replace-weights needs --drop-optimizer"
            )


@dataclass(frozen=True)
class Rewriting:
    """What was, or would be, done to a checkpoint."""

    source: str
    output: str
    step: int
    tensors: int
    parameters: int
    """Of the model."""
    bytes: int
    """Of all tensors written."""
    dropped_bytes: int
    """Of tensors left out."""
    files: int
    """That hold tensors."""
    largest_file_bytes: int
    """Of the tensors in it."""
    written: bool
    """Not in a dry run."""
    verified: bool
    """The source compared with its checksums, and every tensor read back and compared with the source's."""
    layout: dict[str, int | bool] = field(default_factory=dict)
    """For which it was cut; empty: as the source is."""

    def __str__(self) -> str:
        """For people."""
        done = "written" if self.written else "would be written (dry run)"
        layout = " ".join(f"{name}{size}" for name, size in self.layout.items() if name != "zero1" and size != 1)
        cut = f", cut for {layout or 'one rank'}{' ZeRO-1' if self.layout['zero1'] else ''}" if self.layout else ""
        dropped = f", {bytes_text(self.dropped_bytes)} left out" if self.dropped_bytes else ""
        checked = ", read back and equal" if self.verified else ", not read back" if self.written else ""
        return (
            f"step {self.step} of {self.source}{cut}: {self.tensors} tensors, {bytes_text(self.bytes)} in "
            f"{self.files} files of up to {bytes_text(self.largest_file_bytes)}{dropped}{checked}\n"
            f"{done}: {self.output}"
        )


class Rewrite:
    """A checkpoint on its way to another one."""

    def __init__(self, folder: Path, selection: Selection) -> None:
        """Look at a checkpoint's metadata.

        Args:
            folder: of one step.
            selection: what is to be kept.

        Raises:
            UserError: it is no DiT's, is damaged, or lacks what is asked for.
        """
        self.folder, self.selection = folder, selection
        self.dit = read_model_config(folder)
        weights = CoreCheckpoint(folder)
        check_tensors(weights)
        self.model, self.contents = weights.model, weights.contents
        self._read_from = dict(self._chosen())
        """Stored name in the output -> entry of the source."""
        self.templates = {fqn: self._template(fqn) for fqn in self._read_from}

    @property
    def step(self) -> int:
        """Of the run."""
        return int(read_state_values(self.folder)[0]["step"])

    @property
    def bytes(self) -> int:
        """Of all tensors of the output."""
        return sum(template.nbytes for template in self.templates.values())

    @property
    def dropped_bytes(self) -> int:
        """Of the tensors that are left out."""
        kept = {entry.fqn for entry in self._read_from.values()}
        tensors = self.contents.of_part("weights", "optimizer", "averages")
        return sum(entry.bytes for fqn, entry in tensors.items() if fqn not in kept)

    def cuts(self, cuts_of: Callable[[Entry], list[Cut]]) -> Cuts:
        """`cuts_of` every tensor of the output, under its name there."""
        return {fqn: cuts_of(entry) for fqn, entry in self._read_from.items()}

    def beside(self) -> Beside:
        """All that is not a tensor: carried over, but for what says that there are averages."""
        state, _ = read_state_values(self.folder)
        # So a resume starts new averages, and sampling says what is missing.
        state["averages_weights"] = any(entry.part == "averages" for entry in self._read_from.values()) and (
            self.selection.averages == "keep"
        )
        objects = {fqn: self.contents.object_bytes(fqn) for fqn in self.contents.of_part("objects")}
        return Beside(read_config(self.folder), state, self.contents.common, objects)

    def tensor(self, fqn: str) -> Tensor:
        """One tensor of the output.

        Raises:
            UserError: it cannot be read, or the type asked for cannot hold it.
        """
        entry, dtype = self._read_from[fqn], self.templates[fqn].dtype
        found = self.contents.tensor(entry.fqn)
        if found.dtype == dtype:
            return found
        where = f"{self.folder}: {entry.fqn}"
        if not is_finite(found):
            raise UserError(f"{where} holds NaN or infinite values")
        return checked_cast(found, dtype, entry.name, where, self.selection.allow_lossy)

    def _chosen(self) -> Iterator[tuple[str, Entry]]:
        averages = self.contents.of_part("averages")
        if self.selection.averages == "replace-weights":
            if averages.keys() != {f"{EMA_PREFIX}.{name}" for name in self.model.shapes}:
                raise UserError(f"{self.folder} holds no averaged weights; train with ema.decay, or leave --ema out")
            yield from ((name, averages[f"{EMA_PREFIX}.{name}"]) for name in self.model.shapes)
            return
        wanted: list[Part] = ["weights"]
        wanted += ["optimizer"] if self.selection.optimizer else []
        wanted += ["averages"] if self.selection.averages == "keep" else []
        by_place = {(entry.name, entry.role): entry for entry in self.contents.of_part(*wanted).values()}
        unknown = sorted(entry.fqn for (name, _), entry in by_place.items() if name not in self.model.shapes)
        if unknown:
            raise UserError(f"{self.folder} holds tensors of no parameter of its model: {', '.join(unknown[:5])}")
        # As they are read: the weights alone by sampling, the rest parameter by parameter by a run that goes on.
        places = [(name, "weight") for name in self.model.shapes]
        places += [(name, role) for name in self.model.shapes for role in _ROLES]
        yield from ((by_place[place].fqn, by_place[place]) for place in places if place in by_place)

    def _template(self, fqn: str) -> Tensor:
        entry = self._read_from[fqn]
        assert entry.dtype is not None
        is_weight = fqn in self.model.shapes
        dtype = self.selection.dtype if is_weight and self.selection.dtype else entry.dtype
        return torch.empty(entry.shape, dtype=dtype, device="meta")


def write_rewritten(
    rewrite: Rewrite,
    output: Path,
    cuts: Cuts,
    identity: Mapping[str, Any],
    record: str,
    *,
    verify: bool,
    dry_run: bool,
    layout: Mapping[str, int | bool] | None = None,
    publish: Callable[[Journal], None] = Journal.publish,
    told_output: Path | None = None,
    tell: Tell = tell_on_stderr,
) -> Rewriting:
    """Write the checkpoint; it gets its name when it is complete and, to verify, read back.

    Args:
        rewrite: what to write.
        output: folder to create; a killed attempt of the same command is continued.
        cuts: how its tensors are cut.
        identity: what the output depends on beside the source and the selection.
        record: name of the file in it that says what was done.
        verify: compare the source's files with their checksums first, read the output back and compare it.
        dry_run: check and count only.
        layout: for the report.
        publish: gives the finished folder its name.
        told_output: that name for the report, where it is not `output`.
        tell: gets a line when a killed attempt was found.

    Raises:
        UserError: the output exists, there is no room for it, the source's files are not what was written, or the disk
            does not give back what is.
    """
    check_absent(output)
    per_file = _bytes_per_file(rewrite.templates, cuts)
    _allow_open_files(len(per_file))
    check_room(output, rewrite.bytes)
    report = Rewriting(
        source=str(rewrite.folder),
        output=str(told_output or output),
        step=rewrite.step,
        tensors=len(rewrite.templates),
        parameters=sum(torch.Size(shape).numel() for shape in rewrite.model.shapes.values()),
        bytes=rewrite.bytes,
        dropped_bytes=rewrite.dropped_bytes,
        files=len(per_file),
        largest_file_bytes=max(per_file.values()),
        written=not dry_run,
        verified=verify and not dry_run,
        layout=dict(layout or {}),
    )
    if dry_run:
        return report
    selection = asdict(rewrite.selection) | {"dtype": str(rewrite.selection.dtype)}
    whole_identity = {"source": source_identity(rewrite.folder), "selection": selection, **identity}
    with begin_output(output, whole_identity, tell) as journal:
        if verify:
            _check_source(rewrite.folder, tell)
        beside = rewrite.beside()
        digests = write_core(
            journal.folder,
            rewrite.model,
            rewrite.templates,
            rewrite.tensor,
            cuts=cuts,
            beside=beside,
            journal=journal,
            title=output.name,
        )
        if verify:
            _verify(CoreContents(journal.folder), digests, beside)
        (journal.folder / record).write_text(json.dumps(asdict(report), indent=1) + "\n", encoding="utf-8")
        publish(journal)
    return report


def _check_source(folder: Path, tell: Tell) -> None:
    # A byte that changed on the disk since would be copied, and get a checksum that says it is right.
    verdict = check_files(folder, tell=tell)
    if not verdict.whole:
        raise UserError(f"{folder} is damaged: {'; '.join(verdict.faults[:5])}")


def _verify(written: CoreContents, digests: Mapping[str, str], beside: Beside) -> None:
    verify_digests(written.tensor, digests, sorted(written.folder.glob("*.distcp")))
    wrong = [fqn for fqn, content in beside.objects.items() if written.object_bytes(fqn) != content]
    if wrong:
        raise UserError(f"{written.folder} does not hold what was written: {', '.join(wrong[:5])}; it was not kept")


def _bytes_per_file(templates: Mapping[str, Tensor], cuts: Cuts) -> dict[int, int]:
    sizes: dict[int, int] = {}
    for fqn, boxes in cuts.items():
        for _, box, number in boxes:
            count = torch.Size(box).numel() * templates[fqn].element_size()
            sizes[number] = sizes.get(number, 0) + count
    return sizes


def _allow_open_files(count: int) -> None:
    """All files are written by turns, and so are open at once."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = count + _OTHER_OPEN_FILES
    if hard != resource.RLIM_INFINITY and need > hard:
        raise UserError(f"{count} files would be open at once, the system allows {hard}; ask for fewer ranks")
    if soft != resource.RLIM_INFINITY and need > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


def add_output_options(command: argparse.ArgumentParser) -> None:
    """What every command has that writes a checkpoint from another one."""
    command.add_argument(
        "--no-verify",
        action="store_true",
        help="skip comparing the source's files with their checksums, and reading the output back",
    )
    command.add_argument("--dry-run", action="store_true", help="check, say what would be written, and write nothing")
    command.add_argument("--json", action="store_true", help="print the report as JSON")
