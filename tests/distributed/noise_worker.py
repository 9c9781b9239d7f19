"""What every rank of a layout is given to train on; run on the ranks of a pool by test_noise_layouts.py."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import torch

from megatron_video.config_io import load_config
from megatron_video.device import initialize
from megatron_video.parallel import data_parallel_rank, destroy_parallel, initialize_parallel
from training.config import PretrainConfig
from training.data import Batch
from training.data_set import TrainingData
from training.run_plan import plan_run


def batches_of_this_rank(overrides: list[str], steps: int) -> tuple[int, list[str]]:
    """(data-parallel rank, digests of this rank's micro-batches in order) under the layout of the configuration."""
    from training.build_trainer import replica_batches

    config = load_config(PretrainConfig, None, overrides)
    initialize_parallel(config.parallel, config.run.seed, initialize())
    try:
        data = TrainingData.open(config.data)
        plan = plan_run(config, data)
        given = replica_batches(config, data, plan)
        return data_parallel_rank(), [digest(batch) for step in range(steps) for batch in given[step].batches]
    finally:
        destroy_parallel(keep_distributed=True)


def digest(batch: Batch) -> str:
    """Of every number the batch holds."""
    found = hashlib.sha256()
    for item in dataclasses.fields(batch):
        value: Any = getattr(batch, item.name)
        if isinstance(value, torch.Tensor):
            found.update(f"{item.name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()
