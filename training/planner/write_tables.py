"""docs/planner/tables.md: the planner's figures beside others'. `python -m training.planner.write_tables` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

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


if __name__ == "__main__":
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(page(), encoding="utf-8")
    print(OUT)
    sys.exit(0)
