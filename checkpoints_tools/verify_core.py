"""Is a megatron-core checkpoint complete? Its tensors against its model, its chunks against its tensors and files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path

from checkpoints_tools.core_contents import Chunk, CoreContents, Entry
from checkpoints_tools.inspection import RECORDING
from checkpoints_tools.models import read_model
from checkpoints_tools.weights import Model
from checkpoints_tools.wording import shape_text
from megatron_video.errors import UserError
from training.checkpoint_files import STATE_FILE, StoredFile, read_state_values
from training.optimizer_state import MOMENTS

# Written beside a complete checkpoint by the tools.
_BESIDE = {STATE_FILE, *(f"{command}.json" for command in RECORDING)}
OPTIMIZER_ROLES = ("param", *MOMENTS)
UPDATES = "optimizer updates"


def extra_files(folder: Path, recorded: Mapping[str, StoredFile]) -> list[str]:
    """A fault for every file that nobody wrote as a part of the checkpoint."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return [
        f"{name} is not part of the checkpoint: {STATE_FILE} does not list it"
        for name in names
        if name not in recorded and name not in _BESIDE
    ]


def core_faults(folder: Path) -> tuple[Model | None, CoreContents | None, list[str]]:
    """All that is wrong with configuration and metadata; no tensor is read.

    Returns:
        The model and the contents, None where they cannot be told, and the faults.
    """
    model = contents = None
    faults: list[str] = []
    try:
        model = read_model(folder)
    # Whatever a damaged file holds.
    except (UserError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        faults.append(f"its configuration is not usable: {error}")
    try:
        contents = CoreContents(folder)
        faults += _chunk_faults(contents)
        faults += [f"{name} has a place in the files, but is no entry" for name in contents.unlisted]
        if model is not None:
            faults += completeness_faults(contents, model, _keeps_averages(folder))
    except UserError as error:
        faults.append(str(error))
    return model, contents, faults


def completeness_faults(contents: CoreContents, model: Model, keeps_averages: bool) -> Iterator[str]:
    """Tensors that lack, that the model does not have, or of another shape; in weights, averages, optimizer state."""
    yield from tensor_faults("", contents.of_part("weights"), model)
    averages, optimizer = contents.of_part("averages"), contents.of_part("optimizer")
    if averages or keeps_averages:
        yield from tensor_faults("ema.", averages, model)
    if averages and not keeps_averages:
        yield f"it holds averages, but {STATE_FILE} says averages_weights=false: they would not be loaded"
    roles = sorted({entry.role for entry in optimizer.values()} - set(OPTIMIZER_ROLES))
    yield from (f"optimizer state of an unknown kind: {name}" for name in optimizer if optimizer[name].role in roles)
    for role in OPTIMIZER_ROLES if optimizer else ():
        of_role = {name: entry for name, entry in optimizer.items() if entry.role == role}
        yield from tensor_faults(f"optimizer.state.{role}.", of_role, model)
    updates = contents.common.get(UPDATES)
    if optimizer and not (isinstance(updates, int) and updates >= 0):
        yield f"{UPDATES!r}, the count that goes with the optimizer state, is {updates!r} in common.pt"


def tensor_faults(prefix: str, entries: Mapping[str, Entry], model: Model) -> Iterator[str]:
    """Those of one kind of tensors, which have `prefix` before the names of the model's."""
    found = {entry.name: entry for entry in entries.values()}
    for name, shape in model.shapes.items():
        if name not in found:
            yield f"{prefix}{name} is missing"
        elif found[name].shape != tuple(shape):
            yield f"{prefix}{name} has shape {shape_text(found[name].shape)}, its config says {shape_text(shape)}"
    yield from (
        f"{prefix}{name} is unknown: the model has no such tensor" for name in found.keys() - model.shapes.keys()
    )


def _keeps_averages(folder: Path) -> bool:
    try:
        return bool(read_state_values(folder)[0].get("averages_weights"))
    except (ValueError, OSError):
        return False


def _chunk_faults(contents: CoreContents) -> Iterator[str]:
    ranges: dict[str, list[tuple[int, int, str]]] = {}
    for entry in contents.entries.values():
        if entry.dtype is not None:
            yield from _cover_faults(entry)
        for chunk in entry.chunks:
            if not chunk.file:
                yield f"{entry.fqn}: where its piece at {list(chunk.offsets)} lies is not said"
                continue
            ranges.setdefault(chunk.file, []).append((chunk.start, chunk.start + chunk.length, entry.fqn))
    for file, places in sorted(ranges.items()):
        yield from _place_faults(contents.folder / file, file, sorted(places))


def _place_faults(path: Path, file: str, places: list[tuple[int, int, str]]) -> Iterator[str]:
    if not path.is_file():
        yield f"{file} is missing, and {len(places)} pieces with it, of {places[0][2]} and others"
        return
    size = path.stat().st_size
    beyond = [place for place in places if place[1] > size or place[0] < 0]
    if beyond:
        yield f"{file} has {size} bytes, {beyond[-1][2]} ends at {beyond[-1][1]} ({len(beyond)} pieces lie beyond)"
    for (_, end, one), (start, _, other) in pairwise(places):
        if start < end:
            yield f"{file}: {one} and {other} share bytes from {start} on"


def _cover_faults(entry: Entry) -> Iterator[str]:
    """Every value of a tensor must lie in one chunk, and one only."""
    for chunk in entry.chunks:
        ends = [start + size for start, size in zip(chunk.offsets, chunk.sizes, strict=True)]
        if any(end > size for end, size in zip(ends, entry.shape, strict=True)) or any(o < 0 for o in chunk.offsets):
            yield f"{entry.fqn}: its piece at {list(chunk.offsets)} of {shape_text(chunk.sizes)} lies outside of it"
            return
    if twice := next(_overlaps(entry.chunks), None):
        yield f"{entry.fqn}: pieces at {list(twice[0].offsets)} and {list(twice[1].offsets)} overlap"
        return
    held = sum(_volume(chunk) for chunk in entry.chunks)
    if held != entry.elements:
        yield f"{entry.fqn}: its pieces hold {held} of {entry.elements} values"


def _overlaps(chunks: Iterable[Chunk]) -> Iterator[tuple[Chunk, Chunk]]:
    """Pairs that share a value; along the first axis only neighbours are compared."""
    open_ones: list[Chunk] = []
    for chunk in sorted((each for each in chunks if _volume(each)), key=lambda each: each.offsets):
        first = chunk.offsets[0] if chunk.offsets else 0
        open_ones = [each for each in open_ones if not each.offsets or each.offsets[0] + each.sizes[0] > first]
        yield from ((each, chunk) for each in open_ones if _meet(each, chunk))
        open_ones.append(chunk)


def _meet(one: Chunk, other: Chunk) -> bool:
    sides = zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    return all(max(a, b) < min(a + m, b + n) for a, m, b, n in sides)


def _volume(chunk: Chunk) -> int:
    volume = 1
    for size in chunk.sizes:
        volume *= size
    return volume
