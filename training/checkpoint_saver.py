"""Saves of a run: training waits for a copy in host memory, and the rest happens behind it.

One save is under way at a time. Its thread on every rank writes this rank's files; then all ranks tell rank 0, over
process groups of their own, and rank 0 publishes the checkpoint, or removes it if any rank failed. Nothing of this
needs the training threads, so a checkpoint is complete as soon as its last file is on the disk.
"""

from __future__ import annotations

import gc
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig
from megatron.core.dist_checkpointing.core import save_config as save_format
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer

from megatron_video.config_io import save_config
from megatron_video.files import sync
from training.checkpoint_config import CheckpointConfig
from training.checkpoint_disk import GIGABYTE, describe, make_folder, wait_until_visible
from training.checkpoint_files import (
    CONFIG_FILE,
    WRITING_SUFFIX,
    WRITTEN,
    stored_file,
    write_state,
)
from training.checkpoint_folders import prune, publish, step_folder
from training.checkpoint_state import publish_pending_parameters, sharded_state
from training.checkpoint_writer import (
    FORMAT,
    FORMAT_VERSION,
    HostCopies,
    InProcessStrategy,
    Share,
    WrittenShare,
    parallel,
)
from training.ema import EMA

if TYPE_CHECKING:
    from training.checkpoint import TrainState

# The watchdog leaves these groups out: how many messages their threads have sent says nothing about training.
SAVE_GROUP = "checkpoint saves"
_log = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the older ones are as they were."""


@dataclass(frozen=True)
class SaveReport:
    """How a save went; on other ranks than 0 only `folder`, `step` and `error` are known."""

    folder: Path
    step: int
    seconds: float = 0.0
    """From its beginning until it was published."""
    blocked_seconds: float = 0.0
    """Of which training waited, not counting `waited_seconds`."""
    waited_seconds: float = 0.0
    """Before its beginning: until the save before it was done."""
    bytes: int = 0
    """Of all files, from all ranks."""
    files: int = 0
    deleted: tuple[Path, ...] = ()
    """Checkpoints that no rule keeps any more."""
    error: str | None = None
    """Why there is no checkpoint."""

    def details(self) -> dict[str, Any]:
        """For events.jsonl: the fields of a `save`."""
        return {
            "checkpoint": self.folder,
            "seconds": self.seconds,
            "blocked_seconds": self.blocked_seconds,
            "waited_seconds": self.waited_seconds,
            "bytes": self.bytes,
            "gigabytes_per_second": self.bytes / GIGABYTE / self.seconds,
            "files": self.files,
            "deleted": [path.name for path in self.deleted],
        }

    def __str__(self) -> str:
        """One line for the console."""
        if self.error:
            return f"checkpoint {self.folder} FAILED: {self.error}"
        size = self.bytes / GIGABYTE
        after = f" after {self.waited_seconds:.1f} s for the save before it" if self.waited_seconds >= 0.1 else ""
        return (
            f"saved {self.folder} in {self.seconds:.1f} s ({size:.3f} GB, {size / self.seconds:.2f} GB/s); "
            f"training waited {self.blocked_seconds:.2f} s{after}"
        )


@dataclass
class _Job:
    """A save from the moment when this rank's share no longer depends on the trained tensors."""

    share: Share
    writing: Path
    target: Path
    values: dict[str, Any]
    config: Any
    started: float
    thread: threading.Thread | None = None
    blocked_seconds: float = 0.0
    waited_seconds: float = 0.0
    report: SaveReport | None = None


