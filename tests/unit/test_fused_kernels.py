"""The Triton kernels against the plain torch forms: on the GPU where there is one, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_video.dit.fused import (
    plain_gated_residual,
    plain_modulated_layer_norm,
    plain_rms_norm,
    plain_rotated_rms_norm,
)
from megatron_video.dit.rope import Rope, build_rope

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytestmark = [pytest.mark.gpu] if DEVICE.type == "cuda" else []
pytest.importorskip(
    "triton", reason="torch's CPU build comes without triton (640 MB), which would interpret the kernels"
)
# Triton reads the variable when it is first imported, which another module may have done already.
if DEVICE.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("without a GPU the kernels run under TRITON_INTERPRET=1 only", allow_module_level=True)

from megatron_video.dit.kernels.layer_norm import ModulatedLayerNorm  # noqa: E402
from megatron_video.dit.kernels.residual import GatedResidual  # noqa: E402
from megatron_video.dit.kernels.rms_norm import RotatedRMSNorm  # noqa: E402

# tokens, batch, width; neither tokens nor widths are powers of two, and one token is the least there can be
SHAPES = [(1, 1, 16), (5, 1, 100), (13, 3, 96), (8, 2, 640)]
# The 30B's width and heads: minutes in the interpreter.
LARGE = [(1031, 2, 6144)] if DEVICE.type == "cuda" else []
LARGE_ROTATED = [((3, 17, 21), 2, 48, (64, 32, 32))] if DEVICE.type == "cuda" else []
# grid, batch, heads, split
ROTATED = [
    ((1, 1, 1), 1, 1, (8, 4, 4)),
    ((3, 2, 3), 2, 6, (64, 32, 32)),
    ((1, 5, 1), 3, 17, (20, 10, 10)),
    ((2, 2, 2), 1, 5, (24, 12, 4)),
]
# Forward rounds where the plain code rounds, so it may differ by a unit in the last place or two where sums in fp32 are
# taken in another order. The plain backward rounds more often than the kernels. Triton's interpreter truncates to bf16.
UNIT = {torch.float32: 1e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7 if DEVICE.type == "cuda" else 2**-5}
DTYPES = list(UNIT)


def random(*shape: int, dtype: torch.dtype, scale: float = 1.0, seed: int = 0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))) * scale
    return values.to(DEVICE, dtype).requires_grad_()


def compare(kernel: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Output and all gradients of both; the gradients of the plain form are taken in fp32."""
    dtype = inputs[0].dtype
    unit = UNIT[dtype]
    actual, expected = kernel(*inputs), plain(*inputs)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=2 * unit, atol=2 * unit * expected.abs().max().item())
    incoming = random(*actual.shape, dtype=dtype, seed=9).detach()
    exact = [value.detach().float().requires_grad_() for value in inputs]
    gradients = torch.autograd.grad(plain(*exact), exact, incoming.float())
    for ours, theirs in zip(torch.autograd.grad(actual, inputs, incoming), gradients, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == theirs.shape
        # An exact zero comes out of sums of numbers around one.
        size = max(theirs.abs().max().item(), 1.0)
        torch.testing.assert_close(ours.float(), theirs, rtol=4 * unit, atol=4 * unit * size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "batch", "width"), SHAPES + LARGE)
def test_modulated_layer_norm(tokens: int, batch: int, width: int, dtype: torch.dtype) -> None:
    # As in the model, where one tensor [6, b, D] holds all modulations.
    modulation = random(batch, 6, width, dtype=dtype, seed=1).transpose(0, 1).unsqueeze(1)

    def split(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda x, weight, bias, packed: function(x, weight, bias, packed[0], packed[1], 1e-5)

    x = random(tokens, batch, width, dtype=dtype, scale=3.0)
    weight, bias = (random(width, dtype=dtype, seed=seed) for seed in (2, 3))
    compare(split(ModulatedLayerNorm.apply), split(plain_modulated_layer_norm), [x, weight, bias, modulation])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "batch", "width"), SHAPES + LARGE)
def test_gated_residual(tokens: int, batch: int, width: int, dtype: torch.dtype) -> None:
    x, branch = (random(tokens, batch, width, dtype=dtype, seed=seed) for seed in (0, 1))
    gate = random(1, batch, width, dtype=dtype, seed=2)
    compare(GatedResidual.apply, plain_gated_residual, [x, gate, branch])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize(("grid", "batch", "heads", "split"), ROTATED + LARGE_ROTATED)
def test_rotated_rms_norm(
    grid: tuple[int, int, int], batch: int, heads: int, split: tuple[int, ...], rotate: bool, dtype: torch.dtype
) -> None:
    rope = build_rope(grid, split, dtype, DEVICE, False)
    tokens, channels = grid[0] * grid[1] * grid[2], sum(split)
    # The query is a view into the projection's output.
    packed = random(tokens, batch, heads, 3 * channels, dtype=dtype, scale=2.0)
    weight = random(channels, dtype=dtype, seed=1)

    def kernel(packed: Tensor, weight: Tensor) -> Tensor:
        tables = (rope.cos, rope.sin, rope.split) if rotate else (None, None, None)
        return RotatedRMSNorm.apply(packed[..., channels : 2 * channels], weight, 1e-6, *tables)

    def plain(packed: Tensor, weight: Tensor) -> Tensor:
        query = packed[..., channels : 2 * channels]
        if not rotate:
            return plain_rms_norm(query, weight, 1e-6)
        return plain_rotated_rms_norm(query, weight, 1e-6, Rope(rope.cos, rope.sin, rope.split))

    compare(kernel, plain, [packed, weight])


def test_rotated_rms_norm_takes_gradients_with_the_axes_of_attention() -> None:
    rope = build_rope((2, 2, 2), (8, 4, 4), torch.float32, DEVICE, False)
    x, weight = random(8, 2, 3, 16, dtype=torch.float32), random(16, dtype=torch.float32)

    def attention_order(out: Tensor) -> Tensor:
        return out.permute(1, 2, 0, 3).contiguous()

    compare(
        lambda *args: attention_order(RotatedRMSNorm.apply(*args, 1e-6, rope.cos, rope.sin, rope.split)),
        lambda *args: attention_order(plain_rotated_rms_norm(*args, 1e-6, rope)),
        [x, weight],
    )
