"""The code that a job keeps: of a checkout what git would show, else the packages; never more than the limit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megatron_video.errors import UserError
from slurm.snapshot import PACKAGES, link_snapshot, take_snapshot


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    result = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return result.stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    (root / "training").mkdir(parents=True)
    (root / "training" / "loop.py").write_text("steps = 1\n")
    (root / "gone.py").write_text("")
    (root / ".gitignore").write_text("runs/\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-qm", "first")
    return root


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_checkout_with_changes(checkout: Path, tmp_path: Path) -> None:
    (checkout / "training" / "loop.py").write_text("steps = 2\n")
    (checkout / "new name.py").write_text("new\n")
    (checkout / "gone.py").unlink()
    (checkout / "runs").mkdir()
    (checkout / "runs" / "big").write_text("not code")
    job = tmp_path / "job"
    job.mkdir()
    take_snapshot(job / "code", checkout)
    assert files_in(job / "code") == [".gitignore", "new name.py", "training/loop.py"]
    assert (job / "code" / "training" / "loop.py").read_text() == "steps = 2\n"
    record = json.loads((job / "code.json").read_text())
    assert (record["commit"], record["changed"], record["files"]) == (git(checkout, "rev-parse", "HEAD"), True, 3)
    assert record["packages"]["numpy"]
    # The difference leads from the commit to what was copied.
    git(checkout, "checkout", "-q", ".")
    subprocess.run(["git", "apply", str(job / "code.diff")], cwd=checkout, check=True)
    assert (checkout / "training" / "loop.py").read_text() == "steps = 2\n"
    assert not (checkout / "gone.py").exists()


def test_installed_package_inside_another_checkout(checkout: Path, tmp_path: Path) -> None:
    """As site-packages of an environment that lies, ignored, in somebody's repository."""
    site = checkout / "runs" / "site-packages"
    for package in PACKAGES:
        (site / package / "__pycache__").mkdir(parents=True)
        (site / package / "__init__.py").write_text("")
        (site / package / "__pycache__" / "x.pyc").write_text("")
    (site / "torch").mkdir()
    (site / "torch" / "__init__.py").write_text("")
    job = tmp_path / "job"
    job.mkdir()
    take_snapshot(job / "code", site)
    assert files_in(job / "code") == sorted(f"{package}/__init__.py" for package in PACKAGES)
    assert "commit" not in json.loads((job / "code.json").read_text())


def test_too_large_names_the_largest(checkout: Path, tmp_path: Path) -> None:
    (checkout / "weights.bin").write_bytes(b"0" * (2 << 20))
    with pytest.raises(UserError, match=r"2 MiB, more than the 1 MiB .* weights.bin \(2 MiB\).*\.gitignore"):
        take_snapshot(tmp_path / "code", checkout, max_mib=1)
    assert not (tmp_path / "code").exists()


def test_code_of_an_earlier_job_outlives_it(checkout: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    take_snapshot(first / "code", checkout)
    link_snapshot(first, second / "code")
    (first / "code" / "training" / "loop.py").unlink()
    assert (second / "code" / "training" / "loop.py").read_text() == "steps = 1\n"
    assert json.loads((second / "code.json").read_text()) == json.loads((first / "code.json").read_text())
    with pytest.raises(UserError, match="--same-code"):
        link_snapshot(tmp_path / "none", tmp_path / "code")
