"""Kill a real training run again and again while it saves, and look at what is left each time.

    python tests/e2e/checkpoint_kills.py --kills 50 --ranks 1 --ranks 2 --report kills.json

Each life of the run goes on where the last one was killed; in the end it finishes, and every line of its metrics must
equal that of a run which nothing disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

if __name__ == "__main__":  # as a program, the test's helpers are one folder up
    sys.path.insert(0, str(Path(__file__).parent.parent))

from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from checkpoints_tools.verify import verify
from training.checkpoint_files import STATE_FILE
from training.checkpoint_folders import newest_checkpoint, recover
from training.telemetry import git_revision

SAVE_EVERY = 2
# Large enough that a save takes long, small enough that steps do not.
WIDTH = ["model.num_attention_heads=8", "model.attention_head_dim=32", "model.num_layers=3"]
SETTINGS = [
    *MODEL_OVERRIDES,
    *WIDTH,
    "run.seed=5",
    "data.micro_batch_size=2",
    "data.global_batch_size=4",
    "data.buckets=[1x48x48]",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=5",
    "ema.decay=0.9",
    "training.precision=fp32",
    f"training.save_every={SAVE_EVERY}",
    "training.keep_checkpoints=2",
]
REPLICAS = ["parallel.use_distributed_optimizer=true"]


@dataclass
class Kill:
    """One kill and what was found after it."""

    target: str
    """`process`: the only rank, `rank 0` or `rank 1`: one of two, which ends the job."""
    after_seconds: float
    """Since the save began."""
    caught: str
    """What the save had come to: `before the first file`, `files`, `published` (too late) or `metadata`."""
    published_before: int
    """Newest step whose checkpoint was seen complete before the kill; -1: none."""
    newest: int
    """Newest complete step after it."""
    bytes_verified: int = 0
    faults: list[str] = field(default_factory=list)
    orphans: int = 0
    """Processes of the job that were still there ten seconds later."""


@dataclass
class Report:
    """A whole campaign."""

    ranks: int
    kills: list[Kill]
    steps: int
    lives: int
    differing_lines: list[str]
    """Lines of metrics that differ from those of the undisturbed run."""
    seconds: float

    @property
    def wrong(self) -> list[str]:
        """Everything that must not be."""
        found = [f"kill {number}: {fault}" for number, kill in enumerate(self.kills) for fault in kill.faults]
        found += [
            f"kill {number}: step {kill.published_before} was complete, {kill.newest} is left"
            for number, kill in enumerate(self.kills)
            if kill.newest < kill.published_before
        ]
        found += [f"kill {number}: {kill.orphans} orphans" for number, kill in enumerate(self.kills) if kill.orphans]
        return found + self.differing_lines

    def summary(self) -> str:
        """A few lines with the figures."""
        caught, targets = (Counter(getattr(kill, name) for kill in self.kills) for name in ("caught", "target"))
        verified = sum(kill.bytes_verified for kill in self.kills)
        return (
            f"{self.ranks} rank(s): {len(self.kills)} kills ({_counts(targets)}) in {self.lives} lives of one run of "
            f"{self.steps} steps; caught: {_counts(caught)}; {verified / 1e9:.2f} GB verified by checksum after the "
            f"kills; {len(self.wrong)} faults, {len(self.differing_lines)} differing lines; {self.seconds:.0f} s"
        )


class Campaign:
    """Kills of one run in one layout.

    Args:
        folder: for shards and runs.
        ranks: 1, or 2 (data parallel, optimizer cut over them).
        steps: length of the run; long enough that it does not end before the last kill.
        seed: of the moments.
    """

    def __init__(self, folder: Path, ranks: int, steps: int, seed: int) -> None:
        self.folder, self.ranks, self.steps = folder, ranks, steps
        self._random = random.Random(seed)
        self._save_seconds = 0.3
        if not (folder / "shards").exists():
            write_tiny_shards(folder / "shards")
        (folder / "empty.yaml").write_text("")

    def run(self, kills: int, tell: Callable[[str], None] = lambda line: None) -> Report:
        """An undisturbed run, `kills` kills of another one, its end, and the comparison."""
        started = time.perf_counter()
        undisturbed = self._finish("undisturbed")
        found = []
        while len(found) < kills:
            kill = self._live_and_kill()
            if kill is None:
                raise RuntimeError(f"the run ended after {len(found)} kills; give it more than {self.steps} steps")
            found.append(kill)
            tell(f"kill {len(found)}/{kills}: {kill}")
        killed = self._finish("killed")
        differing = [
            f"life {line['life']} step {line['step']}: {name} {line[name]}, undisturbed {expected[name]}"
            for line in killed
            for expected in [next(other for other in undisturbed if other["step"] == line["step"])]
            for name in ("loss", "grad_norm", "learning_rate", "samples")
            if line[name] != expected[name]
        ]
        lives = max(line["life"] for line in killed)
        if {line["step"] for line in killed} != set(range(1, self.steps + 1)):
            differing.append("steps are missing")
        return Report(self.ranks, found, self.steps, lives, differing, time.perf_counter() - started)

    def _command(self, name: str) -> list[str]:
        launch = [sys.executable, "-m"]
        if self.ranks > 1:
            launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(self.ranks), "-m"]
        places = [f"run.output_dir={self.folder / name}", f"data.shards=[{self.folder / 'shards'}]"]
        layout = REPLICAS if self.ranks > 1 else []
        settings = [*SETTINGS, *layout, *places, f"training.steps={self.steps}"]
        return [*launch, "training.pretrain", "--config", str(self.folder / "empty.yaml"), *settings]

    def _finish(self, name: str) -> list[dict[str, Any]]:
        result = subprocess.run(self._command(name), capture_output=True, text=True, timeout=3600)
        if result.returncode:
            raise RuntimeError(result.stdout + result.stderr)
        events = (self.folder / name / "events.jsonl").read_text().splitlines()
        seconds = [event["seconds"] for event in map(json.loads, events) if event["event"] == "save"]
        self._save_seconds = sorted(seconds)[len(seconds) // 2]
        return _lines(self.folder / name / "metrics.jsonl")

    def _live_and_kill(self) -> Kill | None:
        """One life: until a random moment of one of its first saves; None: it came to its end."""
        root = self.folder / "killed" / "checkpoints"
        job = subprocess.Popen(
            self._command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        saves = self._random.randint(1, 4)
        delay = self._random.uniform(0, 1.3 * self._save_seconds)
        if not _wait_for_saves(job, root, saves):
            return None
        begun = time.perf_counter()
        published = max((_step(path) for path in root.glob("step_????????")), default=-1)
        time.sleep(delay)
        published = max([published, *(_step(path) for path in root.glob("step_????????"))])
        tree = [psutil.Process(job.pid), *psutil.Process(job.pid).children(recursive=True)]
        target = self._kill_one(job)
        kill = Kill(target, time.perf_counter() - begun, "", published, -1)
        job.wait(120)
        _, alive = psutil.wait_procs(tree, timeout=10)
        kill.orphans = len(alive)
        self._look(root, kill)
        return kill

    def _kill_one(self, job: subprocess.Popen[bytes]) -> str:
        if self.ranks == 1:
            job.send_signal(signal.SIGKILL)
            return "process"
        workers = sorted(psutil.Process(job.pid).children(), key=lambda process: process.pid)
        chosen = self._random.randrange(len(workers))
        workers[chosen].kill()
        return f"rank {chosen}"

    def _look(self, root: Path, kill: Kill) -> None:
        """What the kill caught, and whether the newest checkpoint is whole."""
        kill.caught = _caught(root)
        # As the next life does; it is done here so that the checkpoint can be verified as that life will find it.
        recover(root)
        newest = newest_checkpoint(root)
        if newest is not None:
            verdict = verify(newest)
            kill.newest, kill.bytes_verified, kill.faults = _step(newest), verdict.bytes, verdict.faults


def _wait_for_saves(job: subprocess.Popen[bytes], root: Path, count: int) -> bool:
    """Until the `count`-th save of this life has begun; False: the job ended first."""
    # What the last life left is not a save of this one.
    seen = {path.name for path in root.glob("*.writing")}
    wanted = len(seen) + count
    while len(seen) < wanted:
        if job.poll() is not None:
            return False
        seen |= {path.name for path in root.glob("*.writing")}
        time.sleep(0.002)
    return True


def _caught(root: Path) -> str:
    writing = list(root.glob("*.writing"))
    if not writing:
        return "published"
    names = {path.name for path in writing[0].iterdir()} if writing[0].is_dir() else set()
    if names & {".metadata", "metadata.json", STATE_FILE}:
        return "metadata"
    return "files" if any(name.endswith(".distcp") for name in names) else "before the first file"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for text in path.read_text().splitlines():
        try:
            lines.append(json.loads(text))
        except ValueError:  # the killed life's last line
            continue
    return lines


def _counts(counter: Counter[str]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counter.items()))


def main() -> int:
    """Run campaigns and write their report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="kills in all, shared over the layouts")
    parser.add_argument("--ranks", type=int, action="append", choices=(1, 2), help="layouts; may be repeated")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", type=Path, required=True)
    arguments = parser.parse_args()
    layouts, reports = arguments.ranks or [1, 2], []
    for number, ranks in enumerate(layouts):
        share = arguments.kills * (number + 1) // len(layouts) - arguments.kills * number // len(layouts)
        with tempfile.TemporaryDirectory() as folder:
            campaign = Campaign(Path(folder), ranks, arguments.steps, arguments.seed + number)
            reports.append(campaign.run(share, lambda line: print(line, flush=True)))
        print(reports[-1].summary(), flush=True)
    campaigns = [
        {"code": git_revision(), "summary": report.summary(), "wrong": report.wrong, **asdict(report)}
        for report in reports
    ]
    arguments.report.write_text(json.dumps({"campaigns": campaigns}, indent=1) + "\n", encoding="utf-8")
    return int(any(report.wrong for report in reports))


if __name__ == "__main__":
    sys.exit(main())
