"""What a Video-VAE run shows: held-out errors, latent statistics, pictures of reconstructions, metrics, TensorBoard."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensorboard.compat.proto.summary_pb2 import Summary
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_video.buckets import Bucket, parse_bucket
from megatron_video.contact_sheet import write_contact_sheet
from megatron_video.files import appearing
from megatron_video.generation import to_pixels
from megatron_video.noise import NoiseSource
from megatron_video.vae import VideoVAE, sample_posterior
from megatron_video.vae.autoencoder import LOGVAR_RANGE
from training.image_metrics import psnr, ssim
from training.sample_folder import animated_gif
from training.telemetry import write_json
from training.vae_clips import Frames

SHOWN_CLIPS = 3
SHOWN_FRAMES = 5
SHOWN_FPS = 12.0
SHOWN_HEIGHT = 96
BEFORE = "before.json"
BEFORE_FRAMES = "before.npz"


@dataclass(frozen=True)
class HeldOut:
    """Errors on held-out clips, whole pictures, decoded from draws of the posterior as the DiT will see them."""

    l1: float
    """Mean absolute error, pixels in [-1, 1]."""
    psnr: float
    """dB, mean over clips, peak 2."""
    psnr_by_bucket: dict[str, float]
    ssim: float
    """Mean over clips, their frames and channels."""
    ssim_by_bucket: dict[str, float]
    kl: float
    """Nats per latent element."""
    latent_mean: list[float]
    """Of each channel, over all draws."""
    latent_std: list[float]
    decode_seconds_per_clip: float
    """Of a video of the largest bucket, in a batch."""


@dataclass
class Reconstruction:
    """A held-out clip beside what the VAE made of it."""

    bucket: Bucket
    original: Frames
    decoded: Frames
    psnr: float
    ssim: float


def to_input(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 -> fp32 in [-1, 1] on the device."""
    return pixels.to(device).float() / 127.5 - 1


@torch.no_grad()
def evaluate(
    vae: VideoVAE, batches: list[tuple[Bucket, Tensor]], seed: int, autocast: torch.autocast
) -> tuple[HeldOut, list[Reconstruction]]:
    """Code every held-out clip once, with noise that depends on the seed alone.

    Args:
        vae: in training or not; its weights are not touched.
        batches: uint8 [B, T, 3, H, W] with their buckets.
        seed: of the posterior draws.
        autocast: arithmetic of the network.
    """
    noise = NoiseSource(seed, "vae-held-out")
    device = next(vae.parameters()).device
    l1s, kls, latents, pictures = [], [], [], list[Reconstruction]()
    seconds = 0.0
    for number, (bucket, pixels) in enumerate(batches):
        video = to_input(pixels, device)
        with autocast:
            moments = vae.encode_moments(video).float()
            shape = (*moments.shape[:2], moments.shape[2] // 2, *moments.shape[3:])
            draw = sample_posterior(moments, noise.posterior(0, number, shape).to(device))
            started = time.perf_counter()
            decoded = vae.decode(draw).float().clamp(-1, 1)
        if bucket == max(b for b, _ in batches):
            seconds = (time.perf_counter() - started) / len(pixels)
        l1s += (decoded - video).abs().mean(dim=(1, 2, 3, 4)).tolist()
        kls.append(kl_divergence(moments).item())
        latents.append(draw.movedim(2, 0).flatten(1).cpu())
        scores = zip(video, decoded, psnr(decoded, video).tolist(), ssim(decoded, video).tolist(), strict=True)
        pictures += [Reconstruction(bucket, to_pixels(a), to_pixels(b), *pair) for a, b, *pair in scores]
    channels = torch.cat(latents, dim=1)
    held_out = HeldOut(
        l1=float(np.mean(l1s)),
        psnr=float(np.mean([picture.psnr for picture in pictures])),
        psnr_by_bucket=_by_bucket(pictures, "psnr"),
        ssim=float(np.mean([picture.ssim for picture in pictures])),
        ssim_by_bucket=_by_bucket(pictures, "ssim"),
        kl=float(np.mean(kls)),
        latent_mean=channels.mean(dim=1).tolist(),
        latent_std=channels.std(dim=1).tolist(),
        decode_seconds_per_clip=seconds,
    )
    return held_out, pictures


def kl_divergence(moments: Tensor) -> Tensor:
    """KL from N(mean, var) to N(0, 1) in nats, mean over latent elements; moments [B, t, 2z, h, w]."""
    mean, logvar = moments.float().chunk(2, dim=2)
    logvar = logvar.clamp(*LOGVAR_RANGE)
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()


def _by_bucket(pictures: list[Reconstruction], score: str) -> dict[str, float]:
    names = dict.fromkeys(picture.bucket.name for picture in pictures)
    return {name: float(np.mean([getattr(p, score) for p in pictures if p.bucket.name == name])) for name in names}


def write_reconstructions(
    pictures: list[Reconstruction], path: Path, before: list[Reconstruction] | None = None
) -> None:
    """A PNG with a few clips of every bucket, each above its reconstructions before and after, with PSNR and SSIM."""
    rows = []
    for bucket, chosen in _shown(pictures).items():
        earlier = _shown(before)[bucket] if before else [None] * len(chosen)
        for number, (after, first) in enumerate(zip(chosen, earlier, strict=True), start=1):
            parts = [after.original, *([first.decoded] if first else []), after.decoded]
            rows_are = (
                f"original, before ({first.psnr:.1f} dB, {first.ssim:.2f}), after" if first else "original, decoded"
            )
            caption = f"{bucket.name} no. {number}: {rows_are} ({after.psnr:.1f} dB, {after.ssim:.2f})"
            rows.append((caption, np.concatenate(parts, axis=1)))
    # By the height of one picture, of which an entry has two or three.
    factor = max(1, round(SHOWN_HEIGHT / min(picture.original.shape[1] for picture in pictures)))
    write_contact_sheet(rows, path, columns=SHOWN_FRAMES, scale=factor)


def write_before(folder: Path, held_out: HeldOut, pictures: list[Reconstruction]) -> None:
    """Keep what the first weights made of the clips that are shown at the end."""
    shown = [picture for chosen in _shown(pictures).values() for picture in chosen]
    arrays = {
        f"{number}_{part}": getattr(p, part) for number, p in enumerate(shown) for part in ("original", "decoded")
    }
    with appearing(folder / BEFORE_FRAMES) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **arrays)
    clips = [{"bucket": p.bucket.name, "psnr": p.psnr, "ssim": p.ssim} for p in shown]
    write_json(folder / BEFORE, {"held_out": asdict(held_out), "clips": clips})


