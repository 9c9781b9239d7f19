"""A training run some of whose reads fail on this rank; run on the ranks of a pool by test_corrupt_samples.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch.distributed as dist

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.shard_index import IndexRow
from megatron_video.shard_schema import DamagedSampleError
from megatron_video.shards import ShardDataset
from training.config import PretrainConfig
from training.pretrain import run_training


def train(overrides: list[str], folder: str, failing: Sequence[str] = (), failing_ranks: Sequence[int] = ()) -> str:
    """Train into `folder`; reads of the samples `failing` fail on `failing_ranks`. Returns how it ended."""
    config = load_config(PretrainConfig, None, [*overrides, f"run.output_dir={folder}"])
    Path(folder).mkdir(parents=True, exist_ok=True)
    read = ShardDataset._read

    def read_or_fail(dataset: ShardDataset, row: IndexRow, payload: str, checksum: int) -> tuple[memoryview, int]:
        if row.key in failing and dist.get_rank() in failing_ranks:
            raise DamagedSampleError(f"{row.shard}: sample {row.key}: cannot be read: Input/output error")
        return read(dataset, row, payload, checksum)

    with patch.object(ShardDataset, "_read", read_or_fail):
        try:
            return f"exit {run_training(config, keep_distributed=True)}"
        except UserError as error:
            return str(error)
