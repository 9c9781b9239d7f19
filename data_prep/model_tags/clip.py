"""CLIP and Chinese CLIP from a local folder, through transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from megatron_video.errors import UserError

# model_type of config.json -> classes of transformers: model, preprocessing of pictures
_CLASSES = {
    "clip": ("CLIPModel", "CLIPImageProcessor"),
    "chinese_clip": ("ChineseCLIPModel", "ChineseCLIPImageProcessor"),
}
_PREPARE_THREADS = 4


class ClipEncoder:
    """Image and text embeddings of one folder, on one device."""

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype) -> None:
        """Load model and preprocessing.

        Raises:
            UserError: no CLIP model there, or one whose weights are not complete.
        """
        self.folder, self.device, self.dtype = folder, device, dtype
        model_class, processor_class = _classes(folder)
        self._model = _load_model(model_class, folder).to(device, dtype).eval()
        self._images = _from_folder(processor_class, folder)
        self._tokens: Any = None
        self.width: int = self._model.config.projection_dim

    @torch.inference_mode()
    def embed_images(self, frames: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [H, W, 3] each -> unit vectors, float32 [N, D] on the CPU."""
        with ThreadPoolExecutor(_PREPARE_THREADS) as threads:
            pixels = list(threads.map(self._prepare, frames))
        embedded = self._model.get_image_features(torch.stack(pixels).to(self.device, self.dtype))
        return _unit_vectors(embedded)

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors, float32 [N, D] on the CPU; what is beyond the text encoder's length is cut off."""
        length = self._model.config.text_config.max_position_embeddings
        tokens = self._tokenizer()(
            list(texts), padding=True, truncation=True, max_length=min(length, _MAX_TOKENS), return_tensors="pt"
        )
        return _unit_vectors(self._model.get_text_features(**tokens.to(self.device)))

    def _tokenizer(self) -> Any:
        # Only the text-video tag needs it; the others may do with a folder that has none.
        if self._tokens is None:
            from transformers import AutoTokenizer

            self._tokens = _from_folder(AutoTokenizer, self.folder)
        return self._tokens

    def _prepare(self, frame: np.ndarray) -> torch.Tensor:
        pixels: torch.Tensor = self._images(images=frame, return_tensors="pt")["pixel_values"][0]
        return pixels


# Chinese CLIP's BERT could hold 512 positions, but was trained on 52; CLIP's own limit is 77.
_MAX_TOKENS = 77


@lru_cache(maxsize=4)
def clip_encoder(folder: Path, device: torch.device, dtype: torch.dtype) -> ClipEncoder:
    """The encoder of a folder; tags that name the same folder share it."""
    return ClipEncoder(folder, device, dtype)


def clip_files(folder: Path) -> list[Path]:
    """Files of a CLIP folder that decide about its scores."""
    wanted = (".json", ".safetensors", ".bin", ".txt")
    return sorted(file for file in folder.iterdir() if file.suffix in wanted)


def _classes(folder: Path) -> tuple[Any, Any]:
    import transformers

    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no CLIP model there (a folder with config.json and weights): {error}") from None
    if kind not in _CLASSES:
        raise UserError(f"{folder}/config.json: model_type {kind!r}; models that work here: {', '.join(_CLASSES)}")
    model, processor = _CLASSES[kind]
    # Pillow's resize, also where torchvision is there (transformers 5 has a class for each): one machine's scores must
    # be another's.
    pillow = getattr(transformers, f"{processor}Pil", None)
    return getattr(transformers, model), pillow or getattr(transformers, processor)


def _load_model(loader: Any, folder: Path) -> Any:
    from transformers.utils import logging

    # Its bars would write over the stage's own, once per worker.
    logging.disable_progress_bar()
    model, report = _from_folder(loader, folder, output_loading_info=True)
    # transformers fills what a file lacks with random numbers and a warning: a made-up score.
    lacking = sorted(str(name) for key in ("missing_keys", "mismatched_keys") for name in report.get(key) or ())
    if lacking:
        raise UserError(f"{folder}: the weights lack or mismatch {len(lacking)} tensors, such as {lacking[0]}")
    return model


def _from_folder(loader: Any, folder: Path, **options: Any) -> Any:
    try:
        return loader.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"{folder}: {loader.__name__} cannot be loaded from it: {first}") from None


def _unit_vectors(features: Any) -> torch.Tensor:
    # transformers 5 wraps the embedding, 4 gives it plain.
    embedded = getattr(features, "pooler_output", features)
    return F.normalize(embedded.float(), dim=-1).cpu()
