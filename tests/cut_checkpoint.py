"""A small complete checkpoint, cut as tensor-parallel ranks cut it, with optimizer state and averages: no ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from safetensors.torch import save_file
from tiny_models import MODEL
from torch import Tensor

from checkpoints_tools.core_contents import PREFIXES
from checkpoints_tools.models import KINDS
from checkpoints_tools.released import write_config
from megatron_video.config_io import save_config
from megatron_video.dit import DiTConfig
from megatron_video.parallel import ParallelConfig, one_process
from training.checkpoint import TrainState
from training.checkpoint_files import CONFIG_FILE, STATE_FILE, WRITTEN, stored_file, write_state
from training.checkpoint_writer import InProcessStrategy
from training.config import DataConfig, PretrainConfig, RunConfig, TrainingConfig

ROWS = ("linear_qkv.weight", "linear_q.weight", "linear_kv.weight", "linear_fc1.weight", "modulation_linear.weight")
COLUMNS = ("linear_proj.weight", "linear_fc2.weight")
STEP = 7
RELEASED_FILE = "diffusion_pytorch_model.safetensors"


def make_tensors(
    seed: int = 0, optimizer: bool = True, averages: bool = True, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random tensors by stored name; `dtype` is that of the weights."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = {"": True} | {p: optimizer if part == "optimizer" else averages for p, (part, _) in PREFIXES.items()}
    return {
        prefix + name: torch.randn(shape, generator=generator).to(torch.float32 if prefix else dtype)
        for prefix, wanted in prefixes.items()
        for name, shape in KINDS["dit"].build(MODEL).shapes.items()
        if wanted
    }


def write_cut_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], ranks: int = 2, model: DiTConfig = MODEL, step: int = STEP
) -> Path:
    """Write `folder` as a checkpoint, cut over tensor-parallel ranks; what is in it, the names of `tensors` say."""
    averages, optimizer = (any(name.startswith(prefix) for name in tensors) for prefix in ("ema.", "optimizer."))
    folder.mkdir(parents=True)
    pieces = {
        f"{name} {i}": piece for name, tensor in tensors.items() for i, piece in enumerate(_cut(name, tensor, ranks))
    }
    with one_process():
        state = {"model": pieces, **({"optimizer updates": step} if optimizer else {})}
        dist_checkpointing.save(state, str(folder), sharded_strategy=InProcessStrategy())
    config = PretrainConfig(
        run=RunConfig(output_dir=str(folder.parent)),
        model=model,
        data=DataConfig(shards=["none"]),
        training=TrainingConfig(precision="fp32"),
        parallel=ParallelConfig(tensor_model_parallel_size=ranks),
    )
    save_config(config, folder / CONFIG_FILE)
    sign(folder, averages, step)
    return folder


def write_released_form(folder: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write the weights among `tensors` as one safetensors file with config.json."""
    model = KINDS["dit"].build(MODEL)
    weights = {name: tensor for name, tensor in tensors.items() if name in model.shapes}
    folder.mkdir(parents=True)
    write_config(folder, model, weights)
    released = {model.released[name]: tensor for name, tensor in weights.items()}
    save_file(released, folder / RELEASED_FILE, metadata={"format": "pt"})
    return folder


def sign(folder: Path, averages: bool = True, step: int = STEP) -> None:
    """Write train_state.json anew for the files as they are now: damage that no checksum shows."""
    state = TrainState(
        step=step,
        averages_weights=averages,
        consumed_samples={"17x48x48": 56},
        encoders={"vae": "af01", "text": "be02"},
    )
    files = {p.name: stored_file(p) for p in sorted(folder.iterdir()) if p.name != STATE_FILE}
    write_state(folder, {**asdict(state), WRITTEN: time.time()}, files)


def _cut(name: str, tensor: Tensor, ranks: int) -> list[ShardedTensor]:
    axis = 0 if name.endswith(ROWS) else 1 if name.endswith(COLUMNS) else None
    if axis is None or ranks == 1:
        return [ShardedTensor.from_rank_offsets(name, tensor)]
    return [
        ShardedTensor.from_rank_offsets(name, piece.contiguous(), (axis, i, ranks))
        for i, piece in enumerate(tensor.chunk(ranks, axis))
    ]
