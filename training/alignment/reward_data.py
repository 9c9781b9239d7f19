"""Preference pairs as a reward model reads them: by number, from several folders, within a budget of memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_video.errors import UserError
from megatron_video.shards import ShardDataset
from training.alignment.feature_files import FeatureFiles


@dataclass(frozen=True)
class PairFolder:
    """Pairs of one folder, and what they count."""

    dataset: ShardDataset
    weight: float
    """Of each of its pairs in the loss; 0: not trained on."""
    features: FeatureFiles | None = None


class Row(NamedTuple):
    """One pair."""

    folder: int
    number: int


class Members(NamedTuple):
    """What a model sees of n pairs; winners first."""

    latents: Tensor | None
    """[2, n, t, z, h, w] fp32."""
    features: Tensor | None
    """[2, n, f] fp32."""
    llm: Tensor
    """[n, d_llm] means over tokens."""
    clip: Tensor
    """[n, d_clip]"""


class PairReader:
    """Pairs by row.

    The first that are read stay in memory while there is room, the others are read again each time: of rows that are
    asked for once an epoch, none is likelier to be wanted next, so there is nothing to gain by exchanging them.

    Args:
        folders: of pairs.
        wants_latents: whether latents are read at all.
        memory: bytes that may be kept.
    """

    def __init__(self, folders: Sequence[PairFolder], wants_latents: bool, memory: int) -> None:
        self.folders, self._wants_latents, self._memory = list(folders), wants_latents, memory
        self._kept: dict[Row, Members] = {}
        self.bytes_kept = 0

    def read(self, rows: Sequence[Row]) -> Members:
        """Pairs of one bucket.

        Raises:
            UserError: a pair or its features are damaged.
        """
        # Latents are kept as they are stored, in half the memory.
        columns = list(zip(*(self._one(row) for row in rows), strict=True))
        latents, features = (
            None if column[0] is None else torch.stack(column, dim=1).float() for column in columns[:2]
        )
        return Members(latents, features, *(torch.stack(column) for column in columns[2:]))

    def _one(self, row: Row) -> Members:
        if row in self._kept:
            return self._kept[row]
        found = self._load(row)
        size = sum(tensor.nbytes for tensor in found if tensor is not None)
        if self.bytes_kept + size <= self._memory:
            self._kept[row] = found
            self.bytes_kept += size
        return found

    def _load(self, row: Row) -> Members:
        folder, features, latents = self.folders[row.folder], None, None
        if folder.features is not None:
            found = folder.features.read([2 * row.number, 2 * row.number + 1])
            features, llm, clip = found.features.flatten(1), found.llm[0], found.clip[0]
        if self._wants_latents or folder.features is None:
            sample = folder.dataset[row.number]
            assert sample.loser is not None
            latents = torch.stack([sample.moments, sample.loser])
            llm, clip = sample.llm.float().mean(0), sample.clip.float().mean(0)
        return Members(latents, features, llm, clip)


class Split(NamedTuple):
    """Pairs by bucket."""

    train: list[list[Row]]
    held_out: list[list[Row]]


def split(folders: Sequence[PairFolder], held_out: float) -> Split:
    """Pairs to train on and those held out; all pairs of a prompt are on one side, in every folder and run alike.

    Pairs of folders of weight 0 are never trained on.

    Raises:
        UserError: one side would be empty.
    """
    train: dict[str, list[Row]] = {}
    kept: dict[str, list[Row]] = {}
    for number, folder in enumerate(folders):
        rows = tqdm(range(len(folder.dataset)), desc=f"read {folder.dataset.folder}", unit="pair", disable=None)
        for row in rows:
            is_kept = place_of(str(folder.dataset.metadata(row)["caption"])) < held_out
            if is_kept or folder.weight > 0:
                side = kept if is_kept else train
                side.setdefault(folder.dataset.rows.row(row).bucket, []).append(Row(number, row))
    rows_kept = [row for rows in kept.values() for row in rows]
    if not train or not any(folders[row.folder].weight for row in rows_kept):
        raise UserError(f"--held-out {held_out} leaves no prompt on one side; take more prompts or another share")
    return Split(list(train.values()), list(kept.values()))


def place_of(prompt: str) -> float:
    """Where a prompt lies in [0, 1), evenly spread and always the same."""
    return int.from_bytes(hashlib.blake2b(prompt.encode(), digest_size=8).digest(), "little") / 2**64


def open_pairs(folder: Path) -> ShardDataset:
    """A folder of pairs.

    Raises:
        UserError: there is none, or it holds single samples.
    """
    dataset = ShardDataset(folder)
    if not dataset.rows.info.pairs:
        raise UserError(f"--pairs {folder} holds single samples; `megatron-video dpo pair` makes pairs")
    return dataset


def feature_scale(reader: PairReader, rows: Iterable[Row]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, [f] fp32 each, of the features of all members of pairs, read one by one."""
    count, total, squares = 0, torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for row in rows:
        found = reader.read([row]).features
        assert found is not None
        values = found[:, 0].double()
        count, total, squares = count + len(values), total + values.sum(0), squares + values.square().sum(0)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(0).sqrt().float()
