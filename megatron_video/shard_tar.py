"""A tar that is written front to back and hashed on the way, so that nothing is read again for its checksum."""

from __future__ import annotations

import hashlib
import tarfile
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

# Writes that may wait for the hashing thread, about one sample's; more would only hold memory.
_MAX_PENDING = 9


class ShardTar:
    """An uncompressed USTAR file, byte for byte what `tarfile` writes of members that have a name and a size only."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "wb")  # noqa: SIM115
        self._digest = hashlib.sha256()
        # Hashing lets go of the interpreter's lock, so that it costs no time where there is a second core.
        self._thread = ThreadPoolExecutor(1)
        self._pending: deque[Future[None]] = deque()
        self.size = 0
        """Bytes written."""

    def append(self, name: str, content: bytes) -> int:
        """Add a member; the position of its first byte in the file."""
        # Time, user and host stay out: they must not change the bytes.
        header = tarfile.TarInfo(name)
        header.size, header.mode = len(content), 0o644
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> str:
        """Write the end of the tar; sha256 of the file, hex. `close` is still due."""
        ending = 2 * tarfile.BLOCKSIZE
        self._write(bytes(ending + -(self.size + ending) % tarfile.RECORDSIZE))
        self._file.flush()
        self._thread.shutdown()
        return self._digest.hexdigest()

    def close(self) -> None:
        """Close the file, finished or not."""
        self._thread.shutdown(cancel_futures=True)
        # Raises too where the disk is full: what is buffered is written here.
        self._file.close()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self.size += len(content)
        self._pending.append(self._thread.submit(self._digest.update, content))
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft().result()
