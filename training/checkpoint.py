"""Checkpoints of a run: `<run>/checkpoints/step_00000100/`, and `latest`, which names the newest complete one.

A checkpoint is a megatron-core distributed checkpoint (torch_dist: any layout loads it) with the resolved `config.yaml`
and `train_state.json`. It is written under a name ending in `.writing` and renamed when all of it is on disk;
`train_state.json` lists the other files with their sizes, so that a folder that lost a part is noticed.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from megatron.core.distributed import DistributedDataParallel
from megatron.core.fp8_utils import is_float8tensor
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.utils import get_attr_wrapped_model

from megatron_video.config_io import build_config, config_to_dict, save_config
from megatron_video.dit import DiTConfig, VideoDiT
from megatron_video.errors import UserError
from megatron_video.fp8 import set_parameter
from training.ema import EMA
from training.fsdp import FullyShardedDiT
from training.optimizer_state import EMA_PREFIX, count_updates, load_optimizer_state, sharded_optimizer_state

# Written once here; find_fault and the readers below go by the same names.
STATE_FILE, CONFIG_FILE, LATEST_FILE = "train_state.json", "config.yaml", "latest"
WRITING_SUFFIX = ".writing"
_STEP_FOLDER = re.compile(r"step_(\d{8})")
_log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where the run stands; with the weights and the optimizer, all that a resume needs."""

    step: int = 0
    """Optimizer steps done (refused ones count: their data was consumed)."""
    refused_steps: int = 0
    """Steps whose update was refused for a non-finite loss or gradient."""
    refused_in_a_row: int = 0
    """Of which the last ones without a good step between them."""
    averages_weights: bool = False
    """Whether the checkpoint holds an exponential moving average of the weights."""
    consumed_samples: dict[str, int] = field(default_factory=dict)
    """Samples drawn from every bucket so far."""
    data_plan: dict[str, Any] = field(default_factory=dict)
    """What the order of the data depends on; a resume with another plan is refused."""


