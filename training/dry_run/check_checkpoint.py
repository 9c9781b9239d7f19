"""The checkpoint that a run would start from: whole, of this model, and with every tensor that its ranks ask for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_video.errors import UserError
from training import checkpoint
from training.config import PretrainConfig
from training.dry_run.findings import Findings
from training.dry_run.job_views import JobViews
from training.dry_run.rank_view import Sized
from training.optimizer_state import EMA_PREFIX

CHECK = "checkpoint"
_SHOWN = 5


@dataclass(frozen=True)
class Start:
    """Where a run would begin."""

    origin: str
    """In words."""
    folder: Path | None
    """The checkpoint that is read; None: random weights, or a checkpoint that is still to be made."""
    step: int = 0
    """Steps done."""


def check_start(
    config: PretrainConfig,
    views: JobViews | None,
    identity: Mapping[str, Any] | None,
    findings: Findings,
    made_before: bool = False,
) -> Start:
    """Look at the newest checkpoint of the run, or at that of run.initial_weights.

    Args:
        config: of the run.
        views: with the tensors that its ranks ask for; None: not known.
        identity: of its data; None: not known.
        findings: where problems go.
        made_before: run.initial_weights is a stage that this job runs first.
    """
    start = Start("not known", None)
    with findings.check(CHECK):
        start = _find(config, made_before)
    if start.folder is None:
        return start
    if start.step >= config.training.steps:
        findings.note(f"{start.folder} is of step {start.step} of {config.training.steps}: the run would end at once")
    with findings.check(CHECK):
        checkpoint.check_same_model(start.folder, config.model)
        if views is not None:
            with findings.check(CHECK):
                check_tensors(start.folder, _asked(config, views, start))
    if _continues(config, start):
        with findings.check(CHECK):
            checkpoint.check_has_optimizer(start.folder)
        if identity is not None:
            with findings.check(CHECK):
                checkpoint.check_same_data_plan(start.folder, dict(identity))
    return start


def check_tensors(folder: Path, wanted: Mapping[str, Sized]) -> None:
    """Compare a checkpoint's list of tensors with those wanted; how it is cut does not matter.

    Raises:
        UserError: naming tensors that are missing, of another shape, or not whole.
    """
    stored = _stored(folder)
    missing = [name for name in wanted if name not in stored]
    wrong = [fault for name in wanted.keys() - set(missing) if (fault := _fault(name, stored[name], wanted[name]))]
    faults = [f"{name} is missing" for name in sorted(missing)] + sorted(wrong)
    if faults:
        more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise UserError(
            f"{folder}: {len(faults)} of the {len(wanted)} tensors that the ranks would ask for: "
            f"{'; '.join(faults[:_SHOWN])}{more}. Take another checkpoint, or start with other run.initial_weights"
        )


def _find(config: PretrainConfig, made_before: bool) -> Start:
    folders = Path(config.run.output_dir) / "checkpoints"
    found = checkpoint.newest_checkpoint(folders, older_if_damaged=config.checkpoint.on_damage == "older")
    if found is not None:
        step = checkpoint.read_state(found).step
        return Start(f"continues from {found}, step {step}", found, step)
    origin = config.run.initial_weights
    if origin is None:
        return Start("random weights", None)
    if made_before:
        return Start(f"weights of {origin}, which a stage before it makes", None)
    folder = checkpoint.find_checkpoint(origin)
    what = "averaged weights" if config.run.initial_from_ema else "weights"
    both = f"{what} and optimizer" if config.run.initial_optimizer else what
    if config.run.initial_from_ema and not checkpoint.read_state(folder).averages_weights:
        raise UserError(f"{folder} holds no averaged weights, and run.initial_from_ema=true asks for them")
    return Start(f"{both} of {folder}", folder)


def _continues(config: PretrainConfig, start: Start) -> bool:
    """Whether the optimizer is read too."""
    own = start.folder is not None and start.folder.is_relative_to(config.run.output_dir)
    return own or config.run.initial_optimizer


def _asked(config: PretrainConfig, views: JobViews, start: Start) -> dict[str, Sized]:
    """Tensors by their names in that checkpoint."""
    assert start.folder is not None
    averages = {f"{EMA_PREFIX}.{name}": sized for name, sized in views.stored.items()}
    if not _continues(config, start):
        return averages if config.run.initial_from_ema else views.stored
    asked = views.stored_with_optimizer
    # Averages that are not there start from the weights.
    if checkpoint.read_state(start.folder).averages_weights:
        return asked
    return {name: sized for name, sized in asked.items() if name not in averages}


def _stored(folder: Path) -> Mapping[str, Any]:
    try:
        stored: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    except Exception as error:  # a pickle that is not whole raises whatever its bytes say
        raise UserError(f"{folder}: its list of tensors cannot be read ({type(error).__name__}: {error})") from None
    return stored


def _fault(name: str, found: Any, wanted: Sized) -> str | None:
    if not isinstance(found, TensorStorageMetadata):
        return f"{name} is no tensor there"
    if tuple(found.size) != wanted.shape:
        return f"{name} is {tuple(found.size)} there, {wanted.shape} here"
    held = sum(math.prod(piece.sizes) for piece in found.chunks)
    return None if held == wanted.elements else f"{name} has {held:,} of its {wanted.elements:,} elements"
