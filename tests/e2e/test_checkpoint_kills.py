"""Kills of a real run at random moments of its saves: nothing complete is lost, nothing half is loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoint_kills import Campaign, Report

pytestmark = pytest.mark.distributed


def check(report: Report, kills: int) -> None:
    print(f"\n{report.summary()}")
    assert len(report.kills) == kills
    assert report.lives == kills + 1
    assert report.wrong == []


# A life is mostly imports: in the default suite test_pretrain_resume kills. The long campaign is stored in
# tests/benchmarks/results/checkpoint_kills.json.
@pytest.mark.parametrize("kills", [3, 25])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.heavy
def test_killed_while_it_saves_the_run_loses_nothing(ranks: int, kills: int, tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, ranks, steps=12 * kills, seed=os.getpid())
    check(campaign.run(kills, print), kills)