def step_folder(run_dir: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run_dir / "checkpoints" / f"step_{step:08d}"


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

    Returns:
        The checkpoint's folder.
    """
    target = step_folder(run_dir, state.step)
    writing = target.with_name(target.name + WRITING_SUFFIX)
    leads = torch.distributed.get_rank() == 0
    # Left over from a save that was killed.
    if leads:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir(parents=True)
    # No rank may write before the folder is there.
    torch.distributed.barrier()
    _publish_pending_parameters(model)
    _collect_write_results_in_process()
    state.averages_weights = ema is not None
    dist_checkpointing.save(_sharded_state(model, optimizer, is_loading=False, ema=ema), str(writing))
    if leads:
        # After all ranks have written: its presence in `files` and the rename make the folder a checkpoint.
        save_config(config, writing / CONFIG_FILE)
        _write_state(writing, state)
        _publish(writing, target)
        _prune(target.parent, keep)
    torch.distributed.barrier()
    return target


def write_weights(folder: Path, tensors: dict[str, ShardedTensor], model: DiTConfig) -> None:
    """Write weights alone into the new `folder`, as a complete checkpoint of step 0; this process is the only rank."""
    folder.mkdir(parents=True)
    _collect_write_results_in_process()
    dist_checkpointing.save({"model": tensors}, str(folder))
    values = yaml.safe_dump({"model": config_to_dict(model)}, sort_keys=False)
    (folder / CONFIG_FILE).write_text(values, encoding="utf-8")
    _write_state(folder, TrainState())


def load_checkpoint(
    checkpoint: Path, model: list[DistributedDataParallel], optimizer: MegatronOptimizer, ema: EMA | None = None
) -> TrainState:
    """Load weights, optimizer and averages of a checkpoint written in any layout, and return where it stood.

    Averages that the checkpoint does not hold start from its weights.
    """
    state = read_state(checkpoint)
    stored_ema = ema if state.averages_weights else None
    # Describes what this rank needs; megatron-core reads just that, from whatever layout wrote it.
    sharded = _sharded_state(model, optimizer, is_loading=True, ema=stored_ema)
    loaded = dist_checkpointing.load(sharded, str(checkpoint))
    _load_chunks([_savable(chunk) for chunk in model], loaded)
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
    chunks = [_savable(chunk) for chunk in model_chunks]
    check_same_model(checkpoint, get_attr_wrapped_model(chunks[0], "dit_config"))
    if averaged and not read_state(checkpoint).averages_weights:
        raise UserError(f"{checkpoint} holds no averaged weights; train with ema.decay, or load the trained ones")
    sharded = _sharded_chunks(chunks)
    if averaged:
        sharded = {name: _under_ema_names(values) for name, values in sharded.items()}
    _load_chunks(chunks, dist_checkpointing.load(sharded, str(checkpoint)))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` means: itself, or the newest complete one of a run or checkpoints folder.

    Raises:
        UserError: nothing there, a half-written checkpoint, or a folder that is no checkpoint.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run folder or one of its checkpoints/step_... folders")
    if (path / STATE_FILE).exists() or path.name.startswith("step_"):
        # A path that names one checkpoint is never replaced by another.
        fault = find_fault(path)
        if fault:
            raise UserError(f"{path} is not a complete checkpoint: {fault}")
        return path
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    newest = newest_checkpoint(root)
    if newest is None:
        raise UserError(f"{path} holds no complete checkpoint (looked for {root}/step_00000000 and the like)")
    return newest


def newest_checkpoint(checkpoints_dir: Path) -> Path | None:
    """The newest complete checkpoint of a folder, or None; every newer one that is not complete is reported."""
    # Step numbers are zero-padded, so order by name is order by step.
    for folder in sorted(checkpoints_dir.glob("step_*"), reverse=True):
        fault = find_fault(folder)
        if fault is None:
            return folder
        _log.warning("ignoring %s: %s", folder, fault)
    return None


def agree_on_newest(checkpoints_dir: Path) -> Path | None:
    """`newest_checkpoint` as rank 0 sees it, on all ranks: file systems show new files to some nodes late."""
    found = [newest_checkpoint(checkpoints_dir) if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    return found[0]


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder, or None: a half-written name, files that lack or differ in size."""
    # Cheap checks only, no bytes are read: this runs at every start on folders of many terabytes.
    if folder.name.endswith(WRITING_SUFFIX):
        return "its writing was interrupted; delete it"
    if not (folder / STATE_FILE).is_file():
        return f"it has no {STATE_FILE}, so it was not written to its end or is no checkpoint of this program"
    try:
        listed: dict[str, int] = json.loads((folder / STATE_FILE).read_text())["files"]
    except (ValueError, KeyError, TypeError):
        return f"its {STATE_FILE} is damaged"
    for name, size in listed.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        found = (folder / name).stat().st_size
        if found != size:
            return f"{name} has {found} bytes, written were {size}"
    return None


def read_state(checkpoint: Path) -> TrainState:
    """The training state stored in a checkpoint."""
    values = json.loads((checkpoint / STATE_FILE).read_text())
    return TrainState(**{name: value for name, value in values.items() if name != "files"})


def read_config(checkpoint: Path) -> dict[str, Any]:
    """The resolved configuration stored in a checkpoint, as plain values."""
    values: dict[str, Any] = yaml.safe_load((checkpoint / CONFIG_FILE).read_text(encoding="utf-8"))
    return values


def read_model_config(checkpoint: str | Path) -> DiTConfig:
    """Sizes of the model stored in a checkpoint."""
    checkpoint = Path(checkpoint)
    return build_config(DiTConfig, read_config(checkpoint)["model"], origin=str(checkpoint / CONFIG_FILE))


def check_same_model(checkpoint: Path, model: DiTConfig) -> None:
    """Refuse weights of a model of other sizes.

    Raises:
        UserError: naming every field that differs, with both values.
    """
    # Loading would fail too, but with tensor shapes instead of field names.
    _refuse_differences(checkpoint, "model", read_config(checkpoint)["model"], config_to_dict(model))


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


def _chunk_names(model: list[Any]) -> list[str]:
    return ["model"] if len(model) == 1 else [f"model{index}" for index in range(len(model))]


def _savable(chunk: Any) -> VideoDiT | FullyShardedDiT:
    """Whoever knows a chunk's tensors: the model itself, bare or wrapped, or what cut them."""
    return chunk if isinstance(chunk, FullyShardedDiT) else getattr(chunk, "module", chunk)


def _sharded_chunks(chunks: list[VideoDiT | FullyShardedDiT]) -> dict[str, Any]:
    """The chunks' tensors and objects by the chunk's name; an object that two chunks of a rank share is listed once.

    megatron-core reads one such object for a rank, however many places ask for it.
    """
    state: dict[str, Any] = {}
    seen: set[str] = set()
    for chunk, name in zip(chunks, _chunk_names(chunks), strict=True):
        values = chunk.sharded_rows() if isinstance(chunk, FullyShardedDiT) else chunk.sharded_state_dict()
        objects = {key: value.unique_key for key, value in values.items() if isinstance(value, ShardedObject)}
        state[name] = {key: value for key, value in values.items() if objects.get(key) not in seen}
        seen.update(objects.values())
    return state


def _under_ema_names(values: dict[str, Any]) -> dict[str, Any]:
    """Ask for the averages of the tensors, which are fp32, instead of the tensors."""
    return {
        name: replace(value, key=f"{EMA_PREFIX}.{value.key}", data=value.data.detach().float(), dtype=torch.float32)
        for name, value in values.items()
        if isinstance(value, ShardedTensor)
    }


def _load_chunks(chunks: list[VideoDiT | FullyShardedDiT], loaded: dict[str, Any]) -> None:
    for chunk, name in zip(chunks, _chunk_names(chunks), strict=True):
        if isinstance(chunk, FullyShardedDiT):
            chunk.load_rows(loaded[name])
            continue
        missing, unexpected = chunk.load_state_dict(loaded[name], strict=False)
        lost = [key for key in missing if not key.endswith("_extra_state")]
        if lost or unexpected:
            raise RuntimeError(f"{name}: not in the checkpoint: {lost}; only in the checkpoint: {unexpected}")
        for key, parameter in chunk.named_parameters():
            if is_float8tensor(parameter):
                set_parameter(parameter, loaded[name][key])


def _sharded_state(
    model: list[DistributedDataParallel], optimizer: MegatronOptimizer, is_loading: bool, ema: EMA | None
) -> dict[str, Any]:
    state = _sharded_chunks([_savable(chunk) for chunk in model])
    state["optimizer"] = sharded_optimizer_state(optimizer, dict(state), is_loading, ema)
    if not is_loading:
        state["optimizer updates"] = count_updates(optimizer)
        # Readers without Transformer Engine must be able to load what is kept in FP8.
        force_all_tensors_to_non_fp8(state)
    return state


def _publish_pending_parameters(model: list[DistributedDataParallel]) -> None:
    """With overlapped gathers the last update of other ranks' shards arrives only in the next forward pass."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather and not isinstance(chunk, FullyShardedDiT):
            chunk.start_param_sync(force_sync=True)


def _collect_write_results_in_process() -> None:
    """Replace the queue of megatron-core's writer, which comes from a manager process started for every rank.

    In a synchronous save its only writer and reader are this process; the manager would cost seconds of imports and
    outlive a killed rank.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _write_state(folder: Path, state: TrainState) -> None:
    # train_state.json is written last, so its own size is not in the list.
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}
    _write_durably(folder / STATE_FILE, json.dumps({**asdict(state), "files": sizes}, indent=1))


def _publish(writing: Path, target: Path) -> None:
    replaced = target.with_name(target.name + ".replaced")
    if target.exists():  # this step was saved before, by a life that ended before `latest` moved
        os.replace(target, replaced)
    # From here on the checkpoint counts as complete, whether `latest` moves or not.
    os.replace(writing, target)
    shutil.rmtree(replaced, ignore_errors=True)
    latest = target.parent / LATEST_FILE
    _write_durably(latest.with_name(latest.name + WRITING_SUFFIX), target.name + "\n")
    os.replace(latest.with_name(latest.name + WRITING_SUFFIX), latest)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


def _prune(checkpoints_dir: Path, keep: int) -> None:
    if keep == 0:
        return
    # A name that is not exactly ours is not ours to delete.
    folders = [path for path in sorted(checkpoints_dir.iterdir()) if _STEP_FOLDER.fullmatch(path.name)]
    for folder in [path for path in folders if path.name != "step_00000000"][:-keep]:
        shutil.rmtree(folder)
