"""Which rank is slower than its peers: times of every rank's own work, gathered seldom and compared.

A synchronous step takes as long for every rank, so what is compared is the time before a rank meets the others: waiting
for its batch, and forward and backward until gradients are reduced. Inside a tensor- or context-parallel group the
second holds collectives in every layer and comes out alike for the whole group; such a group is named as one. Which of
its ranks is slow, a probe tells that needs nobody: products of two small matrices, timed on each rank.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from training.fault_config import FaultConfig
from training.phases import PHASES, STEP_PHASES, Phases
from training.rank_table import RankPlace, RankTable

# Phases before the first collective that waits for other replicas, and the probe.
COMPARED = ("data", "forward_backward", "probe")
_MAD_TO_SIGMA = 1.4826
_PROBE_REPEATS = 5
_PROBE_SIZE = {"cpu": 192, "cuda": 2048}


@dataclass(frozen=True)
class Straggler:
    """A rank, or ranks of one replica, slower than the others of their pipeline stage."""

    place: RankPlace
    """The slowest of them."""
    ranks: list[int]
    phase: str
    """`data`, `forward_backward` (seconds a step) or `probe` (seconds of one product)."""
    seconds: float
    others_seconds: float
    """Median of the ranks it is compared with."""
    ratio: float
    z_score: float | None
    """Distance to the median in robust standard deviations; None when the others are all alike."""

    def __str__(self) -> str:
        """One line for the console."""
        more = f" with ranks {self.ranks}" if len(self.ranks) > 1 else ""
        return (
            f"SLOW {self.place}{more}: {self.phase} takes {self.seconds:.4f} s, median of its peers "
            f"{self.others_seconds:.4f} s, {self.ratio:.1f} times as long"
        )


class StragglerWatch:
    """Gathers the times of all ranks every straggler_every steps, and compares them one step later.

    By then the gathered figures have arrived: nothing waits for the device.

    Args:
        config: how often, and what counts as slow.
        phases: this rank's times.
        table: all ranks.
        device: where the model computes.
    """

    def __init__(self, config: FaultConfig, phases: Phases, table: RankTable, device: torch.device) -> None:
        self.config, self.phases, self.table, self.device = config, phases, table, device
        self.probe = Probe(device)
        # Counted here: step numbers come again when the run goes back behind a spike.
        self._steps = 0
        self._is_first_step = True
        phases.times_device = self._is_on
        self._gathered: Tensor | None = None

    def after_step(self, step: int) -> list[Straggler]:
        """Call it on all ranks after every step, with the steps done; the slow ranks, when rank 0 has just compared."""
        found = self._compare() if self._gathered is not None else []
        if not self._is_on:
            return found
        if self._is_first_step:
            # The first step of a life compiles, and fills the loader.
            self._is_first_step = False
            self.phases.take_seconds()
            return found
        self._steps += 1
        if step % (self.config.straggler_every or 1) == 0:
            self._gather()
        return found

    @property
    def _is_on(self) -> bool:
        return self.config.straggler_every is not None and len(self.table.places) > 1

    def _gather(self) -> None:
        seconds = self.phases.take_seconds()
        own = [seconds[phase] / self._steps for phase in PHASES] + [self.probe.take_seconds()]
        self._steps = 0
        values = torch.tensor(own, dtype=torch.float64).to(self.device, non_blocking=True)
        self._gathered = values.new_empty(len(self.table.places) * len(own))
        dist.all_gather_into_tensor(self._gathered, values)

    def _compare(self) -> list[Straggler]:
        assert self._gathered is not None
        rows, self._gathered = self._gathered, None
        if self.table.rank != 0:
            return []
        by_rank = rows.view(len(self.table.places), -1).tolist()
        names = (*PHASES, "probe")
        times = {name: [row[index] for row in by_rank] for index, name in enumerate(names)}
        return find_stragglers(times, self.table.places, self.config)


class Probe:
    """Times products of two matrices, on this rank alone."""

    def __init__(self, device: torch.device) -> None:
        size = _PROBE_SIZE.get(device.type, 192)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self._matrix = torch.full((size, size), 1 / size, dtype=dtype, device=device)
        self._events: list[torch.cuda.Event] = []
        self._on_device = device.type == "cuda"

    def take_seconds(self) -> float:
        """Median time of one product; on CUDA that of the last call, as this one's is not known before it is done."""
        return self._device_seconds() if self._on_device else self._host_seconds()

    def _host_seconds(self) -> float:
        marks = [time.perf_counter()]
        for _ in range(_PROBE_REPEATS):
            torch.mm(self._matrix, self._matrix)
            marks.append(time.perf_counter())
        return statistics.median(end - start for start, end in itertools.pairwise(marks))

    def _device_seconds(self) -> float:
        before = self._events
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(_PROBE_REPEATS + 1)]
        self._events[0].record()
        for event in self._events[1:]:
            torch.mm(self._matrix, self._matrix)
            event.record()
        pairs = itertools.pairwise(before)
        times = [start.elapsed_time(end) / 1000 for start, end in pairs if end.query()]
        return statistics.median(times) if times else 0.0


