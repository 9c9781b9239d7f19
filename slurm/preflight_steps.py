"""Running one command on many nodes of an allocation at once, and not waiting for those that hang."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slurm.containers import container_words, with_setup
from slurm.job import Job
from slurm.launch import step_environment
from slurm.preflight_probes import CLOCK_MARK
from slurm.profile import ClusterProfile
from slurm.scheduler import compress

# srun ends its step on SIGTERM; it gets so long for it.
KILL_SECONDS = 10.0
AT_ONCE = 32


@dataclass
class Outcome:
    """What came back from a step."""

    lines: list[tuple[float, str]] = field(default_factory=list)
    """Time of arrival (s since the epoch, this host's clock) and text, of every line of the tasks' output."""
    said: dict[str, str] = field(default_factory=dict)
    """node -> what srun said of it, where it was asked alone."""
    timed_out: bool = False
    seconds: float = 0.0
    """Limit of the step."""

    def why_silent(self, node: str, limit: str) -> str:
        """Why a node gave no answer; `limit` is the field that sets the time."""
        said = self.said.get(node, "")
        if self.timed_out:
            return f"no answer within {self.seconds:g} s ({limit}){': ' + said if said else ''}"
        return f"no answer: {said or 'its task ended without a word'}"


@dataclass(frozen=True)
class Steps:
    """Steps of preflight in the allocation around this process."""

    job: Job
    profile: ClusterProfile
    folder: Path
    """Where requests and answers are, on the shared file system."""

    def within(self, name: str) -> Steps:
        """The same with a folder of its own below, made here."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return replace(self, folder=folder)

    def host_command(self, module: str, *arguments: str) -> list[str]:
        """A module of this package, run outside any container."""
        return [self.profile.software.host_python, "-m", module, *arguments]

    def task_command(self, module: str, *arguments: str) -> list[str]:
        """A module of this package, run as a training is: in the container, after the profile's lines of setup."""
        # By hand the code is a link to the checkout.
        folders = [self.job.run_dir, self.job.cwd, self.folder, self.job.code.resolve()]
        enter = container_words(self.profile, folders, self.job.cwd, gpus=bool(self.job.gpus_per_node))
        command = [self.profile.software.python, "-m", module, *arguments]
        return [*enter, *with_setup(self.profile, command)]

    def run(self, nodes: Sequence[str], command: Sequence[str], seconds: float) -> Outcome:
        """Run `command` once on each node, for `seconds` at most; nodes that left no answer are tried again alone.

        A node that died a moment ago can keep the step from starting anywhere, so its neighbours get a second chance.
        """
        outcome = Outcome(seconds=seconds)
        if not nodes:
            return outcome
        self.srun(nodes, command, seconds, outcome)
        silent = [name for name in nodes if not answer_path(self.folder, name).is_file()]
        if silent and not outcome.timed_out:
            with ThreadPoolExecutor(AT_ONCE) as pool:
                said = pool.map(lambda name: self.srun([name], command, seconds, outcome), silent)
                outcome.said.update(zip(silent, said, strict=True))
        return outcome

    def srun(self, nodes: Sequence[str], command: Sequence[str], seconds: float, outcome: Outcome) -> str:
        """One step on `nodes`, ended after `seconds`; what its tasks, or srun, complained of."""
        words = [*srun_words(nodes), f"--chdir={self.job.cwd}", *command]
        own = {"PYTHONPATH": str(self.job.code), "PYTHONSAFEPATH": "1", "SLURM_EXPORT_ENV": "ALL"}
        environment = {**step_environment(), **own}
        process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace", env=environment
        )
        reader = threading.Thread(target=_read_lines, args=(process, outcome.lines), daemon=True)
        reader.start()
        errors: list[str] = []
        listener = threading.Thread(target=lambda: errors.append(_complaint(process)), daemon=True)
        listener.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            outcome.timed_out = True
            end(process)
        reader.join(KILL_SECONDS)
        listener.join(KILL_SECONDS)
        return errors[0] if errors else ""


def srun_words(nodes: Sequence[str]) -> list[str]:
    """srun with one task on each of `nodes`, beside whatever else the allocation runs there; none ends the others."""
    return [
        "srun",
        f"--nodes={len(nodes)}",
        f"--ntasks={len(nodes)}",
        f"--nodelist={compress(nodes)}",
        "--ntasks-per-node=1",
        "--overlap",
        "--no-kill",
        "--kill-on-bad-exit=0",
        "--wait=0",
        "--input=none",
        "--unbuffered",
        # All CPUs of the job, as its ranks will have.
        "--cpu-bind=none",
    ]


def end(process: subprocess.Popen[str]) -> None:
    """End a srun and its step; its tasks may hang, so it is not waited for without limit."""
    process.terminate()
    try:
        process.wait(KILL_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def clock_offsets(lines: Sequence[tuple[float, str]]) -> dict[str, float]:
    """Clock of each node minus this host's, in seconds, by that of its lines which arrived soonest.

    A line's way takes time, which makes the node's clock look late; the quickest line is nearest to the truth.
    """
    best: dict[str, float] = {}
    for arrival, line in lines:
        words = line.split()
        if len(words) == 3 and words[0] == CLOCK_MARK:
            best[words[1]] = max(best.get(words[1], float("-inf")), float(words[2]) - arrival)
    return best


def answer_path(folder: Path, node: str) -> Path:
    """Where a node's answer is."""
    return folder / f"{node}.json"


def read_answers(folder: Path, nodes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Answers of those nodes that gave one."""
    found = {}
    for name in nodes:
        path = answer_path(folder, name)
        if path.is_file():
            found[name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _read_lines(process: subprocess.Popen[str], lines: list[tuple[float, str]]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.append((time.time(), line))


def _complaint(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = process.stderr.read().strip().splitlines()
    # What a task said tells more than srun's word on how it ended.
    own = [line for line in lines if not line.startswith(("srun:", "slurmstepd:"))]
    first = [line for line in lines if "error:" in line][:1]
    return (own[-1:] or first or lines[-1:] or [""])[0]
