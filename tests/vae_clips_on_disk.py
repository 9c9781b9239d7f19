"""A manifest of four small clips, and configurations that train a tiny Video-VAE on them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_video.config_io import build_config
from megatron_video.manifest import table_from_rows, write_manifest
from megatron_video.video_io import write_mp4
from training.vae_config import VAETrainConfig

MODEL = {
    "latent_channels": 2,
    "num_res_blocks": 1,
    "encoder_multipliers": [1, 1, 1, 1],
    "decoder_channels": 32,
    "decoder_multipliers": [1, 1, 1, 1],
}
STAGES = [
    {"steps": 3, "frames": 1, "crop": 16, "batch_size": 2},
    {"steps": 3, "frames": 9, "crop": 16, "batch_size": 1, "image_share": 0.5, "image_batch_size": 2},
]


def _frames(number: int, num_frames: int) -> np.ndarray:
    frames = np.full((num_frames, 32, 32, 3), 40 + 20 * number, np.uint8)
    for t in range(num_frames):
        frames[t, 8:20, 2 + t // 2 : 14 + t // 2] = (200, 60, 40)
    return frames


def write_clips(folder: Path) -> Path:
    """Four clips of a moving square, 20 frames of 32 x 32, and their manifest."""
    rows: list[dict[str, Any]] = []
    for number in range(4):
        path = folder / f"{number}.mp4"
        write_mp4(path, _frames(number, 20), 24)
        rows.append({"clip_id": f"clip{number}", "source": str(path), "start_frame": 1, "end_frame": 20, "fps": 24.0})
    rows.append({**rows[0], "clip_id": "gone", "source": "absent.mp4", "dropped_by": "tag", "drop_reason": "test"})
    common = {"is_image": False, "width": 32, "height": 32, "border_share": 0.0, "caption": "a"}
    write_manifest(table_from_rows([{**common, **row} for row in rows]), folder / "m.parquet")
    return folder / "m.parquet"


def vae_config(manifest: Path, output: Path, **changes: Any) -> VAETrainConfig:
    """A run of a few steps; `changes` replace its fields."""
    values = {
        "manifest": str(manifest),
        "output": str(output),
        "model": MODEL,
        "buckets": ["17x32x32"],
        "stages": STAGES,
        "warmup_steps": 2,
        "learning_rate": 1e-3,
        "save_every": 2,
        **changes,
    }
    return build_config(VAETrainConfig, values, "test")
