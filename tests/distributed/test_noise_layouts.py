"""What training draws for a sample: equal on all ranks of a replica, another for every sample and epoch, any DP size.

All of it is read from the micro-batches that training is given, not from the source of the noise.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from noise_worker import batches_of_this_rank, digest
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards
from torch import Tensor

from megatron_video.config_io import load_config
from megatron_video.noise import NoiseSource
from training.config import PretrainConfig
from training.data import Batch, BatchBuilder, StepBatches
from training.data_set import TrainingData
from training.local_ranks import RankPool
from training.run_plan import plan_run

# 41 samples, 8 a step: every sample is drawn in at least two epochs.
STEPS = 14
LAYOUTS = {
    "TP2 PP2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "TP2 CP2": {"tensor_model_parallel_size": 2, "context_parallel_size": 2},
    "TP2 DP2": {"tensor_model_parallel_size": 2},
    "PP2 DP2": {"pipeline_model_parallel_size": 2},
    "CP2 DP2": {"context_parallel_size": 2},
}


@dataclass(frozen=True)
class Draw:
    """One sample as training sees it."""

    sample: int
    epoch: int
    time: float
    noise: Tensor
    """The t=0 end of its path, flat; recovered from what the model is given and what it is to predict."""
    posterior: Tensor
    """The standard normal draw from the VAE's posterior, flat; recovered from the same."""
    text_dropped: bool
    dropout_seed: int


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    shards = write_tiny_shards(tmp_path_factory.mktemp("shards"))
    data = [f"data.shards=[{shards}]", "data.global_batch_size=8", "data.draw_size=4", "data.text_dropout=0.4"]
    sizes = ["data.micro_batch_size=2", "training.precision=fp32", "model.hidden_dropout=0.1"]
    return [*MODEL_OVERRIDES, "model.num_attention_heads=4", *data, *sizes, "run.seed=11", "optimizer.warmup_steps=0"]


def step_batches(overrides: list[str], rank: int, size: int) -> StepBatches:
    config = load_config(PretrainConfig, None, overrides)
    data = TrainingData.open(config.data)
    noise = NoiseSource(config.run.seed, config.run.stage)
    builder = BatchBuilder(data, noise, config.flow, config.data.text_dropout, torch.float32, config.model)
    return StepBatches(builder, plan_run(config, data), rank, size)


def draws(overrides: list[str], rank: int = 0, size: int = 1) -> Iterator[Draw]:
    """What one replica of `size` trains on, in order."""
    steps = step_batches(overrides, rank, size)
    for step in range(STEPS):
        given = steps[step]
        for plan, batch in zip(given.planned, given.batches, strict=True):
            for row, (sample, epoch) in enumerate(zip(plan.samples, plan.epochs, strict=True)):
                yield read_draw(steps.builder.data, batch, row, int(sample), int(epoch))


def read_draw(data: TrainingData, batch: Batch, row: int, sample: int, epoch: int) -> Draw:
    # x_t = (1 - t) noise + t x0 and target = x0 - noise, solved for noise and x0.
    time, x_t, target = batch.timestep[row].double(), batch.latents[row].double(), batch.target[row].double()
    noise, x0 = x_t - time * target, x_t + (1 - time) * target
    mean, logvar = data[sample].moments.double().chunk(2, dim=1)
    null_llm, _ = data.null_text
    text = batch.llm_states[row][: len(null_llm)]
    assert batch.dropout_seeds is not None
    return Draw(
        sample,
        epoch,
        float(time),
        noise.flatten(),
        ((x0 - mean) / torch.exp(0.5 * logvar)).flatten(),
        torch.equal(text, null_llm.float()),
        int(batch.dropout_seeds[row]),
    )


def same(one: Tensor, two: Tensor) -> bool:
    """Whether two draws are one, also where the shapes differ: noise fills a shape in order."""
    length = min(len(one), len(two))
    return torch.allclose(one[:length], two[:length], atol=1e-4)


@pytest.mark.distributed
def test_equal_on_all_ranks_of_a_replica(overrides: list[str]) -> None:
    with RankPool(4) as pool:
        for name, layout in LAYOUTS.items():
            settings = [*overrides, *(f"parallel.{field}={value}" for field, value in layout.items())]
            replicas: dict[int, list[list[str]]] = {}
            for rank, digests in pool.run(batches_of_this_rank, settings, STEPS):
                replicas.setdefault(rank, []).append(digests)
            assert len(replicas) == (2 if "DP2" in name else 1)
            for rank, found in replicas.items():
                alone = step_batches(overrides, rank, len(replicas))
                expected = [digest(batch) for step in range(STEPS) for batch in alone[step].batches]
                assert len(found) == 4 // len(replicas)
                assert all(digests == expected for digests in found), f"{name}: ranks of replica {rank} differ"
            held = [digests for found in replicas.values() for digests in found[0]]
            assert len(set(held)) == len(held), f"{name}: a micro-batch comes twice"


def test_different_for_every_sample(overrides: list[str]) -> None:
    first_epoch = [draw for draw in draws(overrides) if draw.epoch == 0]
    assert len({draw.sample for draw in first_epoch}) == len(first_epoch) == 41
    for one, two in itertools.combinations(first_epoch, 2):
        assert not same(one.noise, two.noise)
        assert not same(one.posterior, two.posterior)
    assert not any(same(draw.noise, draw.posterior) for draw in first_epoch)
    assert len({draw.time for draw in first_epoch}) == len(first_epoch)
    assert len({draw.dropout_seed for draw in first_epoch}) == len(first_epoch)
    assert {draw.text_dropped for draw in first_epoch} == {False, True}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_same_for_any_data_parallel_size(overrides: list[str], size: int, micro_batch_size: int) -> None:
    expected = {(draw.sample, draw.epoch): draw for draw in draws(overrides)}
    other = [*overrides, f"data.micro_batch_size={micro_batch_size}"]
    found = [draw for rank in range(size) for draw in draws(other, rank, size)]
    assert len(found) == len(expected) == STEPS * 8
    for draw in found:
        reference = expected.pop((draw.sample, draw.epoch))
        assert torch.equal(draw.noise, reference.noise)
        assert torch.equal(draw.posterior, reference.posterior)
        assert (draw.time, draw.text_dropped, draw.dropout_seed) == (
            reference.time,
            reference.text_dropped,
            reference.dropout_seed,
        )
    assert not expected


def test_not_repeated_over_epochs(overrides: list[str]) -> None:
    by_sample: dict[int, list[Draw]] = {}
    for draw in draws(overrides):
        by_sample.setdefault(draw.sample, []).append(draw)
    assert len(by_sample) == 41
    for sample in by_sample.values():
        assert [draw.epoch for draw in sample] == list(range(len(sample)))
        assert len(sample) >= 2
        for one, two in itertools.combinations(sample, 2):
            assert not same(one.noise, two.noise)
            assert not same(one.posterior, two.posterior)
            assert one.time != two.time
            assert one.dropout_seed != two.dropout_seed
    # Of 41 samples some keep their caption in one epoch and lose it in the next, and the other way round.
    changes = {(sample[0].text_dropped, sample[1].text_dropped) for sample in by_sample.values()}
    assert changes == {(False, False), (False, True), (True, False), (True, True)}
