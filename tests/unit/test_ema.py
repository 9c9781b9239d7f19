"""The averaged weights: the formula, fp32 beside bf16 weights, and their way through a checkpoint to sampling."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig, one_process
from training.checkpoint import TrainState, load_checkpoint, load_model_weights, save_checkpoint, step_folder
from training.config import AdamWConfig, EMAConfig, PretrainConfig
from training.ema import EMA, HostEMA, build_ema
from training.main_parameters import main_parameters
from training.optimizer import build_optimizer, wrap_data_parallel

DECAY = 0.9
MODEL = {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 6,
    "out_channels": 6,
    "caption_channels": [24, 12],
}


@pytest.fixture
def parallel() -> Iterator[ParallelConfig]:
    with one_process() as layout:
        yield layout


def build(parallel: ParallelConfig, dtype: torch.dtype, seed: int = 0) -> tuple[list[VideoDiT], object, object]:
    chunks = build_dit(DiTConfig(**MODEL), parallel, dtype, device=torch.device("cpu"), init_seed=seed)
    model = wrap_data_parallel(chunks, parallel)
    return chunks, model, build_optimizer(model, AdamWConfig(), parallel)


@pytest.mark.parametrize("kind", [EMA, HostEMA])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_follow_the_fp32_weights(parallel: ParallelConfig, dtype: torch.dtype, kind: type[EMA]) -> None:
    _, _, optimizer = build(parallel, dtype)
    ema = kind(optimizer, DECAY)
    mains = [item.main for item in main_parameters(optimizer)]
    expected = [main.detach().double().clone() for main in mains]
    for _ in range(4):
        for main, average in zip(mains, expected, strict=True):
            # Steps far below bf16's resolution: an average of bf16 weights would not see them.
            main.data.add_(torch.randn_like(main) * 1e-4)
            average.mul_(DECAY).add_(main.detach().double(), alpha=1 - DECAY)
        ema.update()
    for actual, average in zip(ema.averages, expected, strict=True):
        assert actual.dtype == torch.float32
        assert (actual - average).norm() <= 1e-6 * average.norm()


def test_a_checkpoint_keeps_averages_and_sampling_can_take_them(parallel: ParallelConfig, tmp_path: Path) -> None:
    chunks, model, optimizer = build(parallel, torch.float32)
    ema = EMA(optimizer, DECAY)
    for item in main_parameters(optimizer):
        item.main.data.add_(1.0)
    ema.update()
    config = PretrainConfig(model=DiTConfig(**MODEL), ema=EMAConfig(decay=DECAY))
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=3), config, ema=ema)

    other, other_model, other_optimizer = build(parallel, torch.float32, seed=9)
    other_ema = EMA(other_optimizer, DECAY)
    load_checkpoint(step_folder(tmp_path, 3), other_model, other_optimizer, other_ema)
    assert all(torch.equal(a, b) for a, b in zip(ema.averages, other_ema.averages, strict=True))
    load_model_weights(step_folder(tmp_path, 3), other, averaged=True)
    by_name = dict(chunks[0].named_parameters())
    for name, parameter in other[0].named_parameters():
        # The weights moved by 1 once, the averages by a tenth of it.
        assert torch.allclose(parameter, by_name[name] - DECAY, atol=1e-6), name


def test_a_checkpoint_without_averages_starts_them_and_refuses_to_sample_them(
    parallel: ParallelConfig, tmp_path: Path
) -> None:
    _, model, optimizer = build(parallel, torch.float32)
    save_checkpoint(tmp_path, model, optimizer, TrainState(step=1), PretrainConfig(model=DiTConfig(**MODEL)))
    chunks, other_model, other_optimizer = build(parallel, torch.float32, seed=9)
    ema = EMA(other_optimizer, DECAY)
    load_checkpoint(step_folder(tmp_path, 1), other_model, other_optimizer, ema)
    for average, item in zip(ema.averages, main_parameters(other_optimizer), strict=True):
        assert torch.equal(average, item.main)
    with pytest.raises(UserError, match="holds no averaged weights"):
        load_model_weights(step_folder(tmp_path, 1), chunks, averaged=True)


def test_averages_in_host_memory_are_the_same_and_change_places_with_the_others(
    parallel: ParallelConfig, tmp_path: Path
) -> None:
    _, model, optimizer = build(parallel, torch.bfloat16)
    averages = [build_ema(EMAConfig(decay=DECAY, device=device), optimizer) for device in ("same", "cpu")]
    assert [type(ema) for ema in averages] == [EMA, HostEMA]
    for _ in range(5):
        for item in main_parameters(optimizer):
            item.main.data.add_(torch.randn_like(item.main) * 1e-3)
        for ema in averages:
            ema.update()
    here, on_host = ([average.clone() for average in ema.averages] for ema in averages)
    assert all(torch.equal(a, b) for a, b in zip(here, on_host, strict=True))
    # Saved from one, loaded into the other, both ways.
    config = PretrainConfig(model=DiTConfig(**MODEL))
    for step, (source, target) in enumerate([averages, averages[::-1]]):
        save_checkpoint(tmp_path, model, optimizer, TrainState(step=step), config, ema=source)
        for average in target.averages:
            average.zero_()
        load_checkpoint(step_folder(tmp_path, step), model, optimizer, target)
        assert all(torch.equal(a, b) for a, b in zip(here, target.averages, strict=True))


def test_an_average_without_a_decay_is_none(parallel: ParallelConfig) -> None:
    assert build_ema(EMAConfig(), build(parallel, torch.float32)[2]) is None


@pytest.mark.parametrize("decay", [0.0, 1.0, -1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match="must lie between 0 and 1"):
        EMAConfig(decay=decay)