def find_stragglers(
    times: Mapping[str, Sequence[float]], places: Sequence[RankPlace], config: FaultConfig
) -> list[Straggler]:
    """The ranks whose own work takes longer than that of their peers, those of one replica together.

    Args:
        times: seconds a step by phase and rank; `probe`: seconds of one product.
        places: all ranks.
        config: straggler_ratio and straggler_share.
    """
    step_seconds = statistics.median(sum(times[phase][place.rank] for phase in STEP_PHASES) for place in places)
    found = []
    for phase in COMPARED:
        # A probe is no part of a step; a difference in it counts whatever the step takes.
        least = 0.0 if phase == "probe" else config.straggler_share * step_seconds
        slow = [
            straggler
            for place in places
            if (straggler := _compare_with_peers(phase, times[phase], place, places)) is not None
            and straggler.ratio >= config.straggler_ratio
            and straggler.seconds - straggler.others_seconds >= least
        ]
        found += _by_replica(slow)
    return found


def _compare_with_peers(
    phase: str, seconds: Sequence[float], place: RankPlace, places: Sequence[RankPlace]
) -> Straggler | None:
    """This rank against the median of the others: of its pipeline stage, and of other replicas where groups compute."""
    peers = [seconds[other.rank] for other in places if other is not place and _comparable(phase, place, other)]
    if not peers or (middle := statistics.median(peers)) <= 0:
        return None
    own = seconds[place.rank]
    spread = _MAD_TO_SIGMA * statistics.median(abs(value - middle) for value in peers)
    z_score = (own - middle) / spread if spread > 0 else None
    return Straggler(place, [place.rank], phase, own, middle, own / middle, z_score)


def _comparable(phase: str, place: RankPlace, other: RankPlace) -> bool:
    if phase == "probe":
        return True
    same_stage = place.coordinates["pp"] == other.coordinates["pp"]
    # A group's members compute in step with each other, so their times say nothing about each other.
    return same_stage and (phase == "data" or place.coordinates["dp"] != other.coordinates["dp"])


def _by_replica(slow: list[Straggler]) -> list[Straggler]:
    """One entry a replica, for its slowest rank, with all its slow ranks; the probe speaks of single ranks."""
    groups: dict[tuple[int, ...], list[Straggler]] = {}
    for item in slow:
        key = (
            (item.place.rank,)
            if item.phase == "probe"
            else (item.place.coordinates["dp"], item.place.coordinates["pp"])
        )
        groups.setdefault(key, []).append(item)
    found = []
    for members in groups.values():
        worst = max(members, key=lambda item: item.ratio)
        ranks = [item.place.rank for item in members]
        found.append(Straggler(**{**vars(worst), "ranks": ranks}))
    return found
