"""Latents that features are computed of: the members of preference pairs, or generated samples."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.shard_schema import INDEX_FILE, INFO_FILE
from megatron_video.shards import ShardDataset
from training.alignment.generated import SETTINGS_FILE, Generated, read_generated
from training.sample_latents import read_latent


class Latent(NamedTuple):
    """One latent and what the model is told about it."""

    prompt: str
    latent: Tensor
    """[t, z, h, w] bf16."""
    llm: Tensor
    """[n, d_llm] bf16."""
    clip: Tensor
    """[L_clip, d_clip] bf16."""
    fps: float


class Latents(Protocol):
    """Latents of a folder, by number."""

    folder: Path
    fingerprint: str
    """Equal for folders of equal latents."""
    encoders: dict[str, str]
    """Fingerprints of the Video-VAE ("vae") and the text encoders ("text")."""

    def __len__(self) -> int:
        """How many."""

    def __getitem__(self, number: int) -> Latent:
        """Read one.

        Raises:
            UserError: missing or damaged.
        """


class PairLatents:
    """Winner and loser of every pair of a folder of `megatron-video dpo pair`, in turn."""

    def __init__(self, dataset: ShardDataset) -> None:
        info = dataset.dataset_info
        if not info.pairs:
            raise UserError(f"{dataset.folder} holds single samples; `megatron-video dpo pair` makes pairs")
        self.folder, self._dataset = dataset.folder, dataset
        # The index has the checksum of every sample.
        self.fingerprint = info.files[INDEX_FILE]
        self.encoders = {"vae": info.vae_fingerprint, "text": info.text_fingerprint}

    def __len__(self) -> int:
        return 2 * len(self._dataset)

    def __getitem__(self, number: int) -> Latent:
        sample = self._dataset[number // 2]
        latent = sample.loser if number % 2 else sample.moments
        assert latent is not None
        values = sample.metadata
        return Latent(str(values["caption"]), latent, sample.llm, sample.clip, float(values["fps"]))


class SampleLatents:
    """Samples of a folder of `megatron-video dpo generate`."""

    def __init__(self, generated: Generated) -> None:
        self.folder, self._generated = generated.folder, generated
        self._by_index = {sample.index: sample for sample in generated.samples}
        self.fingerprint = _samples_fingerprint(generated)
        self.encoders = {name: str(generated.settings[name]) for name in ("vae", "text")}

    def __len__(self) -> int:
        return len(self._by_index)

    def __getitem__(self, number: int) -> Latent:
        sample = self._by_index[number]
        stored = read_latent(sample.latent_file)
        return Latent(sample.prompt, stored.latent, stored.llm, stored.clip, float(self._generated.settings["fps"]))


def open_latents(folder: Path) -> Latents:
    """The latents of a folder of pairs or of samples.

    Raises:
        UserError: neither is there, or it is not finished.
    """
    if (folder / INFO_FILE).is_file():
        return PairLatents(ShardDataset(folder))
    if (folder / SETTINGS_FILE).is_file():
        return SampleLatents(read_generated(folder))
    raise UserError(
        f"--data {folder}: neither pairs of `megatron-video dpo pair` nor samples of `megatron-video dpo generate`"
    )


def _samples_fingerprint(generated: Generated) -> str:
    """Of settings, prompts and seeds, of which latents are a function."""
    samples = [[sample.index, sample.prompt, sample.seed] for sample in generated.samples]
    identity = json.dumps([generated.settings, samples], sort_keys=True)
    return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
