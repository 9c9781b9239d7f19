"""`megatron-video dpo pair`: generated videos with scores -> shards of preference pairs.

Of every prompt the best video against the worst, then the second best against the second worst, as far as their scores
lie apart; with --ratings the pairs that people compared, by the majority. What is left out is counted by reason in the
report; a prompt gives at most --pairs-per-prompt, so that none weighs more than the others.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_video.buckets import Bucket
from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from megatron_video.shard_schema import (
    INFO_FILE,
    NULL_TEXT_FILE,
    DatasetInfo,
    ShardSample,
    read_null_text,
    shard_name,
    write_null_text,
)
from megatron_video.shards import ShardWriter, finish_dataset
from training.alignment.generated import Generated, Sample, read_generated
from training.alignment.score import scored_alone
from training.sample_latents import SampledLatent, read_latent

REPORT_FILE = "pairs_report.json"


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt, by their scores."""

    winner: Sample
    loser: Sample
    margin: float
    """Score of the winner less that of the loser."""
    flipped: bool = False
    """Whether winner and loser were exchanged on purpose, as an annotator's mistake."""

    @property
    def key(self) -> str:
        """Unique over all folders: by what was made, not by where it lies."""
        identity = json.dumps([self.winner.prompt, self.winner.seed, self.loser.seed])
        return hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Rules:
    """Which pairs are made."""

    margin: float
    """Least difference of scores; a tie otherwise."""
    pairs_per_prompt: int | None
    """At most; None: one by scores, all that people compared."""
    least_difference: float
    """Least root mean squared difference of the latents, in their standard deviations; near-duplicates otherwise."""
    flip_labels: float
    seed: int


def main(argv: Sequence[str]) -> int:
    """Choose pairs and write them.

    Raises:
        UserError: samples without scores or latents, nothing left to pair, or an output that is there.
    """
    arguments = _parse(argv)
    rules = Rules(
        arguments.margin, arguments.pairs_per_prompt, arguments.least_difference, arguments.flip_labels, arguments.seed
    )
    _check_rules(rules)
    if (arguments.out / INFO_FILE).is_file():
        raise UserError(f"--out {arguments.out} holds finished shards; choose another folder")
    generated = read_generated(arguments.samples)
    candidates, scores, dropped, said = _candidates(arguments, generated)
    pairs, refused = choose_pairs(candidates, rules)
    dropped = refused + dropped
    if not pairs:
        raise UserError(f"--samples {arguments.samples}: no pair is left ({_counts(dropped)}); lower --margin")
    write_pairs(generated, pairs, arguments.out, arguments.pairs_per_shard)
    report = {**describe(pairs, dropped, scores, generated, rules), **said}
    write_atomically(arguments.out / REPORT_FILE, (json.dumps(report, indent=1, ensure_ascii=False) + "\n").encode())
    from training.alignment.pair_plot import draw_pairs

    draw_pairs(pairs, scores, rules, arguments.out / "pairs.png")
    print(json.dumps(report) if arguments.json else _table(report, arguments.out))
    return 0


def choose_pairs(candidates: Sequence[Pair], rules: Rules) -> tuple[list[Pair], Counter[str]]:
    """The candidates that may be kept, and how many may not, by reason.

    Raises:
        UserError: a sample without a latent.
    """
    pairs: list[Pair] = []
    dropped: Counter[str] = Counter()
    for pair in tqdm(candidates, desc="pair", unit="pair", disable=None):
        reason = _reason_against(pair, rules)
        if reason is None:
            pairs.append(pair)
        else:
            dropped[reason] += 1
    generator = np.random.default_rng(rules.seed)
    flips = generator.random(len(pairs)) < rules.flip_labels
    return [_flipped(pair) if flip else pair for pair, flip in zip(pairs, flips, strict=True)], dropped


