"""The batch process of a stage that is no training: runs its units one after the other and keeps what became of each.

A unit that fails does not keep the others from being done; the job fails in the end, so that what waits for it does not
start. A unit that is done already is passed over, so a job may be started any number of times.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from slurm import scheduler
from slurm.job import Job, load_job
from slurm.profile import ClusterProfile
from slurm.results import Result, read_result, write_result
from slurm.stale_locks import all_results, free_stale_locks
from slurm.task_words import task_words

STOPPED_EXIT_CODE = 143
_TAIL_BYTES = 1 << 20


class Stopped(BaseException):
    """SLURM asked the job to end."""


@dataclass(frozen=True)
class Task:
    """This process."""

    job: Job
    profile: ClusterProfile
    scratch: Path
    """A folder of this node that goes with the process."""

    @property
    def results(self) -> Path:
        """Folder of the stage's results, which all its jobs share."""
        return Path(self.job.options["stage_dir"]) / "results"

    def run(self, units: Sequence[int]) -> int:
        """Do all units; 0 if every one of them is done."""
        codes = [self.run_unit(unit) for unit in units]
        failed = [str(unit) for unit, code in zip(units, codes, strict=True) if code]
        if failed:
            print(f"{self.job.name}: failed: {', '.join(failed)}", flush=True)
        return 1 if failed else 0

    def run_unit(self, unit: int) -> int:
        """Do one unit and keep its result."""
        earlier = read_result(self.results, unit)
        if earlier is not None and earlier.state == "done":
            print(f"{self.job.name} {unit}: done before, by job {earlier.job}", flush=True)
            return 0
        self._free_locks(unit)
        log = Path(self.job.options["stage_dir"]) / "logs" / f"{unit:06d}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        begun = Result(unit, "running", _job_id(), socket.gethostname(), time.time(), log=str(log))
        write_result(self.results, begun)
        print(f"{self.job.name} {unit}: started on {begun.host}; log: {log}", flush=True)
        try:
            code, text = self._call(unit, log)
        except Stopped:
            stopped = replace(begun, state="stopped", seconds=_since(begun), exit_code=STOPPED_EXIT_CODE)
            write_result(self.results, replace(stopped, message="ended by SLURM: cancelled, pre-empted or out of time"))
            raise
        message = "" if code == 0 else last_word(text) or f"exit code {code}, without a word"
        ended = replace(begun, state="failed" if code else "done", seconds=_since(begun), exit_code=code)
        write_result(self.results, replace(ended, message=message, report=last_json(text)))
        print(f"{self.job.name} {unit}: {ended.state} after {ended.seconds:.0f} s {message}".rstrip(), flush=True)
        return code

    def _call(self, unit: int, log: Path) -> tuple[int, str]:
        """Exit code of a unit's command, and the end of what it printed."""
        words = task_words(self.job, self.profile, self._filled(unit), self.scratch)
        environment = {**os.environ, "TMPDIR": str(self.scratch)}
        with open(log, "ab", buffering=0) as file:
            head = f"== job {_job_id()} on {socket.gethostname()}, {time.strftime('%F %T')}: {' '.join(words)}\n"
            file.write(head.encode())
            start = file.tell()
            process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, env=environment)
            try:
                code = process.wait()
            except Stopped:
                process.terminate()
                process.wait()
                raise
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - _TAIL_BYTES))
            return code, file.read().decode(errors="replace")

    def _filled(self, unit: int) -> list[str]:
        values = {"task": unit, "tasks": self.job.options["count"], "cpus": cpus(), "scratch": self.scratch}
        return [_fill(word, values) for word in self.job.command]

    def _free_locks(self, unit: int) -> None:
        values = {"task": unit, "tasks": self.job.options["count"]}
        paths = [Path(_fill(name, values)) for name in self.job.options.get("locks", [])]
        attempts = all_results(Path(self.job.options["chain"])) if any(path.exists() for path in paths) else []
        for line in free_stale_locks(paths, attempts, _is_over):
            print(line, flush=True)


def main(argv: Sequence[str]) -> int:
    """Command line of the batch process: the job's folder."""
    job, profile = load_job(Path(argv[0]))
    if any(name not in job.options for name in ("units", "stage_dir", "count", "chain")):
        raise UserError(f"{argv[0]}: not a job of a chain's stage")
    signal.signal(signal.SIGTERM, _stop)
    units = job.options["units"][int(os.environ.get("SLURM_ARRAY_TASK_ID", "0"))]
    # On the node, not in TMPDIR's place on a shared disk, unless the profile names one.
    place = profile.environment.get("TMPDIR") or os.environ.get("SLURM_TMPDIR") or "/tmp"
    with tempfile.TemporaryDirectory(prefix=f"megatron-video-{_job_id()}-", dir=place) as scratch:
        try:
            return Task(job, profile, Path(scratch)).run(units)
        except Stopped:
            return STOPPED_EXIT_CODE


def cpus() -> int:
    """CPUs that SLURM gave this task."""
    given = os.environ.get("SLURM_CPUS_PER_TASK") or os.environ.get("SLURM_CPUS_ON_NODE")
    return int(given) if given else len(os.sched_getaffinity(0))


def last_json(text: str) -> dict[str, Any]:
    """The last JSON object among the lines of a command's output; {} if there is none."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                found = json.loads(line)
            except ValueError:
                continue
            return found if isinstance(found, dict) else {}
    return {}


def last_word(text: str) -> str:
    """The line that says best why a command failed: the last error, else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("srun: ")]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:500]


def _fill(word: str, values: dict[str, Any]) -> str:
    # Not str.format: other braces in a command mean what its own parser says.
    for name, value in values.items():
        word = word.replace("{" + name + "}", str(value))
    return word


def _is_over(result: Result) -> bool:
    if result.job == _job_id():
        return True
    try:
        return not scheduler.queued(f"--jobs={result.job}", patience=10)
    except scheduler.SlurmError:
        return False


def _job_id() -> str:
    return os.environ.get("SLURM_JOB_ID", "0")


def _since(result: Result) -> float:
    return round(time.time() - result.started, 2)


def _stop(number: int, frame: FrameType | None) -> None:
    # Once is enough: what is done on the way out must not be interrupted.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
