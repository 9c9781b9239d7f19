"""`megatron-video demo`: the whole path at small size, from raw videos to a trained model and measured videos.

Every step is a command of its own, run in a process of its own and printed as one would type it. A demo that was
stopped goes on with the step it was in; finished steps are not repeated unless their inputs changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config
from megatron_video.errors import UserError
from training.demo_process import run_streamed
from training.demo_steps import DemoConfig, Layout, Step, plan_steps, write_prompts
from training.demo_summary import format_summary, last_logged_step, summarise
from training.telemetry import write_json

STATE_FILE = "demo_state.json"


class DemoState:
    """Which steps are done, on which inputs, and how long they took; kept in the demo's folder.

    A step's key covers its command and the keys of all steps before it, so a change re-runs what follows from it.
    """

    def __init__(self, out: Path, steps: Sequence[Step]) -> None:
        self.path = out / STATE_FILE
        self.records: dict[str, Any] = json.loads(self.path.read_text()) if self.path.is_file() else {}
        self.keys: dict[str, str] = {}
        key = ""
        for step in steps:
            # Chained: a step is redone when anything before it was done differently.
            key = hashlib.sha256(json.dumps([key, *step.command, step.kill_at]).encode()).hexdigest()[:16]
            self.keys[step.name] = key

    def seconds(self, step: Step) -> float | None:
        """Time that the finished step took; None if it is to be run."""
        record = self.records.get(step.name, {})
        # Outputs that were deleted by hand are made again.
        done = record.get("finished") and record.get("key") == self.keys[step.name]
        return float(record["seconds"]) if done and all(path.exists() for path in step.outputs) else None

    def begin(self, step: Step) -> None:
        """Remove outputs that the step cannot continue from, and note that it was begun on these inputs."""
        record = self.records.get(step.name, {})
        continues = step.resumable and record.get("key") == self.keys[step.name]
        if not continues:
            for path in step.outputs:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        spent = float(record.get("seconds", 0.0)) if continues else 0.0
        self.records[step.name] = {"key": self.keys[step.name], "seconds": spent, "finished": False}
        write_json(self.path, self.records)

    def end(self, step: Step, seconds: float, finished: bool) -> None:
        """Add the time of this try, also of one that failed."""
        record = self.records[step.name]
        self.records[step.name] = {**record, "seconds": record["seconds"] + seconds, "finished": finished}
        write_json(self.path, self.records)


def main(argv: Sequence[str]) -> int:
    """Run what is not done yet, then write and print the summary; 1 if a step or a check failed."""
    arguments = _parser().parse_args(argv)
    config = load_config(DemoConfig, None, arguments.config)
    _open_folder(arguments.out, arguments.force)
    # With --json, standard output holds the summary and nothing else.
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        summary = run_demo(config, arguments.out)
    if summary is None:
        return 1
    print(json.dumps(summary, indent=1, ensure_ascii=False) if arguments.json else format_summary(summary))
    return 1 if summary["failed_checks"] else 0


def run_demo(config: DemoConfig, out: Path) -> dict[str, Any] | None:
    """Run the steps that are not done yet and write `summary.json`; None if a step failed."""
    steps = plan_steps(config, out)
    state = DemoState(out, steps)
    # A summary of an earlier demo must not be taken for this one's if a step fails.
    (out / "summary.json").unlink(missing_ok=True)
    write_prompts(config, out)
    print(f"{len(steps)} steps, logs in {out / 'logs'}", flush=True)
    for number, step in enumerate(steps, 1):
        if not _run_step(step, number, len(steps), state, out):
            return None
    seconds = {step.name: state.seconds(step) or 0.0 for step in steps}
    logs = {step.name: log_path(out, number, step) for number, step in enumerate(steps, 1)}
    summary = summarise(config, steps, seconds, logs, out)
    write_json(out / "summary.json", summary)
    return summary


def log_path(out: Path, number: int, step: Step) -> Path:
    """Log of a step: its number and the words of its name."""
    words = "".join(c if c.isalnum() else " " for c in step.name).split()
    return out / "logs" / f"{number:02d}_{'_'.join(words)}.log"


def _run_step(step: Step, number: int, total: int, state: DemoState, out: Path) -> bool:
    head = f"[{number}/{total}] {step.name}"
    done = state.seconds(step)
    if done is not None:
        print(f"{head}: done before, {_clock(done)}", flush=True)
        return True
    print(f"\n{head}\n  $ {step.shown()}", flush=True)
    state.begin(step)
    log, started = log_path(out, number, step), time.monotonic()
    # None stays when Ctrl-C ends the step: the time is kept, the step is not finished.
    code: int | None = None
    try:
        code = _execute(step, log, out)
    finally:
        seconds = time.monotonic() - started
        state.end(step, seconds, finished=code == 0)
    if code:
        print(_failure(step, number, code, log, out), file=sys.stderr)
        return False
    print(f"  {step.name}: {_clock(seconds)}", flush=True)
    return True


def _execute(step: Step, log: Path, out: Path) -> int:
    """Exit code of the step; a step that is to be killed succeeds by being killed."""
    environment = {"OMP_NUM_THREADS": str(step.threads)}
    if step.kill_at is None:
        return run_streamed(step.command, log, environment)
    kill_at, run = step.kill_at, Layout(out).run
    code = run_streamed(step.command, log, environment, kill_when=lambda: last_logged_step(run) >= kill_at)
    if code == 0:
        print(f"  the job ended before it could be killed after step {kill_at}", file=sys.stderr)
        return 1
    # It died of something else before its time.
    if last_logged_step(run) < kill_at:
        return code
    print(f"  SIGKILL to all ranks after step {last_logged_step(run)}", flush=True)
    return 0


def _open_folder(out: Path, force: bool) -> None:
    """Make the folder, or check that it is a demo's.

    Raises:
        UserError: it holds something else.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    # Only what the state file marks as a demo's is ever deleted, with or without --force.
    if out.is_dir() and any(out.iterdir()) and not (out / STATE_FILE).is_file():
        raise UserError(f"--out {out} holds something that is no demo; name another folder")
    if force and out.is_dir():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / STATE_FILE).is_file():
        write_json(out / STATE_FILE, {})


def _failure(step: Step, number: int, code: int, log: Path, out: Path) -> str:
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    return (
        f"\nstep {number}, {step.name!r}, {how}\n  its command: {step.shown()}\n  its output:  {log}\n"
        f"  to continue: mend the cause and run the demo again with --out {out}; finished steps are kept"
    )


def _clock(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="megatron-video demo", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder (default: %(default)s)")
    fields = ", ".join(config_to_dict(DemoConfig()))
    parser.add_argument(
        "--config", nargs="+", default=[], metavar="key=value", help=f"other sizes; keys: {fields}; see demo_steps.py"
    )
    parser.add_argument("--force", action="store_true", help="delete the folder's earlier demo and start anew")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
