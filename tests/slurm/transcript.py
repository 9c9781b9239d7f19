"""Writes docs/slurm/transcript.md: commands typed on a real SLURM of three nodes, and what they printed.

    NODES=3 tests/slurm/lab/box.sh .venv/bin/python tests/slurm/transcript.py docs/slurm/transcript.md [SCENE ...]

Scenes that are named are played alone, each time on a new cluster; all but the first are added to what the file has.
Nothing is edited but the name of the temporary folder, which becomes ~, and long outputs, whose cuts are marked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "slurm")]

from data_runs import make_small_data  # noqa: E402
from fault_runs import SETTINGS  # noqa: E402
from tiny_shards import write_tiny_shards  # noqa: E402

LAB = ROOT / "tests" / "slurm" / "lab"
LONGEST = 40
"""Lines of an output that are shown; of longer ones the first and the last."""
PROFILE = {
    "slurm": {"partition": "gpu", "gpus_per_node": 0, "cpus_per_node": 2, "memory_per_node": "4G"},
    "launch": {"processes_per_node": 1},
    "environment": {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "eth0"},
    "restarts": {"warning_seconds": 60},
    "shared_folders": ["/tmp"],
    "preflight": {
        "local_folder": "/tmp/local",
        "min_local_free_gib": 0.1,
        "local_probe_mib": 8,
        "min_local_write": 1,
        "min_local_read": 1,
        "min_shared_free_gib": 1,
        "shared_probe_mib": 8,
        "min_shared_write": 1,
        "min_shared_read": 1,
        "min_free_memory_gib": 0.5,
        "min_gemm_tflops": 0.001,
        "gemm_seconds": 1,
        "gemm_size": 256,
        "min_allreduce_gb_s": 0.001,
        "allreduce_mib": 4,
    },
}
HEAD = """# Transcript of the SLURM suite's scenes

Written by `tests/slurm/transcript.py` ({date}, SLURM {slurm}), on the cluster that `tests/slurm/run.sh` starts: a real
controller and three nodes in namespaces of one machine of {cores} cores without a GPU, with other work on it, so its
times say nothing. A tiny model is trained over gloo. What is done to the nodes from outside stands in italics; outputs
of more than {longest} lines are cut where "[... lines]" stands; `~` is the folder of the user.
"""


class Transcript:
    """Runs commands as a user would, in one folder, and keeps what was said."""

    def __init__(self, folder: Path, before: str | None = None) -> None:
        """`before`: what the document has already, if this adds to it."""
        self.folder, self._before = folder, before
        self.parts: list[str] = []
        paths = [str(Path(sys.executable).parent), os.environ["PATH"]]
        self._environment = {**os.environ, "PATH": ":".join(paths), "XDG_STATE_HOME": str(folder / ".state")}
        self._environment["PYTHONPATH"] = str(ROOT)

    def heading(self, text: str) -> None:
        """A scene begins."""
        self.parts.append(f"\n## {text}\n")

    def note(self, text: str) -> None:
        """Something that happens outside the user's terminal."""
        self.parts.append(f"\n*{text}*\n")

    def type(self, command: str, keep: Callable[[str], bool] = lambda line: True) -> str:
        """Run a command, and keep it with its output; `keep` says which lines."""
        result = self._run(command)
        text = result.stdout.replace(str(self.folder), "~")
        lines = [line.rstrip() for line in text.splitlines() if keep(line)]
        dropped = len(text.splitlines()) - len(lines)
        if len(lines) > LONGEST:
            half = LONGEST // 2
            lines = [*lines[:half], f"[... {len(lines) - LONGEST} lines]", *lines[-half:]]
        if dropped:
            lines.append(f"[... {dropped} other lines]")
        code = [f"(exit code {result.returncode})"] if result.returncode else []
        self.parts.append("\n".join(["", "```console", f"$ {command}", *lines, *code, "```", ""]))
        print(f"$ {command}\n" + "\n".join(lines), flush=True)
        return result.stdout

    def wait(self, what: Callable[[], bool], seconds: float = 240.0) -> None:
        """Until something has come about; after `seconds` the transcript goes on all the same, and shows it."""
        deadline = time.monotonic() + seconds
        while not what() and time.monotonic() < deadline:
            time.sleep(0.5)

    def status(self, run: str) -> dict[str, Any]:
        """State of a run, not shown."""
        found = self._run(f"megatron-video slurm status {run} --json").stdout
        states: list[dict[str, Any]] = json.loads(found) if found.startswith("[") else []
        return states[0] if states else {}

    def step(self, run: str) -> int:
        """Last step that a run has done."""
        path = self.folder / run / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return int(json.loads(lines[-1])["step"]) if lines else 0

    def log(self, run: str) -> str:
        """Of the batch process of a run's newest job."""
        logs = sorted((self.folder / run).glob("slurm/0*/slurm-*.out"))
        return logs[-1].read_text() if logs else ""

    def write(self, path: Path) -> None:
        """The document so far."""
        slurm = subprocess.run(["sinfo", "--version"], capture_output=True, text=True).stdout.split()[-1]
        date, cores = time.strftime("%Y-%m-%d"), os.cpu_count()
        head = HEAD.format(date=date, slurm=slurm, cores=cores, longest=LONGEST)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = self._before if self._before is not None else head
        path.write_text(before + "".join(self.parts), encoding="utf-8")

    def _run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def node(*words: str) -> None:
    """Something done to a node."""
    subprocess.run([LAB / "node.sh", *words], check=True)


