"""`python -m training.planner.write_tables`: docs/planner/tables.md, the planner's figures beside others', and
docs/planner/scale.md, its simulations with their pictures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_video.cli import run_command
from training.planner.scale_pages import write_pages
from training.planner.tables import paper_claims, published_speeds, table_2

OUT = Path(__file__).parents[2] / "docs" / "planner" / "tables.md"
_HEAD = "# The planner beside published figures\n\nWritten by `python -m training.planner.write_tables`."
_FITTED = (
    "Rows with an entry under `fitted` were used to fit that constant (`training/planner/fit.py`); the others are "
    "checked against."
)


def page() -> str:
    """All tables as one page."""
    speeds = published_speeds()
    remarks = [f"- {row['run']}: {row['remark']}." for row in speeds.rows if row["remark"]]
    sources = sorted({row["source"] for row in speeds.rows})
    sections = [_HEAD, _FITTED, table_2().markdown(), paper_claims().markdown(), speeds.markdown(), *remarks]
    return "\n\n".join([*sections, "Sources: " + "; ".join(sources) + "."]) + "\n"


def main(argv: Sequence[str]) -> None:
    """Write one page, or both."""
    parser = argparse.ArgumentParser(prog="python -m training.planner.write_tables", description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only tables.md, in seconds")
    parser.add_argument("--simulations", action="store_true", help="only scale.md and its pictures, in minutes")
    arguments = parser.parse_args(argv)
    OUT.parent.mkdir(exist_ok=True)
    if not arguments.simulations:
        OUT.write_text(page(), encoding="utf-8")
        print(OUT)
    if not arguments.tables:
        print(write_pages(OUT.parent))


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
