"""A small CLIP with random weights in a folder, as transformers writes and reads it."""

from __future__ import annotations

import json
import string
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PICTURE = 32
WIDTH = 24


def write_tiny_clip(folder: Path, seed: int = 0) -> Path:
    """Embeddings of WIDTH numbers; letters are the tokens."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder.mkdir(parents=True, exist_ok=True)
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    text = CLIPTextConfig(
        vocab_size=len(words), max_position_embeddings=20, bos_token_id=0, eos_token_id=1, pad_token_id=1, **sizes
    )
    vision = CLIPVisionConfig(image_size=PICTURE, patch_size=PICTURE // 4, **sizes)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    # Larger than in training, or all pictures would be embedded alike.
    config.vision_config.initializer_factor = config.text_config.initializer_factor = config.initializer_factor = 4.0
    CLIPModel(config).save_pretrained(folder)
    crop = {"height": PICTURE, "width": PICTURE}
    CLIPImageProcessorPil(size={"shortest_edge": PICTURE}, crop_size=crop).save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    return folder