def make_inputs(folder: Path) -> None:
    """What the user has: shards, the configuration of a small training, the cluster's profile."""
    write_tiny_shards(folder / "shards")
    configuration: dict[str, Any] = {}
    for setting in (*SETTINGS, f"data.shards=[{folder}/shards]", "training.save_every=20"):
        key, value = setting.split("=", 1)
        group, field = key.split(".")
        configuration.setdefault(group, {})[field] = yaml.safe_load(value)
    (folder / "tiny.yaml").write_text(yaml.safe_dump(configuration))
    (folder / "cluster.yaml").write_text(yaml.safe_dump(PROFILE))


def refusals(shell: Transcript) -> None:
    """Wrong input, before anything is submitted."""
    shell.heading("The cluster, and what is refused before submission")
    shell.type("sinfo --partition=gpu")
    shell.type("cat cluster.yaml")
    submit = "megatron-video slurm submit pretrain --profile cluster.yaml --config tiny.yaml"
    shell.type(f"{submit} run.output_dir=run --nodes 9 --time 11-00 --no-check dry-run")
    shell.type(f"{submit} run.output_dir=run --set slurm.partitions=gpu")


def refused_node(shell: Transcript) -> None:
    """A bad node at the start, a node lost in mid-step, and the end by a person."""
    shell.heading("A training whose first node is refused by preflight")
    node("enter", "node1", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/tmp/local")
    shell.note("The local disk of node1 is full.")
    shell.type(
        "megatron-video slurm submit pretrain --profile cluster.yaml --config tiny.yaml run.output_dir=first"
        " training.steps=100000 --nodes 1 --spares 2 --time 60"
    )
    shell.wait(lambda: shell.step("first") > 30)
    shell.type("megatron-video slurm status first")
    shell.type("megatron-video slurm logs first --batch")
    shell.type("cat first/slurm/bad_nodes.json")
    shell.type("megatron-video slurm nodes --run first")

    shell.heading("Its node loses its power in mid-step")
    before = shell.step("first")
    node("crash", "node2")
    shell.note(f"node2 loses its power, after step {before}.")
    shell.wait(lambda: shell.log("first").count("] start ") > 1 and shell.status("first").get("state") == "running")
    started = shell.step("first")
    shell.wait(lambda: shell.step("first") > max(before, started) + 20)
    shell.type("megatron-video slurm status first")
    shell.type("megatron-video slurm logs first --batch")
    node("start", "node2")
    node("enter", "node1", "umount", "--lazy", "/tmp/local")

    shell.heading("A person ends it")
    shell.type('megatron-video slurm cancel first --reason "the learning rate was too high"')
    shell.type("megatron-video slurm status first")
    shell.type("tail -n 2 first/slurm/attempts.jsonl", keep=lambda line: True)


def requeued(shell: Transcript) -> None:
    """The warning before the limit: save, requeue, resume by itself, finish."""
    shell.heading("The time ends: saved, requeued, resumed, finished")
    shell.wait(lambda: "down" not in subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout)
    submitted = shell.type(
        "megatron-video slurm submit pretrain --profile cluster.yaml --config tiny.yaml run.output_dir=second"
        " training.steps=400 --nodes 2 --time 60 --set preflight.enabled=false --json"
    )
    job = json.loads(submitted)["jobs"][0]
    shell.wait(lambda: shell.step("second") > 30)
    shell.note("What SLURM does `restarts.warning_seconds` before the end of the wall time is done now, by hand.")
    shell.type(f"scancel --batch --signal=USR1 {job}")
    shell.wait(lambda: "back into the queue" in shell.log("second"))
    shell.type(f"squeue --jobs={job}")
    shell.wait(lambda: shell.status("second").get("state") == "done")
    shell.type("megatron-video slurm status second")
    shell.type("megatron-video slurm logs second --batch")
    shell.type("megatron-video slurm resume second")


def failing_shard(shell: Transcript) -> None:
    """An array of which one task fails, and is done again alone."""
    shell.heading("An array of data preparation with a failing shard")
    make_small_data(shell.folder / "data", clips=6)
    limit = 'if [ "${SLURM_ARRAY_TASK_ID:-}" = 1 ] && [ ! -e ~/mended ]; then ulimit -f 8; fi'
    profile = {**PROFILE, "software": {"setup": [limit.replace("~", str(shell.folder))]}}
    (shell.folder / "data.yaml").write_text(yaml.safe_dump(profile))
    shell.note("A line of setup in data.yaml lets the second task write no file of more than 8 KiB.")
    shell.type(
        "megatron-video slurm submit data --profile data.yaml --shards 3 --cpus 2 encode --in data/ingested.parquet"
        " --vae data/vae --text data/text --out encoded --buckets 17x32x32 --samples-per-shard 2 --batch-size 2"
    )
    shell.wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip())
    shell.type("megatron-video slurm status encoded")
    (shell.folder / "mended").touch()
    shell.note("The limit is taken away.")
    shell.type("megatron-video slurm resume encoded")
    shell.wait(lambda: not subprocess.run(["squeue", "-h"], capture_output=True, text=True).stdout.strip())
    shell.type("megatron-video slurm status encoded")
    shell.type("ls encoded")


