"""The summary of a demo: every number is read from what this run wrote, and the checks are made here.

`summary.json` is an interface: fields are added, not renamed.
"""

from __future__ import annotations

import json
import platform
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from megatron_video import __version__
from megatron_video.config_io import config_to_dict
from megatron_video.doctor import GIB, available_cores, memory_bytes
from megatron_video.manifest import read_manifest
from training.demo_steps import DemoConfig, Layout, Step, pretrain_config
from training.telemetry import git_revision, package_versions

SUMMARY_VERSION = 1
# Losses of single steps scatter with their timesteps; start and end are means over this many steps.
MEAN_STEPS = 20


def summarise(
    config: DemoConfig, steps: Sequence[Step], seconds: Mapping[str, float], logs: Mapping[str, Path], out: Path
) -> dict[str, Any]:
    """Collect the figures of a finished demo and check them; `failed_checks` is empty when all hold."""
    at = Layout(out)
    lives = read_lives(at.run)
    summary: dict[str, Any] = {
        "summary_version": SUMMARY_VERSION,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "steps": [
            {"name": s.name, "seconds": round(seconds[s.name], 1), "command": s.shown(), "log": str(logs[s.name])}
            for s in steps
        ],
        "total_seconds": round(sum(seconds.values()), 1),
        "raw": count_rows(at.manifest("filter")),
        "vae": json.loads((at.vae / "report.json").read_text(encoding="utf-8")),
        "training": describe_training(lives, config, out),
        "resume_check": check_resume(lives, pretrain_config(config, out).training.steps),
        # The last line that `ckpt diff --json` printed; exit code 1 would have stopped the demo.
        "conversion_check": json.loads(logs["compare"].read_text(encoding="utf-8").splitlines()[-1]),
        "accuracy": {name: _accuracy(at.measurement(name)) for name in ("real", "trained", "untrained")},
        "samples": len(at.prompts.read_text(encoding="utf-8").splitlines()),
        "contact_sheets": {
            **{name: str(at.samples(name) / "contact_sheet.png") for name in ("trained", "untrained")},
            "vae": str(at.vae / "reconstructions.png"),
        },
        "machine": describe_machine(),
        "versions": {"megatron-video": __version__, "python": platform.python_version(), **package_versions()},
        "git_revision": git_revision(),
        "config": config_to_dict(config),
    }
    return {**summary, "failed_checks": failed_checks(summary, config.required_accuracy)}


