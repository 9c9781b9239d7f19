"""`megatron-video slurm cancel RUN|NAME|JOB`: let a training save and leave, and start nothing after it.

Writes STOP into the run's slurm folder, cancels what waits, signals the batch script of what runs, and waits until it
has left. With --now, and for jobs that are no trainings: scancel. `megatron-video slurm resume` goes on from there.
"""

from __future__ import annotations

import argparse
import getpass
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from megatron_video.files import write_atomically
from slurm import scheduler
from slurm.chain_commands import cancel_chain
from slurm.chain_record import find_chain
from slurm.checks import TRAININGS
from slurm.job import STOP, Job, load_job
from slurm.known_jobs import find_folder
from slurm.live_jobs import live_jobs
from slurm.run_files import last_step, latest_checkpoint
from slurm.scheduler import QueuedJob, SlurmAwayError

_POLL_SECONDS = 2.0
_TELL_SECONDS = 30.0


def main(argv: Sequence[str]) -> int:
    """Cancel a job, or a chain of stages."""
    arguments = _parse(argv)
    if (chain := find_chain(arguments.what)) is not None:
        numbers = cancel_chain(chain)
        print(f"cancelled: {', '.join(numbers) or f'nothing; no job of chain {chain.chain.name} is in the queue'}")
        return 0
    job, _ = load_job(find_folder(arguments.what))
    live = live_jobs(job.run_dir)
    if not live:
        print(f"{job.name}: nothing of {job.run_dir} is in the queue; there is nothing to cancel")
        return 0
    gently = job.kind in TRAININGS and not arguments.now
    if job.kind in TRAININGS:
        _write_stop(job, arguments.reason)
    _cancel([one for one in live if one.state == "PENDING" or not gently])
    running = [one for one in live if one.state != "PENDING"]
    if gently:
        _ask_to_leave(running)
    if arguments.no_wait:
        print(f"not waited for (--no-wait): megatron-video slurm status {job.run_dir}")
        return 0
    return _wait(job)


def _write_stop(job: Job, reason: str | None) -> None:
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"cancelled by {getpass.getuser()} at {when}{f': {reason}' if reason else ''}\n"
    write_atomically(job.slurm_dir / STOP, text.encode())
    print(f"wrote {job.slurm_dir / STOP}: nothing starts this run again until megatron-video slurm resume")


def _cancel(jobs: Sequence[QueuedJob]) -> None:
    if jobs:
        numbers = list(dict.fromkeys(one.job_id for one in jobs))
        scheduler.ask("scancel", *numbers)
        print(f"cancelled {', '.join(f'{one.job_id} ({one.state.lower()})' for one in jobs)}")


def _ask_to_leave(running: Sequence[QueuedJob]) -> None:
    for one in running:
        # To the batch script alone: it passes the word on to the ranks itself.
        scheduler.ask("scancel", "--batch", "--signal=USR1", one.job_id)
        print(f"told job {one.job_id} on {one.nodes} to save and leave")


def _wait(job: Job) -> int:
    """Wait until nothing of the run is in the queue; tell what is saved."""
    told, saying = time.monotonic(), ""
    while True:
        try:
            live = live_jobs(job.run_dir, patience=0.0)
        except SlurmAwayError:
            live, now = None, "SLURM does not answer"
        if live is not None:
            if not live:
                break
            now = ", ".join(f"job {one.job_id} {one.state.lower()}" for one in live)
            # SLURM itself may have requeued it, for a node that failed meanwhile.
            _cancel([one for one in live if one.state == "PENDING"])
        if now != saying or time.monotonic() - told > _TELL_SECONDS:
            print(f"waiting: {now}, last step {last_step(job.run_dir)}", flush=True)
            told, saying = time.monotonic(), now
        time.sleep(_POLL_SECONDS)
    print(f"left the queue; {_saved(job.run_dir)}")
    return 0


def _saved(run_dir: Path) -> str:
    checkpoint = latest_checkpoint(run_dir)
    if checkpoint is None:
        return "there is no checkpoint: it starts from the beginning"
    saved = f"it goes on from {checkpoint.folder} (last step {last_step(run_dir)})"
    return f"{saved}: megatron-video slurm resume {run_dir}"


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-video slurm cancel", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", metavar="RUN|NAME|JOB", help="run's folder, job's name or number")
    parser.add_argument("--now", action="store_true", help="scancel: what was done since the last checkpoint is lost")
    parser.add_argument("--reason", help="kept in STOP, and told by status")
    parser.add_argument("--no-wait", action="store_true", help="do not wait until it has left; Ctrl-C does the same")
    return parser.parse_args(argv)
