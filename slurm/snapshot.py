"""The code as it was submitted: a copy in the job's folder, with the commit, the difference to it, and versions.

A job may wait for days, and is started again for weeks: what is edited meanwhile must not reach it.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_video import __version__
from megatron_video.errors import UserError

CODE_RECORD, DIFF_FILE = "code.json", "code.diff"
# The packages that make up this project, where it is installed and not a checkout.
PACKAGES = ("megatron_video", "training", "data_prep", "checkpoints_tools", "slurm")
MAX_MIB = 200
_RECORDED = ("torch", "megatron-core", "transformer-engine", "numpy", "webdataset", "safetensors")


def source_root() -> Path:
    """The folder that holds the packages: the checkout, or site-packages."""
    return Path(__file__).resolve().parents[1]


def take_snapshot(target: Path, root: Path | None = None, max_mib: int = MAX_MIB) -> None:
    """Copy the code to `target`, and beside it write code.json and code.diff.

    Of a git checkout: what is tracked, and what is neither tracked nor ignored. Else the packages' folders.

    Raises:
        UserError: more than `max_mib` MiB; names the largest files.
    """
    root = root or source_root()
    checkout = is_checkout(root)
    files = _checkout_files(root) if checkout else _package_files(root)
    total = _check_size(root, files, max_mib)
    for name in files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, target / name)
    record = {"version": __version__, "source": str(root), "files": len(files), "bytes": total, **_versions()}
    if checkout:
        record |= _git_state(root)
        diff = _git(root, "diff", "--binary", "HEAD")
        (target.parent / DIFF_FILE).write_bytes(diff)
    (target.parent / CODE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def link_snapshot(earlier: Path, target: Path) -> None:
    """Use the code of an earlier job's folder again: hard links, so that either folder may be removed.

    Raises:
        UserError: the earlier job's folder holds no code.
    """
    source = earlier / target.name
    if not source.is_dir():
        raise UserError(f"{source}: not there; without --same-code the code as it is now is used")
    shutil.copytree(source, target, copy_function=_link)
    for name in (CODE_RECORD, DIFF_FILE):
        if (earlier / name).exists():
            shutil.copy2(earlier / name, target.parent / name)


def is_checkout(root: Path) -> bool:
    """Whether git keeps this very folder: an environment inside some other repository is none."""
    try:
        top = subprocess.run(["git", "rev-parse", "--show-toplevel"], cwd=root, capture_output=True, text=True)
    except OSError:
        return False
    return top.returncode == 0 and Path(top.stdout.strip()).resolve() == root


def _checkout_files(root: Path) -> list[str]:
    listed = os.fsdecode(_git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"))
    # A file that was deleted is still listed; a folder is a repository of its own.
    return sorted({name for name in listed.split("\0") if name and (root / name).is_file()})


def _package_files(root: Path) -> list[str]:
    found = (path for package in PACKAGES for path in (root / package).rglob("*"))
    return sorted(str(path.relative_to(root)) for path in found if path.is_file() and "__pycache__" not in path.parts)


def _check_size(root: Path, files: list[str], max_mib: int) -> int:
    sizes = {name: (root / name).stat().st_size for name in files}
    total = sum(sizes.values())
    if total > max_mib * 2**20:
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        named = ", ".join(f"{name} ({sizes[name] / 2**20:.0f} MiB)" for name in largest)
        raise UserError(
            f"code in {root}: {total / 2**20:.0f} MiB, more than the {max_mib} MiB that a snapshot may have; largest: "
            f"{named}; move such files away or name them in .gitignore"
        )
    return total


def _git_state(root: Path) -> dict[str, str | bool]:
    changed = _git(root, "status", "--porcelain").decode(errors="replace")
    head = _git(root, "rev-parse", "HEAD", check=False).decode().strip()
    branch = _git(root, "rev-parse", "--abbrev-ref", "HEAD", check=False).decode().strip()
    return {"commit": head, "branch": branch, "changed": bool(changed)}


def _versions() -> dict[str, str | dict[str, str | None]]:
    found: dict[str, str | None] = {}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return {"python": platform.python_version(), "packages": found}


def _git(root: Path, *words: str, check: bool = True) -> bytes:
    result = subprocess.run(["git", *words], cwd=root, capture_output=True)
    if check and result.returncode:
        raise UserError(f"git {' '.join(words)} in {root}: {result.stderr.decode(errors='replace').strip()}")
    return result.stdout


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
