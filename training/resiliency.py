"""Heartbeats to the rank monitor of nvidia-resiliency-ext, where its launcher started this rank.

`ft_launcher` gives every rank a process that kills the rank when a section takes too long, and restarts the job. It
works outside of the rank, so it also ends one whose interpreter is stuck; which rank holds the others up, and where,
our own watchdog says, whose limits should be the shorter ones. Its straggler detection needs CUPTI and is not used.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from megatron_video.errors import UserError
from training.phases import Phases

_SOCKET_VARIABLE = "FT_RANK_MONITOR_IPC_SOCKET"
INSTALL = 'pip install -e ".[faults]"'

# Section of each phase; those not listed belong to a step. The names are what --ft-rank-section-timeouts is told.
_SECTIONS = {"start": "setup", "checkpoint": "checkpointing", "validation": "validation"}


class RankMonitor:
    """Tells the monitor which section this rank is in; a step is one section, opened anew for each."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self._section: str | None = None
        self.enter("start")

    def enter(self, phase: str) -> None:
        """The loop begins `phase`; costs two messages over a local socket where the section changes."""
        section = _SECTIONS.get(phase, "step")
        # `data` is the beginning of a step: without a new section, all steps would share one time limit.
        if section == self._section and phase != "data":
            return
        if self._section is not None:
            self.client.end_section(self._section)
        self.client.start_section(section)
        self._section = section

    def close(self) -> None:
        """The training is over; what comes now is not watched."""
        self.client.end_all_sections()
        self.client.shutdown_workload_monitoring()


@contextmanager
def watched_by_rank_monitor(wanted: bool | Literal["auto"], phases: Phases) -> Iterator[None]:
    """Report every phase to the rank monitor, where there is one.

    Raises:
        UserError: see connect_rank_monitor.
    """
    monitor = connect_rank_monitor(wanted)
    if monitor is None:
        yield
        return
    phases.listeners.append(monitor.enter)
    try:
        yield
    finally:
        phases.listeners.remove(monitor.enter)
        monitor.close()


def connect_rank_monitor(wanted: bool | Literal["auto"]) -> RankMonitor | None:
    """The monitor of this rank, or None where it is not wanted or not there.

    Args:
        wanted: faults.resiliency_ext.

    Raises:
        UserError: it is wanted, but the package or its launcher is missing.
    """
    launched = _SOCKET_VARIABLE in os.environ
    if wanted is False or (wanted == "auto" and not launched):
        return None
    if not launched:
        raise UserError(
            f"faults.resiliency_ext=true, but this process was not started by ft_launcher ({_SOCKET_VARIABLE} is not "
            "set); start it with ft_launcher in place of torchrun, or set faults.resiliency_ext=auto"
        )
    try:
        from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient
    except ImportError as error:
        raise UserError(f"nvidia-resiliency-ext cannot be imported ({error}): {INSTALL}") from None
    client = RankMonitorClient()
    client.init_workload_monitoring()
    return RankMonitor(client)
