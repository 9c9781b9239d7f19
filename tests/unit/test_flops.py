"""Cost against the paper's Table 3, latent shapes against the released model's."""

from __future__ import annotations

import pytest

from megatron_video.errors import UserError
from megatron_video.flops import latent_shape, training_flops

# arXiv 2502.10248, Table 3: frames, height, width -> TFLOPs of one sample.
TABLE_3 = [
    (204, 256, 256, 1717.20),
    (204, 192, 320, 1592.61),
    (136, 256, 256, 1079.85),
    (136, 192, 320, 1004.89),
    (68, 256, 256, 509.31),
    (68, 192, 320, 475.87),
    (1, 256, 256, 44.99),
]


@pytest.mark.parametrize(("frames", "height", "width", "tflops"), TABLE_3)
def test_table_3(frames: int, height: int, width: int, tflops: float) -> None:
    flops = training_flops(48, 6144, latent_shape(frames, height, width).tokens)
    assert flops / 1e12 == pytest.approx(tflops, abs=0.01)


@pytest.mark.parametrize(
    ("shape", "latent", "tokens"),
    [
        ((204, 544, 992), (36, 34, 62), 75_888),
        ((136, 544, 992), (24, 34, 62), 50_592),
        ((17, 192, 320), (3, 12, 20), 720),
        ((1, 256, 256), (1, 16, 16), 256),
    ],
)
def test_latent_shapes(shape: tuple[int, int, int], latent: tuple[int, int, int], tokens: int) -> None:
    assert latent_shape(*shape) == latent
    assert latent_shape(*shape).tokens == tokens


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((16, 64, 64), "frames=16 .*nearest: 1 or 17"),
        ((50, 64, 64), "frames=50 .*nearest: 34 or 51"),
        ((0, 64, 64), "frames=0 "),
        ((-17, 64, 64), "frames=-17 .*nearest: 1 or 17"),
        ((17, 540, 960), "height=540 .*nearest: 528 or 544"),
        ((17, 64, 8), "width=8 .*nearest: 16"),
    ],
)
def test_frame_counts_and_sides_are_never_rounded_silently(shape: tuple[int, int, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        latent_shape(*shape)