def read_lives(run: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """Logged steps of each life (start of the job) of a run: life -> step -> line of metrics.jsonl."""
    lives: dict[int, dict[int, dict[str, Any]]] = defaultdict(dict)
    for line in _metric_lines(run):
        lives[line["life"]][line["step"]] = line
    return dict(lives)


def last_logged_step(run: Path) -> int:
    """The step of the newest line of metrics.jsonl; 0 before the first."""
    lines = _metric_lines(run)
    return int(lines[-1]["step"]) if lines else 0


def check_resume(lives: Mapping[int, Mapping[int, Mapping[str, Any]]], steps: int) -> dict[str, Any]:
    """Were the steps between checkpoint and kill, done by two lives, done alike? And is every step there?

    Two lives that agree in the losses and gradient norms of the repeated steps, bit by bit, have the same weights,
    optimizer, data and noise, so the curve is the one of an uninterrupted run.
    """
    by_step: dict[int, list[Mapping[str, Any]]] = defaultdict(list)
    for lines in lives.values():
        for step, line in lines.items():
            by_step[step].append(line)
    repeated = sorted(step for step, lines in by_step.items() if len(lines) > 1)
    differences = {
        name: max((abs(line[name] - by_step[s][0][name]) for s in repeated for line in by_step[s]), default=None)
        for name in ("loss", "grad_norm")
    }
    # A gap would mean data that was skipped, or a step that nobody can account for.
    missing = sorted(set(range(1, steps + 1)) - set(by_step))
    return {
        "lives": [{"life": life, "first_step": min(lines), "last_step": max(lines)} for life, lines in lives.items()],
        "steps_done_twice": len(repeated),
        "first_step_done_twice": repeated[0] if repeated else None,
        "last_step_done_twice": repeated[-1] if repeated else None,
        "max_loss_difference": differences["loss"],
        "max_grad_norm_difference": differences["grad_norm"],
        "missing_steps": missing,
        # Nothing repeated means that nothing was compared; that is no pass.
        "passed": bool(repeated) and not missing and all(value == 0 for value in differences.values()),
    }


def describe_training(lives: Mapping[int, Mapping[int, Any]], config: DemoConfig, out: Path) -> dict[str, Any]:
    """Losses at start and end, and what was trained on how many ranks."""
    resolved = pretrain_config(config, out)
    # A step that was done twice counts once, as the life that went on did it.
    lines = {step: line for life in sorted(lives) for step, line in lives[life].items()}
    losses = [lines[step]["loss"] for step in sorted(lines)]
    first, last = losses[:MEAN_STEPS], losses[-MEAN_STEPS:]
    return {
        "steps": max(lines),
        "samples": sum(line["samples"] for line in lines.values()),
        "seconds_per_step": sum(line["step_seconds"] for line in lines.values()) / len(lines),
        "ranks": config.ranks,
        "tensor_model_parallel_size": resolved.parallel.tensor_model_parallel_size,
        "sequence_parallel": resolved.parallel.sequence_parallel,
        "loss_start": sum(first) / len(first),
        "loss_end": sum(last) / len(last),
        "loss_mean_over_steps": len(last),
    }


def count_rows(manifest: Path) -> dict[str, Any]:
    """Clips kept and dropped, with the reasons, of the last manifest."""
    table = read_manifest(manifest).select(["source", "dropped_by", "drop_reason"]).to_pylist()
    dropped = [row for row in table if row["dropped_by"]]
    examples = {
        row["dropped_by"]: row["drop_reason"].replace(row["source"], Path(row["source"]).name) for row in dropped
    }
    return {
        "files": len({row["source"] for row in table}),
        "clips_kept": len(table) - len(dropped),
        "clips_dropped": dict(Counter(row["dropped_by"] for row in dropped)),
        "dropped_examples": examples,
    }


def describe_machine() -> dict[str, Any]:
    """Where the demo ran."""
    cores, memory = available_cores(), round(memory_bytes() / GIB, 1)
    return {"platform": platform.platform(), "processor": _processor(), "cores": cores, "memory_gib": memory}


def failed_checks(summary: Mapping[str, Any], required_accuracy: float) -> list[str]:
    """What does not hold, in words."""
    failed = []
    if not summary["resume_check"]["passed"]:
        failed.append("resume: the continued run is not the uninterrupted one")
    if not summary["conversion_check"]["equal"]:
        failed.append("conversion: the weights that came back differ")
    for attribute in ("colour", "direction"):
        reached = summary["accuracy"]["trained"][attribute]["accuracy"]
        if reached < required_accuracy:
            failed.append(f"{attribute}: {reached:.1%} right, required_accuracy is {required_accuracy:.0%}")
    return failed


def format_summary(summary: Mapping[str, Any]) -> str:
    """The summary as tables for people."""
    width = max(len(step["name"]) for step in summary["steps"])
    lines = ["", f"{'step':<{width + 4}} seconds"]
    for number, step in enumerate(summary["steps"], 1):
        lines.append(f"{number:>2}  {step['name']:<{width}} {step['seconds']:>7.1f}")
    total = timedelta(seconds=round(summary["total_seconds"]))
    lines += [f"{'':<4}{'total':<{width}} {summary['total_seconds']:>7.1f}  = {total}", ""]
    lines += [*_accuracy_table(summary), "", *_facts(summary), ""]
    failed = summary["failed_checks"]
    return "\n".join(lines + ([f"FAILED {check}" for check in failed] or ["all checks passed"]))


def _accuracy_table(summary: Mapping[str, Any]) -> list[str]:
    lines = [f"{'right, as measured in the videos':<36} {'colour':>9} {'direction':>10} {'both':>7} {'videos':>7}"]
    titles = {"real": "real clips (checks the ruler)", "trained": "trained model", "untrained": "untrained model"}
    for name, title in titles.items():
        row = summary["accuracy"][name]
        shares = [row[part]["accuracy"] for part in ("colour", "direction", "both")]
        lines.append(f"{title:<36} {shares[0]:>9.1%} {shares[1]:>10.1%} {shares[2]:>7.1%} {row['videos']:>7}")
    chance = [summary["accuracy"]["trained"][part]["chance"] for part in ("colour", "direction", "both")]
    lines.append(f"{'chance':<36} {chance[0]:>9.1%} {chance[1]:>10.1%} {chance[2]:>7.1%}")
    for part in ("colour", "direction"):
        low, high = summary["accuracy"]["trained"][part]["interval_95"]
        lines.append(f"  95 % interval of the trained model's {part}: {low:.1%} to {high:.1%}")
    return lines


def _facts(summary: Mapping[str, Any]) -> list[str]:
    raw, training, resume = summary["raw"], summary["training"], summary["resume_check"]
    dropped = ", ".join(f"{count} by {stage}" for stage, count in raw["clips_dropped"].items()) or "none"
    return [
        f"raw: {raw['files']} files, {raw['clips_kept']} clips kept, dropped: {dropped}",
        *(f"  {stage}: {example}" for stage, example in raw["dropped_examples"].items()),
        f"VAE: PSNR {summary['vae']['psnr']:.1f} dB on held-out clips, decoded from draws of the posterior",
        f"loss: {training['loss_start']:.4f} -> {training['loss_end']:.4f} "
        f"(means of the first and last {training['loss_mean_over_steps']} of {training['steps']} steps)",
        f"resume: killed after step {resume['last_step_done_twice']}, {resume['steps_done_twice']} steps done twice, "
        f"largest difference of loss {resume['max_loss_difference']}, of gradient norm "
        f"{resume['max_grad_norm_difference']}, missing steps {len(resume['missing_steps'])}",
        f"convert: {summary['conversion_check']['tensors']} tensors to released names and back, "
        f"{'equal bit by bit' if summary['conversion_check']['equal'] else 'DIFFERENT'}",
        *(f"contact sheet, {name}: {path}" for name, path in summary["contact_sheets"].items()),
    ]


def _accuracy(report: Path) -> dict[str, Any]:
    measured: dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    # One entry a video; they stay in the report that the summary names.
    del measured["details"]
    return {**measured, "report": str(report)}


def _metric_lines(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    # What follows the last line break is a line that is still being written, or never was.
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
