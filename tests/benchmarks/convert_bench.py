"""`ckpt convert` against copying the same files (cp and fsync): seconds and memory, both ways, read back or not.

    python tests/benchmarks/convert_bench.py --heads 25 --folder /tmp/big          # all 785 tensors, narrower
    python tests/benchmarks/convert_bench.py --layers 8 --name full --folder /tmp/big   # few layers, full-size tensors

A synthetic checkpoint of a DiT in bf16, whose released folder goes to a megatron-core checkpoint and back. The ways
take turns; before each the source's pages are dropped from memory, and for reading back the output's, so that all read
from the disk. A whole command is timed, its imports included; `work_of_cp` leaves those out. Memory is what the kernel
says of the process: the peak of all resident pages, files' included, and of anonymous ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import children
import report
import torch

from checkpoints_tools.models import KINDS
from checkpoints_tools.released import write_config
from checkpoints_tools.safetensors_files import GIGABYTE, SafetensorsSink
from checkpoints_tools.transfer import forget_pages
from megatron_video.dit import DiTConfig
from megatron_video.files import sync

WHOLE_BYTES = 58_684_956_800
"""The released 30B: 29,342,478,400 parameters in bf16."""
MEMORY_LIMIT_GB = 8.0
COLUMNS = ["direction", "way", "gb", "mb_per_s", "of_cp", "work_of_cp", "wall_s", "cpu_s", "peak_gb", "anonymous_gb"]
_NOISE_ELEMENTS = 1 << 24


def write_synthetic(folder: Path, config: DiTConfig) -> int:
    """A released folder of random bf16 values; returns the bytes of its tensors."""
    kind = KINDS["dit"]
    model = kind.build(config)
    templates = {name: torch.empty(model.shapes[name], dtype=torch.bfloat16, device="meta") for name in model.released}
    folder.mkdir(parents=True)
    limit = None if kind.shard_gigabytes is None else int(kind.shard_gigabytes * GIGABYTE)
    sink = SafetensorsSink(folder, templates, kind.stem, limit, model.released)
    noise = torch.randn(_NOISE_ELEMENTS, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number, name in enumerate(sink.names):
        count = templates[name].numel()
        # Other bytes in each tensor, without the time of making them.
        values = noise.roll(number + 1).repeat(-(-count // _NOISE_ELEMENTS))[:count]
        sink.write(name, values.view(templates[name].shape))
    sink.finish()
    write_config(folder, model, templates)
    return sink.bytes


class _Memory(threading.Thread):
    """Watches a process until it ends."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self._status = Path(f"/proc/{pid}/status")
        self.peaks = {"VmHWM": 0, "RssAnon": 0, "RssFile": 0}

    def run(self) -> None:
        while True:
            try:
                lines = self._status.read_text().splitlines()
            except (FileNotFoundError, ProcessLookupError):
                return
            values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith(tuple(self.peaks))}
            if not values:  # it has ended, and nobody has waited for it yet
                return
            for name, value in values.items():
                self.peaks[name] = max(self.peaks[name], int(value) * 1024)
            time.sleep(0.02)


def measured(command: Sequence[str]) -> dict[str, float]:
    """Run a command to its end: seconds, CPU seconds, peak memory, and what it says of itself.

    Raises:
        RuntimeError: it failed.
    """
    with tempfile.TemporaryFile("w+") as told:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=told, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        memory = _Memory(process.pid)
        memory.start()
        output = process.stdout.read() if process.stdout else ""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - start
        told.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(command)}: {told.read().strip()}")
    inner = json.loads(output)["seconds"] if output.startswith("{") else wall
    return {
        "wall_s": wall,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "without_start_s": inner,
        "peak_gb": memory.peaks["VmHWM"] / 1e9,
        "anonymous_gb": memory.peaks["RssAnon"] / 1e9,
        "file_pages_gb": memory.peaks["RssFile"] / 1e9,
    }


