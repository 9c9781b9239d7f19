"""A large folder costs ingest the rows of its files and little more: no decoded picture, no open file, no packet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

MEMORY_SCRIPT = """
import re, sys
from pathlib import Path
from data_prep import ingest
report = ingest.run(Path(sys.argv[1]), Path(sys.argv[1] + ".parquet"))
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())
print(report.kept, int(peak[1]))
"""


def make_folder(folder: Path, count: int) -> Path:
    for number in range(count):
        place = folder / f"{number // 1000:03d}"
        place.mkdir(parents=True, exist_ok=True)
        colour = (number % 256, number // 256 % 256, number // 65536)
        # A picture of 12 KB when it is decoded.
        Image.fromarray(np.full((64, 64, 3), colour, np.uint8)).save(place / f"{number}.png")
        (place / f"{number}.txt").write_text(f"caption {number}")
    return folder


def peak_kilobytes(folder: Path, count: int) -> int:
    command = [sys.executable, "-c", MEMORY_SCRIPT, str(make_folder(folder, count))]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    kept, peak = map(int, result.stdout.split())
    assert kept == count
    return peak


@pytest.mark.parametrize("count", [4_000, pytest.param(100_000, marks=pytest.mark.heavy)])
def test_a_file_costs_its_row(tmp_path: Path, count: int) -> None:
    few, many = 1_000, count
    grown = peak_kilobytes(tmp_path / "many", many) - peak_kilobytes(tmp_path / "few", few)
    assert grown / (many - few) < 5
