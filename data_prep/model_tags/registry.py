"""From the YAML to loaded tags: files checked first, fingerprints of what makes the scores, devices."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from data_prep.model_tags.base import ModelTag
from data_prep.model_tags.clip import clip_encoder, clip_files
from data_prep.model_tags.config import ModelsConfig
from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Kind(NamedTuple):
    files: tuple[str, ...]
    """Fields that name a file."""
    folders: tuple[str, ...]
    """Fields that name a CLIP folder."""
    load: Callable[[Any, torch.device, torch.dtype], ModelTag]


def _load_aesthetic(config: Any, device: torch.device, dtype: torch.dtype) -> ModelTag:
    from data_prep.model_tags.heads import AestheticTag

    return AestheticTag(clip_encoder(config.clip, device, dtype), config.head)


def _load_nsfw(config: Any, device: torch.device, dtype: torch.dtype) -> ModelTag:
    from data_prep.model_tags.heads import NsfwTag

    return NsfwTag(clip_encoder(config.clip, device, dtype), config.head)


def _load_watermark(config: Any, device: torch.device, dtype: torch.dtype) -> ModelTag:
    from data_prep.model_tags.watermark import WatermarkTag

    return WatermarkTag(config.weights, device, dtype)


def _load_ocr(config: Any, device: torch.device, dtype: torch.dtype) -> ModelTag:
    from data_prep.model_tags.ocr import OcrTag

    return OcrTag(config.detection, config.recognition, config.keys, config.min_score, device)


def _load_text_video(config: Any, device: torch.device, dtype: torch.dtype) -> ModelTag:
    from data_prep.model_tags.text_video import TextVideoTag

    chinese = clip_encoder(config.chinese_clip, device, dtype) if config.chinese_clip else None
    return TextVideoTag(clip_encoder(config.clip, device, dtype), chinese)


# A new tag is a column of the manifest, a field of ModelsConfig, a module, and a line here.
_KINDS: dict[str, _Kind] = {
    "aesthetic": _Kind(("head",), ("clip",), _load_aesthetic),
    "nsfw": _Kind(("head",), ("clip",), _load_nsfw),
    "watermark": _Kind(("weights",), (), _load_watermark),
    "ocr": _Kind(("detection", "recognition", "keys"), (), _load_ocr),
    "text_video": _Kind((), ("clip", "chinese_clip"), _load_text_video),
}


def check_files(config: ModelsConfig) -> None:
    """See that everything that is named is there, before any clip is decoded.

    Raises:
        UserError: a file or folder is missing; names the field.
    """
    for name, kind in _configured(config).items():
        for field, path in _named(config, name, kind):
            expected = path.is_dir() if field in kind.folders else path.is_file()
            if not expected:
                what = "folder" if field in kind.folders else "file"
                raise UserError(f"{name}.{field}: {path}: no such {what}; correct it, or say `{name}: {{skip: true}}`")


def model_fingerprints(config: ModelsConfig) -> dict[str, str]:
    """Tag -> hash of its model's files, 32 hex digits; skipped tags are not in it."""
    prints = {}
    for name, kind in _configured(config).items():
        files = [
            file
            for field, path in _named(config, name, kind)
            for file in (clip_files(path) if field in kind.folders else [path])
        ]
        prints[name] = fingerprint_files(files)
    return prints


def load_models(config: ModelsConfig) -> list[ModelTag]:
    """Load what is not skipped, onto this process's device.

    Raises:
        UserError: a file is missing or is not what it should be.
    """
    check_files(config)
    device = _device(config.device)
    return [
        kind.load(getattr(config, name), device, _DTYPES[config.dtype]) for name, kind in _configured(config).items()
    ]


@lru_cache(maxsize=1)
def loaded_once(config_json: str, prints_json: str) -> list[ModelTag]:
    """The models of a configuration, which a worker process loads with its first batch and keeps.

    `prints_json` are the fingerprints of their files: other weights under the same names are loaded anew.
    """
    clip_encoder.cache_clear()
    return load_models(build_config(ModelsConfig, json.loads(config_json), "models"))


def _configured(config: ModelsConfig) -> dict[str, _Kind]:
    return {name: kind for name, kind in _KINDS.items() if not getattr(config, name).skip}


def _named(config: ModelsConfig, name: str, kind: _Kind) -> list[tuple[str, Path]]:
    fields = (*kind.folders, *kind.files)
    found = [(field, getattr(getattr(config, name), field)) for field in fields]
    return [(field, path) for field, path in found if path is not None]


def _device(choice: str) -> torch.device:
    if choice == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda, but torch sees no GPU; say `device: auto` or `device: cpu`")
    if choice == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Pool workers are numbered from 1; the main process has no number.
    identity = multiprocessing.current_process()._identity
    return torch.device("cuda", (identity[0] - 1 if identity else 0) % torch.cuda.device_count())
