"""Both halves of the checkpoint tests, each run on the GPU or, in a process of its own, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from gpu_runs import SMALL, learnable_batch, small_batch

from megatron_video import device
from megatron_video.dit import build_dit
from megatron_video.fp8 import Fp8Config
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from training.checkpoint import TrainState, find_checkpoint, load_checkpoint, save_checkpoint
from training.config import AdamWConfig, DataConfig, PretrainConfig, TrainingConfig
from training.main_parameters import main_parameters, only_optimizer
from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from training.train_step import train_step

RATE = 1e-3


def save(folder: str, implementation: str, precision: str, recipe: str | None = None, gather: bool = False) -> None:
    """Train two steps, save, and note what the model says then and what its third step's loss is."""
    model, optimizer = _built(implementation, precision, recipe, gather)
    for step in range(2):
        _train(model, optimizer, step)
    config = PretrainConfig(
        model=SMALL,
        data=DataConfig(shards=["none"]),
        training=TrainingConfig(precision=precision),  # type: ignore[arg-type]
    )
    save_checkpoint(Path(folder), model, optimizer, TrainState(step=2), config)
    said = {"output": _output(model), "moment": _moment(optimizer), "next loss": _train(model, optimizer, 2)}
    torch.save(said, Path(folder) / "said.pt")
    destroy_parallel(keep_distributed=True)


def load(
    folder: str, implementation: str, precision: str, tolerance: float, recipe: str | None = None, gather: bool = False
) -> None:
    """Load what `save` left, and compare.

    Raises:
        AssertionError: the output, the optimizer's first moments or the next loss differ by more than `tolerance`.
    """
    model, optimizer = _built(implementation, precision, recipe, gather)
    load_checkpoint(find_checkpoint(folder), model, optimizer)
    said: dict[str, Any] = torch.load(Path(folder) / "said.pt")
    error = float((_output(model) - said["output"]).norm() / said["output"].norm())
    assert error <= tolerance, f"output: {error:.3g}"
    moment = _moment(optimizer)
    assert abs(moment / said["moment"] - 1) < 1e-6, f"moments: {moment}, saved {said['moment']}"
    loss = _train(model, optimizer, 2)
    assert abs(loss / said["next loss"] - 1) <= tolerance, f"next loss: {loss}, there {said['next loss']}"
    destroy_parallel(keep_distributed=True)


def _built(implementation: str, precision: str, recipe: str | None, gather: bool) -> tuple[Any, Any]:
    info = device.initialize()
    destroy_parallel(keep_distributed=True)
    parallel = ParallelConfig(
        transformer_impl=implementation,  # type: ignore[arg-type]
        use_distributed_optimizer=gather,
    )
    initialize_parallel(parallel, seed=1, device_info=info)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    fp8 = Fp8Config(recipe=recipe, param_gather=gather)  # type: ignore[arg-type]
    chunks = build_dit(SMALL, parallel, dtype, device=info.device, init_seed=0, fp8=fp8)
    model = wrap_data_parallel(chunks, parallel)
    return model, build_optimizer(model, AdamWConfig(learning_rate=RATE), parallel)


def _train(model: Any, optimizer: Any, step: int) -> float:
    set_learning_rate(optimizer, RATE, weight_decay=0.01)
    return train_step(model, optimizer, [learnable_batch(step, samples=8)]).loss


def _output(model: Any) -> torch.Tensor:
    batch = small_batch().to(device.initialize().device)
    with torch.no_grad():
        found = model[0](batch.latents, batch.timestep, batch.llm_states, batch.clip_states, batch.text_lengths)
    return found.float().cpu()


def _moment(optimizer: Any) -> float:
    """Norm of all first moments."""
    state = only_optimizer(optimizer).optimizer.state
    moments = [state[item.main]["exp_avg"] for item in main_parameters(optimizer) if item.main is not None]
    return sum(float(moment.double().square().sum()) for moment in moments) ** 0.5
