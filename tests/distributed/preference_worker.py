"""Training on preference pairs, on every rank of a layout; run on the ranks of a pool."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from resident_reference import resident_reference
from tiny_shards import MODEL_OVERRIDES

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from training.config import PretrainConfig
from training.pretrain import run_training

SETTINGS = [
    *MODEL_OVERRIDES,
    "model.num_layers=4",
    "model.num_attention_heads=4",
    "run.seed=3",
    "data.micro_batch_size=1",
    "data.global_batch_size=8",
    "data.draw_size=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=2",
    "training.precision=fp32",
    "training.log_every=1",
]


def train(overrides: list[str]) -> str | None:
    """Train on this rank; the refusal, if there is one."""
    try:
        run_training(load_config(PretrainConfig, None, [*SETTINGS, *overrides]), keep_distributed=True)
    except UserError as error:
        return str(error)
    return None


def train_beside_a_resident_reference(overrides: list[str]) -> str | None:
    """`train`, on one rank, with a reference of its own."""

    with resident_reference():
        return train(overrides)


def train_where_others_see_no_errors(overrides: list[str]) -> str | None:
    """`train` as on a network file system that shows the reference's errors to the node that wrote them alone."""
    if dist.get_rank() == 0:
        return train(overrides)
    _Blindness.on = True
    try:
        return train(overrides)
    finally:
        _Blindness.on = False


class _Blindness:
    on = False


def _see_nothing(event: str, arguments: tuple[Any, ...]) -> None:
    looks = event in ("open", "os.listdir", "os.scandir", "glob.glob")
    if _Blindness.on and looks and "reference_errors" in str(arguments[0]):
        raise FileNotFoundError(arguments[0])


# Hooks stay for the life of a process.
sys.addaudithook(_see_nothing)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Loss, gradient norm and measures of every step."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{"loss": line["loss"], "grad_norm": line["grad_norm"], **line.get("preference", {})} for line in lines]
