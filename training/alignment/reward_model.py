"""A reward model: a small network that learns which of two videos of one text was preferred.

Bradley-Terry (1952): the probability that the winner is preferred is the sigmoid of the difference of rewards. It sees
latents, or features of the DiT (`megatron-video dpo features`), or both, so nothing is decoded and it judges what
preference training changes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from training.alignment.feature_files import FeatureSettings

CONFIG_FILE, WEIGHTS_FILE = "reward_model.json", "reward_model.safetensors"
# There are far more features than pairs.
_DROPOUT = 0.2


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
    latents: bool = True
    """Whether it sees latents."""
    feature_size: int = 0
    """Numbers of a latent's features; 0: it sees none."""
    features: FeatureSettings | None = None
    """Those it was trained on; others mean something else."""
    feature_model: str = ""
    """Where their checkpoint lay, to tell people."""


class RewardModel(nn.Module):
    """llm [b, d_llm] and clip [b, d_clip] (means over tokens) with latents or features of the DiT -> rewards [b]."""

    feature_mean: Tensor
    feature_deviation: Tensor

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        if config.latents:
            # What changes from frame to frame is given, not left to be found.
            self.stem = nn.Conv3d(2 * config.latent_channels, width, 1)
            self.blocks = nn.ModuleList(_Block(width) for _ in range(config.layers))
        if config.feature_size:
            self.features = nn.Sequential(nn.Dropout(_DROPOUT), nn.Linear(config.feature_size, width), nn.GELU())
            self.register_buffer("feature_mean", torch.zeros(config.feature_size))
            self.register_buffer("feature_deviation", torch.ones(config.feature_size))
        self.text = nn.Linear(config.llm_dim + config.clip_dim, width)
        parts = 1 + 2 * config.latents + bool(config.feature_size)
        self.head = nn.Sequential(nn.Linear(parts * width, width), nn.GELU(), nn.Linear(width, 1))

    def set_feature_scale(self, mean: Tensor, deviation: Tensor) -> None:
        """Take the scale of the training set's features, [f] each."""
        self.feature_mean.copy_(mean)
        self.feature_deviation.copy_(deviation)

    def forward(self, latents: Tensor | None, llm: Tensor, clip: Tensor, features: Tensor | None = None) -> Tensor:
        """Rewards, fp32; their differences are log odds.

        Args:
            latents: [b, t, z, h, w], for a model that sees them.
            llm: [b, d_llm] mean over tokens, and `clip` [b, d_clip].
            features: [b, f] as `dpo features` stored them, for a model that sees them.
        """
        seen = [] if latents is None else [self._see_latents(latents)]
        if features is not None:
            # Channels of a DiT differ in scale by orders of magnitude.
            seen.append(self.features((features - self.feature_mean) / (self.feature_deviation + 1e-6)))
        text = self.text(torch.cat([llm, clip], dim=1))
        rewards: Tensor = self.head(torch.cat([*seen, text], dim=1))[:, 0]
        return rewards

    def _see_latents(self, latents: Tensor) -> Tensor:
        """[b, 2 * width]: mean and deviation over all places."""
        steps = torch.diff(latents, dim=1, prepend=latents[:, :1])
        # [b, t, 2z, h, w] -> [b, 2z, t, h, w]
        hidden = self.stem(torch.cat([latents, steps], dim=2).transpose(1, 2))
        for block in self.blocks:
            hidden = block(hidden)
        places = hidden.flatten(2)
        return torch.cat([places.mean(-1), places.std(-1, correction=0)], dim=1)


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
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(folder / WEIGHTS_FILE, save(weights))
    values = {"config": asdict(model.config), "trained": dict(record)}
    write_atomically(folder / CONFIG_FILE, (json.dumps(values, indent=1) + "\n").encode())


def load_reward_model(folder: Path) -> RewardModel:
    """The model in eval mode, on the CPU.

    Raises:
        UserError: no reward model there, or weights that do not fit.
    """
    path = folder / CONFIG_FILE
    try:
        values = _read(folder)["config"]
        if values.get("features") is not None:
            values["features"] = FeatureSettings.from_values(values["features"])
        config = RewardModelConfig(**values)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    model = RewardModel(config)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder / WEIGHTS_FILE} does not fit {path}: {error}") from None
    return model.eval()


def read_record(folder: Path) -> dict[str, Any]:
    """How a model was trained, as `save_reward_model` was told.

    Raises:
        UserError: no reward model there.
    """
    record: dict[str, Any] = _read(folder).get("trained", {})
    return record


def _read(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise UserError(
            f"{folder}: no {CONFIG_FILE} there; `megatron-video dpo reward` trains a reward model"
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return values
