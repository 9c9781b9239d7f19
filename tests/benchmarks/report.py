"""What every benchmark writes: a printed table, and a results file that names machine, versions and commit."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
# Made-up clips, vectors and models of the tests serve benchmarks too.
sys.path.append(str(Path(__file__).parents[1]))
_PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "transformer-engine-torch"),
    *("av", "decord", "torchcodec", "webdataset", "scenedetect", "scenedetect-headless"),
)


def environment() -> dict[str, Any]:
    """Machine, versions and commit of this run."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "cpu": _processor(),
        "cpu_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "gpu": _gpu(),
    }


def write(path: Path, settings: dict[str, Any], rows: Sequence[dict[str, Any]], summary: dict[str, Any]) -> None:
    """Write one run's settings, rows and summary to `path` as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"environment": environment(), "settings": settings, "summary": summary, "rows": list(rows)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def print_table(rows: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    """Print the named columns of `rows`, aligned; missing values as a dash."""
    lines = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for line in lines:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _gpu() -> dict[str, Any] | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {"name": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
