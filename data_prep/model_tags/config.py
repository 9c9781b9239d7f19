"""The YAML that names the local weights of each model tag."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from megatron_video.config_io import config_dataclass, load_config


@config_dataclass
class ClipHeadConfig:
    """A CLIP image encoder and a small head over its embedding."""

    skip: bool = False
    """Leave the column null."""
    clip: Path | None = None
    """Folder of a transformers CLIP model (config.json, weights, preprocessor_config.json); LAION's heads: ViT-L/14."""
    head: Path | None = None
    """State dict of the head, .pth or .safetensors."""

    def __post_init__(self) -> None:
        _require(self, "clip", "head")


@config_dataclass
class WatermarkConfig:
    """The watermark detector."""

    skip: bool = False
    """Leave the column null."""
    weights: Path | None = None
    """State dict in the layout of LAION's watermark_model_v1.pt (EfficientNet-B3, names of timm)."""

    def __post_init__(self) -> None:
        _require(self, "weights")


@config_dataclass
class OcrConfig:
    """Text detection and recognition by RapidOCR on ONNX files, such as those of PP-OCR."""

    skip: bool = False
    """Leave the column null."""
    detection: Path | None = None
    """ONNX file that finds text."""
    recognition: Path | None = None
    """ONNX file that reads it."""
    keys: Path | None = None
    """Characters of the recognition model, one a line; null where the ONNX file holds them."""
    min_score: float = 0.5
    """Text that is read with less confidence does not count."""

    def __post_init__(self) -> None:
        _require(self, "detection", "recognition")


@config_dataclass
class TextVideoConfig:
    """Cosine of caption and frames."""

    skip: bool = False
    """Leave the column null."""
    clip: Path | None = None
    """Folder of a transformers CLIP model with its tokenizer."""
    chinese_clip: Path | None = None
    """The same of Chinese CLIP, for captions of language zh; null: `clip` reads those too."""

    def __post_init__(self) -> None:
        _require(self, "clip")


@config_dataclass
class ModelsConfig:
    """Weights of all model tags, and how they are run."""

    aesthetic: ClipHeadConfig | None = None
    """CLIP + MLP of the LAION improved aesthetic predictor."""
    nsfw: ClipHeadConfig | None = None
    """CLIP + LAION's NSFW head (the ViT-L/14 or the ViT-H/14 layout)."""
    watermark: WatermarkConfig | None = None
    """EfficientNet-B3."""
    ocr: OcrConfig | None = None
    """RapidOCR."""
    text_video: TextVideoConfig | None = None
    """CLIP, Chinese CLIP."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPUs if there are any, one after the other over the worker processes."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Arithmetic of the networks."""
    clips_per_batch: int = 8
    """Clips whose frames go through a network together."""

    def __post_init__(self) -> None:
        for name in ("aesthetic", "nsfw", "watermark", "ocr", "text_video"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} is not configured; name its files, or say `{name}: {{skip: true}}`")
        if self.clips_per_batch < 1:
            raise ValueError(f"clips_per_batch={self.clips_per_batch} must be at least 1")


def load_models_config(path: Path) -> ModelsConfig:
    """Read the YAML.

    Raises:
        UserError: not readable, an unknown field, or a tag that is neither configured nor skipped.
    """
    return load_config(ModelsConfig, path)


def _require(config: Any, *fields: str) -> None:
    missing = [name for name in fields if getattr(config, name) is None]
    if missing and not config.skip:
        raise ValueError(f"{', '.join(missing)} missing; name the local file, or say `skip: true`")
    if config.skip and len(missing) < len(fields):
        raise ValueError("files are named beside `skip: true`; remove the one or the other")
