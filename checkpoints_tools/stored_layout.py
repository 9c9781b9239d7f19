"""What the files and cuts of a megatron-core checkpoint tell of the ranks that wrote it, without its configuration."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from checkpoints_tools.core_contents import CoreContents, Entry

_RANK_FILE = re.compile(r"__(\d+)_(\d+)\.distcp")
_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class StoredLayout:
    """Counts are facts, of the files; sizes of groups of ranks are guesses from them."""

    tensor_files: int
    writing_ranks: int
    """Ranks that wrote files: with several replicas not every rank writes."""
    cut_weights: int
    """Weights in more than one piece."""
    pieces: dict[str, int]
    """Cut, as pieces along every axis, such as 2x1 -> how many weights are cut so."""
    tensor_parallel: int | None
    """Guess: pieces of those weights that are cut; None where they do not agree."""
    pipeline_stages: int
    """Guess: sets of layers that no writing rank has in common."""
    optimizer_cut_further: bool
    """Whether optimizer state or averages are in smaller pieces than their weights, as under ZeRO-1."""


def stored_layout(contents: CoreContents) -> StoredLayout:
    """Look at the metadata alone."""
    weights = contents.of_part("weights")
    files = {chunk.file for entry in contents.entries.values() for chunk in entry.chunks}
    cuts = {name: pieces(entry) for name, entry in weights.items()}
    counts = {len(entry.chunks) for entry in weights.values() if len(entry.chunks) > 1}
    state = contents.of_part("optimizer", "averages").values()
    return StoredLayout(
        tensor_files=len(files),
        writing_ranks=len({rank for file in files if (rank := _rank(file)) is not None}),
        cut_weights=sum(len(entry.chunks) > 1 for entry in weights.values()),
        pieces=dict(Counter(cuts[name] for name, entry in weights.items() if len(entry.chunks) > 1)),
        tensor_parallel=1 if not counts else next(iter(counts)) if len(counts) == 1 else None,
        pipeline_stages=_stages(weights.values()),
        optimizer_cut_further=any(
            len(entry.chunks) > len(weights[entry.name].chunks) for entry in state if entry.name in weights
        ),
    )


def pieces(entry: Entry) -> str:
    """Pieces along every axis, such as 2x1; `n pieces` where they are no grid."""
    starts = [len({chunk.offsets[axis] for chunk in entry.chunks}) for axis in range(len(entry.shape))]
    grid = 1
    for count in starts:
        grid *= count
    return "x".join(map(str, starts)) if grid == len(entry.chunks) else f"{len(entry.chunks)} pieces"


def _rank(file: str) -> int | None:
    found = _RANK_FILE.fullmatch(file)
    return int(found[1]) if found else None


def _stages(weights: Iterable[Entry]) -> int:
    ranks: dict[int, set[int]] = {}
    for entry in weights:
        if layer := _LAYER.match(entry.name):
            found = {rank for chunk in entry.chunks if (rank := _rank(chunk.file)) is not None}
            ranks.setdefault(int(layer[1]), set()).update(found)
    # Replicas share out what they hold alike, so layers of one stage may lie with several ranks.
    groups: list[set[int]] = []
    for members in ranks.values():
        touching = [group for group in groups if group & members]
        groups = [group for group in groups if not group & members] + [members.union(*touching)]
    return max(1, len(groups))
