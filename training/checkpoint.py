"""Saving, loading and reading of checkpoints; where they lie is in checkpoint_folders, their files in checkpoint_files.

A checkpoint is a megatron-core distributed checkpoint (torch_dist: any layout loads it) with the resolved `config.yaml`
and `train_state.json`, which lists the other files with their sizes and checksums.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_attr_wrapped_model
from torch.distributed.checkpoint import FileSystemReader

from megatron_video.config_io import build_config, config_to_dict
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_files import CONFIG_FILE, WRITTEN, read_state_values
from training.checkpoint_folders import agree_on_newest as agree_on_newest
from training.checkpoint_folders import find_checkpoint as find_checkpoint
from training.checkpoint_folders import newest_checkpoint as newest_checkpoint
from training.checkpoint_folders import step_folder as step_folder
from training.checkpoint_saver import CheckpointSaver
from training.checkpoint_state import (
    load_chunks,
    publish_pending_parameters,
    savable,
    sharded_chunks,
    sharded_state,
    under_ema_names,
    without_absent_objects,
)
from training.ema import EMA
from training.optimizer_state import OPTIMIZER_PREFIX, load_optimizer_state

# Key of config.yaml under which the sizes of the trained model stand, and those of converted checkpoints of others.
MODEL_SECTION = "model"
OTHER_SECTIONS = {"vae": "Video-VAE", "clip": "CLIP text encoder", "step_llm": "Step-LLM text encoder"}


@dataclass
class TrainState:
    """Where the run stands; with the weights and the optimizer, all that a resume needs."""

    step: int = 0
    """Optimizer steps done (refused ones count: their data was consumed)."""
    refused_steps: int = 0
    """Steps whose update was refused for a non-finite loss or gradient."""
    refused_in_a_row: int = 0
    """Of which the last ones without a good step between them."""
    usual_steps: list[list[float]] = field(default_factory=list)
    """Loss and gradient norm of the last steps that were no spikes, where spikes are looked for."""
    spikes_in_a_row: int = 0
    """Last steps that were all spikes."""
    rollbacks: list[int] = field(default_factory=list)
    """Steps after which the run went back behind a spike."""
    skipped_data: list[list[int]] = field(default_factory=list)
    """Windows [first, end) of data steps that are left out."""
    corrupt_samples: int = 0
    """Samples that could not be read and were left out, all replicas together."""
    averages_weights: bool = False
    """Whether the checkpoint holds an exponential moving average of the weights."""
    consumed_samples: dict[str, int] = field(default_factory=dict)
    """Samples drawn from every bucket so far."""
    data_plan: dict[str, Any] = field(default_factory=dict)
    """What the order of the data depends on; a resume with another plan is refused."""
    encoders: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the encoders that the shards were made with, "vae" and "text"."""


def save_checkpoint(
    run_dir: Path,
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    state: TrainState,
    config: Any,
    keep: int = 0,
    ema: EMA | None = None,
) -> Path:
    """Write a checkpoint from all ranks, publish it, and delete all but the newest `keep` (0: none is deleted).

    Training waits for all of it; a run saves through its CheckpointSaver.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: on all ranks; it could not be written.
    """
    saver = CheckpointSaver(run_dir, CheckpointConfig(asynchronous=False), keep)
    return saver.save(model, optimizer, state, config, ema)


def load_checkpoint(
    checkpoint: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, ema: EMA | None = None
) -> TrainState:
    """Load weights, optimizer and averages of a checkpoint written in any layout, and return where it stood.

    Averages that the checkpoint does not hold start from its weights. Works on a fresh model and on one that
    has trained, which so goes back to the checkpoint; a save under way has its own copy and is not disturbed.

    Raises:
        UserError: the checkpoint holds no optimizer state.
    """
    check_has_optimizer(checkpoint)
    state = read_state(checkpoint)
    stored_ema = ema if state.averages_weights else None
    # In a run that goes back, other ranks' part of the last update may still be on its way.
    publish_pending_parameters(model)
    # Describes what this rank needs; megatron-core reads just that, from whatever layout wrote it.
    sharded = sharded_state(model, optimizer, is_loading=True, ema=stored_ema)
    loaded = dist_checkpointing.load(sharded, str(checkpoint))
    load_chunks([savable(chunk) for chunk in model], loaded)
    load_optimizer_state(optimizer, loaded["optimizer"], loaded["optimizer updates"], stored_ema)
    if ema is not None and stored_ema is None:
        ema.restart()
    return state


