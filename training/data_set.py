"""Shard folders as one data set: global sample numbers, buckets, token counts, and checks against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megatron_video.buckets import parse_bucket
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from megatron_video.shard_schema import ShardSample
from megatron_video.shards import ShardDataset
from training.sample_groups import GroupKey, Integers, ListedGroup, SampleGroup


class TrainingData:
    """Samples of several shard folders under one numbering, in the order the folders are given.

    Args:
        folders: shard folders.
        wanted_buckets: buckets to use, or None for all.

    Raises:
        UserError: no folder, none of the wanted buckets is there, or folders encoded with different encoders.
    """

    def __init__(self, folders: Sequence[str], wanted_buckets: Sequence[str] | None = None) -> None:
        if not folders:
            raise UserError("data.shards is empty: name the shard folders, e.g. data.shards=[runs/demo/shards]")
        # Order matters: it numbers the samples, and the number is part of every noise key.
        self.datasets = [ShardDataset(folder) for folder in folders]
        self._check_one_encoding(folders)
        # _ends[f] is one past the last global number of folder f.
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        # Indices only: payloads are read sample by sample.
        names = np.concatenate([np.asarray(dataset.index["bucket"].to_pylist()) for dataset in self.datasets])
        self.llm_tokens = self._column("llm_tokens")
        self.buckets = {str(name): np.flatnonzero(names == name) for name in np.unique(names)}
        self.absent_buckets = [name for name in wanted_buckets or [] if name not in self.buckets]
        self.unused_buckets = self._select(wanted_buckets)
        self.shapes = {name: parse_bucket(name).latent_shape for name in self.buckets}
        self.sources = ["shards"]
        self.source_weights: list[float] | None = None

    def groups(self) -> Mapping[GroupKey, SampleGroup]:
        """The samples of every (source, bucket) that holds any."""
        return {(self.sources[0], name): ListedGroup(samples) for name, samples in self.buckets.items()}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, sample: int) -> ShardSample:
        """The sample of a global number, read from its shard."""
        folder = int(np.searchsorted(self._ends, sample, side="right"))
        return self.datasets[folder][int(sample - (self._ends[folder] - len(self.datasets[folder])))]

    @property
    def null_text(self) -> tuple[Tensor, Tensor]:
        """Encoded empty caption: Step-LLM states [n, d_llm] and CLIP states [slots, d_clip]."""
        # Equal in all folders: one text fingerprint is required of them.
        llm, clip = self.datasets[0].null_text
        return llm, clip

    def fingerprint(self) -> str:
        """Digest of all keys in order: two data sets with one fingerprint give the same batches."""
        digest = hashlib.blake2b(digest_size=16)
        for dataset in self.datasets:
            # Keys are hashes of content and clip span, so moving or renaming folders changes nothing.
            digest.update("\n".join(dataset.index["key"].to_pylist()).encode() + b"\n")
        return digest.hexdigest()

    def check_model(self, model: DiTConfig) -> None:
        """Refuse a model whose sizes do not fit the shards.

        Raises:
            UserError: naming the model's field, its value and the shards' value.
        """
        info = self.datasets[0].dataset_info
        sizes = {
            "in_channels": (model.in_channels, info.latent_channels),
            "out_channels": (model.out_channels, info.latent_channels),
            "caption_channels (Step-LLM)": (model.llm_channels, info.llm_dim),
            "caption_channels (CLIP)": (model.clip_channels, info.clip_dim if model.clip_channels else None),
        }
        wrong = [f"model.{n}={ours}, the shards hold {theirs}" for n, (ours, theirs) in sizes.items() if ours != theirs]
        for name, shape in self.shapes.items():
            if shape.height % model.patch_size or shape.width % model.patch_size:
                wrong.append(f"model.patch_size={model.patch_size} does not divide {name}, {tuple(shape)} latents")
        if wrong:
            raise UserError(f"{self.datasets[0].folder} does not fit the model: " + "; ".join(wrong))

    def tokens(self, model: DiTConfig) -> dict[str, int]:
        """Video tokens of one sample of every bucket."""
        return {name: shape.tokens // model.patch_size**2 for name, shape in self.shapes.items()}

    def flops(self, model: DiTConfig, bucket: str, samples: Integers) -> float:
        """FLOPs of forward and backward on `samples` of one bucket, with their true caption lengths."""
        tokens, clip_slots = self.tokens(model)[bucket], self.clip_slots(model)
        # Few distinct lengths, many samples.
        lengths, counts = np.unique(self.llm_tokens[samples], return_counts=True)
        costs = [training_flops(model.num_layers, model.hidden_size, tokens, clip_slots + int(n)) for n in lengths]
        return float(np.dot(np.asarray(costs, dtype=np.float64), counts))

    def clip_slots(self, model: DiTConfig) -> int:
        """Text keys that every caption has from CLIP."""
        return 0 if model.clip_channels is None else self.datasets[0].dataset_info.clip_tokens

    def _column(self, name: str) -> npt.NDArray[np.int64]:
        return np.concatenate([dataset.index[name].to_numpy() for dataset in self.datasets])

    def _select(self, wanted: Sequence[str] | None) -> list[str]:
        if wanted is None:
            return []
        present = sorted(self.buckets)
        self.buckets = {name: self.buckets[name] for name in present if name in wanted}
        # Some may be missing (a preset names every aspect); all missing is a mistake.
        if not self.buckets:
            raise UserError(f"data.buckets={list(wanted)}: none is in the shards, which hold {present}")
        return [name for name in present if name not in wanted]

    def _check_one_encoding(self, folders: Sequence[str]) -> None:
        first = self.datasets[0].dataset_info
        for folder, dataset in zip(folders, self.datasets, strict=True):
            # Latents of two VAEs are two spaces; nothing later would notice.
            for name in ("vae_fingerprint", "text_fingerprint"):
                ours, other = getattr(first, name), getattr(dataset.dataset_info, name)
                if ours != other:
                    raise UserError(
                        f"data.shards: {folder} and {folders[0]} were encoded differently ({name}: {other} and {ours})"
                    )
