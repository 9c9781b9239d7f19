"""One pool of ranks for all distributed tests of a session; ranks that a test broke are started anew."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from training.layout_matrix.runner import References
from training.local_ranks import RankPool


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Eight ranks on the CPU."""
    with RankPool(8, "cpu") as pool:
        yield pool


@pytest.fixture(scope="session")
def references(ranks: RankPool) -> References:
    """What one process reports, by workload."""
    return References(ranks)
