"""Samples packed into one sequence against the same samples in batches of their own: outputs and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.dit.packing import Cut, cuts
from megatron_video.parallel import ParallelConfig, one_process
from training.data import Batch
from training.layout_matrix.table import Workload
from training.layout_matrix.worker import micro_batches, model_config
from training.packing import PackedBatch, packed, positions

WORKLOAD = Workload()


@pytest.fixture(scope="module")
def parallel() -> Iterator[ParallelConfig]:
    with one_process() as layout:
        yield layout


def build(parallel: ParallelConfig, config: DiTConfig, **changes: Any) -> VideoDiT:
    layout = replace(parallel, **changes)
    (model,) = build_dit(config, layout, torch.float32, device=torch.device("cpu"), init_seed=3)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            # No parameter at zero, so that every part shows.
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def loss_of(batch: Batch, prediction: torch.Tensor) -> torch.Tensor:
    return (prediction - batch.target).square().sum()


def alone(model: VideoDiT, batch: Batch) -> torch.Tensor:
    inputs = (batch.latents, batch.timestep, batch.llm_states, batch.clip_states, batch.text_lengths, batch.fps)
    output: torch.Tensor = model(*inputs)
    return output


def gradients(model: VideoDiT) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(
    "recompute", [{}, {"recompute_granularity": "full"}, {"recompute_granularity": "selective"}], ids=str
)
def test_packed_samples_have_the_numbers_they_have_alone(parallel: ParallelConfig, recompute: dict[str, str]) -> None:
    model, batches = build(parallel, model_config(WORKLOAD), **recompute), micro_batches(WORKLOAD)
    expected = [alone(model, batch) for batch in batches]
    torch.stack([loss_of(*pair) for pair in zip(batches, expected, strict=True)]).sum().backward()
    expected_gradients = gradients(model)
    predictions = model(**PackedBatch(batches).arguments())
    for prediction, other in zip(predictions, expected, strict=True):
        assert prediction.shape == other.shape
        assert (prediction - other).norm() <= 1e-5 * other.norm()
    torch.stack([loss_of(*pair) for pair in zip(batches, predictions, strict=True)]).sum().backward()
    found = gradients(model)
    assert found.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


def test_samples_do_not_see_each_other(parallel: ParallelConfig) -> None:
    model, (first, second, *_) = build(parallel, model_config(WORKLOAD)).eval(), micro_batches(WORKLOAD)
    other = replace(second, latents=second.latents + 1, llm_states=second.llm_states + 1, timestep=second.timestep / 2)
    with torch.no_grad():
        before = model(**PackedBatch([first, second]).arguments())
        after = model(**PackedBatch([first, other]).arguments())
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


def test_dropout_is_refused(parallel: ParallelConfig) -> None:
    model = build(parallel, model_config(replace(WORKLOAD, hidden_dropout=0.1)))
    with pytest.raises(ValueError, match=r"hidden_dropout=0\.1"):
        model(**PackedBatch(micro_batches(WORKLOAD)).arguments())


def test_micro_batches_are_joined_up_to_the_limit() -> None:
    batches = micro_batches(WORKLOAD)
    assert packed(batches, None) == batches
    for limit in (1, 60, 110, 10_000):
        joined = packed(batches, limit)
        parts = [item.parts if isinstance(item, PackedBatch) else [item] for item in joined]
        assert [part for group in parts for part in group] == batches
        assert all(len(group) == 1 or sum(map(positions, group)) <= limit for group in parts)
        # No two neighbours would have fitted.
        firsts = [positions(group[0]) for group in parts[1:]]
        sizes = [sum(map(positions, group)) for group in parts[:-1]]
        assert all(size + following > limit for size, following in zip(sizes, firsts, strict=True))
    assert len(packed(batches, 10_000)) == 1


def test_cuts_of_a_rank() -> None:
    assert cuts([3, 4, 2], 0, 9) == (Cut(0, 0, 3), Cut(1, 3, 7), Cut(2, 7, 9))
    # A rank's part may begin inside a sample; padding goes with the last one.
    assert cuts([3, 4, 2], 4, 4) == (Cut(1, 0, 3), Cut(2, 3, 4))
    assert cuts([3, 4, 2], 8, 4) == (Cut(2, 0, 4),)
    assert cuts([3, 4, 2], 12, 4) == (Cut(2, 0, 4),)
