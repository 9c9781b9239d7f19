"""`data balance` over a million planted vectors: time, memory, and how much of what was planted it finds.

    python tests/benchmarks/balance_bench.py

Runs the command itself, as its own process, over a manifest and a .npy file with known clusters, near-duplicates,
outliers and perceptual hashes. Memory is split: pages of the mapped file belong to the page cache, which gives them
back; anonymous memory is what the process needs.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import report
from planted_vectors import Planted, plant, purity

from megatron_video.manifest import complete_columns, read_manifest, write_manifest

SETTINGS: dict[str, Any] = {
    "clips": 1_000_000,
    "width": 256,
    "concepts": 400,
    "clusters": 1000,
    "copies": 0.05,
    "outliers": 0.002,
    "hash_copies": 0.01,
    "iterations": 10,
    "threads": 2,
}
DUPLICATE_SIMILARITY = 0.95
DUPLICATE_BITS = 3
_SAMPLE_SECONDS = 0.05
_SEARCHES = ("embedding", "hash")


def main(argv: Sequence[str] | None = None) -> None:
    """Plant, run, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, default=report.RESULTS / "balance.json")
    parser.add_argument("--folder", type=Path, help="keep vectors, manifests and plots here (default: nowhere)")
    arguments = parser.parse_args(argv)
    settings = {name: getattr(arguments, name) for name in SETTINGS}
    with tempfile.TemporaryDirectory() as scratch:
        rows, summary = measure(settings, arguments.folder or Path(scratch))
    report.print_table(rows, ["what", "planted", "found", "share", "wrong"])
    report.print_table([summary], list(summary)[:6])
    report.write(arguments.out, settings, rows, summary)


def measure(settings: dict[str, Any], folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of what was found, and a summary of time and memory."""
    folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    truth, hash_of = _plant(settings, folder)
    planted_seconds = time.monotonic() - started
    figures, cost = _run(settings, folder)
    table = read_manifest(folder / "out.parquet")
    rows = _found(table, truth, hash_of)
    summary = {
        **cost,
        "vectors_mib": (folder / "v.npy").stat().st_size >> 20,
        "purity": round(purity(table["cluster"].to_numpy(), truth.label), 4),
        "clips_a_second": round(settings["clips"] / cost["seconds"]),
        "planting_seconds": round(planted_seconds, 1),
        "figures": figures["details"],
    }
    return rows, summary


def _plant(settings: dict[str, Any], folder: Path) -> tuple[Planted, np.ndarray]:
    clips = settings["clips"]
    truth = plant(
        folder / "v.npy",
        clips,
        settings["width"],
        settings["concepts"],
        copies=settings["copies"],
        outliers=settings["outliers"],
    )
    rng = np.random.default_rng(1)
    hashes = rng.integers(1, 2**63, clips, np.uint64)
    # Each of these takes its neighbour's hash with up to three bits turned over.
    chosen = np.flatnonzero(rng.random(clips) < settings["hash_copies"])
    chosen = chosen[(chosen > 0) & (np.diff(chosen, prepend=-2) > 1)]
    hashes[chosen] = hashes[chosen - 1]
    for _ in range(DUPLICATE_BITS):
        hashes[chosen] ^= np.uint64(1) << rng.integers(0, 64, len(chosen), np.uint64)
    hash_of = np.full(clips, -1, np.int64)
    hash_of[chosen] = chosen - 1
    _write_manifest(folder, hashes)
    return truth, hash_of


def _write_manifest(folder: Path, hashes: np.ndarray) -> None:
    names = [f"c{number:09d}" for number in range(len(hashes))]
    columns = {
        "clip_id": names,
        "source": ["x.mp4"] * len(names),
        "aesthetic": np.random.default_rng(2).random(len(names), np.float32),
        "width": np.full(len(names), 1280, np.int32),
        "height": np.full(len(names), 720, np.int32),
        "start_frame": np.zeros(len(names), np.int64),
        "end_frame": np.full(len(names), 200, np.int64),
        "phash": [f"{value:016x}" for value in hashes.tolist()],
    }
    write_manifest(complete_columns(pa.table(columns)), folder / "in.parquet")
    (folder / "v.ids.txt").write_text("\n".join(names))


def _run(settings: dict[str, Any], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    command = [sys.executable, "-m", "data_prep.cli", "balance", "--in", str(folder / "in.parquet"), "--json"]
    command += ["--out", str(folder / "out.parquet"), "--embeddings", str(folder / "v.npy")]
    command += ["--clusters", str(settings["clusters"]), "--iterations", str(settings["iterations"])]
    command += ["--duplicate-similarity", str(DUPLICATE_SIMILARITY), "--duplicate-bits", str(DUPLICATE_BITS)]
    threads = str(settings["threads"])
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads}
    started, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        memory = _watch(process)
        printed = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"balance ended with exit code {process.returncode}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cost = {
        "seconds": round(time.monotonic() - started, 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak_anonymous_mib": memory.get("RssAnon", 0) >> 10,
        "peak_with_file_pages_mib": memory.get("VmHWM", 0) >> 10,
    }
    return json.loads(printed), cost


def _watch(process: subprocess.Popen[str]) -> dict[str, int]:
    """Largest values in KiB of a process's memory while it runs."""
    peak: dict[str, int] = {}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            break
        for name, _, value in (line.partition(":") for line in lines):
            if name in ("RssAnon", "RssFile", "VmHWM"):
                peak[name] = max(peak.get(name, 0), int(value.split()[0]))
        time.sleep(_SAMPLE_SECONDS)
    return peak


def _found(table: pa.Table, truth: Planted, hash_of: np.ndarray) -> list[dict[str, Any]]:
    reason = np.array([str(text).split(":")[0] for text in table["drop_reason"].to_pylist()])
    keeper = np.array([-1 if name is None else int(name[1:]) for name in table["duplicate_of"].to_pylist()])
    outlier, by_vector, by_hash = (reason == name for name in ("outlier", *(f"duplicate by {x}" for x in _SEARCHES)))
    related = _related(truth.copy_of, hash_of)
    wrong = (keeper >= 0) & (related != related[keeper])
    # Of a planted pair one at most may stay, for whatever reason the other is gone.
    gone = reason != "None"
    copies, hash_copies = np.flatnonzero(truth.copy_of >= 0), np.flatnonzero(hash_of >= 0)
    real = truth.label >= 0
    rows = [
        ("copies by embedding", len(copies), gone[copies] | gone[truth.copy_of[copies]], by_vector & wrong),
        ("copies by hash", len(hash_copies), gone[hash_copies] | gone[hash_of[hash_copies]], by_hash & wrong),
        ("outliers", int((~real).sum()), outlier[~real], outlier & real),
    ]
    return [
        {
            "what": what,
            "planted": planted,
            "found": int(found.sum()),
            "share": round(float(found.mean()), 4),
            "wrong": int(wrong.sum()),
        }
        for what, planted, found, wrong in rows
    ]


def _related(copy_of: np.ndarray, hash_of: np.ndarray) -> np.ndarray:
    """One number for all clips that copies of either kind connect."""
    group = np.arange(len(copy_of))
    before = None
    while before is None or (group != before).any():
        before = group.copy()
        for other in (copy_of, hash_of):
            has = np.flatnonzero(other >= 0)
            np.minimum.at(group, other[has], group[has])
            group[has] = np.minimum(group[has], group[other[has]])
    return group


if __name__ == "__main__":
    main()
