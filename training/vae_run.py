"""A run of the Video-VAE between its checkpoints: model, optimizer, discriminator, position."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import torch
from torch import Tensor

from megatron_video.config_io import config_to_dict, save_config
from megatron_video.errors import UserError
from megatron_video.vae import VideoVAE
from megatron_video.vae.base import latent_shape
from training.discriminator import Adversary, has_converged
from training.perceptual import load_lpips, video_lpips
from training.telemetry import record_life
from training.vae_checkpoint import CONFIG_FILE, POINTER, find_run, refuse_other_folder, refuse_other_settings, save_run
from training.vae_clips import TrainingClips
from training.vae_config import VAEStage, VAETrainConfig
from training.vae_phases import first_model, freeze, next_model, whole_copy
from training.vae_ranks import Ranks
from training.vae_report import HeldOut, Reconstruction, evaluate, is_finite, kl_divergence, to_input
from training.vae_updater import Updater, build_updater, zero_stage_of
from training.weight_average import WeightAverage


class VAERun:
    """Continues from the checkpoint in the run's folder, or starts a new run there."""

    vae: VideoVAE
    updater: Updater
    average: WeightAverage | None

    def __init__(self, config: VAETrainConfig, ranks: Ranks) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.ranks = ranks
        self.layout = describe_layout(zero_stage_of(config, self.ranks), self.ranks.world)
        check_batches(config, self.ranks)
        device = self.ranks.device
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.lpips = load_lpips(config.perceptual, device) if config.perceptual.weight else None
        self.adversary = (
            Adversary(config.adversarial, config.seed, self.ranks, self.autocast) if config.adversarial.weight else None
        )
        start = config.adversarial.start
        self.adversarial_since = start if self.adversary and isinstance(start, int) else None
        self.step, self.seconds, self.psnrs = 0, 0.0, list[float]()
        self._start_or_resume()
        if self.ranks.leads:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_config(config, self.folder / CONFIG_FILE)
            record_life(self.folder, self.step)

    def describe(self) -> list[str]:
        """Lines on the sizes of the model and the run, and on what is off."""
        config = self.config
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (self.vae.encoder, self.vae.decoder))
        stages = " + ".join(str(stage.steps) for stage in config.stages)
        lines = [
            f"Video-VAE: {encoder:,} + {decoder:,} parameters (encoder + decoder), {config.precision} on "
            f"{self.ranks.device}, {self.layout}; {stages} = {config.total_steps} steps, at step {self.step}"
        ]
        lines.append(
            f"perceptual loss: LPIPS of {config.perceptual.vgg}, weight {config.perceptual.weight:g}"
            if self.lpips
            else "perceptual loss: off (perceptual.weight=0; it needs local VGG16 and LPIPS weights)"
        )
        lines.append(f"adversarial loss: {self._describe_adversary()}")
        return lines

    def train_step(self, pixels: Tensor) -> dict[str, float]:
        """One update on this rank's share of the batch, uint8 [B, T, 3, H, W].

        Raises:
            UserError: the loss or the gradient is not finite; the last checkpoint is sound.
        """
        started = time.perf_counter()
        self._enter(self.config.stage_at(self.step))
        rate = self.config.learning_rate_at(self.step)
        video = to_input(pixels, self.ranks.device)
        decoded, moments = self.updater.code(video, self._noise(video))
        terms, loss = self._losses(video, decoded, moments)
        values = self._checked(self._means(terms))
        values |= self._checked({"grad_norm": self.updater.update(loss, rate)})
        if self._adversarial_now():
            assert self.adversary is not None
            values |= self._checked({"discriminator": self.adversary.update(video, decoded)})
        if self.average:
            self.average.update()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        samples = float(len(pixels) * self.ranks.world)
        return {**values, "learning_rate": rate, "samples": samples, "step_seconds": seconds}

    def evaluate(self, clips: TrainingClips) -> tuple[HeldOut, list[Reconstruction]]:
        """Held-out errors and pictures; every rank computes all of them, so that ZeRO 3 may gather weights."""
        longest = max(bucket.frames for bucket in clips.held_out)
        batches = clips.held_out_batches(longest, self.config.stages[-1].batch_size)
        with self.average.applied() if self.average else contextlib.nullcontext():
            return evaluate(self.vae, batches, self.config.seed, self.autocast)

    def note_held_out(self, psnr: float) -> bool:
        """Remember an evaluation; True if the adversarial loss starts with it."""
        self.psnrs.append(psnr)
        # Earlier phases have parts frozen: where they stand still is not where the model does.
        last = self.config.stage_at(self.step - 1).phase == self.config.stages[-1].phase
        waiting = self.adversary is not None and self.adversarial_since is None
        if not (last and waiting and has_converged(self.psnrs, self.config.adversarial)):
            return False
        self.adversarial_since = self.step
        return True

    def save(self) -> None:
        """Write a checkpoint; all ranks must call it."""
        state = {
            "config": config_to_dict(self.config),
            "layout": self.layout,
            "step": self.step,
            "seconds": self.seconds,
            "psnrs": self.psnrs,
            "adversarial_since": self.adversarial_since,
            "adversary": self.adversary.state_dict() if self.adversary else None,
            "average": self.average.averages if self.average else None,
        }
        save_run(self.folder, state, self.vae, self.updater, self.ranks)

    def _start_or_resume(self) -> None:
        saved = find_run(self.folder, self.ranks.device)
        if saved is None:
            refuse_other_folder(self.folder)
            first = self.config.stages[0]
            self._train(first_model(self.config, first.kind), first)
            return
        refuse_other_settings(saved, config_to_dict(self.config), self.layout)
        state = saved.state
        self.step, self.seconds, self.psnrs = state["step"], state["seconds"], state["psnrs"]
        self.adversarial_since = state["adversarial_since"]
        stage = self.config.stage_at(self.step - 1)
        self._train(saved.load_model(stage.kind), stage)
        self.updater.load(saved.folder, state["updater"])
        if self.adversary:
            self.adversary.load_state_dict(state["adversary"])
        if self.average:
            self.average.load(state["average"])

    def _enter(self, stage: VAEStage) -> None:
        """Begin the phase of `stage` if it is another: its model, what it trains, a new optimizer."""
        if stage.phase == self._stage.phase:
            return
        with self.updater.whole_weights():
            weights = whole_copy(self.vae)
        self.updater.close()
        self.psnrs = []
        self._train(next_model(self.config, stage.kind, self._stage.kind, weights), stage)

    def _train(self, vae: VideoVAE, stage: VAEStage) -> None:
        self._stage = stage
        self.vae = vae.to(self.ranks.device)
        freeze(self.vae, stage.kind, stage.trains)
        # The averages are made of whole weights: before ZeRO takes hold of them.
        self.average = WeightAverage(self.vae, self.config.ema_decay) if self.config.ema_decay else None
        self.updater = build_updater(self.vae, self.config, self.ranks)

    def _losses(self, video: Tensor, decoded: Tensor, moments: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """The terms to report, and a value whose gradient is that of the weighted sum."""
        config = self.config
        leaf = decoded.detach().requires_grad_()
        error = leaf - video
        terms = {"l1": error.abs().mean(), "mse": error.square().mean()}
        loss = config.l1_weight * terms["l1"] + config.mse_weight * terms["mse"]
        if self.lpips:
            terms["lpips"] = video_lpips(self.lpips, leaf, video, config.perceptual.max_frames)
            loss = loss + config.perceptual.weight * terms["lpips"]
        # Losses of the frames meet at the frames: there the adversarial one is balanced against the others.
        (gradient,) = torch.autograd.grad(loss, leaf)
        terms["kl"] = kl_divergence(moments)
        terms = {"loss": loss + config.kl_weight * terms["kl"], **terms}
        if self._adversarial_now():
            assert self.adversary is not None
            terms["adversarial"], own = self.adversary.gradient(decoded)
            scale = self.adversary.scale(gradient, own)
            terms["adversarial_scale"] = torch.tensor(scale, device=video.device)
            gradient = gradient + scale * own
        return terms, (decoded * gradient).sum() + config.kl_weight * terms["kl"]

    def _adversarial_now(self) -> bool:
        return self.adversarial_since is not None and self.step >= self.adversarial_since

    def _means(self, terms: dict[str, Tensor]) -> dict[str, float]:
        means = self.ranks.mean(torch.stack([term.detach().float() for term in terms.values()]))
        return dict(zip(terms, means.tolist(), strict=True))

    def _checked(self, values: dict[str, float]) -> dict[str, float]:
        if not is_finite(*values.values()):
            saved = (self.folder / POINTER).is_file()
            kept = f"the checkpoint in {self.folder} is sound" if saved else "no checkpoint had been written yet"
            raise UserError(
                f"step {self.step + 1} gave {values}: lower learning_rate={self.config.learning_rate:g}; {kept}"
            )
        return values

    def _noise(self, video: Tensor) -> Tensor:
        # Keyed by the step and drawn for all ranks: neither resuming nor the number of ranks changes it.
        batch = len(video) * self.ranks.world
        shape = latent_shape(self.vae, (batch, *video.shape[1:]))
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
        noise = torch.randn(shape, generator=generator)
        return noise[self.ranks.share(batch)].to(self.ranks.device)

    def _describe_adversary(self) -> str:
        config = self.config.adversarial
        if self.adversary is None:
            return "off (adversarial.weight=0)"
        size = sum(parameter.numel() for parameter in self.adversary.model.parameters())
        begin = (
            f"from step {self.adversarial_since}"
            if self.adversarial_since is not None
            else f"once {config.patience} evaluations in a row bring less than {config.min_gain:g} dB"
        )
        return f"{size:,} parameters, weight {config.weight:g}, {begin}"


def check_batches(config: VAETrainConfig, ranks: Ranks) -> None:
    """Refuse batches that cannot be shared out evenly.

    Raises:
        UserError: the ranks do not divide a stage's batch.
    """
    for stage in config.stages:
        ranks.share(stage.batch_size)
        ranks.share(stage.image_batch_size if stage.image_share else ranks.world)


def describe_layout(zero_stage: int | None, world: int) -> str:
    """How the run is laid out; a run continues under the same layout only."""
    return "plain torch in one process" if zero_stage is None else f"DeepSpeed ZeRO {zero_stage}, world size {world}"
