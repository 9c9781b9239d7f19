"""Sample videos during training, in the run's own layout: every rank takes part, nothing is loaded twice.

`<run>/samples/step_00001000/` holds an mp4 (PNG for images) and a contact sheet for every prompt; TensorBoard shows
them as moving pictures. A set in which a life was interrupted is completed by the next one.
"""

from __future__ import annotations

import math
from itertools import count
from pathlib import Path
from typing import Any

import torch

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.device import DeviceInfo
from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.generation import to_pixels
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from megatron_video.scheduler import sigmas
from megatron_video.vae import VideoVAE, load_vae
from training.config import PretrainConfig
from training.data_set import TrainingData
from training.optimizer import WrappedChunk
from training.prompt_states import PromptStates, prepare_prompts
from training.sample_folder import SampleFolder
from training.sample_prompts import Prompt
from training.sample_ranks import Sampler, complete_folder, decided_by_rank_0, share, writes_for_replica

SAMPLES_FOLDER = "samples"


class SampleVideos:
    """The prompts of a run, and how they are sampled.

    Args:
        config: the run's.
        data: the training data, for sizes and for the encoders it was made with.
        device: to compute on.

    Raises:
        UserError: prompts that cannot be read, or other encoders than the training data's.
    """

    def __init__(self, config: PretrainConfig, data: TrainingData, device: DeviceInfo) -> None:
        self.config, self.device = config.samples, device.device
        self._folder = Path(config.run.output_dir) / SAMPLES_FOLDER
        self._model = config.model
        info = data.datasets[0].dataset_info
        self.size = parse_bucket(self.config.size) if self.config.size else _largest(data)
        self.vae_fingerprint = self._check_vae(info.vae_fingerprint)
        self.texts: PromptStates = prepare_prompts(self.config, self._folder, self.device, info.text_fingerprint)

    @torch.no_grad()
    def run(self, model: list[WrappedChunk], step: int, weights: str) -> SampleFolder:
        """Make the samples that are missing with the weights that `model` has now; all ranks call it together.

        Args:
            model: this rank's chunks.
            step: optimizer steps done.
            weights: tells these weights from others of the same step; kept with the samples.
        """
        settings = {"step": step, "weights": weights, "vae": self.vae_fingerprint, **self._settings()}
        path, missing = decided_by_rank_0(lambda: self._next_folder(settings))
        folder = self._open(path, settings)
        sources = {"vae": str(self.config.vae), "text": str(self.config.text)}
        complete_folder(folder, sources, lambda: self._sample(model, folder, missing))
        return folder

    def _next_folder(self, settings: dict[str, Any]) -> tuple[Path, list[int]]:
        """The folder of this set, and what is missing in it.

        A step that was done again with other weights or settings gets another one: step_00001000_2.
        """
        name = f"step_{settings['step']:08d}"
        for number in count(1):
            path = self._folder / (name if number == 1 else f"{name}_{number}")
            try:
                return path, self._open(path, settings).missing()
            except UserError:
                continue
        raise AssertionError

    def _open(self, path: Path, settings: dict[str, Any]) -> SampleFolder:
        return SampleFolder(path, settings, self.texts.prompts, is_image=self.size.frames == 1)

    def _sample(self, model: list[WrappedChunk], folder: SampleFolder, missing: list[int]) -> None:
        if not missing:
            return
        for chunk in model:
            chunk.eval()
        try:
            vae = self._load_vae() if writes_for_replica() else None
            for batch, counts in self._share(model, missing):
                latents = self._latents(model, batch)
                for prompt, latent in zip(batch, latents, strict=True):
                    if vae is not None and counts:
                        # One at a time: decoding needs far more memory than sampling.
                        folder.write(prompt, to_pixels(vae.decode(latent[None])[0]), self.config.fps)
        finally:
            for chunk in model:
                chunk.train()

    def _latents(self, model: list[WrappedChunk], batch: list[Prompt]) -> torch.Tensor:
        """[b, T, C, h, w] fp32 on every rank of the replica; the noise is a function of the prompts."""
        sampler = Sampler(
            self.size.latent_shape,
            sigmas(self.config.steps, self.config.time_shift),
            self.config.guidance,
            self.config.fps if self._model.use_additional_conditions else None,
        )
        states = [self.texts.states[prompt.index] for prompt in batch]
        return sampler.latents(model, batch, states, self.texts.negative, self.device)

    def _share(self, model: list[WrappedChunk], missing: list[int]) -> list[tuple[list[Prompt], bool]]:
        """This replica's batches, and whether they count."""
        size, batch_size = data_parallel_size(), self.config.batch_size
        ours = [self.texts.prompts[index] for index in share(missing, data_parallel_rank(), size)]
        batches = [(ours[first : first + batch_size], True) for first in range(0, len(ours), batch_size)]
        if model[0].ddp_config.use_megatron_fsdp:
            # Replicas gather weights together, so all of them make as many passes as the busiest.
            most = math.ceil(math.ceil(len(missing) / size) / batch_size)
            batches += [([self.texts.prompts[missing[0]]], False)] * (most - len(batches))
        return batches

    def _load_vae(self) -> VideoVAE:
        assert self.config.vae is not None
        # The released pipeline decodes in bf16 on GPUs; on CPUs bf16 convolutions are slower.
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return load_vae(Path(self.config.vae), device=self.device, dtype=dtype)

    def _check_vae(self, wanted: str) -> str:
        assert self.config.vae is not None
        path = Path(self.config.vae)
        found = decided_by_rank_0(lambda: vae_fingerprint(path))
        refuse_other_vae(self.config.vae, found, wanted)
        return found

    def _settings(self) -> dict[str, Any]:
        names = ("steps", "guidance", "time_shift", "negative_prompt", "fps")
        return {"size": self.size.name, **{name: getattr(self.config, name) for name in names}}


def refuse_other_vae(vae: str, found: str, wanted: str) -> None:
    """Refuse to decode with another VAE than that of the training shards.

    Args:
        vae: its path.
        found: its fingerprint.
        wanted: that of the shards.

    Raises:
        UserError: the fingerprints differ.
    """
    if found != wanted:
        raise UserError(
            f"samples.vae={vae} is not the VAE that data.shards were encoded with ({found}, the shards have {wanted}); "
            "the latents would mean another thing to it"
        )


def _largest(data: TrainingData) -> Bucket:
    buckets = [parse_bucket(name) for name in data.shapes]
    return max(buckets, key=lambda bucket: (bucket.latent_shape.tokens, bucket))
