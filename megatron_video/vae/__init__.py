"""Video-VAE of Step-Video-T2V: 17 frames become 3 latent frames at 1/16 height and width."""

from megatron_video.vae.autoencoder import VideoVAE, sample_posterior
from megatron_video.vae.checkpoint import load_vae, save_vae
from megatron_video.vae.config import VAEConfig

__all__ = ["VAEConfig", "VideoVAE", "load_vae", "sample_posterior", "save_vae"]
