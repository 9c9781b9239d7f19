"""Runs the rows of the table on a pool of ranks, and one process for each kind of work they are compared with."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from training.layout_matrix.compare import Errors, compare
from training.layout_matrix.table import TOLERANCES, Dtype, LayoutCase, Workload
from training.layout_matrix.worker import Report, train
from training.local_ranks import RankError, RankPool

ONE_PROCESS = LayoutCase("one_process", {})


@dataclass(frozen=True)
class Outcome:
    """One row of the table, run."""

    case: LayoutCase
    dtype: Dtype
    seconds: float
    errors: Errors | None
    """None where a rank failed."""
    failure: str = ""
    """The ranks' tracebacks."""

    @property
    def wrong(self) -> list[str]:
        """What is above its tolerance; empty where the layout gives the numbers of one process."""
        return ["failed"] if self.errors is None else self.errors.above(TOLERANCES[self.dtype])


class References:
    """The single process's report for each kind of work, computed when first asked for."""

    def __init__(self, pool: RankPool) -> None:
        self._pool = pool
        self._reports: dict[Workload, Report] = {}

    def report(self, workload: Workload) -> Report:
        """What one process reports."""
        if workload not in self._reports:
            case = replace(ONE_PROCESS, parallel={"transformer_impl": workload.transformer_impl})
            self._reports[workload] = self._pool.run(train, case, workload, ranks=1)[0]
        return self._reports[workload]


def run_case(pool: RankPool, references: References, case: LayoutCase, dtype: Dtype) -> Outcome:
    """Train in one layout and compare; a failure of its ranks is an outcome too."""
    workload = case.workload(dtype)
    reference = references.report(workload)
    started = time.monotonic()
    try:
        errors = compare(pool.run(train, case, workload, ranks=case.ranks), reference)
    except RankError as error:
        return Outcome(case, dtype, time.monotonic() - started, None, str(error))
    return Outcome(case, dtype, time.monotonic() - started, errors)


def run_matrix(
    pool: RankPool, rows: Iterable[tuple[LayoutCase, Dtype]], tell: Callable[[Outcome], None] = lambda _: None
) -> list[Outcome]:
    """All rows in order; `tell` hears of each as it ends."""
    references = References(pool)
    outcomes = []
    for case, dtype in rows:
        outcomes.append(run_case(pool, references, case, dtype))
        tell(outcomes[-1])
    return outcomes
