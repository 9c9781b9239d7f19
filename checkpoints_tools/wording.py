"""How the commands talk: names, sizes and times in reports, lines about progress, values on the command line."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

Tell = Callable[[str], None]
"""Gets a line about what was chosen, found or done."""
_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def tell_on_stderr(line: str) -> None:
    """Print a line beside the report, which stdout has for itself."""
    print(line, file=sys.stderr, flush=True)


def weighted_path(text: str) -> tuple[Path, float | None]:
    """Read PATH or PATH=WEIGHT; without a weight, None. What follows a `=` and is no number belongs to the path."""
    path, separator, weight = text.rpartition("=")
    # A folder may be named runs/lr=1e-4.
    if not separator or Path(text).exists():
        return Path(text), None
    try:
        return Path(path), float(weight)
    except ValueError:
        return Path(text), None


def group_of(name: str) -> str:
    """The module that a tensor is in, two names deep and the same for all layers: layers.self_attention."""
    path = [part for part in name.split(".")[:-1] if not part.isdigit()]
    return ".".join(path[:2]) or name


def bytes_text(count: float) -> str:
    """In decimal units: 12.3 GB."""
    return next((f"{count / size:.1f} {unit}" for size, unit in _UNITS if count >= size), f"{count:.0f} B")


def duration_text(seconds: float) -> str:
    """As hours, minutes and seconds, with days before them."""
    return str(timedelta(seconds=max(round(seconds), 0)))


def shape_text(shape: torch.Size | tuple[int, ...]) -> str:
    """As 160x8x1x1."""
    return "x".join(map(str, shape)) or "scalar"


def dtype_text(dtype: torch.dtype) -> str:
    """As float32."""
    return str(dtype).removeprefix("torch.")


def number_text(value: float | None) -> str:
    """In four digits; nothing for None."""
    return "-" if value is None else f"{value:.4g}"


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of everything in nested mappings; an empty mapping is a value."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def plain(value: Any) -> Any:
    """For JSON, which has no infinite numbers and no NaN: those become text."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
