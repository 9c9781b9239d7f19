"""An output that appears whole or not at all, and the journal with which a killed command goes on where it stood.

While a command runs, its output lies in `NAME.partial/`, beside a journal of what is already on the disk. The same
command, given again with the same source, goes on behind it; with anything else it starts anew, and says so.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools.wording import Tell, tell_on_stderr
from megatron_video import __version__
from megatron_video.errors import UserError
from megatron_video.files import rename_durably, sync
from megatron_video.run_lock import run_lock
from training.checkpoint_files import write_durably

PARTIAL_SUFFIX = ".partial"
JOURNAL_FILE = ".journal.json"
_LOCK_SUFFIX = ".lock"
# For metadata beside the tensors.
_SPARE_BYTES = 1 << 20


@dataclass
class Journal:
    """The folder that an output grows in, and what of it is on the disk."""

    folder: Path
    """NAME.partial."""
    output: Path
    identity: dict[str, Any]
    """Source and arguments, as JSON keeps them; another one cannot go on here."""
    done: dict[str, str] = field(default_factory=dict)
    """Tensor -> digest, of those that need not be written again."""
    position: Any = None
    """Of the sink behind them; None: nothing is there yet."""
    complete: bool = False
    """Whether the folder lacks nothing but its name."""

    def note(self, done: Mapping[str, str], position: Any) -> None:
        """Keep that all up to `position` is on the disk."""
        self.done, self.position = dict(done), position
        content = {"identity": self.identity, "done": self.done, "position": position}
        write_durably(self.folder / JOURNAL_FILE, json.dumps(content))

    def publish(self, single_file: str | None = None) -> None:
        """Give the finished output its name.

        Args:
            single_file: name of the one file in the folder that is the output; None: the folder is.

        Raises:
            UserError: something has got the output's name meanwhile.
        """
        self.complete = True
        check_absent(self.output)
        (self.folder / JOURNAL_FILE).unlink(missing_ok=True)
        if single_file is not None:
            sync(self.folder / single_file)
            rename_durably(self.folder / single_file, self.output)
            shutil.rmtree(self.folder)
            return
        for path in self.folder.rglob("*"):
            sync(path)
        sync(self.folder)
        rename_durably(self.folder, self.output)


@contextmanager
def begin_output(output: Path, identity: Mapping[str, Any], tell: Tell = tell_on_stderr) -> Iterator[Journal]:
    """The journal of an output: a new one, or that of the same command which was killed.

    A kill or an error of the disk leaves the folder for the next attempt, a UserError removes it; the caller publishes
    what is complete.

    Args:
        output: file or folder to create.
        identity: all that the output depends on, as values that JSON keeps; see `source_identity`.
        tell: gets a line when something was found there.

    Raises:
        UserError: the output exists, or another process writes it.
    """
    check_absent(output)
    folder = output.with_name(output.name + PARTIAL_SUFFIX)
    with run_lock(output.with_name(f".{output.name}{_LOCK_SUFFIX}"), output):
        ours = json.loads(json.dumps({"version": __version__, **identity}))
        journal = Journal(folder, output, ours)
        if folder.exists():
            _take_over(journal, tell)
        if journal.position is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        try:
            yield journal
        except UserError:
            # The source is at fault, or what was written: nothing to go on with.
            if not journal.complete:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def check_absent(output: Path) -> None:
    """Refuse an output that exists.

    Raises:
        UserError: it does.
    """
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already; choose another --out or remove it")


def check_room(output: Path, need: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Args:
        output: file or folder to create; what a killed command left for it counts as free.
        need: bytes.

    Raises:
        UserError: naming both figures.
    """
    place = next(folder for folder in output.absolute().parents if folder.exists())
    partial = output.with_name(output.name + PARTIAL_SUFFIX)
    left = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    free = shutil.disk_usage(place).free + left
    if free < need + _SPARE_BYTES:
        raise UserError(f"no room for {output}: {need / 1e9:.3f} GB needed, {free / 1e9:.3f} GB free in {place}")


def source_identity(*paths: Path) -> dict[str, list[int]]:
    """Every file of the sources, with size and time of its last change: the same as long as nobody wrote to them."""
    files = [file for path in paths for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    stats = {str(file.resolve()): file.stat() for file in files if file.is_file()}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _take_over(journal: Journal, tell: Tell) -> None:
    try:
        content = json.loads((journal.folder / JOURNAL_FILE).read_text(encoding="utf-8"))
        theirs, done, position = content["identity"], content["done"], content["position"]
    except (OSError, ValueError, KeyError, TypeError):
        tell(f"{journal.folder} holds nothing that can be used; starting anew")
        return
    other = sorted(name for name in {*theirs, *journal.identity} if theirs.get(name) != journal.identity.get(name))
    if other:
        tell(f"{journal.folder} was begun with another {', '.join(other)}; starting anew")
        return
    journal.done, journal.position = done, position
    tell(f"continuing {journal.folder}: {len(done)} tensors are there already")