def files_of(folder: Path) -> list[Path]:
    """All files of a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copy(source: Path, target: Path, read_back: bool) -> dict[str, float]:
    """cp, fsync of every file, and if wanted reading the copy from the disk."""
    for path in files_of(source):
        forget_pages(path)
    start = time.perf_counter()
    cost = measured(["cp", "-r", "--reflink=never", str(source), str(target)])
    for path in files_of(target):
        sync(path)
    if read_back:
        for path in files_of(target):
            forget_pages(path)
        cost["cpu_s"] += measured(["bash", "-c", f"cat '{target}'/* > /dev/null"])["cpu_s"]
    wall = time.perf_counter() - start
    shutil.rmtree(target)
    return cost | {"wall_s": wall, "without_start_s": wall}


def convert(source: Path, target: Path, read_back: bool, keep: bool = False) -> dict[str, float]:
    """The command, as a user gives it."""
    for path in files_of(source):
        forget_pages(path)
    options = ["--json"] if read_back else ["--json", "--no-verify"]
    command = children.python("-m", "megatron_video", "ckpt", "convert", "--in", str(source), "--out", str(target))
    cost = measured([*command, *options])
    if not keep:
        shutil.rmtree(target)
    return cost


def compare(direction: str, source: Path, scratch: Path, tensor_bytes: int, repeats: int) -> list[dict[str, Any]]:
    """One row per way."""
    target = scratch / "output"
    ways: Mapping[str, Callable[[], dict[str, float]]] = {
        "cp": lambda: copy(source, target, read_back=False),
        "convert --no-verify": lambda: convert(source, target, read_back=False),
        "cp and read": lambda: copy(source, target, read_back=True),
        "convert": lambda: convert(source, target, read_back=True),
    }
    rows = []
    for way, repetitions in children.in_turns(ways, repeats).items():
        row: dict[str, Any] = {"direction": direction, "way": way, "gb": tensor_bytes / 1e9}
        row |= {key: statistics.median(each[key] for each in repetitions) for key in repetitions[0]}
        row["peak_gb"] = max(each["peak_gb"] for each in repetitions)
        row["mb_per_s"] = tensor_bytes / 1e6 / row["wall_s"]
        rows.append(row | {"repetitions": repetitions})
    for ours, theirs in ((rows[1], rows[0]), (rows[3], rows[2])):
        pairs = zip(ours["repetitions"], theirs["repetitions"], strict=True)
        # Of one turn each: what else the machine did then, it did to both.
        ratios = [(their["wall_s"] / our["wall_s"], their["wall_s"] / our["without_start_s"]) for our, their in pairs]
        ours["of_cp"], ours["work_of_cp"] = (statistics.median(each) for each in zip(*ratios, strict=True))
    return rows


def measure(config: DiTConfig, scratch: Path, repeats: int) -> list[dict[str, Any]]:
    """Released -> core and core -> released; at most two copies lie on the disk."""
    released, core = scratch / "released", scratch / "core"
    tensor_bytes = write_synthetic(released, config)
    rows = compare("released -> core", released, scratch, tensor_bytes, repeats)
    convert(released, core, read_back=False, keep=True)
    shutil.rmtree(released)
    rows += compare("core -> released", core, scratch, tensor_bytes, repeats)
    shutil.rmtree(core)
    return rows


def extrapolate(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the figures would mean for the 30B, in words."""
    lines = []
    for row in rows:
        if row["way"] == "convert":
            minutes = WHOLE_BYTES / 1e6 / row["mb_per_s"] / 60
            lines.append(
                f"{row['direction']}: an extrapolation, not a measurement: {WHOLE_BYTES / 1e9:.1f} GB at the "
                f"{row['mb_per_s']:.0f} MB/s of {row['gb']:.1f} GB would take {minutes:.1f} minutes on this disk, read "
                "back included. Memory does not grow with the file, but with the largest tensor: "
                f"{row['peak_gb']:.2f} GB here."
            )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Make the checkpoint, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=48)
    parser.add_argument("--heads", type=int, default=48, help="of 128 values each; 48 are the released width")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="whole", help="key of the results in --out, which keeps others")
    parser.add_argument("--folder", type=Path, help="write below this folder (default: the system's temporary one)")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "convert.json")
    arguments = parser.parse_args(argv)
    config = DiTConfig(num_layers=arguments.layers, num_attention_heads=arguments.heads)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        rows = measure(config, Path(scratch), arguments.repeats)
    report.print_table(rows, COLUMNS)
    print("\n".join(extrapolate(rows)))
    shapes = KINDS["dit"].build(config).shapes
    summary = {
        "tensors": len(shapes),
        "largest_tensor_mb": max(torch.Size(shape).numel() for shape in shapes.values()) * 2 / 1e6,
        "within_memory_limit": all(row["peak_gb"] < MEMORY_LIMIT_GB for row in rows),
        **{
            key: {f"{row['direction']}, {row['way']}": row[key] for row in rows if key in row}
            for key in ("of_cp", "work_of_cp")
        },
        "extrapolation": extrapolate(rows),
    }
    settings = {"layers": arguments.layers, "heads": arguments.heads, "repeats": arguments.repeats}
    found = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    found[arguments.name] = {
        "environment": report.environment(),
        "settings": settings,
        "summary": summary,
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
