"""`megatron-video vae train`: train the Video-VAE on the clips of a manifest (L1 + MSE + KL).

One process. The same command continues a stopped run from its checkpoint, bit for bit. The output folder is then a
VAE for `data encode` and `sample`: config.json and model.safetensors, beside metrics.jsonl, reconstructions.png,
report.json and a TensorBoard log.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config, save_config
from megatron_video.errors import UserError
from megatron_video.vae import VideoVAE, sample_posterior, save_vae
from megatron_video.vae.checkpoint import to_channels_last
from megatron_video.vae.initialisation import initialise
from training.config import PRESET_DIR
from training.telemetry import record_life, write_json
from training.vae_clips import TrainingClips
from training.vae_config import VAETrainConfig
from training.vae_report import VAETelemetry, evaluate, is_finite, kl_divergence, to_input, write_reconstructions

CHECKPOINT = "checkpoint.pt"
REPORT = "report.json"
# What may differ between a run and its continuation.
FREE_FIELDS = ("output", "log_every", "evaluate_every", "save_every", "cache_gib", "device")


def main(argv: Sequence[str]) -> int:
    """Command line of `megatron-video vae`."""
    arguments = _parse(argv)
    config = load_config(VAETrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
    if arguments.print_config:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    report = train(config)
    if arguments.json:
        print(json.dumps(report))
    return 0


def train(config: VAETrainConfig) -> dict[str, Any]:
    """Train, or continue, and return the report that is also written to `<output>/report.json`.

    Raises:
        UserError: unusable data, a checkpoint of other settings, or a loss that is not finite.
        KeyboardInterrupt: stopped by Ctrl-C or SIGTERM, after saving.
    """
    run = VAERun(config)
    if run.step == config.total_steps and (run.folder / REPORT).is_file():
        report: dict[str, Any] = json.loads((run.folder / REPORT).read_text(encoding="utf-8"))
        print(f"{run.folder}: trained already, {run.step} steps; held out PSNR {report['psnr']:.2f} dB", flush=True)
        return report
    clips = TrainingClips(config)
    telemetry = VAETelemetry(run.folder, run.step, config.total_steps, config.log_every)
    telemetry.say(run.describe())
    telemetry.say(clips.describe())
    try:
        with _StopRequest() as stop:
            while run.step < config.total_steps:
                telemetry.log_step(run.step + 1, run.train_step(clips.batch(run.step)))
                if run.step % config.evaluate_every == 0 and run.step < config.total_steps:
                    telemetry.log_held_out(run.step, *run.evaluate(clips))
                if run.step % config.save_every == 0 or run.step == config.total_steps or stop.requested:
                    run.save()
                stop.raise_if_requested()
        return _finish(run, clips, telemetry)
    finally:
        telemetry.close()
        clips.close()


class VAERun:
    """Model, optimizer and position of a run; continues from the checkpoint in its folder."""

    def __init__(self, config: VAETrainConfig) -> None:
        self.config = config
        self.folder = Path(config.output)
        self.device = _device(config.device)
        self.autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bf16")
        self.step = 0
        self.seconds = 0.0
        self.vae = VideoVAE(config.model)
        initialise(self.vae, config.seed)
        to_channels_last(self.vae.to(self.device))
        self.optimizer = torch.optim.AdamW(
            self.vae.parameters(), betas=config.betas, weight_decay=config.weight_decay, fused=True
        )
        self._resume()
        self.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, self.folder / "train_config.yaml")
        record_life(self.folder, self.step)

    def describe(self) -> str:
        """Sizes of the model and the run."""
        encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (self.vae.encoder, self.vae.decoder))
        stages = " + ".join(str(stage.steps) for stage in self.config.stages)
        return (
            f"Video-VAE: {encoder:,} + {decoder:,} parameters (encoder + decoder), {self.config.precision} on "
            f"{self.device}; {stages} = {self.config.total_steps} steps, at step {self.step}"
        )

    def train_step(self, pixels: Tensor) -> dict[str, float]:
        """One update on uint8 pixels [B, T, 3, H, W].

        Raises:
            UserError: the loss or the gradient is not finite; the weights are those before the step.
        """
        started = time.perf_counter()
        rate = self.config.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        video = to_input(pixels, self.device)
        with self.autocast:
            moments = self.vae.encode_moments(video).float()
            decoded = self.vae.decode(sample_posterior(moments, self._noise(moments)))
        error = decoded.float() - video
        l1, mse, kl = error.abs().mean(), error.square().mean(), kl_divergence(moments)
        loss = self.config.l1_weight * l1 + self.config.mse_weight * mse + self.config.kl_weight * kl
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.vae.parameters(), self.config.clip_grad_norm)
        values = {
            name: value.item() for name, value in zip(("loss", "l1", "mse", "kl"), (loss, l1, mse, kl), strict=True)
        }
        values["grad_norm"] = norm.item()
        if not is_finite(*values.values()):
            raise UserError(
                f"step {self.step + 1} gave {values}: lower learning_rate={self.config.learning_rate:g}; "
                f"the last checkpoint in {self.folder} is sound"
            )
        self.optimizer.step()
        self.step += 1
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return {**values, "learning_rate": rate, "samples": float(len(pixels)), "step_seconds": seconds}

    def evaluate(self, clips: TrainingClips) -> Any:
        """Held-out errors and pictures."""
        longest = max(bucket.frames for bucket in clips.held_out)
        batches = clips.held_out_batches(longest, self.config.stages[-1].batch_size)
        return evaluate(self.vae, batches, self.config.seed, self.autocast)

    def save(self) -> None:
        """Write the checkpoint; an older one is replaced only when the new one is complete."""
        state = {
            "config": config_to_dict(self.config),
            "step": self.step,
            "seconds": self.seconds,
            "vae": self.vae.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        temporary = self.folder / f".{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.folder / CHECKPOINT)

    def _noise(self, moments: Tensor) -> Tensor:
        # Keyed by the step, so that a continued run draws what the uninterrupted one would have drawn.
        shape = (*moments.shape[:2], moments.shape[2] // 2, *moments.shape[3:])
        generator = torch.Generator().manual_seed((self.config.seed << 32) + self.step)
        return torch.randn(shape, generator=generator).to(self.device)

    def _resume(self) -> None:
        path = self.folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
        except Exception as error:
            raise UserError(f"{path} is not a readable checkpoint ({error}); remove it to start anew") from None
        _refuse_other_settings(path, state["config"], config_to_dict(self.config))
        self.vae.load_state_dict(state["vae"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]


def _finish(run: VAERun, clips: TrainingClips, telemetry: VAETelemetry) -> dict[str, Any]:
    held_out, pictures = run.evaluate(clips)
    telemetry.log_held_out(run.step, held_out, pictures)
    write_reconstructions(pictures, run.folder / "reconstructions.png")
    save_vae(run.vae, run.folder)
    report = {"output": str(run.folder), "steps": run.step, "train_seconds": run.seconds, **asdict(held_out)}
    write_json(run.folder / REPORT, report)
    telemetry.say(
        f"{run.folder}: {run.step} steps in {run.seconds:.0f} s, PSNR {held_out.psnr:.2f} dB, L1 {held_out.l1:.4f}, "
        f"{1000 * held_out.decode_seconds_per_clip:.0f} ms to decode a clip; look at reconstructions.png"
    )
    return report


def _refuse_other_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [name for name in now if name not in FREE_FIELDS and before.get(name) != now[name]]
    if changed:
        pairs = "; ".join(f"{name}: {before.get(name)} there, {now[name]} now" for name in changed)
        raise UserError(f"{path} is of a run with other settings ({pairs}); take another output, or remove it")


def _device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but torch sees no CUDA device; take device=cpu or device=auto")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


class _StopRequest:
    """Ctrl-C or SIGTERM ends the run after the step in hand; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def raise_if_requested(self) -> None:
        if self.requested:
            raise KeyboardInterrupt

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video vae", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "train",
        help="train on the clips of a manifest, or continue",
        epilog="Fields and their meaning: training/vae_config.py, or --print-config.",
    )
    command.add_argument("--config", required=True, help="a YAML file or a preset (vae_demo)")
    command.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    command.add_argument("--json", action="store_true", help="print the report as JSON at the end")
    command.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. manifest=m.parquet output=runs/vae")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
