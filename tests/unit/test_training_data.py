"""Batches of training: the flow-matching equations on keyed noise, whatever builds them and wherever they are built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LATENT_CHANNELS, LLM_DIM, write_tiny_shards

from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flow_matching import TimeDensity
from megatron_video.noise import NoiseSource
from training.config import DataConfig
from training.data import Batch, BatchBuilder, StepBatches, StepData, iterate_steps
from training.data_plan import DataPlan, PlannedBatch
from training.data_set import TrainingData

MODEL = DiTConfig(
    num_layers=1,
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    caption_channels=[LLM_DIM, CLIP_DIM],
)
NOISE = NoiseSource(3, "test")
DENSITY = TimeDensity(kind="logit_normal")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TrainingData:
    return TrainingData([str(write_tiny_shards(tmp_path_factory.mktemp("shards")))])


def make_builder(data: TrainingData, text_dropout: float = 0.0, model: DiTConfig = MODEL) -> BatchBuilder:
    return BatchBuilder(data, NOISE, DENSITY, text_dropout, torch.float32, model)


def make_steps(data: TrainingData, rank: int = 0, size: int = 1) -> StepBatches:
    config = DataConfig(micro_batch_size=3, global_batch_size=12)
    plan = DataPlan(data.groups(), config, 5, "test")
    return StepBatches(make_builder(data, text_dropout=0.3), plan, rank, size)


def equal(one: Batch, two: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(two, f.name)) for f in dataclasses.fields(Batch)]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_rows_follow_the_equations(data: TrainingData) -> None:
    samples, epochs = data.buckets["17x48x64"][np.array([4, 1])], np.array([0, 2])
    batch = make_builder(data).build(PlannedBatch("17x48x64", samples, epochs))
    for row, (sample, epoch) in enumerate(zip(samples.tolist(), epochs.tolist(), strict=True)):
        mean, logvar = data[sample].moments.float().chunk(2, dim=1)
        x0 = mean + torch.exp(0.5 * logvar) * NOISE.posterior(epoch, sample, mean.shape)
        noise, t = NOISE.noise(epoch, sample, mean.shape), NOISE.timestep(epoch, sample, DENSITY)
        torch.testing.assert_close(batch.latents[row], (1 - t) * noise + t * x0)
        torch.testing.assert_close(batch.target[row], x0 - noise)
        assert batch.timestep[row].item() == t
    assert batch.latents.dtype == batch.target.dtype == batch.timestep.dtype == torch.float32


def test_the_shift_by_resolution_goes_by_the_tokens_of_the_sample(data: TrainingData) -> None:
    density = TimeDensity(shift=2.0, shift_base_tokens=9)
    builder = dataclasses.replace(make_builder(data), density=density)
    # 17x48x64 has 3 x 3 x 4 tokens, an image of 48 x 48 has 9.
    for bucket, shift in (("17x48x64", 4.0), ("1x48x48", 2.0)):
        sample = int(data.buckets[bucket][np.array([2])][0])
        batch = builder.build(PlannedBatch(bucket, np.array([sample]), np.array([1])))
        assert batch.timestep.item() == NOISE.timestep(1, sample, TimeDensity(shift=shift))


def test_text_is_padded_to_the_longest_and_lengths_count_clip(data: TrainingData) -> None:
    samples = data.buckets["17x48x48"][np.arange(6)]
    batch = make_builder(data).build(PlannedBatch("17x48x48", samples, np.zeros(6, dtype=np.int64)))
    lengths = [len(data[int(sample)].llm) for sample in samples]
    assert batch.text_lengths.tolist() == [CLIP_SLOTS + length for length in lengths]
    assert batch.llm_states.shape == (6, max(lengths), LLM_DIM)
    for row, (sample, length) in enumerate(zip(samples.tolist(), lengths, strict=True)):
        torch.testing.assert_close(batch.llm_states[row, :length], data[sample].llm.float())
        assert not batch.llm_states[row, length:].any()


def test_dropped_text_is_the_encoded_empty_caption(data: TrainingData) -> None:
    samples = data.buckets["17x48x48"][np.arange(3)]
    batch = make_builder(data, text_dropout=1.0).build(PlannedBatch("17x48x48", samples, np.zeros(3, dtype=np.int64)))
    llm, clip = data.null_text
    torch.testing.assert_close(batch.llm_states, llm.float().expand(3, -1, -1))
    assert batch.clip_states is not None
    torch.testing.assert_close(batch.clip_states, clip.float().expand(3, -1, -1))
    assert batch.text_lengths.tolist() == [CLIP_SLOTS + len(llm)] * 3


def test_dropping_text_changes_nothing_else(data: TrainingData) -> None:
    planned = PlannedBatch("1x48x48", data.buckets["1x48x48"][np.arange(4)], np.zeros(4, dtype=np.int64))
    kept, dropped = (make_builder(data, text_dropout=p).build(planned) for p in (0.0, 1.0))
    assert torch.equal(kept.latents, dropped.latents)
    assert torch.equal(kept.timestep, dropped.timestep)


def test_the_second_epoch_has_other_noise_time_and_posterior(data: TrainingData) -> None:
    samples = data.buckets["17x48x48"][np.arange(2)]
    first, second = (make_builder(data).build(PlannedBatch("17x48x48", samples, np.full(2, epoch))) for epoch in (0, 1))
    assert not torch.isclose(first.timestep, second.timestep).any()
    assert not torch.isclose(first.target, second.target).all()


def test_replicas_together_have_the_batches_of_one(data: TrainingData) -> None:
    whole, halves = make_steps(data), [make_steps(data, rank, 2) for rank in range(2)]
    for step in (0, 7):
        one, parts = whole[step], [half[step] for half in halves]
        dealt = [parts[i % 2].batches[i // 2] for i in range(4)]
        assert all(equal(a, b) for a, b in zip(one.batches, dealt, strict=True))
        assert {(part.samples, part.tokens, part.flops) for part in parts} == {(one.samples, one.tokens, one.flops)}


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_resume_change_nothing(data: TrainingData, workers: int) -> None:
    steps = make_steps(data)
    found: list[StepData] = list(iterate_steps(steps, 4, 9, workers, prefetch=2))
    assert len(found) == 5
    for number, item in enumerate(found):
        assert all(equal(a, b) for a, b in zip(item.batches, steps[4 + number].batches, strict=True))


def test_size_of_a_step_is_counted_from_its_samples(data: TrainingData) -> None:
    step, planned = make_steps(data)[2], make_steps(data).plan.step(2)
    tokens = {"17x48x48": 27, "17x48x64": 36, "1x48x48": 9}
    assert step.samples == 12
    assert step.tokens == sum(tokens[batch.bucket] * len(batch.samples) for batch in planned)
    d, flops = 32, 0
    for batch in planned:
        for sample in batch.samples.tolist():
            s, t = tokens[batch.bucket], CLIP_SLOTS + len(data[sample].llm)
            flops += 3 * (28 * s * d**2 + 4 * s**2 * d + 4 * t * d**2 + 4 * s * t * d)
    assert step.flops == flops


def test_fps_is_given_to_models_that_take_it(data: TrainingData) -> None:
    model = dataclasses.replace(MODEL, use_additional_conditions=True)
    planned = PlannedBatch("17x48x48", data.buckets["17x48x48"][np.arange(2)], np.zeros(2, dtype=np.int64))
    fps = make_builder(data, model=model).build(planned).fps
    assert fps is not None
    assert fps.tolist() == [25.0, 25.0]


def test_an_error_while_building_reaches_the_loop(data: TrainingData, tmp_path: Path) -> None:
    folder = write_tiny_shards(tmp_path / "damaged")
    for shard in folder.glob("*.tar"):
        content = bytearray(shard.read_bytes())
        content[len(content) // 2] ^= 1
        shard.write_bytes(bytes(content))
    with pytest.raises(UserError, match="checksum"):
        list(iterate_steps(make_steps(TrainingData([str(folder)])), 0, 40, workers=0, prefetch=2))


def test_folders_are_numbered_one_after_the_other(tmp_path: Path) -> None:
    folders = [str(write_tiny_shards(tmp_path / str(seed), {"17x48x48": 5}, seed)) for seed in range(2)]
    both, second = TrainingData(folders), TrainingData(folders[1:])
    assert len(both) == 10
    assert both[7].key == second[2].key
    assert both.buckets["17x48x48"][np.arange(10)].tolist() == list(range(10))
    assert both.fingerprint() != TrainingData(folders[::-1]).fingerprint()


def test_unknown_buckets_and_no_shards_are_refused(data: TrainingData) -> None:
    folder = str(data.datasets[0].folder)
    with pytest.raises(UserError, match=r"68x192x320.*17x48x48"):
        TrainingData([folder], ["68x192x320"])
    with pytest.raises(UserError, match=r"data\.shards is empty"):
        TrainingData([])
    assert TrainingData([folder], ["1x48x48"]).unused_buckets == ["17x48x48", "17x48x64"]


def test_a_model_that_does_not_fit_the_shards_is_refused(data: TrainingData) -> None:
    wrong = dataclasses.replace(MODEL, in_channels=8, caption_channels=[LLM_DIM, 99])
    with pytest.raises(UserError, match=r"model.in_channels=8, the shards hold 4.*CLIP.*=99"):
        data.check_model(wrong)
    data.check_model(MODEL)
