"""Megatron-Video: the model library (DiT, Video-VAE, text encoders, flow matching, parallel building blocks)."""

from pathlib import Path

__version__ = (Path(__file__).parent / "VERSION").read_text().strip()
