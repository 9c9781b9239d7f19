"""Shard folders as one data set: global sample numbers, groups to draw from, token counts, checks against the model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from megatron_video.buckets import parse_bucket
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flops import training_flops
from megatron_video.shard_schema import ShardSample
from megatron_video.shards import ShardDataset
from training.data_config import DataConfig
from training.data_sources import DataSource, sources_of
from training.sample_groups import ChainedGroup, GroupKey, Integers, Part, SampleGroup


class TrainingData:
    """Samples of several shard folders under one numbering, in the order the folders are given.

    Nothing grows with the number of samples: their places, weights and lengths are mapped files.

    Args:
        folders: shard folders, in one source without a weight.
        wanted_buckets: buckets to use, or None for all.
        sources: instead of folders: folders by source, with weights and subsets.
        sample_weights: draw samples by their weights where they have some.
        read_attempts: how often a sample is read before it counts as damaged.
        pairs: whether the folders must hold preference pairs, or must not.

    Raises:
        UserError: no folder, folders of the other kind, none of the wanted buckets is there, or folders encoded with
            different encoders.
    """

    def __init__(
        self,
        folders: Sequence[str] = (),
        wanted_buckets: Sequence[str] | None = None,
        *,
        sources: Sequence[DataSource] | None = None,
        sample_weights: bool = True,
        read_attempts: int = 1,
        pairs: bool = False,
    ) -> None:
        self._sources = sources or sources_of(DataConfig(shards=list(folders)))
        # Order matters: it numbers the samples, and the number is part of every noise key.
        opened = [(source, folder) for source in self._sources for folder in source.folders]
        self.datasets = [ShardDataset(folder, read_attempts=read_attempts) for _, folder in opened]
        self._check_kind(pairs)
        self._check_one_encoding()
        # _starts[f] is the global number of the first sample of folder f, and the last entry their count.
        self._starts = np.array([0, *accumulate(len(dataset) for dataset in self.datasets)])
        self._weighted = sample_weights
        self._groups = self._find_groups([source for source, _ in opened])
        self._check_subsets([source for source, _ in opened])
        present = sorted({bucket for _, bucket in self._groups})
        self.absent_buckets = [name for name in wanted_buckets or [] if name not in present]
        self.unused_buckets = [name for name in present if wanted_buckets is not None and name not in wanted_buckets]
        self._keep(wanted_buckets, present)
        self.buckets = self._by_bucket()
        self.shapes = {name: parse_bucket(name).latent_shape for name in self.buckets}
        self.caption_weights: dict[str, float] = {}

    @classmethod
    def open(cls, config: DataConfig, pairs: bool = False) -> TrainingData:
        """The data set of a configuration, of preference pairs or of samples.

        Raises:
            UserError: as the class does, or kinds of captions that the shards do not have.
        """
        data = cls(
            wanted_buckets=config.buckets,
            sources=sources_of(config),
            sample_weights=config.sample_weights,
            read_attempts=config.read_attempts,
            pairs=pairs,
        )
        data.weigh_captions(config.caption_weights)
        return data

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, sample: int) -> ShardSample:
        """The sample of a global number, read from its shard.

        Raises:
            DamagedSampleError: it cannot be read; names the file and the key.
        """
        folder, number = self._find(sample)
        return self.datasets[folder][number]

    def where(self, sample: int) -> str:
        """File and key of a sample."""
        folder, number = self._find(sample)
        return self.datasets[folder].where(number)

    @property
    def folders(self) -> list[str]:
        """Folders of the shards, in order."""
        return [str(dataset.folder) for dataset in self.datasets]

    @property
    def sources(self) -> list[str]:
        """Names of the sources."""
        return [source.name for source in self._sources]

    @property
    def source_weights(self) -> list[float] | None:
        """Share of every source, or None: samples of all are drawn equally often."""
        weights = [source.weight for source in self._sources if source.weight is not None]
        return weights or None

    def groups(self) -> Mapping[GroupKey, SampleGroup]:
        """The samples of every (source, bucket) that holds any."""
        return self._groups

    @property
    def null_text(self) -> tuple[Tensor, Tensor]:
        """Encoded empty caption: Step-LLM states [n, d_llm] and CLIP states [slots, d_clip]."""
        # Equal in all folders: one text fingerprint is required of them.
        llm, clip = self.datasets[0].null_text
        return llm, clip

    def fingerprint(self) -> str:
        """Digest of all keys in order: two data sets with one fingerprint give the same batches."""
        prints = [dataset.rows.fingerprint for dataset in self.datasets]
        joined = hashlib.blake2b("\n".join(prints).encode(), digest_size=16).hexdigest()
        return joined if len(prints) > 1 else prints[0]

    def weigh_captions(self, weights: Mapping[str, float]) -> None:
        """Draw captions of several kinds by `weights`; {} takes every sample's first.

        Raises:
            UserError: a folder has captions of none of the kinds, or no folder has one of them.
        """
        for dataset in self.datasets:
            kinds = dataset.rows.info.captions
            if weights and not set(weights) & set(kinds):
                has = f"captions of {', '.join(kinds)}" if kinds else "one caption a sample, of no named kind"
                raise UserError(
                    f"data.caption_weights={dict(weights)}: {dataset.folder} has {has}; encode it with "
                    "`--captions`, or leave the weights out"
                )
        known = {kind for dataset in self.datasets for kind in dataset.rows.info.captions}
        if set(weights) - known:
            raise UserError(
                f"data.caption_weights names {sorted(set(weights) - known)}; the shards have {sorted(known)}"
            )
        self.caption_weights = dict(sorted(weights.items()))

    def llm_tokens(self, samples: Integers) -> Integers:
        """Step-LLM tokens, [n], of the captions of samples, [n]; of several kinds, the mean by their weights."""
        tokens = np.empty(len(samples), dtype=np.int64)
        folders = np.searchsorted(self._starts, samples, side="right") - 1
        for folder in np.unique(folders):
            chosen = folders == folder
            rows = self.datasets[folder].rows
            found = rows.tokens(samples[chosen] - self._starts[folder])
            tokens[chosen] = self._mean_tokens(found, rows.info.captions)
        return tokens

    def check_model(self, model: DiTConfig) -> None:
        """Refuse a model whose sizes do not fit the shards.

        Raises:
            UserError: naming the model's field, its value and the shards' value.
        """
        info = self.datasets[0].rows.info
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
        lengths, counts = np.unique(self.llm_tokens(samples), return_counts=True)
        costs = [training_flops(model.num_layers, model.hidden_size, tokens, clip_slots + int(n)) for n in lengths]
        return float(np.dot(np.asarray(costs, dtype=np.float64), counts))

    def clip_slots(self, model: DiTConfig) -> int:
        """Text keys that every caption has from CLIP."""
        return 0 if model.clip_channels is None else self.datasets[0].rows.info.clip_tokens

    def _find(self, sample: int) -> tuple[int, int]:
        """Folder, and number in it, of a global number."""
        folder = int(np.searchsorted(self._starts, sample, side="right")) - 1
        return folder, int(sample - self._starts[folder])

    def _mean_tokens(self, found: Integers, kinds: Sequence[str]) -> Integers:
        """Mean length, [n], of the captions that are drawn from; `found`: [n, 1 + kinds]."""
        weights = np.array([self.caption_weights.get(kind, 0.0) for kind in kinds])
        if not weights.any():
            return found[:, 0]
        # Only what a sample has is drawn.
        shares = weights * (found[:, 1:] > 0)
        totals = shares.sum(axis=1)
        means = (shares * found[:, 1:]).sum(axis=1) / np.where(totals, totals, 1)
        return np.where(totals, np.rint(means), found[:, 0]).astype(np.int64)

    def _find_groups(self, sources: Sequence[DataSource]) -> dict[GroupKey, SampleGroup]:
        parts: dict[GroupKey, list[Part]] = {}
        for source, dataset, start in zip(sources, self.datasets, self._starts, strict=False):
            for bucket in sorted({entry.bucket for entry in dataset.rows.classes}):
                found = dataset.rows.select(bucket, source.subsets)
                parts.setdefault((source.name, bucket), []).extend(Part(rows, int(start)) for rows in found)
        return {key: ChainedGroup(found, self._weighted) for key, found in sorted(parts.items()) if found}

    def _keep(self, wanted: Sequence[str] | None, present: Sequence[str]) -> None:
        if wanted is not None:
            self._groups = {key: group for key, group in self._groups.items() if key[1] in wanted}
        # Some may be missing (a preset names every aspect); all missing is a mistake.
        if wanted is not None and not self._groups:
            raise UserError(f"data.buckets={list(wanted)}: none is in the shards, which hold {list(present)}")

    def _by_bucket(self) -> dict[str, SampleGroup]:
        parts: dict[str, list[Part]] = {}
        for (_, bucket), group in self._groups.items():
            parts.setdefault(bucket, []).append(Part(group, 0))
        return {bucket: ChainedGroup(parts[bucket], self._weighted) for bucket in sorted(parts)}

    def _check_subsets(self, sources: Sequence[DataSource]) -> None:
        for source, dataset in zip(sources, self.datasets, strict=True):
            known = {entry.subset for entry in dataset.rows.classes}
            unknown = sorted(set(source.subsets or ()) - known)
            if source.subsets is not None and len(unknown) == len(source.subsets):
                names = sorted(name for name in known if name is not None)
                raise UserError(
                    f"{dataset.folder} has no sample of the subsets {unknown}; it has "
                    f"{', '.join(names) if names else 'none: `megatron-video data filter` names them before encode'}"
                )

    def _check_kind(self, pairs: bool) -> None:
        for dataset in self.datasets:
            if dataset.rows.info.pairs != pairs:
                found, way_out = (
                    ("preference pairs", "train on them with `python -m training.dpo`")
                    if dataset.rows.info.pairs
                    else ("single samples, not preference pairs", "`megatron-video dpo pair` makes pairs")
                )
                raise UserError(f"data.shards: {dataset.folder} holds {found}; {way_out}")

    def _check_one_encoding(self) -> None:
        first = self.datasets[0]
        for dataset in self.datasets:
            # Latents of two VAEs are two spaces; nothing later would notice.
            for name in ("vae_fingerprint", "text_fingerprint"):
                ours, other = getattr(first.rows.info, name), getattr(dataset.rows.info, name)
                if ours != other:
                    raise UserError(
                        f"data.shards: {dataset.folder} and {first.folder} were encoded differently "
                        f"({name}: {other} and {ours})"
                    )
