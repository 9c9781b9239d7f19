"""How a rank's share of a checkpoint gets to disk: megatron-core plans it, threads of this process write it.

megatron-core's own writers fork the training process, twice over: a child that is killed is waited for without end, and
a fork of a process with threads, a GPU context and registered network memory is not safe. Threads are: writing,
checksums and fsync all run outside Python's lock, and nothing outlives a killed rank.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.base import SaveShardedStrategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor
from torch.distributed.checkpoint.filesystem import SerializationFormat, _write_item
from torch.distributed.checkpoint.storage import WriteResult

from training.checkpoint_files import StoredFile, durable_file

FORMAT, FORMAT_VERSION = "torch_dist", 1
# (path, name in the metadata, (objects, tensors)), as megatron-core makes them.
Bucket = tuple[str, str, tuple[list[Any], list[tuple[Any, Tensor]]]]


@dataclass
class WrittenShare:
    """What one rank wrote."""

    results: list[WriteResult] = field(default_factory=list)
    """Where in the files each piece lies."""
    files: dict[str, StoredFile] = field(default_factory=dict)


class HostCopies:
    """Copies of the trained tensors in host memory, in buffers that are taken once and kept; pinned where a GPU is."""

    def __init__(self) -> None:
        self._buffers: dict[Any, Tensor] = {}

    def copy(self, key: Any, tensor: Tensor) -> Tensor:
        """`tensor` as it is now, for as long as no other is copied under `key`; on CUDA only after `wait`."""
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[key] = buffer
        buffer.copy_(tensor, non_blocking=True)
        return buffer

    @staticmethod
    def wait() -> None:
        """Until the copies hold what they copy."""
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()


class Share:
    """What this rank has to write of one checkpoint."""

    def __init__(self, writer: Any, metadata: Any, copies: HostCopies | None) -> None:
        self._writer, self._metadata = writer, metadata
        copy = _once(copies.copy if copies else _on_host)
        self._buckets: list[Bucket] = [
            (path, name, (objects, [(item, copy(item.index, tensor)) for item, tensor in tensors]))
            for path, name, (objects, tensors) in writer.write_buckets
        ]
        # The writer holds the trained tensors themselves; from here on only their copies count.
        writer.write_buckets = []
        HostCopies.wait()

    @property
    def bytes(self) -> int:
        """About as many as the files will have."""
        buckets = [content for _, _, content in self._buckets]
        objects = sum(data.getbuffer().nbytes for held, _ in buckets for _, data in held)
        return objects + sum(tensor.nbytes for _, held in buckets for _, tensor in held)

    def write(self) -> WrittenShare:
        """Write this rank's files, all at once, until they are on the disk.

        Raises:
            OSError: naming the file that could not be written.
        """
        written = WrittenShare()
        if self._buckets:
            with ThreadPoolExecutor(len(self._buckets), thread_name_prefix="checkpoint-file") as threads:
                for name, stored, results in threads.map(self._write_bucket, self._buckets):
                    written.files[name] = stored
                    written.results += results
        return written

    def write_metadata(self, results: Sequence[list[WriteResult]]) -> None:
        """On rank 0: what all ranks wrote, and where; without it the files mean nothing."""
        self._writer.finish(self._metadata, results)

    def _write_bucket(self, bucket: Bucket) -> tuple[str, StoredFile, list[WriteResult]]:
        path, name, (objects, tensors) = bucket
        with durable_file(Path(path)) as stream:
            results = [
                _write_item(self._writer.transforms, stream, data, item, name, SerializationFormat.TORCH_SAVE)
                for item, data in [*objects, *tensors]
            ]
        return name, stream.stored, results


class InProcessStrategy(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist format, written by this process.

    Args:
        copies: where the tensors are copied to before they are written, if they may change meanwhile; None: they stay.
        files: files this rank writes.
    """

    def __init__(self, copies: HostCopies | None = None, files: int = 2) -> None:
        # cached_metadata: from the third save of a run on, the ranks need not exchange their plans, which are the same.
        super().__init__(FORMAT, FORMAT_VERSION, thread_count=files, cached_metadata=True)
        _start_no_manager()
        self.share: Share | None = None
        self._copies = copies

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any) -> AsyncRequest:
        # Called at the end of megatron-core's planning, with what this rank has to write.
        share = self.share = Share(writer, planned[1], self._copies)
        written: list[WrittenShare] = []
        return AsyncRequest(lambda: written.append(share.write()), (), [lambda: _finish(share, written[0])])


def parallel(strategy: InProcessStrategy) -> SaveShardedStrategy:
    """What several replicas hold alike is written by all of them, each a share, instead of all by the first."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    # Virtual stages of one rank hold the embedders twice; megatron-core 0.16.1 would deal out both as main copies.
    virtual = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    if group.size() == 1 or virtual > 1:
        return strategy
    return FullyParallelSaveStrategyWrapper(strategy, group, do_cache_distribution=True)


def _finish(share: Share, written: WrittenShare) -> None:
    """The end of a save in which all ranks wait for each other."""
    leads = dist.get_rank() == 0
    gathered: list[Any] | None = [None] * dist.get_world_size() if leads else None
    dist.gather_object(written.results, gathered)
    if gathered is not None:
        share.write_metadata(gathered)


def _start_no_manager() -> None:
    """Give megatron-core the queue that its planning asks for and that nothing here uses.

    Its own comes from a manager process, started for every rank, which costs seconds of imports and outlives a killed
    rank.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()


def _once(copy: Callable[[Any, Tensor], Tensor]) -> Callable[[Any, Tensor], Tensor]:
    """fp32 weights are stored as weights and as the optimizer's: one copy serves for both."""
    made: dict[Any, Tensor] = {}

    def copy_once(key: Any, tensor: Tensor) -> Tensor:
        source = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if source not in made:
            made[source] = copy(key, tensor)
        return made[source]

    return copy_once


def _on_host(_: Any, tensor: Tensor) -> Tensor:
    # A view would be written with all of the memory it looks into.
    host = tensor.detach().cpu()
    return host.clone() if host.untyped_storage().nbytes() != host.nbytes else host
