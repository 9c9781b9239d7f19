"""The YAML of `data filter`: rules, and named subsets that are step by step stricter."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc

from megatron_video.config_io import config_dataclass, load_config
from megatron_video.errors import UserError

NumberTag = Literal[
    "width",
    "height",
    "short_side",
    "fps",
    "clip_seconds",
    "crop_width",
    "crop_height",
    "border_share",
    "blur",
    "brightness",
    "saturation_mean",
    "saturation_max",
    "saturation_min",
    "motion_mean",
    "motion_max",
    "motion_min",
    "flicker",
    "static_share",
    "text_area",
    "aesthetic",
    "nsfw",
    "watermark",
    "ocr_area",
    "text_video_score",
    "cluster_count",
    "center_similarity",
]
TextTag = Literal["source", "codec", "language", "color_transfer"]
# Tags that are no columns: the columns they are made of.
DERIVED: dict[str, tuple[str, str]] = {"clip_seconds": ("start_time", "end_time")}


@config_dataclass
class Rule:
    """One threshold."""

    tag: str
    """Column of the manifest that is compared; clip_seconds is the length of the span."""
    min: float | None = None
    """Smallest value that is kept."""
    max: float | None = None
    """Largest value that is kept."""
    exclude: str | None = None
    """For columns of text: regular expression (RE2) of what is not kept."""
    media: Literal["all", "videos", "images"] = "all"
    """What the rule is for."""
    missing: Literal["error", "keep", "drop"] | None = None
    """What becomes of clips that have no value (skipped models, stages not run); default: error, and keep for text,
    which is lacking where a file does not say it."""

    def __post_init__(self) -> None:
        known = get_args(NumberTag) + get_args(TextTag)
        if self.tag not in known:
            near = difflib.get_close_matches(self.tag, known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"tag {self.tag!r} is none that a rule can be about{hint}; there are: {', '.join(known)}")
        if self.tag in get_args(TextTag):
            if self.exclude is None or self.min is not None or self.max is not None:
                raise ValueError(f"rule for {self.tag}: a column of text takes `exclude`, and neither min nor max")
            _check_pattern(self.tag, self.exclude)
            return
        if self.exclude is not None:
            raise ValueError(f"rule for {self.tag}: `exclude` is for columns of text; a number takes min and max")
        if self.min is None and self.max is None:
            raise ValueError(f"rule for {self.tag}: neither min nor max is given")
        if any(bound is not None and math.isnan(bound) for bound in (self.min, self.max)):
            raise ValueError(f"rule for {self.tag}: min={self.min}, max={self.max} must be numbers")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"rule for {self.tag}: min={self.min} is above max={self.max}")

    @property
    def on_missing(self) -> Literal["error", "keep", "drop"]:
        """`missing`, or its default."""
        return self.missing or ("error" if self.exclude is None else "keep")

    @property
    def bounds(self) -> str:
        """What is kept, such as "[3..50]"."""
        if self.exclude is not None:
            return f"not /{self.exclude}/"
        low, high = ("" if bound is None else f"{bound:g}" for bound in (self.min, self.max))
        return f"[{low}..{high}]"

    @property
    def name(self) -> str:
        """Tag, bounds and what it is for."""
        return f"{self.tag} {self.bounds}" + ("" if self.media == "all" else f" ({self.media})")


def _check_pattern(tag: str, pattern: str) -> None:
    try:
        # On nothing at all Arrow does not look at the pattern.
        pc.match_substring_regex(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        raise ValueError(f"rule for {tag}: exclude={pattern!r} is no regular expression: {error}") from None


@config_dataclass
class Subset:
    """One subset: what the subset before it holds (the first: what the common rules leave), less what these drop."""

    name: str
    """Written to the column `subset`."""
    rules: list[Rule]
    """Thresholds, tried in this order."""


@config_dataclass
class FilterConfig:
    """Common rules, and subsets of what they leave."""

    rules: list[Rule] = field(default_factory=list)
    """Thresholds; the first that a clip fails is its drop reason."""
    subsets: list[Subset] = field(default_factory=list)
    """From the widest to the strictest; a clip is in the last one it passes, and so in all before it."""

    def __post_init__(self) -> None:
        names = [subset.name for subset in self.subsets]
        if not self.rules and not self.subsets:
            raise ValueError("neither rules nor subsets are given")
        if len(set(names)) < len(names) or "" in names:
            raise ValueError(f"subsets need names of their own, not {names}")


@dataclass(frozen=True)
class Step:
    """A rule at its place in the order."""

    rule: Rule
    level: int
    """0 for common rules, n for those of subset number n."""
    subset: str
    """Empty for common rules."""

    @property
    def name(self) -> str:
        """Name of the rule, behind that of its subset."""
        return f"{self.subset}: {self.rule.name}" if self.subset else self.rule.name


def load_rules(path: Path) -> FilterConfig:
    """Read the YAML.

    Raises:
        UserError: not readable, an unknown field, or a rule that contradicts itself.
    """
    return load_config(FilterConfig, path)


def steps_of(config: FilterConfig) -> list[Step]:
    """All rules in the order in which they are tried."""
    common = [Step(rule, 0, "") for rule in config.rules]
    nested = enumerate(config.subsets, start=1)
    return common + [Step(rule, level, subset.name) for level, subset in nested for rule in subset.rules]


def chosen_level(config: FilterConfig, subset: str | None) -> int:
    """Number of the subset whose clips stay; the widest if none is named, 0 if there are no subsets.

    Raises:
        UserError: no such subset.
    """
    names = [entry.name for entry in config.subsets]
    if subset is None:
        return min(1, len(names))
    if subset not in names:
        raise UserError(f"--subset {subset!r}: no such subset in the rules; there are: {', '.join(names) or 'none'}")
    return names.index(subset) + 1


def columns_of(steps: Sequence[Step]) -> list[str]:
    """Columns of the manifest that the rules look at."""
    found = {"dropped_by", "is_image", "source"}
    for step in steps:
        found |= set(DERIVED.get(step.rule.tag, (step.rule.tag,)))
    return sorted(found)
