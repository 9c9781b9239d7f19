"""The page of preference_gain.py."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

_STEPS = ("generate", "score", "pair", "reward", "train", "evaluate", "judge")


def write_page(path: Path, results: Mapping[str, Any]) -> None:
    """Write the page; the picture beside it has its name.

    Args:
        path: Markdown file.
        results: what preference_gain.py wrote as JSON.
    """
    rows, rounds, settings = results["rows"], results["summary"]["rounds"], results["settings"]
    machine = results["environment"]
    command = " ".join(["python tests/benchmarks/preference_gain.py", *settings["overrides"]])
    text = [
        "# What preference training did to the demo's model",
        f"Written by `{command}` after `make demo`; all figures are in "
        f"`tests/benchmarks/results/preference_gain.json`. {machine['cpu']}, {machine['cpu_cores']} cores, commit "
        f"{machine['commit']}.",
        *(f"Rewarded is `{name}`. {meaning}" for name, meaning in settings["score"].items()),
        f"Pairs come from {settings['prompts']} captions with {settings['seeds']} seeds each; judged is on "
        f"{rows[0]['videos']} others with seeds of their own and the same initial noise for all models. A win rate is "
        "the share of these videos that beat the demo's model's; a tie counts half.",
        "\n".join(_table(rows)),
        "Colour and direction: share of the videos that show what the caption asks for. Loss, margin and the changes "
        "of the errors of winners and losers against the reference are means over the last steps.",
        "## Rounds",
        "\n".join(_rounds(rounds)),
        "Seconds of each step:",
        "\n".join(_seconds(rounds, results["summary"]["seconds_of_the_start"])),
        f"![start and rounds side by side]({path.with_suffix('.png').name})",
        "The first captions of the evaluation, not chosen ones; in brackets the reward.",
    ]
    wrapped = [part if part[0] in "|#!" else textwrap.fill(part, 120, break_on_hyphens=False) for part in text]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(wrapped) + "\n", encoding="utf-8")


def _table(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| training | win rate (95 % interval) | by the reward model | colour | direction | both | loss | margin | "
        "pairs right | winners' error | losers' error |"
    )
    yield "|---|" + "---|" * 10
    for row in rows:
        shown = [f"{row[name]:.1%}" for name in ("colour", "direction", "both")]
        if "win_rate" not in row:
            yield f"| {row['training']} | | | {' | '.join(shown)} | | | | | |"
            continue
        low, high = row["interval_95"]
        by_model = row.get("win_rate_by_reward_model")
        yield (
            f"| {row['training']} | {row['win_rate']:.1%} ({low:.1%} to {high:.1%}) | "
            f"{'' if by_model is None else f'{by_model:.1%}'} | {' | '.join(shown)} | {row['loss']:.3g} | "
            f"{row['margin']:.3g} | {row['accuracy']:.1%} | {row['winner_change']:+.2g} | {row['loser_change']:+.2g} |"
        )


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield (
        "| round | pairs | over the round before | over the start | mean reward | reward model on held-out pairs, "
        "before and after it was tuned |"
    )
    yield "|---|" + "---|" * 5
    for item in rounds:
        gains = next(iter(item["gains"].values()))
        before, first = gains["over_the_round_before"], gains["over_the_start"]
        untuned, tuned = (item["reward_model"][name] for name in ("before", "held_out"))
        yield (
            f"| {item['round']} | {item['pairs']} | {before['win_rate']:.1%} | {first['win_rate']:.1%} | "
            f"{before['mean_before']:.3g} -> {before['mean_after']:.3g} | {untuned['accuracy']:.1%} -> "
            f"{tuned['accuracy']:.1%} of {tuned['pairs']} |"
        )


def _seconds(rounds: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> Iterator[str]:
    yield f"| | {' | '.join(_STEPS)} | together |"
    yield "|---|" + "---|" * (len(_STEPS) + 1)
    for name, seconds in [("start", start), *((f"round {item['round']}", item["seconds"]) for item in rounds)]:
        cells = [f"{seconds[step]:.0f}" if step in seconds else "" for step in _STEPS]
        yield f"| {name} | {' | '.join(cells)} | {sum(seconds.values()):.0f} |"
