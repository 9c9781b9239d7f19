"""A small complete checkpoint cut as two tensor-parallel ranks cut it, with optimizer state and averages: no ranks."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from tiny_models import MODEL
from torch import Tensor

from checkpoints_tools.core_contents import PREFIXES
from checkpoints_tools.models import KINDS
from megatron_video.config_io import save_config
from megatron_video.parallel import ParallelConfig, one_process
from training.checkpoint import TrainState
from training.checkpoint_files import WRITTEN, stored_file, write_state
from training.checkpoint_writer import InProcessStrategy
from training.config import DataConfig, PretrainConfig, RunConfig, TrainingConfig

ROWS = ("linear_qkv.weight", "linear_q.weight", "linear_kv.weight", "linear_fc1.weight", "modulation_linear.weight")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
STEP = 7


def write_cut_checkpoint(
    folder: Path, seed: int = 0, optimizer: bool = True, averages: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Write `folder` as the checkpoint of step 7; returns all tensors by stored name."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = {"": True} | {p: optimizer if part == "optimizer" else averages for p, (part, _) in PREFIXES.items()}
    tensors = {
        prefix + name: torch.randn(shape, generator=generator).to(torch.float32 if prefix else dtype)
        for prefix, wanted in prefixes.items()
        for name, shape in KINDS["dit"].build(MODEL).shapes.items()
        if wanted
    }
    folder.mkdir(parents=True)
    pieces = {f"{name} {i}": piece for name, tensor in tensors.items() for i, piece in enumerate(_cut(name, tensor))}
    with one_process():
        state = {"model": pieces, **({"optimizer updates": STEP} if optimizer else {})}
        dist_checkpointing.save(state, str(folder), sharded_strategy=InProcessStrategy())
    complete(folder, averages)
    return tensors


def complete(folder: Path, averages: bool, parallel: ParallelConfig | None = None) -> None:
    """Give the tensors of a checkpoint its configuration and training state, and list all files with checksums."""
    config = PretrainConfig(
        run=RunConfig(output_dir=str(folder.parent)),
        model=MODEL,
        data=DataConfig(shards=["none"]),
        training=TrainingConfig(precision="fp32"),
        parallel=parallel or ParallelConfig(tensor_model_parallel_size=2),
    )
    save_config(config, folder / "config.yaml")
    sign(folder, averages)


def sign(folder: Path, averages: bool = True) -> None:
    """Write train_state.json anew for the files as they are now: damage that no checksum shows."""
    state = TrainState(
        step=STEP,
        averages_weights=averages,
        consumed_samples={"17x48x48": 56},
        encoders={"vae": "af01", "text": "be02"},
    )
    files = {p.name: stored_file(p) for p in sorted(folder.iterdir()) if p.name != "train_state.json"}
    write_state(folder, {**asdict(state), WRITTEN: time.time()}, files)


def _cut(name: str, tensor: Tensor) -> list[ShardedTensor]:
    axis = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
    if axis is None:
        return [ShardedTensor.from_rank_offsets(name, tensor)]
    return [
        ShardedTensor.from_rank_offsets(name, piece.contiguous(), (axis, i, 2))
        for i, piece in enumerate(tensor.chunk(2, axis))
    ]
