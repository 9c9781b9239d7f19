"""Losses and scores of Video-VAE training against second implementations and their definitions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from megatron_video.errors import UserError
from training.discriminator import Adversary, PatchDiscriminator, has_converged
from training.image_metrics import psnr, ssim
from training.perceptual import load_lpips, video_lpips
from training.vae_config import AdversarialConfig, PerceptualConfig
from training.vae_ranks import Ranks
from training.weight_average import WeightAverage

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
VGG_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")


def _videos(*shape: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    original = torch.rand(shape, generator=generator) * 2 - 1
    return (original + 0.2 * torch.randn(shape, generator=generator)).clamp(-1, 1), original


def _ssim_by_windows(x: np.ndarray, y: np.ndarray, peak: float) -> float:
    """SSIM of one channel from its definition, window by window."""
    axis = np.arange(-5, 6)
    window = np.exp(-(axis[:, None] ** 2 + axis[None] ** 2) / (2 * 1.5**2))
    window /= window.sum()
    c1, c2 = (0.01 * peak) ** 2, (0.03 * peak) ** 2
    values = []
    for top in range(x.shape[0] - 10):
        for left in range(x.shape[1] - 10):
            a, b = (picture[top : top + 11, left : left + 11] for picture in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a, var_b = (window * (a - mean_a) ** 2).sum(), (window * (b - mean_b) ** 2).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            contrast = (2 * covariance + c2) / (var_a + var_b + c2)
            values.append((2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1) * contrast)
    return float(np.mean(values))


def test_ssim_and_psnr_are_their_definitions() -> None:
    decoded, original = _videos(2, 2, 3, 16, 14)
    x, y = decoded.double().numpy(), original.double().numpy()
    for clip in range(2):
        channels = [_ssim_by_windows(x[clip, t, c], y[clip, t, c], 2.0) for t in range(2) for c in range(3)]
        assert ssim(decoded, original)[clip].item() == pytest.approx(np.mean(channels), abs=1e-6)
        error = np.mean((x[clip] - y[clip]) ** 2)
        assert psnr(decoded, original)[clip].item() == pytest.approx(10 * np.log10(4 / error), abs=1e-4)
    assert ssim(original, original).tolist() == pytest.approx([1.0, 1.0])
    with pytest.raises(ValueError, match="at least 11 x 11"):
        ssim(decoded[..., :8], original[..., :8])


def _write_lpips(folder: Path) -> tuple[nn.Sequential, list[Tensor]]:
    """Random weights in the public layouts: VGG16 layers as torchvision numbers them, and the linear heads."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    channels = 3
    for width in VGG_WIDTHS:
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
    features = nn.Sequential(*layers)
    heads = [torch.rand(1, width, 1, 1) for width in (64, 128, 256, 512, 512)]
    state = {f"features.{name}": weight for name, weight in features.state_dict().items()}
    torch.save(state | {"classifier.0.bias": torch.zeros(1)}, folder / "vgg16.pth")
    save_file({f"lin{n}.model.1.weight": head for n, head in enumerate(heads)}, folder / "heads.safetensors")
    return features, heads


@torch.no_grad()
def _lpips_by_layers(features: nn.Sequential, heads: list[Tensor], x: Tensor, y: Tensor) -> Tensor:
    """LPIPS from its equation, one picture; taps behind the layers relu1_2, 2_2, 3_3, 4_3 and 5_3."""
    shift = torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1)
    scale = torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1)
    total = torch.zeros(())
    for tap, head in zip((3, 8, 15, 22, 29), heads, strict=True):
        units = [F.normalize(features[: tap + 1]((picture - shift) / scale), dim=1) for picture in (x, y)]
        total += F.conv2d((units[0] - units[1]) ** 2, head).mean()
    return total


def test_lpips_is_its_equation_on_files_in_the_public_layouts(tmp_path: Path) -> None:
    features, heads = _write_lpips(tmp_path)
    config = PerceptualConfig(weight=1.0, vgg=str(tmp_path / "vgg16.pth"), heads=str(tmp_path / "heads.safetensors"))
    lpips = load_lpips(config, CPU)
    decoded, original = _videos(1, 3, 3, 32, 32)
    expected = [_lpips_by_layers(features, heads, decoded[0, t : t + 1], original[0, t : t + 1]) for t in range(3)]
    torch.testing.assert_close(video_lpips(lpips, decoded, original, None), torch.stack(expected).mean())
    torch.testing.assert_close(video_lpips(lpips, decoded, original, 2), (expected[0] + expected[2]) / 2)
    assert video_lpips(lpips, original, original, None).item() == 0
    leaf = decoded.clone().requires_grad_()
    video_lpips(lpips, leaf, original, None).backward()
    assert leaf.grad is not None
    assert leaf.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in lpips.parameters())


