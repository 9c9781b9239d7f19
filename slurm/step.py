"""One step of the job, all ranks of a training: started, warned of the end, watched for signs of life, ended.

Signals go to the ranks through srun, which needs no controller: USR1 (save and leave) and TERM (srun kills the step).
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from slurm.allocation import Allocation, is_dead, say
from slurm.job import STOP
from slurm.profile import Heartbeat
from slurm.rank import NODES_FOLDER, STACKS_SIGNAL
from slurm.run_files import METRICS_FILE, Marks
from slurm.scheduler import SlurmError, ask

POLL_SECONDS = 0.5
# srun's exit code where the supervisor did not wait for it: 128 + SIGTERM.
SIGNALLED = 143
# A rank that has not reached its loop has no handler yet and would miss a warning that comes once.
_WARN_EVERY_SECONDS = 10.0
_STATES_EVERY_SECONDS = 15.0
# srun ends a step that is told to within KillWait (30 s by default) and a little more.
_KILL_SECONDS = 60.0
_STACKS_SECONDS = 5.0


class StopRequest:
    """Whether the job is to save and leave: by a signal, by STOP in the run's folder, or at the end of its time."""

    def __init__(self, slurm_dir: Path, warning_seconds: float) -> None:
        self._stop_file, self._warning_seconds = slurm_dir / STOP, warning_seconds
        self._warn_at: float | None = None
        self._signal: signal.Signals | None = None

    def set_end(self, end_time: float | None) -> None:
        """The job's time ends then, which SLURM's own warning may come too late or too early for."""
        self._warn_at = None if end_time is None else end_time - self._warning_seconds

    def listen(self) -> None:
        """Take USR1 and TERM from now on."""
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, self._remember)

    @property
    def reason(self) -> str | None:
        """Why the job is to leave, or None."""
        if self._stop_file.exists():
            return f"{STOP} in the run's folder"
        if self._signal is not None:
            return f"{self._signal.name} from SLURM"
        late = self._warn_at is not None and time.time() >= self._warn_at
        return "the end of the job's time" if late else None

    @property
    def by_person(self) -> bool:
        """Whether it is not to be started again by itself."""
        return self._stop_file.exists()

    @property
    def is_killed(self) -> bool:
        """Whether SLURM said that it is about to end the job: at its cancellation, its preemption, a lost node."""
        return self._signal is signal.SIGTERM

    def _remember(self, number: int, frame: object) -> None:
        self._signal = signal.Signals(number)


@dataclass(frozen=True)
class StepEnd:
    """How a step ended."""

    code: int
    """srun's exit code."""
    seconds: float
    warned: str | None = None
    """Why the ranks were told to save and leave."""
    dead_nodes: tuple[str, ...] = ()
    """Nodes of the step that SLURM gave up while it ran."""
    silent: str | None = None
    """What it was that did not come, of a step that showed no sign of life and was ended."""


