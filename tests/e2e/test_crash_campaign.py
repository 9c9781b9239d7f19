"""A short crash campaign; the long one is in docs/crash_campaign.md."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from crash_campaign import run_campaign, write_report

pytestmark = [pytest.mark.distributed, pytest.mark.heavy]


def test_a_run_with_random_faults_ends_with_the_curve_of_one_without(tmp_path: Path) -> None:
    campaign = run_campaign(tmp_path, steps=60, count=6, ranks=2, seed=os.getpid())
    assert campaign.steps == 60
    assert campaign.largest_difference < 1e-6
    assert all(item.named is not False for item in campaign.outcomes), campaign.outcomes
    assert all(item.back is not None for item in campaign.outcomes), campaign.outcomes
    write_report(campaign, tmp_path / "report.md", os.getpid())
    assert "crash_campaign.py" in (tmp_path / "report.md").read_text()
