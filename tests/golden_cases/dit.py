"""Golden cases of the DiT: output in fp32 and in the released bf16, and the gradient of every parameter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.dit_names import released_names
from megatron_video import device
from megatron_video.dit import DiTConfig, VideoDiT, build_dit
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel

_CPU = torch.device("cpu")
ABSOLUTE_FP32 = 5e-5
RELATIVE_GRADIENT = 1e-5
# fields of the reference's configuration -> ours; the rest has no effect on the numbers
FIELDS = {"rope_ch_split": "rope_channel_split", "attention_type": None, "dropout": None, "norm_type": None}
INPUTS = {
    "latents": "in.hidden_states",
    "timestep": "in.timestep",
    "llm_states": "in.encoder_hidden_states",
    "clip_states": "in.encoder_hidden_states_2",
    "fps": "in.fps",
}


def run(meta: dict[str, Any], tensors: dict[str, Tensor], golden_dir: Path, name: str) -> None:
    """Compare one recorded forward (and backward, where recorded) with our model on one process."""
    weights = {key.removeprefix("sd."): value for key, value in tensors.items() if key.startswith("sd.")}
    inputs = read_inputs(tensors)
    model = load_reference_model(meta["config"], weights, torch.float32)
    with torch.no_grad():
        assert_close(model(**inputs), tensors["out"], ABSOLUTE_FP32, f"{name} fp32 output")
    gradients = golden_dir / f"{name}.grads.safetensors"
    if gradients.is_file():
        _check_gradients(model, inputs, load_file(gradients), name)
    if "out_bf16" in tensors:
        _check_bf16(meta, weights, inputs, tensors, name)


def read_inputs(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The recorded inputs as our model's arguments; the reference uses only the row sum of its text mask."""
    inputs = {ours: tensors[theirs] for ours, theirs in INPUTS.items() if theirs in tensors}
    return inputs | {"text_lengths": tensors["in.encoder_attention_mask"].sum(dim=1).long()}


def load_reference_model(
    config: dict[str, Any], weights: dict[str, Tensor], dtype: torch.dtype, where: torch.device = _CPU
) -> VideoDiT:
    """Our model on one process with weights under the released names; every tensor must be used and be there."""
    fields = {FIELDS.get(key, key): value for key, value in config.items()}
    fields.pop(None, None)
    dit = DiTConfig(**fields, released_precision=dtype == torch.bfloat16)
    destroy_parallel(keep_distributed=True)
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=1, device_info=device.initialize())
    (model,) = build_dit(dit, parallel, dtype, device=where, init_seed=None)
    names = released_names(dit)
    assert set(names.values()) == set(weights), set(names.values()) ^ set(weights)
    parameters = dict(model.named_parameters())
    assert set(parameters) == set(names), set(parameters) ^ set(names)
    with torch.no_grad():
        for ours, theirs in names.items():
            assert parameters[ours].shape == weights[theirs].shape, (ours, theirs)
            parameters[ours].copy_(weights[theirs])
    return model.eval()


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    error = (actual.float() - expected.float()).abs().max().item()
    assert error <= tolerance, f"{what}: largest difference {error:.3g}, allowed {tolerance:.3g}"


def _check_gradients(model: VideoDiT, inputs: dict[str, Tensor], recorded: dict[str, Tensor], name: str) -> None:
    loss = (model(**inputs) - recorded["target"]).square().mean()
    assert_close(loss, recorded["loss"], ABSOLUTE_FP32, f"{name} loss")
    loss.backward()
    names = released_names(model.dit_config)
    for ours, parameter in model.named_parameters():
        expected = recorded.get(f"grad.{names[ours]}")
        if expected is None or not expected.any():  # an embedder whose condition was not given
            assert parameter.grad is None or not parameter.grad.any(), f"{name}: a gradient for {ours}"
            continue
        assert parameter.grad is not None, f"{name}: no gradient for {ours}"
        error = (parameter.grad - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= RELATIVE_GRADIENT, f"{name} gradient of {names[ours]}: relative error {error:.3g}"


def _check_bf16(
    meta: dict[str, Any], weights: dict[str, Tensor], inputs: dict[str, Tensor], tensors: dict[str, Tensor], name: str
) -> None:
    """The released pipeline's bf16, roundings of time and rotary angles included.

    Those two roundings are what moves the released output away from fp32 (by up to 1.0 in these cases). Our kernels
    round at other places inside a block: that is allowed a tenth of this distance, or four units in the last place of
    the largest output.
    """
    model = load_reference_model(meta["config"], weights, torch.bfloat16)
    cast = {key: value.bfloat16() if value.is_floating_point() else value for key, value in inputs.items()}
    with torch.no_grad():
        actual = model(**cast)
    recorded_distance = (tensors["out"] - tensors["out_bf16"]).abs().max().item()
    last_places = 2**-6 * tensors["out_bf16"].abs().max().item()
    assert_close(actual, tensors["out_bf16"], max(last_places, 0.1 * recorded_distance), f"{name} bf16 output")