def by_hand(shell: Transcript) -> None:
    """An operator checks nodes."""
    shell.heading("An operator checks nodes by hand, and drains what is bad")
    slow = ["tc", "qdisc", "add", "dev", "eth0", "root", "tbf", "rate", "40mbit", "burst", "64kb", "latency", "50ms"]
    node("enter", "node2", *slow)
    shell.note("The network interface of node2 passes 40 Mbit/s.")
    shell.type(
        "megatron-video slurm preflight --profile cluster.yaml --nodes 'node[1-3]' --set preflight.action=drain"
        " --set preflight.min_allreduce_gb_s=0.015 --set preflight.allreduce_mib=2 --set preflight.scores=$PWD/scores"
    )
    shell.type("sinfo --list-reasons")
    shell.type("megatron-video slurm preflight --profile cluster.yaml --nodes 'node[1-3]'")
    node("enter", "node2", "tc", "qdisc", "del", "dev", "eth0", "root")
    shell.type("scontrol update nodename=node2 state=resume")


SCENES = (refusals, refused_node, requeued, failing_shard, by_hand)


def main(argv: Sequence[str]) -> int:
    """Play all scenes, or those that are named behind the file, and write them."""
    path, names = Path(argv[0]), set(argv[1:])
    before = path.read_text() if path.exists() and names and SCENES[0].__name__ not in names else None
    with tempfile.TemporaryDirectory(prefix="transcript-", dir="/tmp") as folder:
        shell = Transcript(Path(folder), before)
        make_inputs(shell.folder)
        for scene in SCENES:
            if not names or scene.__name__ in names:
                scene(shell)
                shell.write(path)
        subprocess.run(["scancel", f"--user={os.environ.get('USER', 'root')}"], check=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
