"""Is a checkpoint, byte for byte, what was written? Every file is read and compared with its recorded checksum."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints_tools.journal import PARTIAL_SUFFIX
from megatron_video.errors import UserError
from training.checkpoint_disk import GIGABYTE
from training.checkpoint_files import (
    DELETING_SUFFIX,
    REPLACED_SUFFIX,
    STATE_FILE,
    WRITING_SUFFIX,
    StoredFile,
    find_flip,
    read_state_values,
)
from training.checkpoint_folders import step_folders

# What stands behind the name of a folder that is being written, or was when its writer was killed.
UNFINISHED = (WRITING_SUFFIX, REPLACED_SUFFIX, DELETING_SUFFIX, PARTIAL_SUFFIX)


@dataclass
class Verdict:
    """What was found in one checkpoint."""

    folder: str
    files: int = 0
    bytes: int = 0
    faults: list[str] = field(default_factory=list)
    """Everything that is wrong; empty: the checkpoint is whole."""
    without_checksum: list[str] = field(default_factory=list)
    """Files of which only the size is known: versions before checksums wrote them."""
    tensors: int = 0
    """Read, and looked through for NaN and infinite values."""
    values: int = 0
    """In them."""

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults


def checkpoints_of(path: Path, every: bool) -> list[Path]:
    """The folders that `path` means: itself, or the newest checkpoint of a run, or all of them.

    Raises:
        UserError: there is none.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a folder; give a run folder or one of its checkpoints/step_... folders")
    if (path / STATE_FILE).exists() or path.name.startswith("step_") or path.suffix in UNFINISHED:
        return [path]
    root = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found = step_folders(root)
    if not found:
        raise UserError(f"{path} holds no checkpoint (looked for {root}/step_00000000 and the like)")
    return found if every else found[-1:]


def verify(folder: Path, threads: int = 4, tell: Callable[[str], None] = lambda line: None) -> Verdict:
    """Read all of a checkpoint.

    Args:
        folder: of one checkpoint.
        threads: files that are read at the same time.
        tell: gets a line about the progress, about once a second.
    """
    verdict, files = _recorded(folder)
    meter = _Meter(folder, files, tell)
    # zlib and reading run outside Python's lock.
    with ThreadPoolExecutor(threads) as pool:
        pending = {pool.submit(_fault, folder, name, file): name for name, file in files.items()}
        for done in as_completed(pending):
            name = pending[done]
            meter.add(files[name].size)
            verdict.faults += [fault for fault in [done.result()] if fault]
    verdict.faults.sort()
    verdict.files, verdict.bytes = meter.files, meter.bytes
    return verdict


def verify_sizes(folder: Path) -> Verdict:
    """Look for files that are missing or of another size, and read none of them."""
    verdict, files = _recorded(folder)
    verdict.faults += [fault for name, file in files.items() if (fault := _size_fault(folder, name, file))]
    return verdict


def unfinished_fault(folder: Path) -> str:
    """Of a folder whose name ends in one of UNFINISHED."""
    return f"its writing was interrupted, or its deletion ({folder.suffix}): it is no checkpoint yet, or no more"


def _recorded(folder: Path) -> tuple[Verdict, dict[str, StoredFile]]:
    verdict = Verdict(str(folder))
    if not (folder / STATE_FILE).is_file():
        verdict.faults.append(f"{STATE_FILE} is missing")
        return verdict, {}
    try:
        _, files = read_state_values(folder)
    except ValueError as error:
        verdict.faults.append(str(error))
        return verdict, {}
    verdict.without_checksum = sorted(name for name, file in files.items() if file.crc32 is None)
    return verdict, files


def _fault(folder: Path, name: str, file: StoredFile) -> str | None:
    return _size_fault(folder, name, file) or find_flip(folder, [name])


def _size_fault(folder: Path, name: str, file: StoredFile) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    return None if found == file.size else f"{name} has {found} bytes, written were {file.size}"


class _Meter:
    """How far it is and how fast."""

    def __init__(self, folder: Path, files: dict[str, StoredFile], tell: Callable[[str], None]) -> None:
        self._folder, self._all, self._tell = folder, files, tell
        self._total = sum(file.size for file in files.values())
        self._started = self._told = time.monotonic()
        self.files = self.bytes = 0

    def add(self, count: int) -> None:
        self.files, self.bytes = self.files + 1, self.bytes + count
        now = time.monotonic()
        if now - self._told >= 1 or self.files == len(self._all):
            self._told = now
            speed = self.bytes / GIGABYTE / max(now - self._started, 1e-9)
            self._tell(
                f"{self._folder.name}: {self.files}/{len(self._all)} files, {self.bytes / GIGABYTE:.3f} of "
                f"{self._total / GIGABYTE:.3f} GB, {speed:.2f} GB/s"
            )
