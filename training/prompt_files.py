"""Files of prompts as rows of fields: plain text, JSON lines, and tables with a header (CSV, TSV).

All are UTF-8, with or without a byte order mark, with line ends of any system.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_video.errors import UserError

# What a row may say to us; all else is kept for samples.jsonl.
OWN_FIELDS = ("prompt", "seed", "noise_index", "category")
# Of samples.jsonl, which is a prompt file too: what belongs to the folder it was read from.
_OF_A_FOLDER = ("index", "file")
_DIALECTS = {".csv": "excel", ".tsv": "excel-tab"}
# Nearer names are taken for slips of the pen: "seeds", "catagory", but not "prompt_id".
_LIKENESS = 0.83
_SHOWN = 80


class Row(NamedTuple):
    """One prompt's line."""

    where: str
    """Such as `p.csv, line 3`, for messages."""
    values: dict[str, Any]
    """Fields by name; of tables, those that are not empty, as text."""


def read_rows(path: Path) -> list[Row]:
    """Rows of a prompt file, read by its suffix: .jsonl, .csv, .tsv, and as plain text, one prompt a line, any other.

    Raises:
        UserError: the file cannot be read, holds no prompt, or a line of it is wrong.
    """
    text = _read_text(path)
    if path.suffix.lower() in _DIALECTS:
        rows = list(_table(text, path))
    elif path.suffix.lower() == ".jsonl":
        rows = [Row(where, _json_fields(line, where)) for where, line in _lines(text, path)]
    else:
        rows = [Row(where, {"prompt": line}) for where, line in _lines(text, path)]
        _refuse_json_as_text(rows, path)
    if not rows:
        raise UserError(f"--prompts {path} holds no prompt")
    return rows


def _read_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"--prompts {path} is not readable as a text file: {error}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(
            f"--prompts {path}, line {line} is not UTF-8 ({error.reason}); save it as UTF-8, "
            "such as by `iconv -f GB18030 -t UTF-8`, or -f UTF-16"
        ) from None
    if "\0" in text:
        raise UserError(f"--prompts {path} holds zero bytes, so it is no UTF-8 text; convert it (`iconv -f UTF-16LE`)")
    return text


def _lines(text: str, path: Path) -> Iterator[tuple[str, str]]:
    # Not str.splitlines: it would cut at separators that JSON, and prompts, may hold.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        if line.strip():
            yield f"--prompts {path}, line {number}", line.strip()


def _json_fields(line: str, where: str) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
        raise UserError(f'{where}: expected {{"prompt": "...", "seed": ...}}, found {line[:_SHOWN]}')
    _refuse_slips(values, where)
    return {name: value for name, value in values.items() if name not in _OF_A_FOLDER}


def _table(text: str, path: Path) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), _DIALECTS[path.suffix.lower()], strict=True)
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"--prompts {path}, line {reader.line_num}"
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _checked_header([cell.strip() for cell in cells], where)
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{where} has {len(cells)} cells, the header names {len(header)} columns; "
                    "a cell that holds the separator needs quotes"
                )
            named = ((name, cell.strip()) for name, cell in zip(header, cells, strict=True) if cell.strip())
            yield Row(where, {name: cell for name, cell in named if name not in _OF_A_FOLDER})
    except csv.Error as error:
        raise UserError(
            f"--prompts {path}, line {reader.line_num}: {error}; a cell that holds a quote doubles it and is quoted "
            "itself, or a quote is never closed"
        ) from None


def _checked_header(names: Sequence[str], where: str) -> list[str]:
    _refuse_slips(names, where)
    if "prompt" not in names:
        raise UserError(
            f"{where}: no column is called 'prompt'; the first line names the columns, here "
            f"{', '.join(names)[:_SHOWN]}. Commas separate cells in .csv, tabs in .tsv; bare prompts are a .txt"
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not all(names):
        raise UserError(f"{where}: a column {f'{twice[0]!r} is there twice' if twice else 'has no name'}")
    return list(names)


def _refuse_slips(names: Sequence[str] | dict[str, Any], where: str) -> None:
    """A misspelt field would be kept as one of the user's own, and the seed or the category not be seen."""
    for name in names:
        near = difflib.get_close_matches(name.lower(), OWN_FIELDS, n=1, cutoff=_LIKENESS)
        if near and name not in OWN_FIELDS:
            raise UserError(f"{where}: unknown field {name!r}; did you mean {near[0]!r}? Rename it if not")


def _refuse_json_as_text(rows: Sequence[Row], path: Path) -> None:
    first = rows[0].values["prompt"] if rows else ""
    if path.suffix.lower() == ".json" or re.match(r'\{\s*"', first):
        raise UserError(f"--prompts {path} looks like JSON; name a file of one object a line .jsonl")
