"""Judging a table of clips by rules: column by column, so that ten million clips take seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.filter_rules import DERIVED, Rule, Step
from megatron_video.errors import UserError
from megatron_video.manifest import SCHEMA

STAGE = "filter"
VERDICTS = pa.schema([SCHEMA.field(name) for name in ("dropped_by", "drop_reason", "subset", "subset_reason")])
"""What `judge` gives."""
_EXAMPLES = 5


@dataclass
class Tally:
    """What the rules did to all tables so far."""

    steps: Sequence[Step]
    subsets: Sequence[str]
    """Names, from the widest to the strictest."""
    rows: int = 0
    dropped_before: int = 0
    kept: int = 0
    fails: Counter[str] = field(default_factory=Counter)
    """Clips that a rule finds fault with, of all that came in: does not depend on the rules before it."""
    removed: Counter[str] = field(default_factory=Counter)
    """Clips of which it was the first to do so."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Tag -> clips that it dropped from the manifest."""
    examples: list[str] = field(default_factory=list)

    @property
    def entered(self) -> int:
        """Clips that no earlier stage had dropped."""
        return self.rows - self.dropped_before


def judge(table: pa.Table, steps: Sequence[Step], cut: int, tally: Tally) -> pa.Table:
    """`VERDICTS` on the clips of a table, by the first rule that each fails.

    Args:
        table: has the columns that the rules look at.
        steps: rules in order.
        cut: level up to which failing a rule drops the clip; at higher ones it only ends its way through the subsets.
        tally: is added to.

    Raises:
        UserError: a clip has no value for a tag that a rule is about.
    """
    kept = table["dropped_by"].is_null().to_numpy(zero_copy_only=False)
    images = pc.fill_null(table["is_image"], False).to_numpy(zero_copy_only=False)
    # Number of the first rule that a clip fails; all rules are passed where it stays at their count.
    first = np.full(table.num_rows, len(steps), np.int32)
    for number, step in enumerate(steps):
        fails = _fails(table, step.rule, _concerned(step.rule, kept, images))
        newly = fails & (first == len(steps))
        first[newly] = number
        tally.fails[step.name] += int(fails.sum())
        tally.removed[step.name] += int(newly.sum())
    reasons = _reasons(table, steps, np.where(kept, first, len(steps)))
    # Level of the rule that stopped the clip: it is in all subsets below it.
    stopped = np.array([*(step.level for step in steps), len(tally.subsets) + 1])[first]
    drops = kept & (stopped <= cut)
    tally.rows += table.num_rows
    tally.dropped_before += int((~kept).sum())
    tally.kept += int((kept & ~drops).sum())
    _count_drops(table, np.where(drops, first, len(steps)), reasons, tally)
    return _columns(table, cut, kept, stopped, reasons, tally.subsets)


def numbers(table: pa.Table, tag: str) -> np.ndarray:
    """Values of a tag, float64 [rows]; missing ones are not a number."""
    start, end = DERIVED.get(tag, (None, tag))
    values = table[end].cast(pa.float64()).to_numpy(zero_copy_only=False)
    return values if start is None else values - table[start].cast(pa.float64()).to_numpy(zero_copy_only=False)


def _concerned(rule: Rule, kept: np.ndarray, images: np.ndarray) -> np.ndarray:
    if rule.media == "all":
        return kept
    return kept & (images if rule.media == "images" else ~images)


def _fails(table: pa.Table, rule: Rule, concerned: np.ndarray) -> np.ndarray:
    if rule.exclude is not None:
        lacking = table[rule.tag].is_null().to_numpy(zero_copy_only=False)
        found = pc.match_substring_regex(table[rule.tag], rule.exclude)
        fails = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
    else:
        values = numbers(table, rule.tag)
        # A score that is not a number would pass every comparison.
        lacking = np.isnan(values)
        fails = np.zeros(len(values), bool)
        if rule.min is not None:
            fails |= values < rule.min
        if rule.max is not None:
            fails |= values > rule.max
    _refuse_untagged(table, rule, concerned & lacking)
    return (fails | lacking if rule.on_missing == "drop" else fails & ~lacking) & concerned


