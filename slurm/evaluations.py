"""`megatron-video slurm evaluations OUT`: what `submit evaluate` measured of every checkpoint, in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from slurm.evaluate_chain import MEASURE_FILE

TABLE_FILE, JSON_FILE = "evaluations.md", "evaluations.json"
_ATTRIBUTES = ("colour", "direction", "both")


def main(argv: Sequence[str]) -> int:
    """Print the table; with --write keep it beside the samples too."""
    parser = argparse.ArgumentParser(prog="megatron-video slurm evaluations", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="--out of `submit evaluate`")
    parser.add_argument("--write", action="store_true", help=f"write OUT/{TABLE_FILE} and OUT/{JSON_FILE}")
    parser.add_argument("--json", action="store_true", help="print as JSON")
    arguments = parser.parse_args(argv)
    rows = collect(arguments.out)
    if arguments.write:
        write_atomically(arguments.out / TABLE_FILE, as_table(rows).encode())
        write_atomically(arguments.out / JSON_FILE, (json.dumps(rows, indent=1) + "\n").encode())
    print(json.dumps(rows) if arguments.json else as_table(rows), end="" if not arguments.json else "\n")
    return 0


def collect(out: Path) -> list[dict[str, Any]]:
    """A row for every checkpoint that was measured, in the order of steps.

    Raises:
        UserError: none was.
    """
    rows = []
    for path in sorted(out.glob(f"step_*/{MEASURE_FILE}")):
        report = json.loads(path.read_text(encoding="utf-8"))
        row: dict[str, Any] = {"step": int(path.parent.name[5:]), "videos": report["videos"]}
        row |= {name: report[name]["accuracy"] for name in _ATTRIBUTES if name in report}
        rows.append(row | {"no_foreground": report["no_foreground"], "no_motion": report["no_motion"]})
    if not rows:
        raise UserError(
            f"{out}: nothing is measured there yet (no step_*/{MEASURE_FILE}); see megatron-video slurm status"
        )
    return rows


def as_table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    columns = ("step", "videos", *_ATTRIBUTES, "no_foreground", "no_motion")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for row in rows:
        cells = [
            f"{row[name]:.1%}" if name in _ATTRIBUTES and name in row else str(row.get(name, "")) for name in columns
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
