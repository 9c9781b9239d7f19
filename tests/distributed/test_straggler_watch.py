"""The gathering of the ranks' times, on real ranks, over step numbers that come again."""

from __future__ import annotations

import time

import pytest
import torch

from megatron_video.parallel import ParallelConfig, initialize_parallel
from training.fault_config import FaultConfig
from training.local_ranks import RankPool
from training.phases import Phases
from training.rank_table import gather_rank_table
from training.stragglers import StragglerWatch

pytestmark = pytest.mark.distributed

# Behind step 9, the run goes back to step 5.
STEPS = [*range(1, 10), *range(6, 12)]
SLOW_RANK = 1


def watch() -> tuple[list[str], list[tuple[int, int, float]]]:
    """Places of all ranks as this one knows them, and what it found: step, rank, seconds."""
    from megatron_video.device import initialize

    initialize_parallel(ParallelConfig(tensor_model_parallel_size=2), 0, initialize())
    table, phases = gather_rank_table(), Phases(torch.device("cpu"))
    stragglers = StragglerWatch(FaultConfig(straggler_every=3), phases, table, torch.device("cpu"))
    found = []
    for step in STEPS:
        phases.enter("data", step - 1)
        time.sleep(0.1 if table.rank == SLOW_RANK else 0.0)
        phases.enter("forward_backward")
        torch.distributed.barrier()
        phases.enter("report")
        slow = [item for item in stragglers.after_step(step) if item.phase == "data"]
        found += [(step, item.place.rank, item.seconds) for item in slow]
    return [str(place).split(", ", 2)[2] for place in table.places], found


def test_the_slow_rank_is_found_also_when_step_numbers_come_again(ranks: RankPool) -> None:
    results = ranks.run(watch, ranks=4)
    places = ["tp 0 cp 0 dp 0 pp 0)", "tp 1 cp 0 dp 0 pp 0)", "tp 0 cp 0 dp 1 pp 0)", "tp 1 cp 0 dp 1 pp 0)"]
    assert [found for _, found in results[1:]] == [[], [], []]  # rank 0 speaks
    assert all(seen == places for seen, _ in results)
    # Gathered after 3, 6, 9, 6 and 9, compared one step later.
    assert [(step, rank) for step, rank, _ in results[0][1]] == [(step, SLOW_RANK) for step in (4, 7, 6, 7, 10)]
    assert all(0.1 <= seconds < 0.3 for _, _, seconds in results[0][1])