class Step:
    """A running step.

    Args:
        command: srun and its arguments.
        environment: of srun.
        attempt: folder of the start.
        run_dir: the run's folder, where the training leaves its signs of life.
        heartbeat: how long it may be silent.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str], attempt: Path, run_dir: Path, heartbeat: Heartbeat
    ) -> None:
        self._attempt, self._heartbeat, self._run_dir = attempt, heartbeat, run_dir
        self._before = self._marks = Marks.of_run(run_dir)
        self._started = self._last_sign = self._last_look = time.monotonic()
        self._last_warning = -_WARN_EVERY_SECONDS
        self._stepping = False
        with (attempt / "srun.log").open("ab") as log:
            self._srun = subprocess.Popen(
                list(command), stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=dict(environment)
            )

    def run(self, stop: StopRequest, allocation: Allocation, nodes: Sequence[str]) -> StepEnd:
        """Wait for the end, and bring it about when the job is to leave, a node is lost, or nothing moves any more.

        Args:
            stop: looked at all the time.
            allocation: of the job.
            nodes: of this step.
        """
        warned: str | None = None
        silent: str | None = None
        dead: tuple[str, ...] = ()
        with ThreadPoolExecutor(1) as pool:
            watch = _NodeWatch(pool, allocation.node_states, nodes)
            while self._srun.poll() is None:
                if stop.reason is not None:
                    warned = stop.reason
                    self._warn(warned)
                if stop.is_killed and allocation.is_over():
                    # SLURM ends the step too, and kills this process so soon that it must not wait for that.
                    return StepEnd(SIGNALLED, time.monotonic() - self._started, warned)
                dead, silent = watch.dead(), self._silence()
                if dead or silent:
                    say(f"{silent or f'SLURM gave up {dead}'}: the step is ended")
                    if silent:
                        self._ask_for_stacks(allocation)
                    self._end(allocation)
                    break
                time.sleep(POLL_SECONDS)
        return StepEnd(self._srun.wait(), time.monotonic() - self._started, warned, dead, silent)

    def _warn(self, reason: str) -> None:
        now = time.monotonic()
        if now - self._last_warning >= _WARN_EVERY_SECONDS:
            if self._last_warning < 0:
                say(f"{reason}: the ranks are told to save and leave")
            self._last_warning = now
            self._srun.send_signal(signal.SIGUSR1)

    def _silence(self) -> str | None:
        """What has not come for too long, or None."""
        now, limits = time.monotonic(), self._heartbeat
        if now - self._last_look < min(10.0, limits.step_seconds / 10, limits.start_seconds / 10):
            return None
        self._last_look = now
        marks = Marks.of_run(self._run_dir)
        logs = Marks.of(list((self._attempt / NODES_FOLDER).glob("*.log")))
        marks = Marks(marks.values | logs.values)
        if marks != self._marks:
            self._marks, self._last_sign = marks, now
        self._stepping = self._stepping or marks.changed_since(self._before, METRICS_FILE)
        if not self._stepping:
            late = now - self._started > limits.start_seconds
            return f"no step within {limits.start_seconds:g} s (heartbeat.start_seconds)" if late else None
        late = now - self._last_sign > limits.step_seconds
        return f"no sign of life for {limits.step_seconds:g} s (heartbeat.step_seconds)" if late else None

    def _end(self, allocation: Allocation) -> None:
        # srun takes it as an order to kill all tasks of the step, and carries it to the nodes by itself.
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            if number is signal.SIGKILL:
                # Without srun nobody would tell them.
                self._signal_step(allocation, "KILL")
            self._srun.send_signal(number)
            try:
                self._srun.wait(_KILL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                continue

    def _ask_for_stacks(self, allocation: Allocation) -> None:
        """Let every rank write its stacks; those that are stopped, or whose node is, do not."""
        self._signal_step(allocation, STACKS_SIGNAL.name.removeprefix("SIG"))
        time.sleep(_STACKS_SECONDS)

    def _signal_step(self, allocation: Allocation, name: str) -> None:
        """Send a signal to every process of the step, by the controller."""
        try:
            for number, step in allocation.steps().items():
                if step == self._attempt.name:
                    ask("scancel", f"--signal={name}", number, patience=10)
        except SlurmError as error:
            say(f"SIG{name} may not have reached all ranks: {error}")


class _NodeWatch:
    """Looks at the nodes' states now and then, in a thread: a controller that is away takes its time to say nothing."""

    def __init__(self, pool: ThreadPoolExecutor, states: Callable[[], Mapping[str, str]], nodes: Sequence[str]) -> None:
        self._pool, self._states, self._nodes = pool, states, nodes
        self._asked: Future[Mapping[str, str]] = pool.submit(states)
        self._last = time.monotonic()

    def dead(self) -> tuple[str, ...]:
        """Nodes that SLURM has given up, as far as is known."""
        now = time.monotonic()
        if not self._asked.done() or now - self._last < _STATES_EVERY_SECONDS:
            return ()
        found = self._asked.result()
        self._asked, self._last = self._pool.submit(self._states), now
        return tuple(node for node in self._nodes if is_dead(found.get(node, "")))
