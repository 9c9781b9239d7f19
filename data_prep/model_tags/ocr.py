"""Share of the picture under text that OCR finds and can read: RapidOCR on local ONNX files.

RapidOCR (Apache-2.0, released monthly) runs the PP-OCR networks on onnxruntime; PaddleOCR itself would bring
PaddlePaddle and a second OpenCV build.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np
import torch

from data_prep.model_tags.base import TagBatch
from megatron_video.errors import UserError


class OcrTag:
    """Mean over the frames of the union of text boxes, as a share of the picture."""

    column: ClassVar[str] = "ocr_area"

    def __init__(
        self, detection: Path, recognition: Path, keys: Path | None, min_score: float, device: torch.device
    ) -> None:
        """Load the engine.

        Raises:
            UserError: RapidOCR or onnxruntime is not installed, or a file is no network that they can run.
        """
        self._engine = _engine(detection, recognition, keys, min_score, device)
        self._files = f"{detection}, {recognition}"

    def score(self, batch: TagBatch) -> list[float]:
        """One number a clip."""
        return [float(np.mean([self._share(frame) for frame in clip])) for clip in batch.frames]

    def _share(self, frame: np.ndarray) -> float:
        # RapidOCR takes OpenCV's colour order.
        found = self._engine(np.ascontiguousarray(frame[..., ::-1]), use_cls=False)
        boxes = found.boxes if found.boxes is not None else []
        return box_share(boxes, frame.shape[0], frame.shape[1])


def box_share(boxes: Sequence[np.ndarray], height: int, width: int) -> float:
    """Area of the union of quadrilaterals, float [4, 2] of (x, y), as a share of the picture."""
    mask = np.zeros((height, width), np.uint8)
    for box in boxes:
        # One by one: fillPoly on all at once would leave overlaps empty.
        cv2.fillPoly(mask, [np.rint(np.asarray(box)).astype(np.int32)], 1)
    return float(mask.mean())


def _engine(detection: Path, recognition: Path, keys: Path | None, min_score: float, device: torch.device) -> Any:
    try:
        import onnxruntime
        from rapidocr import RapidOCR
    except ImportError as error:
        raise UserError(
            f"ocr needs RapidOCR and onnxruntime ({error}): pip install 'megatron-video[data]', or "
            "`ocr: {skip: true}`"
        ) from None
    cuda = device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    parameters = {
        "Global.use_cls": False,
        "Global.text_score": min_score,
        "Global.log_level": "critical",
        "Det.model_path": str(detection),
        "Rec.model_path": str(recognition),
        "Rec.rec_keys_path": str(keys) if keys else None,
        "EngineConfig.onnxruntime.use_cuda": cuda,
        "EngineConfig.onnxruntime.cuda_ep_cfg.device_id": device.index or 0,
    }
    engine = RapidOCR(params=parameters)
    try:
        # It loads the files at the first picture; one now, so that a wrong file is an error and no dropped clip.
        engine._load_det_model()
        engine._load_rec_model()
    except Exception as error:
        raise UserError(f"ocr: {detection} or {recognition} cannot be run by RapidOCR: {error}") from None
    return engine
