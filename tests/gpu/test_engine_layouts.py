"""Transformer Engine over two GPUs: tensor and sequence parallelism and every kind of context parallelism."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from gpu_runs import ENGINE, gradient_errors, needs_cuda, needs_engine, needs_two_gpus, one_step, small_batch

from megatron_video.fp8 import Fp8Config
from megatron_video.parallel import ParallelConfig
from training.local_ranks import RankError, RankPool

pytestmark = [pytest.mark.gpu, needs_cuda, needs_engine, needs_two_gpus]

BF16 = 0.03
CP = {"transformer_impl": "transformer_engine", "context_parallel_size": 2}
TP = {"transformer_impl": "transformer_engine", "tensor_model_parallel_size": 2}


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    with RankPool(2, "cuda") as ranks:
        yield ranks


@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize(
    "layout",
    [
        {**CP, "cp_comm_type": "a2a"},
        {**CP, "cp_comm_type": "all_gather"},
        {**CP, "cp_comm_type": "p2p"},
        TP,
        {**TP, "sequence_parallel": True},
    ],
    ids=["a2a", "all_gather", "p2p", "tp", "tp and sp"],
)
def test_two_gpus_give_the_gradients_of_one(pool: RankPool, layout: dict, samples: int) -> None:
    batches = [small_batch(samples)]
    (whole,) = pool.run(_step, ENGINE, None, batches, ranks=1)
    for found in pool.run(_step, ParallelConfig(**layout), None, batches):
        assert found.loss == pytest.approx(whole.loss, rel=BF16)
        errors = gradient_errors(found, whole)
        assert max(errors.values()) < BF16, {name: error for name, error in errors.items() if error >= BF16}


@pytest.mark.parametrize("kind", ["a2a", "all_gather"])
def test_padding_is_left_out(pool: RankPool, kind: str) -> None:
    # 45 tokens.
    batches = [small_batch(latents=(3, 3, 5))]
    (whole,) = pool.run(_step, ENGINE, None, batches, ranks=1)
    for found in pool.run(_step, ParallelConfig(**CP, cp_comm_type=kind), None, batches):
        assert max(gradient_errors(found, whole).values()) < BF16


def test_ring_refuses_padding(pool: RankPool) -> None:
    with pytest.raises(RankError, match="45 video tokens had to be padded to 48"):
        pool.run(_step, ParallelConfig(**CP, cp_comm_type="p2p"), None, [small_batch(latents=(3, 3, 5))])


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_over_two_gpus_is_near_one(pool: RankPool, recipe: str) -> None:
    fp8 = Fp8Config(recipe=recipe)  # type: ignore[arg-type]
    (whole,) = pool.run(_step, ENGINE, fp8, [small_batch()], ranks=1)
    for found in pool.run(_step, ParallelConfig(**TP, sequence_parallel=True), fp8, [small_batch()]):
        assert found.loss == pytest.approx(whole.loss, rel=0.02)
        assert sorted(gradient_errors(found, whole).values())[len(found.gradients) // 2] < 0.1


def _step(parallel: ParallelConfig, fp8: Fp8Config | None, batches: list) -> object:
    return one_step(parallel, torch.bfloat16, fp8, batches=batches, warm_up=3 if fp8 else 0)
