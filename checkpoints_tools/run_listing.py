"""The checkpoints of a run: which there are, how large and how old, which is the newest, and which are damaged."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.wording import bytes_text, duration_text
from megatron_video.errors import UserError
from training.checkpoint_files import LATEST_FILE, STATE_FILE, WRITTEN, find_fault, read_state_values
from training.checkpoint_folders import step_folders
from training.layout_matrix.report import text_table


@dataclass(frozen=True)
class Listed:
    """One checkpoint of a run."""

    path: str
    step: int
    bytes: int
    """Of all its files, as they were written."""
    written: float
    """Unix time."""
    averages: bool
    checksums: bool
    """Whether every file's was recorded."""
    fault: str | None
    newest: bool
    """Of those without a fault: the one that a run continues from."""


def is_run(path: Path) -> bool:
    """Whether `path` is a folder of checkpoints, or of a run that has one, and no checkpoint itself."""
    if not path.is_dir() or (path / STATE_FILE).exists() or path.name.startswith("step_"):
        return False
    return any(path.glob("step_[0-9]*")) or any(path.glob("checkpoints/step_[0-9]*"))


def checkpoints_folder(path: Path) -> Path:
    """Where a run's checkpoints lie."""
    return path / "checkpoints" if (path / "checkpoints").is_dir() else path


def list_run(path: Path) -> list[Listed]:
    """The checkpoints of a run, oldest first; nothing of their tensors is read."""
    folders = step_folders(checkpoints_folder(path))
    faults = {folder: find_fault(folder) for folder in folders}
    newest = next((folder for folder in reversed(folders) if faults[folder] is None), None)
    return [_listed(folder, faults[folder], folder == newest) for folder in folders]


def newest_of(path: Path) -> Path:
    """The newest whole checkpoint of a run.

    Raises:
        UserError: there is none.
    """
    found = next((Path(each.path) for each in list_run(path) if each.newest), None)
    if found is None:
        raise UserError(f"{path} holds no complete checkpoint")
    return found


def unfinished(path: Path) -> list[str]:
    """Folders that a killed job left."""
    names = {folder.name for folder in step_folders(checkpoints_folder(path))}
    return sorted(each.name for each in checkpoints_folder(path).glob("step_[0-9]*") if each.name not in names)


def run_json(path: Path) -> dict[str, Any]:
    """The list as plain values."""
    return {
        "path": str(path),
        "checkpoints": [vars(listed) for listed in list_run(path)],
        "latest": _latest(path),
        "unfinished": unfinished(path),
    }


def run_lines(path: Path) -> list[str]:
    """The list for a terminal."""
    listed = list_run(path)
    total = bytes_text(sum(each.bytes for each in listed))
    lines = [f"{path}: {len(listed)} checkpoints, {total}"]
    header = ["step", "size", "age", "averages", "checksums", ""]
    rows = [
        [
            str(each.step),
            bytes_text(each.bytes),
            duration_text(time.time() - each.written),
            "yes" if each.averages else "no",
            "yes" if each.checksums else "no",
            f"DAMAGED: {each.fault}" if each.fault else "newest" if each.newest else "",
        ]
        for each in listed
    ]
    lines += [text_table(header, rows)] if rows else []
    lines += [
        f"unfinished: {name} (a killed job left it; a run removes it when it starts)" for name in unfinished(path)
    ]
    named, newest = _latest(path), next((Path(each.path).name for each in listed if each.newest), None)
    if named is not None and named != newest:
        lines.append(f"the file `{LATEST_FILE}` names {named}; runs go by the folders")
    return lines


def _latest(path: Path) -> str | None:
    file = checkpoints_folder(path) / LATEST_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _listed(folder: Path, fault: str | None, newest: bool) -> Listed:
    step = int(folder.name.removeprefix("step_"))
    try:
        values, files = read_state_values(folder)
    except (ValueError, OSError):
        size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
        return Listed(str(folder), step, size, folder.stat().st_mtime, False, False, fault, newest)
    written = float(values.get(WRITTEN, folder.stat().st_mtime))
    size = sum(file.size for file in files.values())
    averages, checksums = bool(values.get("averages_weights")), all(f.crc32 is not None for f in files.values())
    return Listed(str(folder), step, size, written, averages, checksums, fault, newest)
