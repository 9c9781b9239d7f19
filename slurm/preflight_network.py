"""All-reduce over the nodes of a job against a floor; where it is below, halving finds who is to blame."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from slurm.preflight_checks import BadNode
from slurm.preflight_requests import AllReduceRequest, write_request
from slurm.preflight_steps import Outcome, Steps

CHECK = "all-reduce"
Group = tuple[str, ...]
# Bus bandwidths in GB/s of disjoint groups of nodes, measured at the same time; 0 where a group failed, infinity where
# there is nothing to measure.
Measure = Callable[[Sequence[Group]], list[float]]


@dataclass
class Verdict:
    """What the all-reduces showed."""

    gb_s: float
    """Of all nodes together; 0: failed."""
    bad: list[BadNode] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What is slow and lies with no single node."""


class Network:
    """Measures groups of nodes of the allocation around this process."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._count = itertools.count(1)
        # A job may take a part of a node's GPUs.
        self._ranks_per_node = steps.profile.launch.processes_per_node or max(1, steps.job.gpus_per_node)

    def ranks(self, nodes: Sequence[str]) -> int:
        """Ranks of the job on these nodes."""
        return len(nodes) * self._ranks_per_node

    def measure(self, groups: Sequence[Group]) -> list[float]:
        """See `Measure`."""
        with ThreadPoolExecutor(len(groups)) as pool:
            return list(pool.map(self._measure_one, groups))

    def _measure_one(self, group: Group) -> float:
        if self.ranks(group) < 2:
            return float("inf")
        steps, preflight = self._steps.within(f"{next(self._count):03d}"), self._steps.profile.preflight
        request = AllReduceRequest(
            folder=str(steps.folder),
            nodes=list(group),
            ranks_per_node=self._ranks_per_node,
            gpus=steps.job.gpus_per_node,
            mib=preflight.allreduce_mib,
            seconds=preflight.burn_seconds / 2,
        )
        command, outcome = steps.task_command("slurm.allreduce", str(write_request(request))), Outcome()
        said = steps.srun(group, command, preflight.burn_seconds, outcome)
        if not request.result.is_file():
            (steps.folder / "error").write_text(said + "\n", encoding="utf-8")
            return 0.0
        return float(json.loads(request.result.read_text(encoding="utf-8"))["gb_s"])


def find_slow_nodes(nodes: Sequence[str], measure: Measure, floor: float) -> Verdict:
    """Measure all of `nodes`; where they stay below `floor` GB/s, name those without which they would not.

    A group below is halved, all halves of a round at once, until pairs are left; each of a pair is measured with a node
    of a group that was fast. Where none is left to compare with, both of the pair are named.
    """
    whole = tuple(nodes)
    (rate,) = measure([whole])
    verdict = Verdict(rate)
    if rate >= floor:
        return verdict
    slow, fast = [whole], []
    while slow:
        halves = [_halves(group) for group in slow]
        flat = list(itertools.chain.from_iterable(halves))
        rates = dict(zip(flat, measure(flat), strict=True))
        fast += [node for group in flat if rates[group] >= floor for node in group]
        for group, pair in zip(slow, halves, strict=True):
            if all(rates[half] >= floor for half in pair):
                _blame(group, measure, floor, fast, verdict)
        below = [group for group in flat if rates[group] < floor]
        verdict.bad += [_alone(group[0], rates[group], floor) for group in below if len(group) == 1]
        slow = [group for group in below if len(group) > 1]
    return verdict


def _halves(group: Group) -> tuple[Group, Group]:
    middle = (len(group) + 1) // 2
    return group[:middle], group[middle:]


def _blame(group: Group, measure: Measure, floor: float, fast: Sequence[str], verdict: Verdict) -> None:
    """A group that is slow although both its halves are fast."""
    first, second = _halves(group)
    if len(second) > 1:
        verdict.notes.append(f"between {', '.join(first)} and {', '.join(second)}: each fast alone, slow together")
        return
    # A node alone has shown nothing of its network: of three, only the single one is in doubt.
    suspects = group if len(group) == 2 else second
    witness = next((node for node in (*first, *fast) if node not in suspects), None)
    if witness is None:
        reason = f"one of {group[0]}, {group[1]}: together below {floor:g} GB/s, and no third node to tell them apart"
        verdict.bad += [BadNode(node, CHECK, f"{reason} (preflight.min_allreduce_gb_s)", sure=False) for node in group]
        return
    rates = [measure([(node, witness)])[0] for node in suspects]
    guilty = [(node, rate) for node, rate in zip(suspects, rates, strict=True) if rate < floor]
    verdict.bad += [BadNode(node, CHECK, _reason(f"with {witness}", rate, floor)) for node, rate in guilty]
    if not guilty:
        verdict.notes.append(f"between {', '.join(group)}: fast one by one, slow together")


def _alone(node: str, rate: float, floor: float) -> BadNode:
    return BadNode(node, CHECK, _reason("between its own GPUs", rate, floor))


def _reason(where: str, rate: float, floor: float) -> str:
    measured = f"{rate:.4g} GB/s" if rate else "failed"
    return f"bus bandwidth {where}: {measured}, at least {floor:g} GB/s is asked (preflight.min_allreduce_gb_s)"
