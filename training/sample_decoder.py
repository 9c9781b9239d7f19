"""From latents to what people look at: videos, contact sheets and moving pictures in TensorBoard."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_video.generation import to_pixels
from megatron_video.vae import VideoVAE, load_vae
from training.sample_folder import SampleBoard, SampleFolder
from training.sample_prompts import Prompt


class Decoder:
    """Writes the samples of a folder on one rank; the Video-VAE is read when it is needed first.

    Args:
        folder: of the samples.
        vae: folder or file of the Video-VAE.
        fps: of the videos.
        step: training step of the weights that the samples are of.
        device: to decode on.
        dtype: to decode in.
    """

    def __init__(
        self, folder: SampleFolder, vae: Path, fps: float, step: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        self._folder, self._path, self._fps, self._step = folder, vae, fps, step
        self._device, self._dtype = device, dtype
        self._vae: VideoVAE | None = None
        self._board: SampleBoard | None = None

    def load(self) -> None:
        """Read the Video-VAE, if it is not there."""
        if self._vae is None:
            self._vae = load_vae(self._path, device=self._device, dtype=self._dtype)

    @torch.no_grad()
    def write(self, prompt: Prompt, latent: Tensor) -> None:
        """Decode a latent [t, z, h, w] and write the sample."""
        self.load()
        assert self._vae is not None
        frames = to_pixels(self._vae.decode(latent[None].to(self._device))[0])
        self._folder.write(prompt, frames, self._fps)
        if self._board is None:
            self._board = SampleBoard(self._folder.path / "tensorboard", f".{dist.get_rank()}")
        self._board.add(prompt, frames, self._fps, self._step)

    def release(self) -> None:
        """Give up the Video-VAE."""
        self._vae = None

    def close(self) -> None:
        """Finish the event file."""
        if self._board is not None:
            self._board.close()
