"""How gradients become new weights: plain torch in one process, or DeepSpeed ZeRO over any number.

Both run the same forward pass and take the same steps to rounding (tests/distributed/test_vae_zero.py).
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megatron_video.errors import UserError
from megatron_video.vae import VideoVAE, sample_posterior
from megatron_video.vae.checkpoint import to_channels_last
from training.vae_config import VAETrainConfig
from training.vae_ranks import Ranks

TAG = "zero"


class Coder(nn.Module):
    """The VAE with a forward pass: code a video and decode a draw of its posterior."""

    def __init__(self, vae: VideoVAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [B, T, 3, H, W] in [-1, 1] -> decoded frames of that shape and moments [B, t, 2z, h, w], fp32."""
        moments = self.vae.encode_moments(video).float()
        return self.vae.decode(sample_posterior(moments, noise)).float(), moments


class Updater(Protocol):
    """One phase's weights and optimizer."""

    def code(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """`Coder.forward` in the run's precision, recorded for `update`."""

    def update(self, loss: Tensor, learning_rate: float) -> float:
        """Gradients of the loss, averaged over ranks and clipped, then a step; returns their norm before clipping."""

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it every rank may read all weights; all ranks must enter."""

    def save(self, folder: Path) -> dict[str, Any]:
        """Write what is this updater's own to `folder`; return what belongs into the run's file."""

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        """Continue where `save` was called."""

    def close(self) -> None:
        """Let go of the weights; the phase is over."""


class TorchUpdater:
    """AdamW in one process."""

    def __init__(self, vae: VideoVAE, config: VAETrainConfig, ranks: Ranks) -> None:
        self._vae, self._clip = vae, config.clip_grad_norm
        self._coder = Coder(to_channels_last(vae))
        self._trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self._optimizer = _adamw(self._trained, config)
        self._autocast = torch.autocast(ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16")

    def code(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        with self._autocast:
            decoded, moments = self._coder(video, noise)
        return decoded, moments

    def update(self, loss: Tensor, learning_rate: float) -> float:
        _set_rate(self._optimizer, learning_rate)
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self._trained, self._clip).item()
        if torch.isfinite(torch.tensor(norm)):
            self._optimizer.step()
        return norm

    def whole_weights(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def save(self, folder: Path) -> dict[str, Any]:
        return {"vae": self._vae.state_dict(), "optimizer": self._optimizer.state_dict()}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        self._vae.load_state_dict(state["vae"])
        self._optimizer.load_state_dict(state["optimizer"])

    def close(self) -> None:
        pass


class ZeroUpdater:
    """AdamW of torch under DeepSpeed; its own Adam would want a compiler."""

    def __init__(self, vae: VideoVAE, config: VAETrainConfig, ranks: Ranks, zero_stage: int) -> None:
        deepspeed = _import_deepspeed()
        for parameter in vae.parameters():
            # DeepSpeed cuts weights into flat buffers, and cannot send them in channels-last memory.
            parameter.data = parameter.data.contiguous()
        trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
        self._vae, self._stage, self._deepspeed = vae, zero_stage, deepspeed
        self._optimizer = _adamw(trained, config)
        self._engine, *_ = deepspeed.initialize(
            model=Coder(vae),
            optimizer=self._optimizer,
            config=_deepspeed_config(config, zero_stage),
            dist_init_required=False,
        )

    def code(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        decoded, moments = self._engine(video, noise)
        return decoded, moments

    def update(self, loss: Tensor, learning_rate: float) -> float:
        _set_rate(self._optimizer, learning_rate)
        self._engine.backward(loss)
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        if self._stage < 3:
            yield
            return
        with self._deepspeed.zero.GatheredParameters(list(self._vae.parameters())):
            yield

    def save(self, folder: Path) -> dict[str, Any]:
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        return {}

    def load(self, folder: Path, state: dict[str, Any]) -> None:
        path, _ = self._engine.load_checkpoint(str(folder), tag=TAG)
        if path is None:
            raise UserError(f"{folder} holds no DeepSpeed state; remove the run's checkpoint.json to start anew")

    def close(self) -> None:
        self._engine.destroy()


def build_updater(vae: VideoVAE, config: VAETrainConfig, ranks: Ranks) -> Updater:
    """What trains the parameters of `vae` that are not frozen.

    Raises:
        UserError: ZeRO is asked for, or needed by several ranks, and DeepSpeed is not installed.
    """
    stage = zero_stage_of(config, ranks)
    return TorchUpdater(vae, config, ranks) if stage is None else ZeroUpdater(vae, config, ranks, stage)


def zero_stage_of(config: VAETrainConfig, ranks: Ranks) -> int | None:
    """ZeRO stage of the run; None is plain torch."""
    return config.zero_stage or (2 if ranks.world > 1 else None)


def _adamw(trained: list[nn.Parameter], config: VAETrainConfig) -> torch.optim.AdamW:
    return torch.optim.AdamW(trained, betas=config.betas, weight_decay=config.weight_decay, fused=True)


def _set_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _deepspeed_config(config: VAETrainConfig, zero_stage: int) -> dict[str, Any]:
    return {
        # Bookkeeping only: every rank hands over its share of a batch at once.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.clip_grad_norm,
        "zero_optimization": {"stage": zero_stage},
        "zero_allow_untested_optimizer": True,
        "torch_autocast": {"enabled": config.precision == "bf16", "dtype": "bfloat16"},
    }


def _import_deepspeed() -> Any:
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "ZeRO, and several ranks, need DeepSpeed: pip install 'megatron-video[vae]', or train in one process"
        )
    # It tells about every bucket and every missing compiler.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Else it compiles shared-memory collectives for the CPU at the first start: a minute, and only with a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
