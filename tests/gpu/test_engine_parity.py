"""The local spec on CUDA against the recorded reference, and Transformer Engine's spec against the local one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from golden_cases import dit as golden
from gpu_runs import ENGINE, LOCAL, SMALL, fill, gradient_errors, needs_cuda, needs_engine, one_step, small_batch
from safetensors.torch import load_file

from checkpoints_tools.dit_names import released_names
from megatron_video import device
from megatron_video.dit import VideoDiT, build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel

pytestmark = [pytest.mark.gpu, needs_cuda]

CASES = sorted(Path(__file__).parent.parent.glob("golden/dit_*.json"))
FP32_OUTPUT, FP32_GRADIENT = 2e-4, 1e-4
# cuBLAS under Transformer Engine multiplies fp32 in TF32: 11 bits.
TF32 = 5e-3
BF16_FLOOR = 0.02


@pytest.fixture(autouse=True)
def no_model_left() -> Iterator[None]:
    yield
    destroy_parallel(keep_distributed=True)


def built(parallel: ParallelConfig, dtype: torch.dtype) -> VideoDiT:
    destroy_parallel(keep_distributed=True)
    info = device.initialize()
    initialize_parallel(parallel, seed=1, device_info=info)
    (model,) = build_dit(SMALL, parallel, dtype, device=info.device)
    fill(model)
    return model.eval()


def output(model: VideoDiT) -> torch.Tensor:
    batch = small_batch().to(device.initialize().device)
    with torch.no_grad():
        return model(batch.latents, batch.timestep, batch.llm_states, batch.clip_states, batch.text_lengths).float()


@pytest.mark.parametrize("case", CASES, ids=[case.stem for case in CASES])
def test_local_spec_on_cuda_equals_the_reference(case: Path) -> None:
    meta, tensors = json.loads(case.read_text()), load_file(case.with_suffix(".safetensors"))
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    model = golden.load_reference_model(meta["config"], weights, torch.float32, device.initialize().device)
    inputs = {key: value.cuda() for key, value in golden.read_inputs(tensors).items()}
    found = model(**inputs)
    golden.assert_close(found.detach().cpu(), tensors["out"], FP32_OUTPUT, "output")
    recorded = case.with_name(f"{case.stem}.grads.safetensors")
    if not recorded.is_file():
        return
    expected = load_file(recorded)
    (found - expected["target"].cuda()).square().mean().backward()
    names = released_names(model.dit_config)
    for name, parameter in model.named_parameters():
        gradient = expected.get(f"grad.{names[name]}")
        if gradient is None or not gradient.any():
            continue
        assert parameter.grad is not None, name
        error = float((parameter.grad.cpu() - gradient).norm() / gradient.norm())
        assert error <= FP32_GRADIENT, f"{name}: {error:.3g}"


@needs_engine
def test_engine_has_the_names_shapes_and_cuts_of_the_local_spec() -> None:
    described = []
    for parallel in (LOCAL, ENGINE):
        model = built(parallel, torch.bfloat16)
        marks = {
            name: (tuple(p.shape), p.dtype, getattr(p, "tensor_model_parallel", False), getattr(p, "partition_dim", -1))
            for name, p in model.named_parameters()
        }
        sharded = {
            key: (value.key, getattr(value, "global_shape", None), getattr(value, "axis_fragmentations", None))
            for key, value in model.sharded_state_dict().items()
        }
        described.append((marks, sharded))
    (local_marks, local_sharded), (engine_marks, engine_sharded) = described
    # Without tensor parallelism a cut is only a mark, and both set it.
    assert engine_marks == local_marks
    assert engine_sharded == local_sharded


@needs_engine
def test_engine_equals_local_in_fp32() -> None:
    expected, found = output(built(LOCAL, torch.float32)), output(built(ENGINE, torch.float32))
    assert float((found - expected).norm() / expected.norm()) < TF32
    local, engine = one_step(LOCAL, torch.float32), one_step(ENGINE, torch.float32)
    assert engine.loss == pytest.approx(local.loss, rel=TF32)
    errors = gradient_errors(engine, local)
    assert max(errors.values()) < 2 * TF32, {name: error for name, error in errors.items() if error >= 2 * TF32}


@needs_engine
def test_engine_is_as_near_to_fp32_as_local_in_bf16() -> None:
    exact = one_step(LOCAL, torch.float32)
    local = gradient_errors(one_step(LOCAL, torch.bfloat16), exact)
    engine_run = one_step(ENGINE, torch.bfloat16)
    assert engine_run.loss == pytest.approx(exact.loss, rel=0.01)
    for name, error in gradient_errors(engine_run, exact).items():
        assert error <= max(2 * local[name], BF16_FLOOR), f"{name}: {error:.3g}, local {local[name]:.3g}"


@needs_engine
@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full"},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "cross_attention", "mlp"]},
    ],
    ids=["full", "selective"],
)
def test_recomputed_activations_give_the_same_gradients(recompute: dict) -> None:
    kept = one_step(ENGINE, torch.bfloat16)
    again = one_step(ParallelConfig(transformer_impl="transformer_engine", **recompute), torch.bfloat16)
    assert again.loss == kept.loss
    assert max(gradient_errors(again, kept).values()) < 5e-3


@needs_engine
@pytest.mark.parametrize("implementation", ["local", "transformer_engine"])
def test_offloaded_activations_give_the_same_gradients(implementation: str) -> None:
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import PipelineOffloadManager

    PipelineOffloadManager.reset_instance()
    # Large enough for the smallest tensor that is offloaded, a million elements; several micro-batches and steps, since
    # the first step only learns what there is to offload.
    batches = [small_batch(latents=(16, 16, 16), seed=seed) for seed in (0, 1)]
    kept = one_step(ParallelConfig(transformer_impl=implementation), torch.bfloat16, batches=batches, warm_up=2)
    offloading = ParallelConfig(transformer_impl=implementation, fine_grained_activation_offloading=True)
    away = one_step(offloading, torch.bfloat16, batches=batches, warm_up=2)
    assert PipelineOffloadManager.get_instance().offload_summary_total_bytes > 0
    assert away.loss == pytest.approx(kept.loss, rel=1e-4)
    assert max(gradient_errors(away, kept).values()) < 1e-2
