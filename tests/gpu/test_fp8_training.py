"""FP8 against bf16: loss and gradients of a step per recipe, 200 steps of training, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_runs import ENGINE, LOCAL, SMALL, Run, needs_cuda, needs_engine, one_step, relative_error, trained_losses

from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from megatron_video.fp8 import RECIPES, Fp8Config
from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import broken_rule
from megatron_video.parallel import ParallelConfig, destroy_parallel

pytestmark = [pytest.mark.gpu, needs_cuda, needs_engine]

# e4m3 has 4 significant bits, e5m2 3; sums over hundreds of terms average the roundings out.
LOSS, BLOCK_GRADIENTS, COSINE = 0.02, 0.2, 0.9
# Of the mean of the last 20 of 200 steps.
CURVE = 0.03
ZERO = ParallelConfig(transformer_impl="transformer_engine", use_distributed_optimizer=True)


@pytest.fixture(autouse=True)
def no_model_left() -> Iterator[None]:
    yield
    destroy_parallel(keep_distributed=True)


def refused_here(fp8: Fp8Config, dit: DiTConfig = SMALL, parallel: ParallelConfig = ENGINE) -> bool:
    return broken_rule(Layout(parallel, dit, "bf16", fp8, hardware=Hardware.detect())) is not None


def compare(fp8: Run, bf16: Run) -> None:
    """Gradients of the blocks' weights, which come from FP8 products, and of everything before and behind them."""
    assert fp8.loss == pytest.approx(bf16.loss, rel=LOSS)
    blocks = [name for name in fp8.gradients if name.startswith("layers.")]
    together = [torch.cat([run.gradients[name].flatten() for name in blocks]) for run in (fp8, bf16)]
    assert relative_error(*together) < BLOCK_GRADIENTS
    for name, gradient in fp8.gradients.items():
        expected = bf16.gradients[name]
        cosine = torch.nn.functional.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0)
        assert cosine > COSINE, f"{name}: cosine {cosine:.4f}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_step_in_fp8_is_near_bf16_or_refused(recipe: Any) -> None:
    fp8 = Fp8Config(recipe=recipe)
    if refused_here(fp8):
        with pytest.raises(UserError, match=r"compute_capability|cuda_version"):
            one_step(ENGINE, torch.bfloat16, fp8)
        return
    # Delayed scaling has seen no magnitudes before the first step.
    compare(one_step(ENGINE, torch.bfloat16, fp8, warm_up=3), one_step(ENGINE, torch.bfloat16))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_fp8_is_used_at_all(recipe: Any) -> None:
    fp8 = Fp8Config(recipe=recipe)
    if refused_here(fp8):
        pytest.skip("refused on this machine")
    found, exact = one_step(ENGINE, torch.bfloat16, fp8, warm_up=3), one_step(ENGINE, torch.bfloat16)
    name = "layers.1.mlp.linear_fc1.weight"
    # bf16 rounds 16 times finer.
    assert relative_error(found.gradients[name], exact.gradients[name]) > 0.005


def test_bf16_layers_stay_bf16() -> None:
    """With every layer left in bf16 the FP8 run is the bf16 run, padding apart."""
    found = one_step(ENGINE, torch.bfloat16, Fp8Config(recipe="tensorwise", first_layers_bf16=2))
    exact = one_step(ENGINE, torch.bfloat16)
    name = "layers.1.mlp.linear_fc1.weight"
    assert relative_error(found.gradients[name], exact.gradients[name]) < 0.005


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("granularity", ["full", "selective"])
def test_recompute_in_fp8_gives_the_same_gradients(recipe: Any, granularity: Any) -> None:
    fp8 = Fp8Config(recipe=recipe)
    if refused_here(fp8):
        pytest.skip("refused on this machine")
    recomputing = ParallelConfig(
        transformer_impl="transformer_engine",
        recompute_granularity=granularity,
        recompute_modules=["core_attn", "cross_attention", "mlp"],
    )
    kept = one_step(ENGINE, torch.bfloat16, fp8, warm_up=3)
    again = one_step(recomputing, torch.bfloat16, fp8, warm_up=3)
    assert again.loss == pytest.approx(kept.loss, rel=1e-3)
    compare(again, kept)


def test_fp8_attention_is_near_bf16() -> None:
    dit = dataclasses.replace(SMALL, num_attention_heads=2, attention_head_dim=128, rope_channel_split=None)
    fp8 = Fp8Config(recipe="delayed", dot_product_attention=True)
    assert not refused_here(fp8, dit)
    compare(one_step(ENGINE, torch.bfloat16, fp8, warm_up=3, dit=dit), one_step(ENGINE, torch.bfloat16, dit=dit))


@pytest.fixture(scope="module")
def bf16_losses() -> list[float]:
    losses = trained_losses(ENGINE, None, steps=200)
    assert sum(losses[-20:]) < 0.8 * sum(losses[:20]), "nothing was learnt"
    return losses


@pytest.mark.parametrize(
    ("parallel", "fp8"),
    [
        (ENGINE, Fp8Config(recipe="delayed", amax_history_len=16)),
        (ENGINE, Fp8Config(recipe="tensorwise")),
        (ENGINE, Fp8Config(recipe="tensorwise", first_layers_bf16=1)),
        (ENGINE, Fp8Config(recipe="blockwise", format="e4m3")),
        (ZERO, Fp8Config(recipe="delayed", amax_history_len=16, param_gather=True)),
        (ZERO, Fp8Config(recipe="tensorwise", param_gather=True)),
        (ZERO, Fp8Config(recipe="blockwise", format="e4m3", param_gather=True)),
    ],
    ids=lambda value: f"{value.recipe}{' weights' * value.param_gather}" if isinstance(value, Fp8Config) else None,
)
def test_200_steps_in_fp8_learn_like_bf16(bf16_losses: list[float], parallel: ParallelConfig, fp8: Fp8Config) -> None:
    if refused_here(fp8, parallel=parallel):
        pytest.skip("refused on this machine")
    losses = trained_losses(parallel, fp8, steps=200)
    found, expected = sum(losses[-20:]) / 20, sum(bf16_losses[-20:]) / 20
    print(f"last 20 of 200 steps: {fp8.recipe} {found:.4f}, bf16 {expected:.4f}, {found / expected - 1:+.2%}")
    assert found == pytest.approx(expected, rel=CURVE)


@pytest.mark.parametrize(
    ("parallel", "dtype", "fp8", "message"),
    [
        (LOCAL, torch.bfloat16, Fp8Config(recipe="tensorwise"), "transformer_impl=transformer_engine"),
        (ENGINE, torch.float32, Fp8Config(recipe="tensorwise"), "training.precision=bf16"),
        (ENGINE, torch.bfloat16, Fp8Config(recipe="delayed", last_layers_bf16=1), "last_layers_bf16=0"),
        (ENGINE, torch.bfloat16, Fp8Config(recipe="tensorwise", param_gather=True), "use_distributed_optimizer=true"),
        (ENGINE, torch.bfloat16, Fp8Config(recipe="blockwise", dot_product_attention=True), "fp8.recipe=delayed"),
    ],
)
def test_what_cannot_work_is_refused(
    parallel: ParallelConfig, dtype: torch.dtype, fp8: Fp8Config, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        one_step(parallel, dtype, fp8)
