"""The models of a run's phases: where their weights come from, and what of them is trained."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megatron_video.errors import UserError
from megatron_video.vae import VideoVAE, load_vae
from megatron_video.vae.base import BASE_CONFIG_FILE, BaseVideoVAE, grow, load_base, part_of
from megatron_video.vae.checkpoint import check_weights
from megatron_video.vae.initialisation import initialise
from training.vae_config import Kind, Trains, VAETrainConfig

TRAINED_PARTS: dict[Trains, tuple[str, ...]] = {
    "dual_path": ("dual_path",),
    "middle": ("dual_path", "middle"),
    "all": ("dual_path", "middle", "backbone"),
}


def first_model(config: VAETrainConfig, kind: Kind) -> VideoVAE:
    """A model with the weights a run starts from, on the CPU.

    Raises:
        UserError: `initial_weights` cannot be read, or does not fit the model and the first stage.
    """
    vae = _new_model(config, kind)
    if config.initial_weights is None:
        return vae
    path = Path(config.initial_weights)
    if (path / BASE_CONFIG_FILE).is_file():
        _start_from_base(load_base(path), vae, path)
    elif kind == "base":
        raise UserError(f"initial_weights={path} is a whole Video-VAE; a first stage of kind=base needs a base VAE")
    else:
        weights = load_vae(path).state_dict()
        check_weights(vae, weights, str(path))
        vae.load_state_dict(weights)
    return vae


def next_model(config: VAETrainConfig, kind: Kind, before: Kind, weights: dict[str, Tensor]) -> VideoVAE:
    """A model with the weights of the phase before; the dual-path modules are new where that had none."""
    vae = _new_model(config, kind)
    if kind == before:
        vae.load_state_dict(weights)
    else:
        grow(weights, vae)
    return vae


def freeze(vae: VideoVAE, kind: Kind, trains: Trains) -> None:
    """Let only the phase's parts be trained."""
    parts = TRAINED_PARTS["all" if kind == "base" else trains]
    for name, parameter in vae.named_parameters():
        parameter.requires_grad_(kind == "base" or part_of(name) in parts)


def whole_copy(vae: VideoVAE) -> dict[str, Tensor]:
    """The weights on the CPU, apart from the model's own."""
    return {name: weight.detach().to("cpu", copy=True) for name, weight in vae.state_dict().items()}


def bare_model(config: VAETrainConfig, kind: Kind) -> VideoVAE:
    """A model whose weights nobody has set."""
    return VideoVAE(config.model) if kind == "dual_path" else BaseVideoVAE(config.model, config.base_latent_channels)


def _new_model(config: VAETrainConfig, kind: Kind) -> VideoVAE:
    vae = bare_model(config, kind)
    initialise(vae, config.seed)
    return vae


def _start_from_base(base: BaseVideoVAE, vae: VideoVAE, path: Path) -> None:
    if isinstance(vae, BaseVideoVAE):
        check_weights(vae, base.state_dict(), str(path))
        vae.load_state_dict(base.state_dict())
    else:
        grow(base.state_dict(), vae)
