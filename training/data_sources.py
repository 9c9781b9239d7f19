"""Where the samples come from: the folders of a configuration, under the names by which they are weighed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_video.blend import read_blend
from megatron_video.errors import UserError
from training.data_config import DataConfig

ALL_SHARDS = "shards"
"""Name of the one source of a configuration without weights: all folders together."""


@dataclass(frozen=True)
class DataSource:
    """Folders that are drawn from as one."""

    name: str
    folders: tuple[str, ...]
    weight: float | None = None
    """Share of the samples; None in a configuration without weights."""
    subsets: tuple[str, ...] | None = None
    """Subsets of `data filter` to draw from; None for all samples."""


def sources_of(config: DataConfig) -> list[DataSource]:
    """The sources of a configuration, in the order that numbers the samples.

    Raises:
        UserError: no folder, or a blend that cannot be read.
    """
    own = None if config.subsets is None else tuple(config.subsets)
    if config.blend is not None:
        blend, folders = read_blend(Path(config.blend))
        return [
            DataSource(source.shards, (str(folder),), source.weight, _both(source.subsets, own, source.shards))
            for source, folder in zip(blend.sources, folders, strict=True)
        ]
    if not config.shards:
        raise UserError("data.shards is empty: name the shard folders, e.g. data.shards=[runs/demo/shards]")
    if not config.shard_weights:
        return [DataSource(ALL_SHARDS, tuple(config.shards), subsets=own)]
    pairs = zip(config.shards, config.shard_weights, strict=True)
    return [DataSource(folder, (folder,), weight, own) for folder, weight in pairs]


def _both(of_source: Sequence[str] | None, of_stage: Sequence[str] | None, name: str) -> tuple[str, ...] | None:
    """Subsets that both the source and the stage allow."""
    if of_source is None or of_stage is None:
        chosen = of_source if of_stage is None else of_stage
        return None if chosen is None else tuple(chosen)
    common = tuple(subset for subset in of_source if subset in of_stage)
    if not common:
        raise UserError(f"data.subsets={list(of_stage)} and subsets={list(of_source)} of {name} have none in common")
    return common
