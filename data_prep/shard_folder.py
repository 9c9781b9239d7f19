"""A folder of shards that one run writes: its lock, the mark of what belongs there, and what a kill left behind."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_prep.disk import disk_errors
from data_prep.stage import check_folder, fingerprint_of
from data_prep.workers import Shard
from megatron_video.errors import UserError
from megatron_video.run_lock import share_lock
from megatron_video.shard_schema import INFO_FILE, NULL_TEXT_FILE, PARTS_FOLDER, write_atomically

LOCK_FILE = ".lock"
PLAN_FILE = "plan"


@contextmanager
def claimed(folder: Path, stage: str, made_with: Mapping[str, Any], share: Shard | None = None) -> Iterator[None]:
    """Hold a folder of shards while it is written.

    Args:
        folder: made if it is not there.
        stage: that writes it.
        made_with: all that its bytes depend on, by name; a folder with shards of anything else is refused.
        share: hold only this part of the work; others may hold theirs.

    Raises:
        UserError: another run holds it, it holds something else, or the disk is full (then what is finished stays).
    """
    check_folder(folder, "--out")
    with disk_errors(folder), share_lock(folder / LOCK_FILE, folder, share.lock_name if share else None):
        _claim(folder, stage, made_with, alone=share is None)
        # Half-written files can be told from those that others are writing only by who holds the whole.
        if share is None:
            _clear(folder)
        try:
            yield
        finally:
            if share is None:
                _clear(folder)


def _claim(folder: Path, stage: str, made_with: Mapping[str, Any], alone: bool) -> None:
    """Mark the folder as this plan's, or see that it is."""
    mark = folder / PARTS_FOLDER / PLAN_FILE
    plan = {"fingerprint": _fingerprint(stage, made_with), "stage": stage, "made_with": dict(made_with)}
    if mark.is_file():
        found = _read(mark)
        if found["fingerprint"] == plan["fingerprint"]:
            return
        # A plan of which no shard was finished keeps nothing: a wrong option is mended with the next command.
        if not alone or any(folder.glob("*.tar")) or (folder / INFO_FILE).exists():
            raise UserError(f"--out {folder} {_difference(found, plan)}; name a new folder or remove this one")
        _forget(folder)
    elif strange := sorted(path.name for path in folder.iterdir() if _is_strange(path)):
        raise UserError(
            f"--out {folder} holds {', '.join(strange[:3])}, not written by this command; name a new folder"
        )
    mark.parent.mkdir(exist_ok=True)
    write_atomically(mark, json.dumps(plan, indent=1, default=str).encode())


def _fingerprint(stage: str, made_with: Mapping[str, Any]) -> str:
    settings = {name: value for name, value in made_with.items() if name != "input"}
    return fingerprint_of(stage, settings, str(made_with["input"]))


def _read(mark: Path) -> dict[str, Any]:
    """What the mark says; one of an older version is a fingerprint and nothing else."""
    text = mark.read_text()
    try:
        found: dict[str, Any] = json.loads(text)
        return {"stage": found["stage"], "made_with": found["made_with"], "fingerprint": found["fingerprint"]}
    except (ValueError, TypeError, KeyError):
        return {"stage": None, "made_with": {}, "fingerprint": text}


def _difference(found: Mapping[str, Any], plan: Mapping[str, Any]) -> str:
    if found["stage"] not in (None, plan["stage"]):
        return f"holds shards made by `data {found['stage']}`"
    there, now = found["made_with"], json.loads(json.dumps(plan["made_with"], default=str))
    changed = [f"{name}: {there[name]} there, {now.get(name)} now" for name in there if there[name] != now.get(name)]
    what = f" ({'; '.join(changed)})" if changed else ""
    return f"holds shards of another input, other encoders or other settings{what}"


def _is_strange(path: Path) -> bool:
    # Hidden ones are locks, and what file systems keep for themselves.
    return not path.name.startswith(".") and path.name != PARTS_FOLDER


def _forget(folder: Path) -> None:
    for path in (*folder.glob(f"{PARTS_FOLDER}/*"), folder / NULL_TEXT_FILE):
        path.unlink(missing_ok=True)


def _clear(folder: Path) -> None:
    """Remove what a killed process left half written."""
    # Under the lock of the whole nobody else can be writing them.
    for leftover in (*folder.glob(".*.tmp"), *folder.glob(f"{PARTS_FOLDER}/.*.tmp")):
        leftover.unlink(missing_ok=True)
