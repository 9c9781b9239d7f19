"""Text-video score: mean cosine of the caption and the sampled frames in CLIP's common space."""

from __future__ import annotations

from typing import ClassVar

import torch

from data_prep.model_tags.base import TagBatch
from data_prep.model_tags.clip import ClipEncoder
from megatron_video.manifest import Row


class TextVideoTag:
    """Section 7 of arXiv 2502.10248; Chinese captions go to Chinese CLIP where it is configured."""

    column: ClassVar[str] = "text_video_score"

    def __init__(self, encoder: ClipEncoder, chinese: ClipEncoder | None) -> None:
        self._encoder, self._chinese = encoder, chinese

    @torch.inference_mode()
    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        scores = [0.0] * len(batch.rows)
        for encoder in dict.fromkeys(map(self._reader, batch.rows)):
            numbers = [n for n, row in enumerate(batch.rows) if self._reader(row) is encoder]
            texts = encoder.embed_texts([batch.rows[n]["caption"] for n in numbers])
            vectors = batch.image_embeddings(encoder, numbers)
            for number, text, frames in zip(numbers, texts, vectors, strict=True):
                scores[number] = (frames @ text).mean().item()
        return scores

    def _reader(self, row: Row) -> ClipEncoder:
        return self._chinese if self._chinese and row["language"] == "zh" else self._encoder
