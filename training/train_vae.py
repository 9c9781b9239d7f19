"""`megatron-video vae train`: train the Video-VAE on the clips of a manifest.

Losses: L1, MSE and KL, LPIPS from local weights, and an adversarial one after convergence. One process is plain torch;
under torchrun DeepSpeed ZeRO splits the optimizer's state, gradients and weights over the ranks. The same command
continues a stopped run from its checkpoint, bit for bit. The output folder is then a VAE for `data encode` and
`sample`: config.json and model.safetensors, beside metrics.jsonl, reconstructions.png, report.json and a TensorBoard
log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist
import yaml

from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config
from megatron_video.run_lock import run_lock
from training.dry_run.request import add_dry_run_options, refuse_without_dry_run
from training.telemetry import write_json
from training.vae_checkpoint import write_model
from training.vae_clips import TrainingClips
from training.vae_config import PRESET_DIR, VAETrainConfig
from training.vae_ranks import join_ranks
from training.vae_report import VAETelemetry, read_before, write_before, write_reconstructions
from training.vae_run import VAERun

REPORT = "report.json"


def main(argv: Sequence[str]) -> int:
    """Command line of `megatron-video vae`."""
    arguments = _parse(argv)
    if arguments.dry_run:
        # Of no use to a run.
        from training.dry_run.vae import dry_run_vae

        return dry_run_vae(arguments)
    refuse_without_dry_run(arguments)
    config = load_config(VAETrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
    if arguments.print_config:
        print(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), end="")
        return 0
    if arguments.deepspeed and config.zero_stage is None:
        config.zero_stage = 2
    try:
        report = train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if arguments.json and int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(report))
    return 0


def train(config: VAETrainConfig) -> dict[str, Any]:
    """Train, or continue, and return the report that is also written to `<output>/report.json`.

    Under torchrun every rank calls it; they share the work.

    Raises:
        UserError: unusable data, a checkpoint of other settings, another run on the same output, or a loss that is not
            finite.
        KeyboardInterrupt: stopped by Ctrl-C, SIGTERM or SIGUSR1, after saving.
    """
    ranks = join_ranks(config.device, config.zero_stage)
    lock = run_lock(Path(config.output) / ".run.lock", config.output) if ranks.leads else contextlib.nullcontext()
    with lock:
        return _train(VAERun(config, ranks))


def _train(run: VAERun) -> dict[str, Any]:
    config = run.config
    if run.step == config.total_steps and (run.folder / REPORT).is_file():
        report: dict[str, Any] = json.loads((run.folder / REPORT).read_text(encoding="utf-8"))
        print(f"{run.folder}: trained already, {run.step} steps; held out PSNR {report['psnr']:.2f} dB", flush=True)
        return report
    clips = TrainingClips(config)
    telemetry = VAETelemetry(run.folder, run.step, config.total_steps, config.log_every, run.ranks.leads)
    for line in (*run.describe(), clips.describe()):
        telemetry.say(line)
    try:
        if run.step == 0 and config.evaluate_first:
            _evaluate_first(run, clips, telemetry)
        with _StopRequest() as stop:
            while run.step < config.total_steps:
                _one_step(run, clips, telemetry, stop)
        return _finish(run, clips, telemetry)
    finally:
        telemetry.close()
        clips.close()


def _one_step(run: VAERun, clips: TrainingClips, telemetry: VAETelemetry, stop: _StopRequest) -> None:
    config = run.config
    telemetry.log_step(run.step + 1, run.train_step(clips.batch(run.step, run.ranks)))
    if run.step % config.evaluate_every == 0 and run.step < config.total_steps:
        held_out, pictures = run.evaluate(clips)
        telemetry.log_held_out(run.step, held_out, pictures)
        if run.note_held_out(held_out.psnr):
            telemetry.say(f"step {run.step}: held-out PSNR has converged, the adversarial loss starts")
    stopping = run.ranks.any(stop.requested)
    if run.step % config.save_every == 0 or run.step == config.total_steps or stopping:
        run.save()
    if stopping:
        raise KeyboardInterrupt


def _evaluate_first(run: VAERun, clips: TrainingClips, telemetry: VAETelemetry) -> None:
    held_out, pictures = run.evaluate(clips)
    telemetry.log_held_out(0, held_out, pictures)
    if run.ranks.leads:
        write_before(run.folder, held_out, pictures)


def _finish(run: VAERun, clips: TrainingClips, telemetry: VAETelemetry) -> dict[str, Any]:
    held_out, pictures = run.evaluate(clips)
    telemetry.log_held_out(run.step, held_out, pictures)
    before = read_before(run.folder)
    with run.updater.whole_weights(), run.average.applied() if run.average else contextlib.nullcontext():
        if run.ranks.leads:
            write_model(run.vae, run.folder)
    report = {
        "output": str(run.folder),
        "steps": run.step,
        "train_seconds": run.seconds,
        "layout": run.layout,
        "adversarial_since": run.adversarial_since,
        "before": before[0] if before else None,
        **asdict(held_out),
    }
    if run.ranks.leads:
        write_reconstructions(pictures, run.folder / "reconstructions.png", before[1] if before else None)
        write_json(run.folder / REPORT, report)
    run.ranks.barrier()
    gain = f" (before: {before[0]['psnr']:.2f} dB, {before[0]['ssim']:.3f})" if before else ""
    telemetry.say(
        f"{run.folder}: {run.step} steps in {run.seconds:.0f} s, PSNR {held_out.psnr:.2f} dB, SSIM {held_out.ssim:.3f}"
        f"{gain}, L1 {held_out.l1:.4f}, {1000 * held_out.decode_seconds_per_clip:.0f} ms to decode a clip; "
        "look at reconstructions.png"
    )
    if run.config.stages[-1].kind == "base":
        telemetry.say("these are the weights of a base VAE (4x8x8): initial_weights of a dual_path stage, no Video-VAE")
    return report


class _StopRequest:
    """Ctrl-C, SIGTERM or SIGUSR1 ends the run after the step in hand; a second Ctrl-C at once."""

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _StopRequest:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
    command.add_argument("--config", required=True, help="a YAML file or a preset (vae_demo, vae_paper)")
    command.add_argument(
        "--deepspeed",
        action="store_true",
        help="train with DeepSpeed ZeRO 2 also in one process, unless zero_stage says",
    )
    command.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    command.add_argument("--json", action="store_true", help="print the report as JSON at the end")
    add_dry_run_options(command, with_json=False)
    command.add_argument("overrides", nargs="*", metavar="field=value", help="e.g. manifest=m.parquet output=runs/vae")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
