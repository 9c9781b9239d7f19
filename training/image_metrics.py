"""PSNR and SSIM of videos."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW = 11
SIGMA = 1.5
K1, K2 = 0.01, 0.03


def psnr(decoded: Tensor, original: Tensor, peak: float = 2.0) -> Tensor:
    """dB of each clip [B] from [B, T, 3, H, W]; the squared error is averaged over the whole clip."""
    mse = ((decoded - original) / peak).square().mean(dim=(1, 2, 3, 4)).clamp_min(1e-10)
    return -10 * torch.log10(mse)


def ssim(decoded: Tensor, original: Tensor, peak: float = 2.0) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each clip [B] from [B, T, 3, H, W], mean over frames and channels.

    Gaussian windows of 11 x 11 pixels, sigma 1.5, that lie inside the picture; population variances.

    Raises:
        ValueError: pictures are smaller than the window.
    """
    if min(original.shape[-2:]) < WINDOW:
        raise ValueError(
            f"SSIM needs pictures of at least {WINDOW} x {WINDOW} pixels, not {tuple(original.shape[-2:])}"
        )
    x, y = (video.flatten(0, 2).unsqueeze(1).double() for video in (decoded, original))
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x, variance_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).mean(dim=(1, 2, 3)).unflatten(0, original.shape[:3]).mean(dim=(1, 2)).float()


def _blur(x: Tensor) -> Tensor:
    positions = torch.arange(WINDOW, device=x.device, dtype=x.dtype) - WINDOW // 2
    window = torch.exp(-0.5 * (positions / SIGMA) ** 2)
    window = window / window.sum()
    return F.conv2d(F.conv2d(x, window.view(1, 1, -1, 1)), window.view(1, 1, 1, -1))
