"""docs/alignment/dry_run_30b.md: Video-DPO of the 30B, dry. `python -m training.dry_run.write_preference_page`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_video.config_io import load_config
from megatron_video.flops import TABLE_3_TEXT_TOKENS
from megatron_video.parallel import ParallelConfig
from training.config import PRESET_DIR as PRETRAIN_PRESETS
from training.config import PretrainConfig
from training.dpo import PRESET_DIR
from training.dry_run.write_page import measured
from training.planner.cluster import GIB, Cluster, load_cluster
from training.planner.job import Job
from training.planner.memory import peak_memory
from training.planner.mix import step_of
from training.planner.plan import Refusal, describe, lay_out
from training.planner.step_time import forward_seconds, step_seconds
from training.planner.tables import Formats, Table, number

OUT = Path(__file__).parents[2] / "docs" / "alignment" / "dry_run_30b.md"
_PRESET, _FINE_TUNING, _CLUSTER = "step_video_30b_dpo", "step_video_30b_sft", "h800_step_video"
_GPUS, _SHOWN = (64, 128, 256, 512), 512
# Where all of _LAYOUTS have a pair for every replica.
_FOR_LAYOUTS = 256
_COMMAND = [
    *("megatron-video", "dpo", "train", "--config", _PRESET, "--dry-run", "--gpus", str(_SHOWN)),
    *("--cluster", _CLUSTER, "--skip", "data,checkpoint,disk"),
]
# (tensor-parallel size, pipeline stages)
_LAYOUTS = ((8, 1), (4, 1), (4, 2), (2, 4))
_PARTS = ("weights", "gradients", "optimizer", "activations", "workspace", "communication")
_GIB, _SECONDS = number(2), number(2)


def page() -> str:
    """Run it, and what it said, took and means."""
    config = load_config(PretrainConfig, _PRESET, [], PRESET_DIR)
    text, took = measured(_COMMAND)
    return "\n\n".join(
        [
            "# Video-DPO of the 30B, dry",
            "Written by `python -m training.dry_run.write_preference_page`: what the planner says of the preset on "
            f"H800s with {load_cluster(_CLUSTER).usable_bytes / GIB:.1f} GiB usable. Nothing here ran on a GPU; how "
            "far the planner's memory is from that of real runs is in docs/planner/measured_memory.md, and what a step "
            "and its memory cost beside pretraining, measured, in tests/benchmarks/README.md.",
            _memory_table(config).markdown(),
            "Fine-tuning is `step_video_30b_sft` with the buckets, layout and rows of DPO: 128 samples a step, two a "
            "micro-batch. The planner takes a pair for two samples, so that they are equal by assumption; that they "
            "are equal in bytes was measured (tests/benchmarks/README.md).",
            _time_table(config).markdown(),
            "`pass` is the forward pass over the draws of all steps that precomputes the reference's errors; it keeps "
            f"24 bytes a draw, {24 * config.training.steps * config.data.global_batch_size / 1e6:.1f} MB for the run. "
            "`swapped` has the same forward pass in every step, and four copies of the weights over PCIe, which the "
            "planner takes not to overlap; its weights wait in page-locked host memory.",
            _second_model_table(config).markdown(),
            _second_model_words(config),
            "## The dry run itself",
            took,
            f"    {' '.join(_COMMAND)}",
            f"```\n{text.strip()}\n```",
        ]
    )


def _memory_table(config: PretrainConfig) -> Table:
    tuned = load_config(PretrainConfig, _FINE_TUNING, _as_rows_of(config), PRETRAIN_PRESETS)
    rows: list[dict[str, Any]] = []
    for gpus in _GPUS:
        for what, one in (("DPO", config), ("fine-tuning", tuned)):
            peak = max(peak_memory(_job(one, gpus)), key=lambda memory: memory.total)
            rows.append({"GPUs": gpus, "training": what, **peak.in_gib(), "total": peak.total / GIB})
    formats: Formats = {"GPUs": str, "training": str, **dict.fromkeys((*_PARTS, "total"), _GIB)}
    return Table("Memory of a GPU in GiB, by part", rows, formats)


def _as_rows_of(config: PretrainConfig) -> list[str]:
    """What makes fine-tuning train on as many rows of the same sizes in the same layout."""
    data, parallel = config.data, config.parallel
    return [
        f"data.buckets=[{','.join(data.buckets or [])}]",
        "data.bucket_weights={}",
        f"data.micro_batch_size={2 * data.micro_batch_size}",
        f"data.global_batch_size={2 * data.global_batch_size}",
        f"parallel.tensor_model_parallel_size={parallel.tensor_model_parallel_size}",
        f"parallel.recompute_granularity={parallel.recompute_granularity}",
        "parallel.recompute_num_layers=null",
    ]


def _time_table(config: PretrainConfig) -> Table:
    rows = []
    for gpus in _GPUS:
        job = _job(config, gpus)
        step, forward, copies = step_seconds(job).total, forward_seconds(job).total, 4 * _copy_seconds(job)
        rows.append(
            {
                "GPUs": gpus,
                "step s": step,
                "steps h": step * config.training.steps / 3600,
                "pass, a step s": forward,
                "pass h": forward * config.training.steps / 3600,
                "swapped: step s": step + forward + copies,
                "swapped: host GiB a node": _weights(job) * job.cluster.gpus_per_node / GIB,
            }
        )
    return Table(
        f"Time of {config.training.steps:,} steps of {config.data.global_batch_size} pairs",
        rows,
        {name: str if name == "GPUs" else _SECONDS for name in rows[0]},
    )


def _second_model_table(config: PretrainConfig) -> Table:
    rows = []
    for tensor, stages in _LAYOUTS:
        parallel = replace(config.parallel, tensor_model_parallel_size=tensor, pipeline_model_parallel_size=stages)
        rows += [_fit(config, parallel, models) for models in (1, 2)]
    formats: Formats = {
        "layout": str,
        "models": str,
        "second model": _GIB,
        "recomputed": str,
        "GiB": lambda value: "" if value is None else _GIB(value),
        "step_s": lambda value: "does not fit" if value is None else _SECONDS(value),
    }
    heads = {"second model": "second model GiB", "recomputed": "layers recomputed, at least", "step_s": "step s"}
    return Table(f"A second copy of the weights on {_FOR_LAYOUTS} GPUs", rows, formats, heads)


def _fit(config: PretrainConfig, parallel: ParallelConfig, models: int) -> dict[str, Any]:
    """With the fewest recomputed layers that fit."""
    layers = config.model.num_layers // parallel.pipeline_model_parallel_size
    name, second = describe(parallel).split(" recompute")[0], 0.0
    for number_recomputed in range(layers + 1):
        job = _job(config, _FOR_LAYOUTS, _recomputing(parallel, number_recomputed))
        second = (models - 1) * _weights(job)
        peak = max(memory.total for memory in peak_memory(job)) + second
        if peak <= job.cluster.usable_bytes:
            told = f"{number_recomputed} of {layers}"
            seconds = step_seconds(job).total + (models - 1) * forward_seconds(job).total
            return _row(name, models, second, told, peak / GIB, seconds)
    return _row(name, models, second, f"{layers} of {layers}", None, None)


def _row(
    name: str, models: int, second: float, recomputed: str, gib: float | None, seconds: float | None
) -> dict[str, Any]:
    return {
        "layout": name,
        "models": models,
        "second model": second / GIB,
        "recomputed": recomputed,
        "GiB": gib,
        "step_s": seconds,
    }


def _recomputing(parallel: ParallelConfig, layers: int) -> ParallelConfig:
    if not layers:
        return replace(parallel, recompute_granularity=None, recompute_num_layers=None)
    return replace(parallel, recompute_granularity="full", recompute_num_layers=layers)


def _second_model_words(config: PretrainConfig) -> str:
    job = _job(config, _FOR_LAYOUTS)
    largest = max(memory.total for memory in peak_memory(job))
    return (
        f"In the preset's layout a second model would take {_weights(job) / GIB:.2f} GiB of every GPU beside a peak of "
        f"{largest / GIB:.2f} GiB, so there it fits into {job.cluster.usable_bytes / GIB:.1f} GiB; it takes the room "
        "that fewer recomputed layers need. With TP 4 it is twice as large; there the latents of 204 frames leave room "
        "for it only where the layers are cut into stages too, and in the other layouts not even one model trains. A "
        "step with two models includes the second one's forward pass."
    )


def _job(config: PretrainConfig, gpus: int, parallel: ParallelConfig | None = None) -> Job:
    cluster: Cluster = replace(load_cluster(_CLUSTER), gpus=gpus)
    job = lay_out(config, cluster, step_of(config, TABLE_3_TEXT_TOKENS), parallel or config.parallel)
    if isinstance(job, Refusal):
        raise RuntimeError(job.reason)
    return job


def _weights(job: Job) -> float:
    """Bytes of one GPU, of the fullest stage."""
    return max(memory.weights for memory in peak_memory(job))


def _copy_seconds(job: Job) -> float:
    return _weights(job) / (job.cluster.host_gbps * 1e9)


def write(out: Path, lines: Sequence[str]) -> None:
    """The page, in a folder that may be new."""
    out.parent.mkdir(exist_ok=True)
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(OUT, [page()])
    print(OUT)