def load_model_weights(checkpoint: Path, model_chunks: list[Any], averaged: bool = False) -> None:
    """Load only the weights, into a model of any layout (bare chunks or wrapped for data parallelism).

    Args:
        checkpoint: folder of one checkpoint.
        model_chunks: this rank's modules.
        averaged: load the exponential moving average instead of the trained weights.

    Raises:
        UserError: the checkpoint's model has other sizes, or it holds no averages.
    """
    # Wrapped or bare: only VideoDiT itself knows its tensors.
    chunks = [savable(chunk) for chunk in model_chunks]
    check_same_model(checkpoint, get_attr_wrapped_model(chunks[0], "dit_config"))
    check_averages(checkpoint, averaged)
    sharded = sharded_chunks(chunks)
    if averaged:
        sharded = {name: under_ema_names(values) for name, values in sharded.items()}
    else:
        # Converted and averaged checkpoints have no settings of FP8 beside the weights; those start anew.
        stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
        sharded = {name: without_absent_objects(values, stored) for name, values in sharded.items()}
    load_chunks(chunks, dist_checkpointing.load(sharded, str(checkpoint)))


def check_averages(checkpoint: Path, wanted: bool) -> None:
    """Refuse averaged weights where there are none.

    Raises:
        UserError: they are wanted, and the checkpoint holds none.
    """
    if wanted and not read_state(checkpoint).averages_weights:
        raise UserError(f"{checkpoint} holds no averaged weights; train with ema.decay, or load the trained ones")


def read_state(checkpoint: Path) -> TrainState:
    """The training state stored in a checkpoint."""
    values, _ = read_state_values(checkpoint)
    return TrainState(**{name: value for name, value in values.items() if name != WRITTEN})


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The resolved configuration stored in a checkpoint, as plain values."""
    values: dict[str, Any] = yaml.safe_load((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    return values


def read_model_config(checkpoint: str | Path) -> DiTConfig:
    """Sizes of the DiT stored in a checkpoint.

    Raises:
        UserError: it holds another model.
    """
    checkpoint = Path(checkpoint)
    return build_config(DiTConfig, _model_values(checkpoint), origin=str(checkpoint / CONFIG_FILE))


def _model_values(checkpoint: Path) -> dict[str, Any]:
    values = read_config(checkpoint)
    if MODEL_SECTION not in values:
        others = [title for section, title in OTHER_SECTIONS.items() if section in values]
        raise UserError(
            f"{checkpoint} holds {'a ' + others[0] if others else 'no model'} and not a video DiT "
            f"({CONFIG_FILE} has no section {MODEL_SECTION!r}); give a checkpoint of the DiT"
        )
    model: dict[str, Any] = values[MODEL_SECTION]
    return model


def check_has_optimizer(checkpoint: Path) -> None:
    """Refuse to continue from a checkpoint of weights alone.

    Raises:
        UserError: it was pruned, converted or averaged.
    """
    stored = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    if not any(name.startswith(OPTIMIZER_PREFIX) for name in stored):
        raise UserError(
            f"{checkpoint} holds no optimizer state, so no run can continue from it: `megatron-video ckpt prune` left "
            "it out, or the weights were converted or averaged. Move it away to continue from an older checkpoint, or "
            f"start another run.output_dir with run.initial_weights={checkpoint} and a fresh optimizer"
        )


def check_same_model(checkpoint: Path, model: DiTConfig) -> None:
    """Refuse weights of a model of other sizes.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    # Loading would fail too, but with tensor shapes instead of field names. Fields that are newer than the checkpoint
    # have their defaults there.
    stored = config_to_dict(read_model_config(checkpoint))
    _refuse_differences(checkpoint, "model", stored, config_to_dict(model))


def check_same_data_plan(checkpoint: Path, plan: dict[str, Any]) -> None:
    """Refuse to continue with other data or another order of it, which would repeat and drop samples.

    Raises:
        UserError: naming every property that differs, with both values.
    """
    _refuse_differences(checkpoint, "data plan", read_state(checkpoint).data_plan, plan)


def _refuse_differences(checkpoint: Path, what: str, stored: dict[str, Any], ours: dict[str, Any]) -> None:
    names = sorted({*stored, *ours})
    lines = [
        f"{name}: {stored.get(name)} there, {ours.get(name)} here"
        for name in names
        if stored.get(name) != ours.get(name)
    ]
    if lines:
        raise UserError(
            f"the {what} of {checkpoint} differs from this configuration: "
            + "; ".join(lines)
            + ". Restore these values, or start another run.output_dir (run.initial_weights can take the weights)"
        )
