"""Tiny random weights of the model tags, in the formats and under the names of the published files."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import nn
from transformers import (
    BertTokenizer,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    ChineseCLIPTextConfig,
    ChineseCLIPVisionConfig,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPTokenizer,
    CLIPVisionConfig,
)

from data_prep import ingest
from data_prep.model_tags.watermark import detector
from megatron_video.video_io import write_mp4

WIDTH = 24
IMAGE_SIZE = 32
HANZI = "红色方块圆形向上移动"


def frames_of(seed: int, count: int = 3, height: int = 40, width: int = 56) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(0, 256, (count, 5, 7, 3)).astype(np.uint8)
    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_CUBIC) for frame in noise])


def clip_folder(folder: Path, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=8,
    )  # fmt: skip
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder


def chinese_clip_folder(folder: Path) -> Path:
    torch.manual_seed(5)
    text = ChineseCLIPTextConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=20,
    )  # fmt: skip
    vision = ChineseCLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=IMAGE_SIZE,
        patch_size=8,
    )  # fmt: skip
    config = ChineseCLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    ChineseCLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    ).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *HANZI)))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def linear_state(name: str, out_features: int, in_features: int) -> dict[str, torch.Tensor]:
    scale = in_features**-0.5
    return {
        f"{name}.weight": torch.randn(out_features, in_features) * scale,
        f"{name}.bias": torch.randn(out_features) * 0.1,
    }


def layers_state(widths: list[int], positions: list[int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(len(positions))
    state = {}
    for position, (inputs, outputs) in zip(positions, pairwise(widths), strict=True):
        state |= linear_state(f"layers.{position}", outputs, inputs)
    return state


def aesthetic_state() -> dict[str, torch.Tensor]:
    return layers_state([WIDTH, 20, 12, 8, 6, 1], [0, 2, 4, 6, 7])


def nsfw_h14_state() -> dict[str, torch.Tensor]:
    return layers_state([WIDTH, 20, 22, 18, 12, 10, 6, 1], [0, 3, 6, 9, 12, 15, 16])


def nsfw_l14_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(9)
    state = {"norm.mean": torch.randn(WIDTH) * 0.1, "norm.variance": torch.rand(WIDTH) + 0.5}
    for number, (inputs, outputs) in enumerate(((WIDTH, 8), (8, 16), (16, 12), (12, 1)), start=1):
        state |= linear_state(f"linear_{number}", outputs, inputs)
    return state


def pseudo_random(count: int, seed: int) -> torch.Tensor:
    """Numbers in -1 to 1 that need no generator, so that another library's run can be repeated with them."""
    x = torch.sin(torch.arange(count, dtype=torch.float64) * 12.9898 + seed) * 43758.5453
    return 2 * (x - x.floor()) - 1


def filled_detector() -> nn.Module:
    network = detector().eval()
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if tensor.dtype == torch.int64:
            continue
        noise = pseudo_random(tensor.numel(), number).reshape(tensor.shape)
        if name.endswith("running_var"):
            value = 1 + 0.5 * noise
        elif tensor.ndim == 1:
            value = float(name.endswith("weight")) + 0.2 * noise
        else:
            value = noise * math.sqrt(6 / tensor[0].numel())
        tensor.copy_(value)
    return network


def ingested(folder: Path, clips: int = 3) -> Path:
    """Manifest of short captioned videos, in two languages."""
    (folder / "in").mkdir(parents=True)
    for number in range(clips):
        write_mp4(folder / "in" / f"{number}.mp4", frames_of(number, 10, 64, 96), fps=24, crf=4)
        (folder / "in" / f"{number}.txt").write_text("a red square" if number % 2 else "红色方块")
    ingest.run(folder / "in", folder / "1.parquet")
    return folder / "1.parquet"