def _refuse_untagged(table: pa.Table, rule: Rule, untagged: np.ndarray) -> None:
    if rule.on_missing == "error" and untagged.any():
        example = table["source"][int(untagged.argmax())]
        raise UserError(
            f"clips without {rule.tag}, such as {example}; run `megatron-video data tag` first (with --models for "
            "scores of models), restrict the rule to `media: videos`, or say `missing: keep` or `missing: drop`"
        )


def _reasons(table: pa.Table, steps: Sequence[Step], first: np.ndarray) -> pa.Array:
    """Text for every clip that failed, null for the others; made for the failing ones only, as text is slow."""
    rows = [np.flatnonzero(first == number) for number in range(len(steps))]
    texts = [_texts(table, step, where) for step, where in zip(steps, rows, strict=True)]
    place = np.full(len(first), -1, np.int64)
    failed = np.concatenate([*rows, np.empty(0, np.int64)])
    place[failed] = np.arange(len(failed))
    return pa.concat_arrays([*texts, pa.array([], pa.string())]).take(pa.array(place, mask=place < 0))


def _texts(table: pa.Table, step: Step, where: np.ndarray) -> pa.Array:
    within = f" (subset {step.subset})" if step.subset else ""
    rule = step.rule
    if rule.exclude is not None:
        return pa.array([f"{rule.tag}: matches /{rule.exclude}/{within}"]).take(pa.array(np.zeros(len(where), int)))
    values = numbers(table, rule.tag)[where]
    shown = pc.fill_null(pc.cast(pc.round(pa.array(values, from_pandas=True), 4), pa.string()), "no value")
    return pc.binary_join_element_wise(f"{rule.tag}: ", shown, f" is outside {rule.bounds}{within}", "")


def _columns(
    table: pa.Table, cut: int, kept: np.ndarray, stopped: np.ndarray, reasons: pa.Array, subsets: Sequence[str]
) -> pa.Table:
    inside = pa.array([None, *subsets], pa.string()).take(pa.array(np.maximum(stopped - 1, 0)))
    none = pa.nulls(table.num_rows, pa.string())
    outside = pc.if_else(pa.array(stopped > 0), reasons, none)
    drops = kept & (stopped <= cut)
    return pa.table(
        {
            "dropped_by": _where(drops, pa.scalar(STAGE), table, "dropped_by"),
            "drop_reason": _where(drops, reasons, table, "drop_reason"),
            # Clips that were dropped before keep what an earlier filter wrote about them.
            "subset": _where(kept, inside, table, "subset"),
            "subset_reason": _where(kept, outside, table, "subset_reason"),
        },
        schema=VERDICTS,
    )


def _where(rows: np.ndarray, values: pa.Array | pa.Scalar, table: pa.Table, name: str) -> pa.ChunkedArray | pa.Array:
    # A dry run reads no old reasons: it writes none.
    old = table[name] if name in table.schema.names else pa.nulls(table.num_rows, pa.string())
    return pc.if_else(pa.array(rows), values, old)


def _count_drops(table: pa.Table, dropping: np.ndarray, reasons: pa.Array, tally: Tally) -> None:
    """Args: dropping: number of the rule that drops each clip, int [rows]; the count of rules where none does."""
    counts = np.bincount(dropping, minlength=len(tally.steps) + 1)[:-1]
    for step, count in zip(tally.steps, counts.tolist(), strict=True):
        if count:
            tally.reasons[step.rule.tag] += count
    shown = np.flatnonzero(dropping < len(tally.steps))[: _EXAMPLES - len(tally.examples)]
    tally.examples += [f"{table['source'][int(row)]}: {reasons[int(row)]}" for row in shown]
