"""A manifest of clips that a test made itself, for stages that start from a manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from megatron_video.manifest import Row, clip_id, table_from_rows, write_manifest
from megatron_video.video_io import write_mp4

FPS = 24.0


def write_clips(folder: Path, clips: Mapping[str, tuple[np.ndarray, str]]) -> Path:
    """`folder`/m.parquet of name -> (uint8 [T, H, W, 3], caption); .png names are images of one frame."""
    rows = [_row(folder / name, frames, caption) for name, (frames, caption) in clips.items()]
    write_manifest(table_from_rows(rows), folder / "m.parquet")
    return folder / "m.parquet"


def _row(path: Path, frames: np.ndarray, caption: str) -> Row:
    image = path.suffix == ".png"
    if image:
        Image.fromarray(frames[0]).save(path)
    else:
        write_mp4(path, frames, FPS, crf=4)
    content_hash = f"hash-of-{path.stem}"
    return {
        "clip_id": clip_id(content_hash, 0, len(frames)),
        "content_hash": content_hash,
        "source": str(path),
        "caption": caption,
        "language": "en",
        "is_image": image,
        "width": frames.shape[2],
        "height": frames.shape[1],
        "fps": 0.0 if image else FPS,
        "start_frame": 0,
        "end_frame": len(frames),
    }
