"""`--dry-run` of `vae train`: the VAE of every stage without memory, its clips, first weights, room and ranks."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_video.config_io import config_to_dict, load_config
from training.discriminator import PatchDiscriminator
from training.dry_run import check_data, check_disk
from training.dry_run.check_disk import DiskNeed
from training.dry_run.command import is_follower, prepare_process
from training.dry_run.findings import Findings
from training.dry_run.report import Report
from training.dry_run.request import Request
from training.layout_matrix.report import text_table
from training.perceptual import load_lpips
from training.planner.cluster import GIB
from training.vae_checkpoint import find_run, refuse_other_folder, refuse_other_settings
from training.vae_clips import check_videos, clips_by_bucket
from training.vae_config import PRESET_DIR, VAEStage, VAETrainConfig
from training.vae_phases import bare_model, first_model, freeze
from training.vae_ranks import Ranks
from training.vae_run import check_batches, describe_layout
from training.vae_updater import zero_stage_of

_FP32 = 4
_MOMENTS = 2
_META = torch.device("meta")


@dataclass(frozen=True)
class StageState:
    """What one rank holds of a stage between steps; all ranks hold the same. Bytes."""

    stage: int
    phase: str
    parameters: int
    """Of the VAE."""
    trained: int
    """That are not frozen."""
    weights: int
    """fp32; of the discriminator too."""
    gradients: int
    optimizer: int
    """Two moments, and under ZeRO this rank's part of the weights once more."""
    average: int
    """Of the weights."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.gradients + self.optimizer + self.average

    @staticmethod
    def of(config: VAETrainConfig, number: int, stage: VAEStage, zero: int | None, world: int) -> StageState:
        """Of a stage's real model, on the meta device."""
        with _META:
            vae = bare_model(config, stage.kind)
            adversary = _adversary_parameters(config)
        freeze(vae, stage.kind, stage.trains)
        total = sum(parameter.numel() for parameter in vae.parameters())
        trained = sum(parameter.numel() for parameter in vae.parameters() if parameter.requires_grad)
        # ZeRO 1 cuts the optimizer over the ranks, 2 the gradients too, 3 the weights too.
        cut = [world if (zero or 0) >= level else 1 for level in (1, 2, 3)]
        return StageState(
            number,
            "/".join(stage.phase),
            total,
            trained,
            _FP32 * (-(-total // cut[2]) + adversary),
            _FP32 * (-(-trained // cut[1]) + adversary),
            _FP32 * ((_MOMENTS + (zero is not None)) * -(-trained // cut[0]) + _MOMENTS * adversary),
            _FP32 * total if config.ema_decay else 0,
        )


def dry_run_vae(arguments: argparse.Namespace) -> int:
    """A dry run of one configuration.

    Returns:
        0 if it can run, else 2.
    """
    if is_follower():
        return 0
    prepare_process()
    findings = Findings()
    report = Report("vae train", Request.of(arguments, findings), [findings])
    config: VAETrainConfig | None = None
    with findings.check("config"):
        config = load_config(VAETrainConfig, arguments.config, arguments.overrides, PRESET_DIR)
        if arguments.deepspeed and config.zero_stage is None:
            config.zero_stage = 2
    if config is not None and report.request is not None:
        _examine(config, report, report.request, findings)
    return report.tell(arguments.json)


def _examine(config: VAETrainConfig, report: Report, request: Request, findings: Findings) -> None:
    ranks = Ranks(0, request.world_size, _META)
    zero = zero_stage_of(config, ranks)
    with findings.check("layout"):
        check_batches(config, ranks)
    if zero is not None and importlib.util.find_spec("deepspeed") is None:
        findings.leave_out("packages", "DeepSpeed is not on this machine; `megatron-video doctor` on the nodes tells")
    states = [StageState.of(config, i, stage, zero, ranks.world) for i, stage in enumerate(config.stages)]
    _unless_skipped(request, findings, check_data.CHECK, lambda: _check_clips(config, findings))
    with findings.check("perceptual"):
        if config.perceptual.weight:
            load_lpips(config.perceptual, torch.device("cpu"))
    layout = describe_layout(zero, ranks.world)
    _unless_skipped(request, findings, "checkpoint", lambda: _check_start(config, layout, findings))
    need = _disk_need(config, states)
    _unless_skipped(request, findings, check_disk.CHECK, lambda: check_disk.check_disk([need], findings))
    _check_memory(states, request, findings)
    report.other = {
        "layout": layout,
        "steps": config.total_steps,
        "vae_stages": [{**asdict(state), "model_state": state.total} for state in states],
        "disk": need.values(),
        "checks": findings.checks,
    }
    report.lines = [_text(config, layout, states, need, findings)]


def _unless_skipped(request: Request, findings: Findings, name: str, check: Callable[[], None]) -> None:
    if name in request.skip:
        findings.pass_over(name)
    else:
        check()


def _check_clips(config: VAETrainConfig, findings: Findings) -> None:
    """The manifest, and the first clip of every bucket."""
    with findings.check(check_data.CHECK):
        groups = clips_by_bucket(config)
        with findings.check(check_data.CHECK):
            check_videos(config, groups)
        for clips in groups.values():
            with findings.check(check_data.CHECK):
                clips[0].decode(0, 1)


def _check_start(config: VAETrainConfig, layout: str, findings: Findings) -> None:
    """The run's own checkpoint, or else the weights that it starts from."""
    with findings.check("checkpoint"):
        saved = find_run(Path(config.output), _META)
        if saved is None:
            refuse_other_folder(Path(config.output))
            first_stage = config.stages[0]
            if config.initial_weights is not None:
                first_model(config, first_stage.kind)
            return
        refuse_other_settings(saved, config_to_dict(config), layout)
        saved.load_model(config.stage_at(saved.state["step"] - 1).kind)
        findings.note(f"continues from {saved.folder}, step {saved.state['step']} of {config.total_steps}")


def _disk_need(config: VAETrainConfig, states: list[StageState]) -> DiskNeed:
    """The newest checkpoint goes when the next one is complete; the finished VAE lies beside them."""
    adversary = _adversary_parameters(config)
    size = max(
        _FP32 * (state.parameters + (_MOMENTS + 1) * (state.trained + adversary)) + state.average for state in states
    )
    folder = Path(config.output)
    present = sum(path.stat().st_size for path in (folder / "checkpoint").glob("*/*") if path.is_file())
    return DiskNeed(folder, size, 2, present, "output")


def _adversary_parameters(config: VAETrainConfig) -> int:
    if not config.adversarial.weight:
        return 0
    with _META:
        model = PatchDiscriminator(config.adversarial.channels, config.adversarial.num_layers)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_memory(states: list[StageState], request: Request, findings: Findings) -> None:
    findings.leave_out("activations", "the planner knows the DiT alone: their memory and the step time are not known")
    if request.cluster is None:
        return
    findings.checks.setdefault("memory", "ok")
    usable = request.cluster.usable_bytes
    for state in states:
        if state.total > usable:
            findings.refuse(
                "memory",
                f"stage {state.stage} ({state.phase}) keeps {state.total / GIB:.1f} GiB on a GPU before any activation,"
                f" and {usable / GIB:.1f} GiB are usable; raise zero_stage, or take more ranks",
            )


def _text(config: VAETrainConfig, layout: str, states: list[StageState], need: DiskNeed, findings: Findings) -> str:
    names = ("weights", "gradients", "optimizer", "average", "total")
    rows = [
        [
            str(state.stage),
            state.phase,
            f"{config.stages[state.stage].steps:,}",
            f"{state.parameters:,}",
            f"{state.trained:,}",
            *(f"{getattr(state, name) / GIB:.3f}" for name in names),
        ]
        for state in states
    ]
    checks = ", ".join(f"{check} {verdict}" for check, verdict in findings.checks.items())
    return "\n".join(
        [
            f"== {config.output}: {config.total_steps:,} steps, {layout}",
            text_table(["stage", "kind/trains", "steps", "parameters", "trained", *names], rows),
            "GiB of one rank, all alike, without activations",
            f"checkpoints: {need.checkpoint_bytes / 1e9:,.3f} GB each, {need.count} at a time",
            f"checks: {checks}",
        ]
    )