def test_perceptual_weights_of_another_layout_are_refused(tmp_path: Path) -> None:
    _write_lpips(tmp_path)
    vgg, heads = str(tmp_path / "vgg16.pth"), str(tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=r"features\.0\.weight must be \[64, 3, 3, 3\], is missing"):
        load_lpips(PerceptualConfig(weight=1.0, vgg=heads, heads=heads), CPU)
    with pytest.raises(UserError, match=r"absent\.pth cannot be read"):
        load_lpips(PerceptualConfig(weight=1.0, vgg=vgg, heads="absent.pth"), CPU)


def _adversary(**changes: object) -> Adversary:
    config = AdversarialConfig(**{"weight": 0.5, "channels": 8, "num_layers": 2, "learning_rate": 1e-3, **changes})
    return Adversary(config, 0, ALONE, torch.autocast("cpu", enabled=False))


def test_the_discriminator_learns_patches_of_videos_and_single_frames() -> None:
    assert PatchDiscriminator(8, 3)(torch.zeros(2, 3, 9, 32, 48)).shape == (2, 1, 9, 4, 6)
    assert PatchDiscriminator(8, 1)(torch.zeros(1, 3, 1, 16, 16)).shape == (1, 1, 1, 8, 8)
    adversary = _adversary()
    fake, real = _videos(2, 3, 3, 16, 16)
    losses = [adversary.update(real, fake.mul(0.3)) for _ in range(30)]
    # The hinge loss starts near 1, where nothing is told apart.
    assert losses[0] == pytest.approx(1.0, abs=0.3)
    assert losses[-1] < 0.3


def test_the_adversarial_gradient_is_as_long_as_the_others_times_its_weight() -> None:
    adversary = _adversary()
    decoded, original = _videos(2, 3, 3, 16, 16)
    loss, own = adversary.gradient(decoded)
    # From the definition: minus the mean score, by a central difference along the gradient.
    step = 1e-2 / own.norm() * own
    with torch.no_grad():
        ahead, behind = (-adversary.model((decoded + s).transpose(1, 2)).mean() for s in (step, -step))
    assert ((ahead - behind) / 2).item() == pytest.approx((own * step).sum().item(), rel=2e-2)
    torch.testing.assert_close(loss, -adversary.model(decoded.transpose(1, 2)).mean().detach())
    assert all(parameter.grad is None for parameter in adversary.model.parameters())
    others = (decoded - original).sign() / decoded.numel()
    assert (adversary.scale(others, own) * own).norm().item() == pytest.approx(0.5 * others.norm().item(), rel=1e-5)
    assert _adversary(warmup_steps=1).scale(others, own) == 0
    assert _adversary(max_scale=1e-6).scale(others, own) == pytest.approx(5e-7)


@pytest.mark.parametrize(
    ("psnrs", "converged"),
    [
        ([20.0, 20.0, 20.0], False),  # no evaluation before the last three
        ([20.0, 21.0, 22.0, 23.0], False),
        ([20.0, 23.0, 22.9, 23.05, 23.02], True),
        ([20.0, 23.0, 22.9, 23.05, 23.2], False),
    ],
)
def test_convergence_is_no_gain_over_the_best_before(psnrs: list[float], converged: bool) -> None:
    assert has_converged(psnrs, AdversarialConfig(patience=3, min_gain=0.1)) is converged


def test_weight_average_is_its_recursion_and_gives_the_weights_back() -> None:
    module = nn.Linear(2, 2)
    average = WeightAverage(module, 0.75)
    expected = module.weight.detach().clone()
    for number in range(3):
        with torch.no_grad():
            module.weight.fill_(float(number))
        average.update()
        expected = 0.75 * expected + 0.25 * number
    with average.applied():
        torch.testing.assert_close(module.weight.detach(), expected)
    assert module.weight.unique().tolist() == [2.0]
