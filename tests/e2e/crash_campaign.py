"""Random faults, one after another, in one run: does it finish, with the curve of an undisturbed run, at what cost?

    PYTHONPATH=tests python tests/e2e/crash_campaign.py --steps 200 --faults 15 --report docs/crash_campaign.md

Faults: a rank is killed (SIGKILL), stopped (SIGSTOP) or sleeps in its loader; the job is told to stop (SIGTERM); a
batch has a NaN in it. The last is in the data, so the undisturbed run meets it too; all others must leave no trace.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fault_runs import command, environment
from tiny_shards import write_tiny_shards

from training.events import read_events

HANG_SECONDS = 6
# Share of the faults of each kind.
KINDS = {"kill": 5, "stop": 2, "sleep": 3, "terminate": 3, "nan": 3}
# A restart that never comes is not waited for.
LIMIT_SECONDS = 3600


@dataclass
class Outcome:
    """What became of one fault."""

    kind: str
    step: int
    rank: int | None
    struck: float
    """Unix time."""
    named: bool | None = None
    """Whether the watchdog named this rank, for faults that it should notice."""
    back: float | None = None
    """Seconds until the run was further than before."""
    repeated: int = 0
    """Steps that were done again."""


@dataclass
class Campaign:
    """The result of all of it."""

    outcomes: list[Outcome]
    steps: int
    ranks: int
    seconds: float
    lives: int
    refused: list[int]
    largest_difference: float
    """Of the loss, relative to the undisturbed run."""
    step_seconds: float


def draw_faults(steps: int, count: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    """Faults at steps of their own, in the order of the steps."""
    draw = random.Random(seed)
    kinds = draw.choices(list(KINDS), weights=list(KINDS.values()), k=count)
    # Some steps apart, and never in the first: every life gets beyond where it started.
    places = sorted(draw.sample(range(2, steps // 4), count))
    faults: list[dict[str, Any]] = []
    for kind, place in zip(kinds, places, strict=True):
        step, rank = 4 * place, draw.randrange(ranks)
        faults.append({"name": kind, "step": step, "rank": rank, **_planted(kind, step)})
    return faults


def _planted(kind: str, step: int) -> dict[str, Any]:
    return {
        "kill": {"kind": "send", "signal": "SIGKILL"},
        "stop": {"kind": "send", "signal": "SIGSTOP"},
        "sleep": {"kind": "sleep", "seconds": 10_000},
        # Sent by this script to the launcher.
        "terminate": {"kind": "none"},
        # In the data: whoever trains on it meets it.
        "nan": {"kind": "scale", "factor": "nan", "last": step},
    }[kind]


def run_undisturbed(folder: Path, steps: int, ranks: int, faults: list[dict[str, Any]]) -> None:
    """The same run with the faults of its data alone."""
    of_data = [fault for fault in faults if fault["name"] == "nan"]
    arguments = command(folder, "undisturbed", f"training.steps={steps}", ranks=ranks)
    subprocess.run(arguments, env=environment(folder / "undisturbed", of_data), check=True, timeout=LIMIT_SECONDS)


def run_disturbed(folder: Path, steps: int, ranks: int, faults: list[dict[str, Any]]) -> float:
    """Start the job again until it is done, as a scheduler would.

    Returns:
        Seconds from the first start to the end.
    """
    overrides = [f"training.steps={steps}", f"faults.hang_seconds={HANG_SECONDS}", "faults.hang_seconds_start=200"]
    launch = ("--standalone", "--nproc-per-node", str(ranks), "--max-restarts", "100")
    arguments = command(folder, "disturbed", *overrides, launch=launch)
    planted = [fault for fault in faults if fault["kind"] != "none"]
    told = [fault for fault in faults if fault["kind"] == "none"]
    begin = time.monotonic()
    while time.monotonic() - begin < LIMIT_SECONDS:
        job = subprocess.Popen(arguments, env=environment(folder / "disturbed", planted))
        while job.poll() is None:
            time.sleep(0.1)
            if told and _last_step(folder / "disturbed") >= told[0]["step"]:
                _mark(folder, told.pop(0))
                job.send_signal(signal.SIGTERM)
                job.wait()
        if job.returncode == 0:
            return time.monotonic() - begin
    raise TimeoutError(f"not done after {LIMIT_SECONDS} s")


def _mark(folder: Path, fault: dict[str, Any]) -> None:
    (folder / "disturbed_marks" / f"none_{fault['rank']}_{fault['step']}").touch()


def _lines(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    # The last line may be under way.
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def _last_step(run_dir: Path) -> int:
    lines = _lines(run_dir)
    return lines[-1]["step"] if lines else 0


def judge(folder: Path, steps: int, ranks: int, faults: list[dict[str, Any]], seconds: float) -> Campaign:
    """Compare the two runs, and find out what every fault cost."""
    expected = {line["step"]: line["loss"] for line in _lines(folder / "undisturbed")}
    lines = _lines(folder / "disturbed")
    differences = [
        abs(line["loss"] - expected[line["step"]]) / abs(expected[line["step"]])
        for line in lines
        if not line["refused"]
    ]
    hangs = read_events(folder / "disturbed", "hang")
    outcomes = [found for fault in faults if (found := _outcome(folder, fault, lines, hangs)) is not None]
    return Campaign(
        outcomes=outcomes,
        steps=len({line["step"] for line in lines}),
        ranks=ranks,
        seconds=seconds,
        lives=lines[-1]["life"],
        refused=sorted({line["step"] for line in lines if line["refused"]}),
        largest_difference=max(differences),
        step_seconds=statistics.median(line["step_seconds"] for line in lines),
    )


def _outcome(
    folder: Path, fault: dict[str, Any], lines: list[dict[str, Any]], hangs: list[dict[str, Any]]
) -> Outcome | None:
    if fault["name"] == "nan":
        return None
    struck = (folder / "disturbed_marks" / f"{fault['kind']}_{fault['rank']}_{fault['step']}").stat().st_mtime
    found = Outcome(fault["name"], fault["step"], None if fault["name"] == "terminate" else fault["rank"], struck)
    before = [line for line in lines if line["time"] <= struck + HANG_SECONDS]
    furthest = max((line["step"] for line in before), default=0)
    life = before[-1]["life"] if before else 0
    after = [line for line in lines if line["life"] > life]
    beyond = next((line for line in after if line["step"] > furthest), None)
    if beyond is not None:
        found.back = beyond["time"] - struck
        found.repeated = furthest - after[0]["step"] + 1
    if fault["name"] in ("stop", "sleep"):
        mine = [hang for hang in hangs if datetime.fromisoformat(hang["time"]).timestamp() > struck]
        found.named = bool(mine) and [culprit["rank"] for culprit in mine[0]["culprits"]] == [fault["rank"]]
    return found


def write_report(campaign: Campaign, path: Path, seed: int) -> None:
    """The page for the operator."""
    useful = campaign.steps * campaign.step_seconds
    rows = [
        f"| {item.step} | {item.kind} | {'job' if item.rank is None else item.rank} | "
        f"{'' if item.named is None else 'yes' if item.named else 'NO'} | {item.back:.1f} | {item.repeated} |"
        for item in campaign.outcomes
    ]
    backs = [item.back for item in campaign.outcomes if item.back is not None]
    text = f"""# Crash campaign

