"""Which rank is to blame, told from reports alone."""

from __future__ import annotations

import pytest

from training.hang_report import RankReport, find_culprits
from training.rank_table import RankPlace, RankTable

# TP 2 x DP 2: groups of rank pairs, and the world.
GROUPS = {0: ("tp0", "dp0"), 1: ("tp0", "dp1"), 2: ("tp1", "dp0"), 3: ("tp1", "dp1")}
TABLE = RankTable("now", [RankPlace(rank, f"host{rank // 2}", 100 + rank, {"tp": rank % 2}) for rank in range(4)], 0)


def report(
    rank: int, phase: str = "forward_backward", step: int = 7, waits: str | None = "all_reduce", **called: int
) -> RankReport:
    tp, dp = GROUPS[rank]
    collectives = {"world": called.get("world", 9), tp: called.get("tp", 5), dp: called.get("dp", 3)}
    neighbours = {other: "running" for other in range(4) if other // 2 == rank // 2}
    return RankReport(rank, step, phase, 12.0, "training/x.py:1 (f)", waits, collectives, [], neighbours)


def named(*reports: RankReport) -> list[int]:
    return [culprit.rank for culprit in find_culprits({item.rank: item for item in reports}, TABLE)]


def test_silent_ranks_are_named_with_what_their_neighbours_see() -> None:
    reports = {0: report(0), 2: report(2), 3: report(3)}
    reports[0].neighbours[1] = "stopped"
    (culprit,) = find_culprits(reports, TABLE)
    assert (culprit.rank, culprit.why) == (1, "gave no sign of life; its process 101 is stopped")


def test_a_lost_host_is_named_rank_by_rank() -> None:
    culprits = find_culprits({0: report(0), 1: report(1)}, TABLE)
    assert [culprit.rank for culprit in culprits] == [2, 3]
    assert "host1, which may be lost" in culprits[0].why


@pytest.mark.parametrize(("phase", "step"), [("data", 7), ("update", 6)])
def test_the_rank_in_the_earlier_part_is_named(phase: str, step: int) -> None:
    assert named(report(0), report(1), report(2, phase, step, waits=None), report(3)) == [2]


def test_of_ranks_in_one_part_the_one_that_called_fewer_collectives_is_named_and_not_those_it_holds_up() -> None:
    # Rank 1 did not come to its tensor-parallel collective 6; rank 0 waits there and so misses its replicas' 4.
    waiting = [report(0, tp=6), report(2, tp=6, dp=4), report(3, tp=6, dp=4)]
    assert named(*waiting, report(1, waits="all_reduce")) == [1]


def test_a_held_up_replica_is_not_taken_for_the_stuck_rank_when_the_others_are_a_phase_ahead() -> None:
    waiting = [report(0, tp=6), report(2, "reduce", tp=6, dp=4), report(3, "reduce", tp=6, dp=4)]
    assert named(*waiting, report(1, waits=None)) == [1]


def test_the_rank_that_waits_for_nobody_is_named_when_nothing_else_tells() -> None:
    assert named(report(0), report(1, waits=None), report(2), report(3)) == [1]


def test_nobody_is_accused_when_all_wait_alike() -> None:
    assert named(report(0), report(1), report(2), report(3)) == []