def write_pairs(generated: Generated, pairs: Sequence[Pair], out: Path, pairs_per_shard: int) -> None:
    """Write preference shards; the folder is finished when its dataset_info.json is there.

    Raises:
        UserError: members of a pair that differ in shape or text.
    """
    settings = generated.settings
    bucket = Bucket(settings["frames"], settings["height"], settings["width"])
    first = read_latent(pairs[0].winner.latent_file)
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(pairs), pairs_per_shard)):
        with ShardWriter(out, shard_name(number)) as writer:
            for pair in pairs[start : start + pairs_per_shard]:
                writer.add(_encoded(pair, settings), bucket)
    if not (generated.folder / NULL_TEXT_FILE).is_file():
        raise UserError(f"{generated.folder}: no {NULL_TEXT_FILE}; generate with --latents")
    write_null_text(out, *read_null_text(generated.folder))
    info = DatasetInfo(
        settings["vae"],
        settings["text"],
        latent_channels=first.latent.shape[1],
        llm_dim=first.llm.shape[1],
        clip_dim=first.clip.shape[1],
        clip_tokens=len(first.clip),
        pairs=True,
    )
    finish_dataset(out, info)


def describe(
    pairs: Sequence[Pair], dropped: Mapping[str, int], scores: Mapping[int, float], generated: Generated, rules: Rules
) -> dict[str, Any]:
    """Figures of what was paired."""
    by_prompt = Counter(pair.winner.prompt for pair in pairs)
    margins = np.array([pair.margin for pair in pairs])
    values = np.array(list(scores.values()))
    return {
        "samples": str(generated.folder),
        "checkpoint": generated.settings["checkpoint"],
        "rules": asdict(rules),
        "pairs": len(pairs),
        "prompts": len(generated.by_prompt()),
        "prompts_with_pairs": len(by_prompt),
        "left_out": dict(dropped),
        "flipped": sum(pair.flipped for pair in pairs),
        "margin": {"mean": float(margins.mean()), "least": float(margins.min()), "largest": float(margins.max())},
        "score": {"mean": float(values.mean()), "standard_deviation": float(values.std())},
    }


def _candidates(
    arguments: argparse.Namespace, generated: Generated
) -> tuple[list[Pair], dict[int, float], Counter[str], dict[str, Any]]:
    """Pairs to choose from, a number for every sample, what is left out already, and figures of the votes."""
    if arguments.ratings:
        # Here: the module needs this one.
        from training.alignment.rating.voted import read_voted_pairs

        voted = read_voted_pairs(arguments.ratings, generated, arguments.pairs_per_prompt)
        return voted.candidates, voted.strengths, voted.left_out, {"ratings": voted.report}
    rated, scores, unrated = scored_alone(generated, arguments.scores or arguments.samples / "scores.jsonl")
    groups = rated.by_prompt().values()
    alone = sum(len(group) < 2 for group in groups)
    dropped = Counter({name: n for name, n in (("one video of its prompt", alone), ("unrated", unrated)) if n})
    most = arguments.pairs_per_prompt or 1
    return [pair for group in groups for pair in _extremes(group, scores, most)], scores, dropped, {}