Written by `tests/e2e/crash_campaign.py` (seed {seed}): one run of {campaign.steps} steps on {campaign.ranks} gloo ranks
of one CPU machine that had other work, {len(campaign.outcomes)} faults that end the job and NaN in the data of
{len(campaign.refused)} steps. The model is tiny; a step takes {campaign.step_seconds:.3f} s, so nearly all of the time
is start-up, and the seconds say nothing about a cluster.

- The run finished, in {campaign.lives} lives and {campaign.seconds:.0f} s ({useful:.0f} s of them useful steps).
- Largest relative difference of the loss, of any step of any life, to the undisturbed run:
  {campaign.largest_difference:.1e}.
- Refused for NaN, and equal in both runs: steps {campaign.refused}.
- Hung ranks named rightly: {sum(bool(item.named) for item in campaign.outcomes)} of
  {sum(item.named is not None for item in campaign.outcomes)} (limit {HANG_SECONDS} s without progress).
- From a fault to a step beyond where it struck: median {statistics.median(backs):.1f} s, at most {max(backs):.1f} s.

| data step | fault | rank | named | seconds until further than before | steps repeated |
|---|---|---|---|---|---|
{chr(10).join(rows)}

`kill`: SIGKILL. `stop`: SIGSTOP; the others end by themselves, but torchrun waits 30 s before it kills what does not
answer SIGTERM. `sleep`: the loader stops building. `terminate`: SIGTERM to torchrun; the run saves first, and repeats
nothing. A fault strikes when the loader builds the batch of its data step, two steps ahead of training.
"""
    path.write_text(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--faults", type=int, default=15)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, required=True)
    parser.add_argument("--folder", type=Path, help="kept; else a temporary one")
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="campaign"))
    try:
        campaign = run_campaign(folder, arguments.steps, arguments.faults, arguments.ranks, arguments.seed)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder, ignore_errors=True)
    write_report(campaign, arguments.report, arguments.seed)
    return 0 if campaign.largest_difference < 1e-6 and all(item.named is not False for item in campaign.outcomes) else 1


def run_campaign(folder: Path, steps: int, count: int, ranks: int, seed: int) -> Campaign:
    """Both runs, and their comparison."""
    folder.mkdir(parents=True, exist_ok=True)
    write_tiny_shards(folder / "shards")
    faults = draw_faults(steps, count, ranks, seed)
    run_undisturbed(folder, steps, ranks, faults)
    seconds = run_disturbed(folder, steps, ranks, faults)
    return judge(folder, steps, ranks, faults, seconds)


if __name__ == "__main__":
    sys.exit(main())
