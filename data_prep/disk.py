"""A disk that is full: one clear line instead of a traceback, whoever was writing."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_video.errors import FULL_DISK, UserError


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk into one clear line.

    Raises:
        UserError: nothing more can be written.
    """
    try:
        yield
    except OSError as error:
        reason = FULL_DISK.get(error.errno or 0)
        if reason is None:
            raise
        free = shutil.disk_usage(folder).free / 1e6
        raise UserError(
            f"{folder}: {reason} ({free:.0f} MB free there); what is finished stays, nothing half-written has a final "
            "name: make room and give the same command again"
        ) from None