def read_before(folder: Path) -> tuple[dict[str, Any], list[Reconstruction]] | None:
    """What `write_before` kept: the fields of HeldOut and the clips; None if the run did not evaluate first."""
    if not (folder / BEFORE).is_file():
        return None
    values = json.loads((folder / BEFORE).read_text(encoding="utf-8"))
    with np.load(folder / BEFORE_FRAMES) as arrays:
        pictures = [
            Reconstruction(
                parse_bucket(clip["bucket"]),
                arrays[f"{number}_original"],
                arrays[f"{number}_decoded"],
                clip["psnr"],
                clip["ssim"],
            )
            for number, clip in enumerate(values["clips"])
        ]
    return values["held_out"], pictures


def _shown(pictures: list[Reconstruction]) -> dict[Bucket, list[Reconstruction]]:
    buckets = sorted({picture.bucket for picture in pictures})
    return {bucket: [p for p in pictures if p.bucket == bucket][:SHOWN_CLIPS] for bucket in buckets}


class VAETelemetry:
    """metrics.jsonl (every step), TensorBoard and console lines (every log_every steps); `active` on one rank only."""

    def __init__(self, folder: Path, first_step: int, total_steps: int, log_every: int, active: bool = True) -> None:
        self.total_steps, self.log_every, self.active = total_steps, log_every, active
        if not active:
            return
        self._lines = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._bar = tqdm(total=total_steps, initial=first_step, desc="vae train", unit="step", disable=None)
        self._window: list[dict[str, float]] = []

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        """Record one finished step (counted from 1)."""
        if not self.active:
            return
        self._lines.write(json.dumps({"step": step, **metrics}) + "\n")
        self._lines.flush()
        self._window.append(metrics)
        self._bar.update()
        if step % self.log_every == 0 or step == self.total_steps:
            # Losses that began within the window have fewer values.
            means = {name: float(np.mean([m[name] for m in self._window if name in m])) for name in metrics}
            self._window = []
            for name, value in means.items():
                self._board.add_scalar(f"train/{name}", value, step)
            left = (self.total_steps - step) * means["step_seconds"]
            self.say(
                f"step {step}/{self.total_steps} | loss {means['loss']:.4f} | L1 {means['l1']:.4f} | "
                f"KL {means['kl']:.3f} | grad {means['grad_norm']:.2f} | {means['step_seconds']:.3f} s/step | "
                f"left {left:.0f} s at this size"
            )

    def log_held_out(self, step: int, held_out: HeldOut, pictures: list[Reconstruction]) -> None:
        """Record an evaluation, with one reconstructed clip of each bucket."""
        if not self.active:
            return
        values = asdict(held_out)
        self._lines.write(json.dumps({"step": step, "held_out": values}) + "\n")
        self._lines.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self._board.add_scalar(f"held_out/{name}", value, step)
        for picture in {picture.bucket: picture for picture in reversed(pictures)}.values():
            self._add_video(f"reconstructions/{picture.bucket.name}", picture, step)
        self._board.flush()
        by_bucket = ", ".join(f"{name} {value:.1f}" for name, value in held_out.psnr_by_bucket.items())
        spread = f"{min(held_out.latent_std):.2f} to {max(held_out.latent_std):.2f}"
        self.say(
            f"step {step}: held out L1 {held_out.l1:.4f}, PSNR {held_out.psnr:.2f} dB ({by_bucket}), "
            f"SSIM {held_out.ssim:.3f}, KL {held_out.kl:.3f}, latent std {spread}"
        )

    def say(self, text: str) -> None:
        """A line above the progress bar."""
        if self.active:
            self._bar.write(text)

    def close(self) -> None:
        """Flush and close the files."""
        if not self.active:
            return
        self._bar.close()
        self._lines.close()
        self._board.close()

    def _add_video(self, tag: str, picture: Reconstruction, step: int) -> None:
        both = np.concatenate([picture.original, picture.decoded], axis=2)
        image = Summary.Image(
            height=both.shape[1],
            width=both.shape[2],
            colorspace=3,
            encoded_image_string=animated_gif(both, SHOWN_FPS),
        )
        writer: Any = self._board.file_writer
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


def is_finite(*values: float) -> bool:
    """Whether no value is infinite or undefined."""
    return all(math.isfinite(value) for value in values)
