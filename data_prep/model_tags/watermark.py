"""Watermark probability: EfficientNet-B3 in the layout of LAION's watermark_model_v1.pt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import nn

from data_prep.model_tags.base import TagBatch, per_clip
from data_prep.model_tags.efficientnet import HEAD_CHANNELS, EfficientNetB3
from data_prep.model_tags.heads import load_state, load_strictly

_SIZE = 256
_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
_WATERMARK_CLASS = 0


class WatermarkTag:
    """Mean probability over the frames, 0 to 1."""

    column: ClassVar[str] = "watermark"

    def __init__(self, weights: Path, device: torch.device, dtype: torch.dtype) -> None:
        self._network = detector()
        load_strictly(self._network, load_state(weights), weights)
        self._network.to(device, dtype).eval()
        self._device, self._dtype = device, dtype

    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        return [clip.mean().item() for clip in per_clip(batch.frames, self._probabilities)]

    @torch.inference_mode()
    def _probabilities(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        pixels = torch.stack([prepare(frame) for frame in frames])
        logits = self._network(pixels.to(self._device, self._dtype)).float()
        return logits.softmax(dim=-1)[:, _WATERMARK_CLASS].cpu()


def detector() -> EfficientNetB3:
    """The network, not filled: two classes, watermark and clear, behind two hidden layers."""
    return EfficientNetB3(
        nn.Sequential(
            nn.Linear(HEAD_CHANNELS, 625),
            nn.ReLU(),
            nn.Dropout(0.3),
            nn.Linear(625, 256),
            nn.ReLU(),
            nn.Linear(256, 2),
        )
    )


def prepare(frame: np.ndarray) -> torch.Tensor:
    """uint8 [H, W, 3] -> float32 [3, 256, 256], squeezed to a square as the detector was trained."""
    square = Image.fromarray(frame).resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return (pixels - _MEAN) / _STD
