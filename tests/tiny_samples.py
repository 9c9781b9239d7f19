"""A made-up folder of generated videos, with their latents."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LLM_DIM

from megatron_video.shard_schema import write_null_text
from megatron_video.text import TextStates
from megatron_video.video_io import write_mp4
from training.sample_latents import latent_file, write_latent

SHAPE = (3, 4, 3, 3)  # of 17x48x48
SETTINGS = {
    "checkpoint": "step_00000001 x",
    "vae": "v",
    "text": "t",
    "fps": 8.0,
    "frames": 17,
    "height": 48,
    "width": 48,
}


def make_samples(folder: Path, scores: dict[str, list[float]], categories: dict[str, str] | None = None) -> Path:
    """A folder as `dpo generate` leaves it, whose videos are as bright as `scores` say (in [0, 1]), by prompt."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    lines, index = [], 0
    for prompt, values in scores.items():
        text = TextStates(torch.randn(5, LLM_DIM, generator=generator), torch.randn(CLIP_SLOTS, CLIP_DIM), 5, 5)
        for seed, value in enumerate(values):
            frames = np.full((17, 48, 48, 3), round(255 * value), np.uint8)
            write_mp4(folder / f"{index:05d}.mp4", frames, 8.0)
            write_latent(latent_file(folder, index), torch.randn(SHAPE, generator=generator), text)
            tags = {"category": categories[prompt]} if prompt in (categories or {}) else {}
            own = {"index": index, "prompt": prompt, "seed": seed, "noise_index": 0, "file": f"{index:05d}.mp4"}
            lines.append(tags | own)
            index += 1
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.json").write_text(json.dumps({"settings": SETTINGS, "prompts": lines}))
    write_null_text(folder, torch.randn(2, LLM_DIM), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    return folder
