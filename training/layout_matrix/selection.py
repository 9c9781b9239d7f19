"""Which rows of the table run on this machine."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_video.errors import UserError
from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import broken_rule
from training.layout_matrix.table import LAYOUTS, Dtype, LayoutCase
from training.layout_matrix.worker import model_config

Row = tuple[LayoutCase, Dtype]


def layout_of(case: LayoutCase, dtype: Dtype, hardware: Hardware) -> Layout:
    """The row as the rules judge it."""
    workload = case.workload(dtype)
    return Layout(
        case.config,
        model_config(workload),
        "fp32" if dtype == "float32" else "bf16",
        world_size=case.ranks,
        micro_batches=len(workload.shapes),
        balance="auto",
        hardware=hardware,
    )


def rows_for(
    hardware: Hardware, dtypes: Sequence[Dtype], max_ranks: int = 8, short: bool = False
) -> tuple[list[Row], list[str]]:
    """Rows that run on this hardware, and the names of the layouts left out because it, or max_ranks, does not do."""
    rows: list[Row] = []
    left_out: dict[str, None] = {}
    for dtype in dtypes:
        for case in LAYOUTS:
            if dtype not in case.dtypes or (short and not case.is_short(dtype)):
                continue
            if case.ranks > max_ranks or broken_rule(layout_of(case, dtype, hardware)):
                left_out[case.name] = None
            else:
                rows.append((case, dtype))
    return rows, list(left_out)


def named_rows(rows: Sequence[Row], left_out: Sequence[str], names: Sequence[str]) -> list[Row]:
    """Only the rows of these names.

    Raises:
        UserError: a name that is not in the table, or that does not run here.
    """
    unknown = [name for name in names if name not in {case.name for case in LAYOUTS}]
    if unknown:
        raise UserError(f"--layouts {' '.join(unknown)}: not in the table; --list shows the names")
    away = [name for name in names if name in left_out]
    if away:
        raise UserError(
            f"--layouts {' '.join(away)}: needs more ranks than --max-ranks, or GPUs with Transformer Engine, which "
            "this machine or --device does not offer"
        )
    return [row for row in rows if row[0].name in names]
