"""Samples that cannot be read: a replica's ranks agree on them, leave them out alike, and one of them tells.

Every rank of a replica (TP, CP, PP) reads the same samples, and a read may fail on one rank alone. What one cannot read
none may train on: their shapes would differ, and they would wait for each other for ever. So they compare notes when a
step's data is handed over, on the CPU; where nothing failed, this is one reduction of a few hundred bytes.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig, data_parallel_rank, rank_grid
from training.data import Batch, BatchBuilder, CorruptSample, StepData
from training.data_plan import PlannedBatch

_READ = torch.iinfo(torch.int32).max


class ReplicaAgreement:
    """Makes the ranks of a replica leave out the same samples.

    Args:
        builder: builds this replica's batches.
        parallel: the layout; making the groups takes part of all ranks.
    """

    def __init__(self, builder: BatchBuilder, parallel: ParallelConfig) -> None:
        self._builder = builder
        # [pp, dp, cp, tp] -> the ranks of every replica.
        replicas = rank_grid(parallel, dist.get_world_size()).transpose(0, 1).flatten(1).tolist()
        self._place = replicas[data_parallel_rank()].index(dist.get_rank())
        self._group = None
        if len(replicas[0]) > 1:
            # gloo: the flags are on the host, and the device is not waited for.
            self._group, _ = dist.new_subgroups_by_enumeration(replicas, backend="gloo")

    def __call__(self, data: StepData) -> StepData:
        """A step's data without any sample that some rank of the replica could not read; on all ranks of it."""
        if self._group is None:
            return data
        tellers = self._tellers(data)
        if all((of_batch == _READ).all() for of_batch in tellers):
            return data
        batches = [
            self._agreed(batch, data.planned[number], tellers[number], data.corrupt, number)
            for number, batch in enumerate(data.batches)
        ]
        told = [found for found in data.corrupt if tellers[found.batch][found.row] == self._place]
        return replace(data, batches=batches, corrupt=told)

    def _tellers(self, data: StepData) -> list[torch.Tensor]:
        """For every micro-batch, by row: the first place in the replica that could not read it, or _READ."""
        sizes = [len(batch.samples) for batch in data.planned]
        flags = torch.full((sum(sizes),), _READ, dtype=torch.int32)
        rows = list(flags.split(sizes))
        for found in data.corrupt:
            rows[found.batch][found.row] = self._place
        dist.all_reduce(flags, dist.ReduceOp.MIN, self._group)
        return rows

    def _agreed(
        self, batch: Batch, planned: PlannedBatch, tellers: torch.Tensor, own: list[CorruptSample], number: int
    ) -> Batch:
        missing = {found.row for found in own if found.batch == number}
        # Rows of the plan that this rank's batch has, in order.
        here = [row for row in range(len(tellers)) if row not in missing]
        kept = [place for place, row in enumerate(here) if tellers[row] == _READ]
        if len(kept) == len(here):
            return batch
        return batch.select(kept) if kept else self._builder.stand_in(planned)


def check_corrupt(count: int, most: int) -> None:
    """Stop a run that left out too many samples; `count` is the same on all ranks.

    Raises:
        UserError: more than `most`.
    """
    if count > most:
        raise UserError(
            f"{count} samples could not be read and were left out, more than data.max_corrupt_samples={most}; "
            "events.jsonl in the run's folder names them (event corrupt_sample), `megatron-video data verify --in "
            "SHARDS` finds all damage of a folder. Encode the shards again, or raise the limit"
        )
