"""Large pictures in slabs, and chunks: the same result as plain, in little memory."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from megatron_video.vae import VAEConfig, VideoVAE, slabs

TINY = VAEConfig(
    latent_channels=2,
    num_res_blocks=1,
    encoder_multipliers=(1, 1, 2, 2),
    decoder_channels=32,
    decoder_multipliers=(1, 1, 2, 2),
)

# Peak of a process that encodes argv[1] frames of 96 x 96, in MB over what it was before.
_PEAK = """
import resource, sys, torch
from megatron_video.vae import VAEConfig, VideoVAE
torch.set_num_threads(1)
vae = VideoVAE(VAEConfig(latent_channels=2, num_res_blocks=1, encoder_multipliers=(1, 1, 1, 1), decoder_channels=32,
                         decoder_multipliers=(1, 1, 1, 1))).requires_grad_(False)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
with torch.inference_mode():
    vae.encode_moments(torch.zeros(1, 1, 3, 32, 32))
    start = peak()
    vae.encode_moments(torch.zeros(1, int(sys.argv[1]), 3, 96, 96, dtype=torch.uint8))
print(peak() - start)
"""


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak; works on fake tensors, which have no data."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_iter(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())

    def _freed(self, key: int, size: int) -> None:
        self._seen.remove(key)
        self.now -= size


def released_peak(frames: int, decode: bool = False) -> float:
    """GiB of tensors alive at once (weights apart) when the released VAE codes 544 x 992 in bf16."""
    default = torch.get_default_dtype()
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            released = VideoVAE(VAEConfig())
        finally:
            torch.set_default_dtype(default)
        latents = torch.empty(1, frames // 17 * 3, 64, 34, 62, dtype=torch.bfloat16)
        video = torch.empty(1, frames, 3, 544, 992, dtype=torch.uint8)
        with LiveBytes() as live:
            released.decode(latents) if decode else released.encode_moments(video)
    return live.peak / 2**30


@pytest.fixture(scope="module")
def vae() -> VideoVAE:
    torch.manual_seed(0)
    return VideoVAE(TINY).double().eval().requires_grad_(False)


def random_video(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    shape = (batch, frames, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def peak_megabytes(frames: int) -> float:
    # One arena and early returns to the system: the peak is what is alive, not what malloc keeps.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", _PEAK, str(frames)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)


@pytest.mark.parametrize(("frames", "elements"), [(1, 1), (9, 20_000), (17, 100_000)])
@torch.no_grad()
def test_slabs_change_nothing(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch, frames: int, elements: int) -> None:
    video = random_video(2 if frames == 1 else 1, frames, 32, 48)
    moments = vae.encode_moments(video)
    decoded = vae.decode(moments[:, :, :2])
    monkeypatch.setattr(slabs, "MAX_SLAB_ELEMENTS", elements)
    # Double precision: what is left is rounding, 1e-7 of which a wrong row would exceed by far.
    torch.testing.assert_close(vae.encode_moments(video), moments, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(vae.decode(moments[:, :, :2]), decoded, rtol=1e-9, atol=1e-11)


@torch.no_grad()
def test_slabs_in_bf16_differ_by_rounding(vae: VideoVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    half = VideoVAE(TINY)
    half.load_state_dict(vae.state_dict())
    half = half.bfloat16().eval()
    video = random_video(1, 17, 48, 48)
    exact, plain = vae.encode_moments(video), half.encode_moments(video)
    monkeypatch.setattr(slabs, "MAX_SLAB_ELEMENTS", 10_000)
    in_slabs = half.encode_moments(video)
    rounding = (plain.double() - exact).square().mean().sqrt()
    # As far from the exact result as the plain bf16 computation is, not farther.
    assert (in_slabs.double() - exact).square().mean().sqrt() < 1.2 * rounding


def test_gradients_are_recorded_without_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs, "MAX_SLAB_ELEMENTS", 1)
    torch.manual_seed(0)
    trained = VideoVAE(TINY)
    trained.decode(trained.encode_moments(torch.rand(1, 9, 3, 16, 16))[:, :, :2]).square().mean().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained.parameters())


@torch.no_grad()
def test_bytes_are_scaled_as_floats_are(vae: VideoVAE) -> None:
    pixels = torch.randint(0, 256, (2, 18, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(vae.encode_moments(pixels), vae.encode_moments(pixels.float() / 127.5 - 1))


@pytest.mark.heavy
def test_memory_of_encode_does_not_grow_with_the_length() -> None:
    short, long = peak_megabytes(34), peak_megabytes(340)
    # Ten times the frames; a second chunk alive would double it.
    assert long < 1.2 * short + 12


def test_the_largest_bucket_fits_with_slabs(monkeypatch: pytest.MonkeyPatch) -> None:
    encode, decode = released_peak(17), released_peak(17, decode=True)
    assert encode < 9
    assert decode < 15
    # Twelve chunks: what grows is the bytes of the video itself, and its latents.
    assert released_peak(204) - encode < 1.1 * 204 * 3 * 544 * 992 / 2**30
    monkeypatch.setattr(slabs, "MAX_SLAB_ELEMENTS", 2**40)
    assert released_peak(17) > 1.5 * encode
    assert released_peak(17, decode=True) > 1.4 * decode
