"""Nodes that a run avoids: RUN/slurm/bad_nodes.json, node -> why, which check found it, until when, in which job."""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.job import BAD_NODES_FILE


@dataclass(frozen=True)
class BadNodeEntry:
    """Why and how long a node is left out."""

    reason: str
    check: str
    """Who found it: a check of preflight, or `node`, `hang`, `crash` of the supervisor."""
    until: float
    """Unix time from which on it may be used again."""
    job: str
    """SLURM's number of the job that met it."""


def read_bad_nodes(slurm_dir: Path, now: float | None = None) -> dict[str, BadNodeEntry]:
    """Nodes to avoid now, by name; entries whose time is over are left out.

    Args:
        slurm_dir: RUN/slurm.
        now: Unix time; None: now.

    Raises:
        UserError: the file is not readable.
    """
    moment = time.time() if now is None else now
    return {node: entry for node, entry in _read(slurm_dir / BAD_NODES_FILE).items() if entry.until > moment}


def add_bad_node(slurm_dir: Path, node: str, *, reason: str, check: str, hours: float, job: str) -> BadNodeEntry:
    """Leave a node out for some hours from now; a later end that is already noted stays.

    Raises:
        UserError: the file is not readable.
    """
    entry = BadNodeEntry(reason, check, time.time() + 3600 * hours, job)
    with _locked(slurm_dir) as path:
        entries = {name: old for name, old in _read(path).items() if old.until > time.time()}
        if node in entries and entries[node].until > entry.until:
            return entries[node]
        entries[node] = entry
        _write(path, entries)
    return entry


def forgive_node(slurm_dir: Path, node: str) -> bool:
    """Allow a node again; whether it was left out.

    Raises:
        UserError: the file is not readable.
    """
    with _locked(slurm_dir) as path:
        entries = _read(path)
        known = entries.pop(node, None) is not None
        if known:
            _write(path, entries)
    return known


@contextmanager
def _locked(slurm_dir: Path) -> Iterator[Path]:
    slurm_dir.mkdir(parents=True, exist_ok=True)
    path = slurm_dir / BAD_NODES_FILE
    # Tasks of an array and a preflight may find nodes at the same moment.
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield path


def _read(path: Path) -> dict[str, BadNodeEntry]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {node: BadNodeEntry(**entry) for node, entry in values.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not readable ({error}); mend it, or remove it to use all nodes again") from None


def _write(path: Path, entries: dict[str, BadNodeEntry]) -> None:
    plain = {node: asdict(entry) for node, entry in sorted(entries.items())}
    write_atomically(path, (json.dumps(plain, indent=1) + "\n").encode())