class CheckpointSaver:
    """Saves checkpoints of one run; all ranks make one and call its methods together.

    Args:
        run_dir: the run's folder.
        settings: how to write and what to keep.
        keep: newest checkpoints that are kept; 0: all.
        told: called on rank 0, from any thread, with every finished or failed save.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: CheckpointConfig,
        keep: int = 0,
        told: Callable[[SaveReport], None] = lambda report: None,
    ) -> None:
        self._run_dir, self._settings, self._keep, self._told = run_dir, settings, keep, told
        self._strategy = InProcessStrategy(HostCopies() if settings.asynchronous else None, settings.files_per_rank)
        self._parallel = parallel(self._strategy)
        self._leads = dist.get_rank() == 0
        self._group = self._own_group() if settings.asynchronous else None
        self._job: _Job | None = None
        self._checked = False

    @property
    def busy(self) -> bool:
        """Whether a save is under way on this rank."""
        return self._job is not None and self._job.thread is not None and self._job.thread.is_alive()

    def save(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        state: TrainState,
        config: Any,
        ema: EMA | None = None,
    ) -> Path:
        """Begin a save of this moment, after the one under way; when this returns the tensors may change.

        Returns:
            The folder that the checkpoint will have. Without settings.asynchronous it is there.

        Raises:
            CheckpointError: on all ranks; the save before failed or took too long, or this one cannot begin, and
                settings.on_error is to stop.
        """
        asked = time.perf_counter()
        self.wait()
        with _no_garbage_collection():
            return self._begin(model, optimizer, state, config, ema, asked)

    def _begin(
        self,
        model: list[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        state: TrainState,
        config: Any,
        ema: EMA | None,
        asked: float,
    ) -> Path:
        started = time.perf_counter()
        target = step_folder(self._run_dir, state.step)
        writing = target.with_name(target.name + WRITING_SUFFIX)
        publish_pending_parameters(model)
        state.averages_weights = ema is not None
        tensors = sharded_state(model, optimizer, is_loading=False, ema=ema)
        refusal = self._prepare(writing, _bytes_to_write(tensors))
        if refusal:
            self._settle(SaveReport(target, state.step, error=refusal))
            return target
        share = self._plan(tensors, writing)
        self._job = job = _Job(share, writing, target, asdict(state), config, started)
        job.waited_seconds = started - asked
        if self._settings.asynchronous:
            job.thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
            job.blocked_seconds = time.perf_counter() - started
            job.thread.start()
        else:
            self._run(job)
            self.wait()
        return target

    def wait(self) -> None:
        """Until no save is under way.

        Raises:
            CheckpointError: on all ranks; it failed or took too long, and settings.on_error is to stop.
        """
        job = self._job
        if job is None:
            return
        if job.thread is not None:
            job.thread.join(self._settings.max_wait_seconds)
        self._job = None
        if job.report is None:
            late = f"not complete after {self._settings.max_wait_seconds:g} s (checkpoint.max_wait_seconds)"
            self._settle(SaveReport(job.target, job.values["step"], error=late))
        elif job.report.error and self._settings.on_error == "stop":
            raise CheckpointError(str(job.report))

    def finish(self) -> None:
        """The run ends: wait for the save under way, whose failure is then an error whatever settings.on_error says.

        Raises:
            CheckpointError: it failed or took too long.
        """
        job = self._job
        self.wait()
        if job is not None and job.report is not None and job.report.error:
            raise CheckpointError(str(job.report))

    def drain(self) -> None:
        """Let the save under way come to its end and raise nothing: the run fails for another reason."""
        if self._job is not None and self._job.thread is not None:
            self._job.thread.join(self._settings.max_wait_seconds)

    def _settle(self, report: SaveReport) -> None:
        if self._leads:
            self._told(report)
        if report.error and self._settings.on_error == "stop":
            raise CheckpointError(str(report))

    def _plan(self, tensors: dict[str, Any], writing: Path) -> Share:
        """Let megatron-core plan who writes what, and copy this rank's share to host memory."""
        dist_checkpointing.save(
            tensors,
            str(writing),
            sharded_strategy=self._parallel,
            # Costs an exchange of all descriptions; they are the same in every save of a run.
            validate_access_integrity=not self._checked,
            async_sharded_save=True,
        )
        self._checked = True
        share, self._strategy.share = self._strategy.share, None
        assert share is not None
        return share

    def _prepare(self, writing: Path, own_bytes: int) -> str | None:
        """Make the folder on rank 0; why there will be no checkpoint, or None, the same on all ranks."""
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        need = torch.tensor(own_bytes, dtype=torch.int64, device=device)
        dist.all_reduce(need)
        refusal = [make_folder(writing, int(need)) if self._leads else None]
        dist.broadcast_object_list(refusal, src=0)
        return refusal[0]

    def _run(self, job: _Job) -> None:
        """Write, tell, publish; in the save's thread, or in the caller's."""
        try:
            job.report = self._write_and_publish(job)
        except Exception as error:  # nobody would see it in a thread
            why = f"{type(error).__name__}: {error}"
            job.report = SaveReport(job.target, job.values["step"], error=why)
        if self._leads:
            self._told(job.report)

    def _write_and_publish(self, job: _Job) -> SaveReport:
        need = job.share.bytes
        try:
            written, error = job.share.write(), None
        except Exception as failure:  # every rank must get to the exchange below
            written, error = WrittenShare(), f"rank {dist.get_rank()}: {describe(failure, job.writing, need)}"
        shares: list[Any] | None = [None] * dist.get_world_size() if self._leads else None
        dist.gather_object((written, error), shares, group=self._group)
        verdict: list[Any] = [self._conclude(job, shares) if shares is not None else None]
        dist.broadcast_object_list(verdict, src=0, group=self._group)
        report: SaveReport = verdict[0]
        return report

    def _conclude(self, job: _Job, shares: list[tuple[WrittenShare, str | None]]) -> SaveReport:
        """On rank 0, when all ranks are done: publish, or remove what there is."""
        step = job.values["step"]
        errors = [error for _, error in shares if error]
        try:
            if not errors:
                size, count, deleted = self._publish(job, [share for share, _ in shares])
                seconds = time.perf_counter() - job.started
                # In the caller's thread training waited for all of it.
                blocked = job.blocked_seconds if job.thread else seconds
                return SaveReport(job.target, step, seconds, blocked, job.waited_seconds, size, count, deleted)
        except Exception as failure:
            errors = [describe(failure, job.writing, 0)]
        shutil.rmtree(job.writing, ignore_errors=True)
        return SaveReport(job.target, step, error="; ".join(errors))

    def _publish(self, job: _Job, shares: list[WrittenShare]) -> tuple[int, int, tuple[Path, ...]]:
        job.share.write_metadata([share.results for share in shares])
        save_format(CheckpointingConfig(FORMAT, FORMAT_VERSION), str(job.writing))
        save_config(job.config, job.writing / CONFIG_FILE)
        files = {name: file for share in shares for name, file in share.files.items()}
        wait_until_visible(job.writing, files)
        for path in sorted(job.writing.iterdir()):
            if path.name not in files:  # written by this rank alone, small
                sync(path)
                files[path.name] = stored_file(path)
        write_state(job.writing, {**job.values, WRITTEN: time.time()}, files)
        publish(job.writing, job.target)
        try:
            deleted = prune(job.target.parent, self._keep, self._settings)
        except OSError as error:  # the new checkpoint is there all the same
            _log.warning("cannot delete old checkpoints: %s", error)
            deleted = []
        return sum(file.size for file in files.values()), len(files), tuple(deleted)

    def _own_group(self) -> dist.ProcessGroup | None:
        """For the saves' threads: their messages must not mix with those of training."""
        if dist.get_world_size() == 1:
            return None
        timeout = timedelta(seconds=self._settings.max_wait_seconds)
        return dist.new_group(backend="gloo", timeout=timeout, group_desc=SAVE_GROUP)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Describing thousands of tensors would start a collection of everything the process holds, which takes longer than
    their copy; what the descriptions take is given back when they go."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _bytes_to_write(tensors: dict[str, Any]) -> int:
    """What this rank would write if nothing were shared out: over all ranks, the size of the checkpoint."""
    held = (value for value in nested_values(tensors) if isinstance(value, ShardedTensor))
    return sum(value.data.nbytes for value in held if is_main_replica(value.replica_id))
