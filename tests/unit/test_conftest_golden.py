"""Golden discovery: which files count as cases, and what an empty or missing folder says."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
PROBE = "def test_golden_probe(golden_case):\n    assert golden_case.kind and golden_case.path().parent.is_dir()\n"


def collect(tmp_path: Path, golden: Path) -> subprocess.CompletedProcess[str]:
    for name in ("conftest.py", "golden_files.py"):
        (tmp_path / name).write_text((TESTS / name).read_text())
    (tmp_path / "test_probe.py").write_text(PROBE)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tmp_path), "-v", "-k", "golden"]
    return subprocess.run([*command, "--golden-dir", str(golden)], capture_output=True, text=True, cwd=tmp_path)


def test_every_json_with_a_kind_is_a_case(tmp_path: Path) -> None:
    golden = tmp_path / "cases"
    golden.mkdir()
    (golden / "MANIFEST.json").write_text(json.dumps({"kind": "not a case"}))
    (golden / "notes.json").write_text(json.dumps({"text": "no kind here"}))
    (golden / "dit_new_size.json").write_text(json.dumps({"kind": "dit", "config": {"num_layers": 3}}))
    result = collect(tmp_path, golden)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "test_golden_probe[dit_new_size] PASSED" in result.stdout
    assert "1 passed" in result.stdout


def test_folder_without_cases_is_an_error(tmp_path: Path) -> None:
    result = collect(tmp_path, tmp_path / "nothing")
    assert result.returncode != 0
    assert "nothing is not a folder" in result.stdout + result.stderr
