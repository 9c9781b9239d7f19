"""The constants that were fitted, and on what; `python -m training.planner.fit` prints what the files should hold."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import replace

from training.planner import published, table2
from training.planner.cluster import Cluster
from training.planner.step_time import step_seconds

# Halvings of the interval in which a constant is looked for.
_HALVINGS = 16


def fit_table_2(cluster: Cluster) -> dict[str, float]:
    """Efficiencies with which the rows of Table 2 that name them come out as printed.

    The layout with TP 8 alone says how fast blocks are, TP 4 beside it what tensor parallelism costs, and with that how
    fast products are, CP 2 what its traffic costs.
    """
    rows = {row.fits: row for row in table2.ROWS if row.fits}

    def error(constant: str, **values: float) -> float:
        row, changed = rows[constant], with_efficiency(cluster, **values)
        job = row.job(changed)
        return 100 * job.mfu(step_seconds(job).total) - row.mfu_percent

    def attention_at(gemm: float) -> float:
        return _root(lambda attention: error("attention", gemm=gemm, attention=attention), 0.3, 0.9)

    gemm = _root(lambda gemm: error("gemm", gemm=gemm, attention=attention_at(gemm)), 0.3, 0.8)
    attention = attention_at(gemm)
    nic = _root(lambda nic: error("nic", gemm=gemm, attention=attention, nic=nic), 0.2, 1.0)
    return {"gemm": gemm, "attention": attention, "nic": nic}


def fit_wan_attention() -> float:
    """Efficiency of attention with which the rows that are fitted on come out best, by mean log of the ratio."""
    rows = [row for row in published.ROWS if row.fits == "attention"]

    def error(attention: float) -> float:
        return sum(math.log(row.predicted(attention) / row.tflops) for row in rows)

    return _root(error, 0.05, 0.9)


def with_efficiency(cluster: Cluster, **values: float) -> Cluster:
    """The same cluster with other efficiencies."""
    return replace(cluster, efficiency=replace(cluster.efficiency, **values))


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a monotonous function is 0."""
    rises = function(high) > function(low)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if (function(middle) < 0) == rises:
            low = middle
        else:
            high = middle
    return (low + high) / 2


if __name__ == "__main__":
    for name, value in fit_table_2(table2.table_2_cluster()).items():
        print(f"training/configs/clusters/{table2.CLUSTER}.yaml: efficiency.{name}: {value:.3f}")
    print(f"training/planner/published.py: WAN_ATTENTION = {fit_wan_attention():.3f}")
    sys.exit(0)
