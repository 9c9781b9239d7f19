"""The video diffusion transformer on megatron-core."""

from megatron_video.dit.build import build_dit, transformer_config
from megatron_video.dit.config import DiTConfig
from megatron_video.dit.model import VideoDiT

__all__ = ["DiTConfig", "VideoDiT", "build_dit", "transformer_config"]
