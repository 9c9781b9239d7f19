"""Small real models on disk for tests of sampling: text encoders, Video-VAE, and a checkpoint of a DiT for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.noise import NoiseSource
from megatron_video.parallel import ParallelConfig, destroy_parallel, initialize_parallel
from megatron_video.vae import VAEConfig, VideoVAE, save_vae
from training import build_text_encoders
from training.checkpoint import TrainState, save_checkpoint
from training.config import AdamWConfig, DataConfig, PretrainConfig, RunConfig, TrainingConfig
from training.optimizer import build_optimizer, wrap_data_parallel

LATENT_CHANNELS = 4
CAPTIONS = ["a red circle moves left", "a blue square moves up", "蓝色方块向上移动"]
MODEL = DiTConfig(
    num_layers=2,
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=LATENT_CHANNELS,
    out_channels=LATENT_CHANNELS,
    caption_channels=[64, 48],
)


def write_tiny_text_encoders(folder: Path) -> Path:
    """`folder`/text with encoders of widths 64 and 48."""
    captions = folder / "captions.txt"
    captions.write_text("\n".join(CAPTIONS), encoding="utf-8")
    build_text_encoders.main(["build", "--captions", str(captions), "--out", str(folder / "text")])
    return folder / "text"


def write_tiny_vae(folder: Path) -> Path:
    """`folder`/vae with LATENT_CHANNELS latent channels and random weights."""
    multipliers = (1, 1, 1, 1)
    config = VAEConfig(
        latent_channels=LATENT_CHANNELS,
        num_res_blocks=1,
        encoder_multipliers=multipliers,
        decoder_channels=32,
        decoder_multipliers=multipliers,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_vae(VideoVAE(config), folder / "vae")
    return folder / "vae"


def write_tiny_run(folder: Path, seed: int = 0, encoders: dict[str, str] | None = None, dit: DiTConfig = MODEL) -> Path:
    """`folder`/run with a checkpoint after step 7 of a DiT in which every parameter counts."""
    parallel = ParallelConfig()
    initialize_parallel(parallel, seed=0, device_info=device.initialize())
    try:
        chunks = build_dit(dit, parallel, torch.float32, device=torch.device("cpu"), init_seed=seed)
        _leave_no_zero(chunks[0], seed)
        model = wrap_data_parallel(chunks, parallel)
        optimizer = build_optimizer(model, AdamWConfig(), parallel)
        config = PretrainConfig(
            run=RunConfig(output_dir=str(folder / "run")),
            model=dit,
            data=DataConfig(shards=["none"]),
            training=TrainingConfig(precision="fp32"),
        )
        save_checkpoint(folder / "run", model, optimizer, TrainState(step=7, encoders=encoders or {}), config)
    finally:
        destroy_parallel()
    return folder / "run"


def write_tiny_models(folder: Path, prompts: Sequence[str]) -> Path:
    """All that sampling takes: `folder`/text, /vae, /run and prompts.txt; the folder."""
    write_tiny_text_encoders(folder)
    write_tiny_vae(folder)
    write_tiny_run(folder)
    (folder / "prompts.txt").write_text("\n".join(prompts), encoding="utf-8")
    return folder


def _leave_no_zero(model: torch.nn.Module, seed: int) -> None:
    source = NoiseSource(seed, "tests")
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(model.named_parameters())):
            fan_in = parameter.shape[-1] if parameter.dim() > 1 else 16
            parameter.add_(source.noise(0, index, parameter.shape) / fan_in**0.5)
