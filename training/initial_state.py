"""What a new run takes from a checkpoint of another: its weights or their averages, its optimizer or a fresh one."""

from __future__ import annotations

from collections.abc import Sequence

from megatron.core.optimizer import MegatronOptimizer

from megatron_video.dit import VideoDiT
from training import checkpoint
from training.config import RunConfig
from training.optimizer import WrappedChunk


def take_initial_weights(run: RunConfig, chunks: Sequence[VideoDiT]) -> None:
    """Load the weights a new run starts from. To be called before the optimizer takes its fp32 copies of them.

    Raises:
        UserError: no complete checkpoint there, a model of other sizes, or no averages where they are asked for.
    """
    if run.initial_weights is None:
        return
    found = checkpoint.find_checkpoint(run.initial_weights)
    checkpoint.load_model_weights(found, list(chunks), averaged=run.initial_from_ema)


def take_initial_optimizer(run: RunConfig, model: list[WrappedChunk], optimizer: MegatronOptimizer) -> None:
    """Load the optimizer's state as well, if the run is to take it: fp32 weights, moments, and the count of updates."""
    if run.initial_weights is not None and run.initial_optimizer:
        checkpoint.load_checkpoint(checkpoint.find_checkpoint(run.initial_weights), model, optimizer)
