"""Ends a job that makes no progress, and says which rank is stuck where.

A thread of every rank looks at the rank's own heartbeat. Nothing is sent between ranks as long as all is well. The
first rank whose heartbeat is too old makes the folder `<run>/hangs/<start>/`; the others see it, and all leave their
report and their stacks there. Files are used because they work while collectives hang and while the process that serves
the job's store is itself stopped; the run's folder is shared by all ranks anyway, since checkpoints are.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
import traceback
from dataclasses import asdict
from pathlib import Path
from types import TracebackType

import psutil

from training.events import EventLog
from training.fault_config import FaultConfig
from training.hang_report import (
    Culprit,
    RankReport,
    describe_this_rank,
    dump_flight_recorder,
    find_culprits,
    find_reports,
    read_reports,
    write_report,
)
from training.phases import Phases
from training.rank_table import RankTable
from training.telemetry import write_json

HANG_EXIT_CODE = 75
"""Exit code of a rank whose job made no progress: start the same command again (EX_TEMPFAIL of sysexits.h)."""

# Loader workers answer it by writing their stacks; they inherit the handler when they are forked.
_DUMP_SIGNAL = signal.SIGUSR2


class Watchdog:
    """Watches this rank from a thread, and ends the process when it or another rank is stuck.

    Args:
        config: the time limits.
        phases: the heartbeat.
        table: all ranks.
        run_dir: the run's folder.
    """

    def __init__(self, config: FaultConfig, phases: Phases, table: RankTable, run_dir: Path) -> None:
        self.config, self.phases, self.table, self.run_dir = config, phases, table, run_dir
        self.folder = run_dir / "hangs" / table.start
        self._leave = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Start watching, unless the limits say not to."""
        if self.config.hang_seconds is not None:
            # Without a file of its own: the file's number is inherited by forked workers, a later one would not be.
            self._worker_stacks = os.memfd_create("worker stacks")
            faulthandler.register(_DUMP_SIGNAL, file=self._worker_stacks, all_threads=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        if self._thread.is_alive():
            self._thread.join()
            faulthandler.unregister(_DUMP_SIGNAL)
            os.close(self._worker_stacks)
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._leave.wait(self.config.hang_poll_seconds):
            limit = self.config.hang_limit(self.phases.heartbeat.phase, self.phases.is_first_step)
            # If something keeps the interpreter's lock, this thread stops too, and the C library's thread does it all.
            faulthandler.dump_traceback_later(limit + 2 * self.config.hang_grace_seconds, exit=True)
            late = time.monotonic() - self.phases.heartbeat.since > limit
            if late or self.folder.exists():
                self._end_job()

    def _end_job(self) -> None:
        try:
            self._report()
        except Exception:  # a full disk, say: the job must end all the same
            _say(f"HANG: {self.table.here} could not report to {self.folder}")
            traceback.print_exc()
            faulthandler.dump_traceback(all_threads=True)
        for child in psutil.Process().children(recursive=True):
            child.kill()
        sys.stderr.flush()
        # The main thread is stuck: nothing that waits for it, such as sys.exit, would come to an end.
        os._exit(HANG_EXIT_CODE)

    def _report(self) -> None:
        """Leave report and stacks, let one rank wait for those of all and say what was found."""
        heartbeat = self.phases.heartbeat
        self.folder.mkdir(parents=True, exist_ok=True)
        self._dump_stacks()
        write_report(describe_this_rank(self.table, heartbeat, time.monotonic()), self.folder)
        # One rank speaks for all; which one must not be fixed, as any may be the stuck one.
        if self._is_first():
            reports = self._wait_for_reports()
            self._tell(find_culprits(reports, self.table), reports)
        # The others leave when it is told: the launcher kills all ranks when one has left.
        deadline = time.monotonic() + 2 * self.config.hang_grace_seconds
        while not (self.folder / "verdict.json").exists() and time.monotonic() < deadline:
            time.sleep(self.config.hang_poll_seconds / 10)

    def _wait_for_reports(self) -> dict[int, RankReport]:
        deadline = time.monotonic() + self.config.hang_grace_seconds
        while time.monotonic() < deadline and len(find_reports(self.folder)) < len(self.table.places):
            time.sleep(self.config.hang_poll_seconds / 4)
        return read_reports(self.folder)

    def _is_first(self) -> bool:
        try:
            (self.folder / "told").open("x").close()
        except FileExistsError:
            return False
        return True

    def _tell(self, culprits: list[Culprit], reports: dict[int, RankReport]) -> None:
        """Write the verdict to the console, events.jsonl, status.json and, last, the folder."""
        step = max(report.step for report in reports.values())
        named = [{**asdict(self.table.places[culprit.rank]), "why": culprit.why} for culprit in culprits]
        for culprit in culprits:
            _say(f"HANG at step {step + 1}: {self.table.places[culprit.rank]} {culprit.why}")
        waiting = [f"rank {rank}: {report.phase}, {report.place}" for rank, report in sorted(reports.items())]
        if not culprits:
            _say(f"HANG at step {step + 1}: all {len(reports)} ranks wait alike: {'; '.join(waiting[:8])}")
        _say(f"stacks of all ranks are in {self.folder}; the job ends with exit code {HANG_EXIT_CODE}")
        EventLog(self.run_dir, self.table.rank, len(self.table.places)).record(
            "hang", step, culprits=named, waiting=waiting, stacks=self.folder
        )
        write_json(self.run_dir / "status.json", {"state": "hung", "step": step})
        write_json(self.folder / "verdict.json", {"step": step, "culprits": named, "waiting": waiting})

    def _dump_stacks(self) -> None:
        path = self.folder / f"rank_{self.table.rank:05d}.stacks.txt"
        workers = psutil.Process().children()
        for worker in workers:
            worker.send_signal(_DUMP_SIGNAL)
        with path.open("w", encoding="utf-8") as stream:
            print(f"{self.table.here}", file=stream, flush=True)
            faulthandler.dump_traceback(file=stream, all_threads=True)
        dump_flight_recorder(path.with_suffix(".nccl_trace.pickle"))
        if workers:
            # They write while this thread waits; one that is stopped writes nothing, and its state is in the report.
            time.sleep(min(1.0, self.config.hang_poll_seconds))
            with path.open("ab") as stream:
                stream.write(f"\nloader workers {[worker.pid for worker in workers]}\n".encode())
                stream.write(os.pread(self._worker_stacks, 1 << 20, 0))


def _say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)
