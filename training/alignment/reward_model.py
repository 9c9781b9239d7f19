"""A reward model: a small network over latents and text that learns which of two videos was preferred.

Bradley-Terry (1952): the probability that the winner is preferred is the sigmoid of the difference of rewards. It sees
latents, so nothing is decoded and it judges what preference training changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically

CONFIG_FILE, WEIGHTS_FILE = "reward_model.json", "reward_model.safetensors"


@dataclass(frozen=True)
class RewardModelConfig:
    """Sizes, and what the model may be used with."""

    latent_channels: int
    llm_dim: int
    clip_dim: int
    vae_fingerprint: str
    """Latents of another Video-VAE are another space."""
    text_fingerprint: str
    width: int = 48
    layers: int = 3


class RewardModel(nn.Module):
    """latents [b, t, z, h, w], llm [b, d_llm] and clip [b, d_clip] (means over tokens) -> rewards [b]."""

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        # What changes from frame to frame is given, not left to be found.
        self.stem = nn.Conv3d(2 * config.latent_channels, width, 1)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(config.layers))
        self.text = nn.Linear(config.llm_dim + config.clip_dim, width)
        self.head = nn.Sequential(nn.Linear(3 * width, width), nn.GELU(), nn.Linear(width, 1))

    def forward(self, latents: Tensor, llm: Tensor, clip: Tensor) -> Tensor:
        """Rewards, fp32; their differences are log odds."""
        steps = torch.diff(latents, dim=1, prepend=latents[:, :1])
        # [b, t, 2z, h, w] -> [b, 2z, t, h, w]
        hidden = self.stem(torch.cat([latents, steps], dim=2).transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        places = hidden.flatten(2)
        pooled = torch.cat([places.mean(-1), places.std(-1, correction=0)], dim=1)
        text = self.text(torch.cat([llm, clip], dim=1))
        rewards: Tensor = self.head(torch.cat([pooled, text], dim=1))[:, 0]
        return rewards


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, width)
        self.conv = nn.Conv3d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor) -> Tensor:
        update: Tensor = nn.functional.gelu(self.conv(self.norm(hidden)))
        return hidden + update


def save_reward_model(model: RewardModel, folder: Path, record: Mapping[str, object]) -> None:
    """Write weights, sizes and the record of how it was trained; the sizes come last, and make it complete."""
    folder.mkdir(parents=True, exist_ok=True)
    with appearing(folder / WEIGHTS_FILE) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, temporary)
    values = {"config": asdict(model.config), "trained": dict(record)}
    write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=1) + "\n").encode())


def load_reward_model(folder: Path) -> RewardModel:
    """The model in eval mode, on the CPU.

    Raises:
        UserError: no reward model there, or weights that do not fit.
    """
    path = folder / CONFIG_FILE
    try:
        config = RewardModelConfig(**json.loads(path.read_text(encoding="utf-8"))["config"])
    except OSError:
        raise UserError(
            f"{folder}: no {CONFIG_FILE} there; `megatron-video dpo reward` trains a reward model"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    model = RewardModel(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit {path}: {error}") from None
    return model.eval()
