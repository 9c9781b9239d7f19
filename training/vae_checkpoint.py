"""Checkpoints of a Video-VAE run: `checkpoint/step_N/` with the VAE as `load_vae` reads it, and the optimizer's state.

`checkpoint.json` names the newest complete one, and is replaced last: a run that is killed while it saves continues
from the one before.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_video.errors import UserError
from megatron_video.vae import VideoVAE, load_vae, save_vae
from megatron_video.vae.base import BaseVideoVAE, load_base, save_base
from training.telemetry import write_json
from training.vae_config import Kind
from training.vae_ranks import Ranks
from training.vae_updater import Updater

POINTER = "checkpoint.json"
FOLDER = "checkpoint"
STATE_FILE = "run.pt"
CONFIG_FILE = "train_config.yaml"
# What may differ between a run and its continuation.
FREE_FIELDS = ("output", "log_every", "evaluate_every", "save_every", "cache_gib", "device", "evaluate_first")


@dataclass
class SavedRun:
    """A checkpoint that was found."""

    folder: Path
    state: dict[str, Any]

    def load_model(self, kind: Kind) -> VideoVAE:
        """The weights, on the CPU."""
        return load_base(self.folder) if kind == "base" else load_vae(self.folder)


def save_run(output: Path, state: dict[str, Any], vae: VideoVAE, updater: Updater, ranks: Ranks) -> None:
    """Write a checkpoint, then remove older ones; all ranks must call it.

    Args:
        output: the run's folder.
        state: plain values and tensors; `step` names the checkpoint.
        vae: the model being trained.
        updater: of the phase.
        ranks: who takes part.
    """
    folder = output / FOLDER / f"step_{state['step']:08d}"
    if ranks.leads:
        # Left half done by a life that was killed here.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    ranks.barrier()
    state = state | {"updater": updater.save(folder)}
    with updater.whole_weights():
        if ranks.leads:
            write_model(vae, folder)
    if ranks.leads:
        try:
            torch.save(state, folder / STATE_FILE)
        except (RuntimeError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / STATE_FILE} cannot be written ({reason}); the one before it stays") from None
        write_json(output / POINTER, {"folder": f"{FOLDER}/{folder.name}", "step": state["step"]})
        for older in (output / FOLDER).iterdir():
            if older != folder:
                shutil.rmtree(older)
    ranks.barrier()


def write_model(vae: VideoVAE, folder: Path) -> None:
    """Write the whole VAE for `load_vae`, or the VAE of base stages for `load_base`."""
    if isinstance(vae, BaseVideoVAE):
        save_base(vae, folder)
    else:
        save_vae(vae, folder)


def find_run(output: Path, device: torch.device) -> SavedRun | None:
    """The newest complete checkpoint.

    Raises:
        UserError: there is one, and it cannot be read.
    """
    pointer = output / POINTER
    if not pointer.is_file():
        return None
    try:
        folder = output / json.loads(pointer.read_text(encoding="utf-8"))["folder"]
        state = torch.load(folder / STATE_FILE, map_location=device, weights_only=True)
    except Exception as error:
        raise UserError(f"{pointer} names no readable checkpoint ({error}); remove it to start anew") from None
    return SavedRun(folder, state)


def refuse_other_folder(output: Path) -> None:
    """Begin a run only where it overwrites no model that is not its own.

    Raises:
        UserError: a Video-VAE lies there, and no run that made it.
    """
    if (output / "model.safetensors").exists() and not (output / CONFIG_FILE).exists():
        raise UserError(
            f"output={output} holds a Video-VAE that was not trained there and would be overwritten; name another "
            "folder (initial_weights may name this one)"
        )


def refuse_other_settings(saved: SavedRun, config: dict[str, Any], layout: str) -> None:
    """Continue only what is continued exactly.

    Raises:
        UserError: names the settings that differ.
    """
    before, now = saved.state["config"] | {"ranks": saved.state["layout"]}, config | {"ranks": layout}
    changed = [name for name in now if name not in FREE_FIELDS and name in before and before[name] != now[name]]
    if changed:
        pairs = "; ".join(f"{name}: {before[name]} there, {now[name]} now" for name in changed)
        raise UserError(
            f"{saved.folder} is of a run with other settings ({pairs}); take another output (initial_weights may name "
            "this one), or remove it"
        )