def _extremes(group: Sequence[Sample], scores: Mapping[int, float], most: int) -> Iterator[Pair]:
    # Equal scores in the order of the seeds, so that a repetition pairs alike.
    ranked = sorted(group, key=lambda sample: (-scores[sample.index], sample.seed))
    for number in range(min(most, len(ranked) // 2)):
        winner, loser = ranked[number], ranked[-1 - number]
        yield Pair(winner, loser, scores[winner.index] - scores[loser.index])


def _reason_against(pair: Pair, rules: Rules) -> str | None:
    # A margin of zero is a tie whatever --margin says.
    if pair.margin <= 0 or pair.margin < rules.margin:
        return "tie"
    winner, loser = (read_latent(sample.latent_file).latent.float() for sample in (pair.winner, pair.loser))
    if winner.shape != loser.shape:
        raise UserError(
            f"{pair.winner.latent_file} and {pair.loser.latent_file}: the members of a pair differ in shape "
            f"({list(winner.shape)} and {list(loser.shape)}); a folder has videos of one size, so one of them is of "
            "another: delete its video and its latent, and generate again"
        )
    spread = float(winner.std() * loser.std()) ** 0.5
    difference = float((winner - loser).square().mean().sqrt()) / max(spread, 1e-12)
    return "near-duplicates" if difference < rules.least_difference else None


def _flipped(pair: Pair) -> Pair:
    return Pair(pair.loser, pair.winner, pair.margin, flipped=True)


def _encoded(pair: Pair, settings: Mapping[str, Any]) -> ShardSample:
    winner, loser = read_latent(pair.winner.latent_file), read_latent(pair.loser.latent_file)
    _check_same_text(pair, winner, loser)
    metadata = {
        "caption": pair.winner.prompt,
        "fps": settings["fps"],
        "winner_seed": pair.winner.seed,
        "loser_seed": pair.loser.seed,
        "margin": pair.margin,
        "checkpoint": settings["checkpoint"],
    }
    return ShardSample(pair.key, winner.latent, winner.llm, winner.clip, metadata, loser=loser.latent)


def _check_same_text(pair: Pair, winner: SampledLatent, loser: SampledLatent) -> None:
    if winner.llm.shape != loser.llm.shape or not bool((winner.llm == loser.llm).all()):
        raise UserError(
            f"{pair.winner.latent_file} and {pair.loser.latent_file} are of one prompt and hold other text states; "
            "generate both with the same text encoders"
        )


def _check_rules(rules: Rules) -> None:
    if rules.margin < 0 or rules.least_difference < 0:
        raise UserError(f"--margin {rules.margin} and --least-difference {rules.least_difference} must not be negative")
    if rules.pairs_per_prompt is not None and rules.pairs_per_prompt < 1:
        raise UserError(f"--pairs-per-prompt {rules.pairs_per_prompt} must be at least 1")
    if not 0 <= rules.flip_labels <= 1:
        raise UserError(f"--flip-labels {rules.flip_labels} must be between 0 and 1")


def _counts(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in dropped.items()) or "nothing left out"


def _table(report: dict[str, Any], out: Path) -> str:
    margin = report["margin"]
    votes = report.get("ratings")
    return (
        f"{out}: {report['pairs']} pairs of {report['prompts_with_pairs']} of {report['prompts']} prompts; margins "
        f"{margin['least']:.4g} to {margin['largest']:.4g}, mean {margin['mean']:.4g}; left out: "
        f"{_counts(report['left_out'])}"
        + (f"; {report['flipped']} flipped on purpose" if report["flipped"] else "")
        + (f"; raters disagree on {votes['split']} of {votes['compared']} pairs" if votes else "")
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo pair", description=__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of `megatron-video dpo generate`")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--scores", type=Path, help="of `megatron-video dpo score` (default: scores.jsonl in the folder)"
    )
    source.add_argument(
        "--ratings",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="votes of `dpo rate`: the pairs that people compared, margins in shares of votes",
    )
    add("--out", type=Path, required=True, help="folder for the shards, pairs_report.json and pairs.png")
    add("--margin", type=float, default=0.0, help="least difference of scores; less is a tie (default: %(default)s)")
    add("--pairs-per-prompt", type=int, help="at most (default: 1; with --ratings all)")
    add(
        "--least-difference",
        type=float,
        default=0.05,
        help="of the latents, in standard deviations; less are near-duplicates (default: %(default)s)",
    )
    add("--pairs-per-shard", type=int, default=64, help="(default: %(default)s)")
    add("--flip-labels", type=float, default=0.0, help="exchange winner and loser of this share: annotators' mistakes")
    add("--seed", type=int, default=0, help="of --flip-labels (default: %(default)s)")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
