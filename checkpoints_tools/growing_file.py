"""Files that grow from front to end, can be put on the disk in between, and can be continued after a kill."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_video.files import sync
from training.checkpoint_files import ChecksummedStream, StoredFile


class GrowingFile(ChecksummedStream):
    """A file of known beginning that is only added to; it knows its checksum without being read again."""

    def __init__(self, path: Path, known: StoredFile) -> None:
        """Open `path` and cut it off behind what is `known` of it."""
        self._path = path
        with open(path, "ab"):
            pass
        opened = open(path, "r+b", buffering=0)  # noqa: SIM115 - closed by close()
        opened.truncate(known.size)
        opened.seek(known.size)
        # What it calls is `write` alone.
        super().__init__(cast(BinaryIO, _Whole(opened)))
        self._opened = opened
        self._written, self._crc32 = known.size, known.crc32 or 0

    def write(self, data: Any) -> int:
        """Add bytes.

        Raises:
            OSError: naming the file.
        """
        try:
            return super().write(data)
        except OSError as error:
            self.error = OSError(error.errno, error.strerror, str(self._path))
            raise self.error from error

    def close(self) -> None:
        """End it; what was written may not be on the disk yet."""
        self._opened.close()
        super().close()


class _Whole:
    """Unbuffered writes may take a part of the bytes only."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, flat: memoryview) -> int:
        rest = flat
        while len(rest):
            rest = rest[self._file.write(rest) :]
        return len(flat)


class FileSet:
    """Files of one folder that are written by turns."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._known: dict[str, StoredFile] = {}
        self._open: dict[str, GrowingFile] = {}

    def file(self, name: str) -> GrowingFile:
        """The file of that name, at its end."""
        if name not in self._open:
            self._open[name] = GrowingFile(self.folder / name, self._known.get(name, StoredFile(0, 0)))
        return self._open[name]

    def end(self, name: str) -> None:
        """Nothing more goes into that file."""
        file = self._open.pop(name)
        self._known[name] = file.stored
        file.close()

    def end_all(self) -> None:
        """Nothing more goes into any file; all of them are on the disk when this returns."""
        for name in list(self._open):
            self.end(name)
        for name in self._known:
            sync(self.folder / name)
        sync(self.folder)

    @property
    def stored(self) -> dict[str, StoredFile]:
        """Size and checksum of every file so far."""
        return self._known | {name: file.stored for name, file in self._open.items()}

    def paths(self) -> list[Path]:
        """The files so far."""
        return [self.folder / name for name in self.stored]

    def position(self) -> Any:
        """How far the files are, as JSON keeps it: name -> [bytes, CRC-32]."""
        return {name: [file.size, file.crc32 or 0] for name, file in self.stored.items()}

    def go_on(self, position: Any) -> None:
        """Go on behind `position`; what lies behind it is cut off, files that it does not name are removed.

        Raises:
            ValueError: a file has fewer bytes than it should.
        """
        self._known = {name: StoredFile(size, crc32) for name, (size, crc32) in position.items()}
        for path in self.folder.iterdir():
            if path.name not in position and not path.name.startswith(".") and path.is_file():
                path.unlink()
        for name, known in self._known.items():
            found = (self.folder / name).stat().st_size if (self.folder / name).exists() else 0
            if found < known.size:
                raise ValueError(f"{name} has {found} bytes, {known.size} were written")
            os.truncate(self.folder / name, known.size)
