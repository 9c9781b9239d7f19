"""`megatron-video dpo score`: a number for every generated video.

Adds a line to the output for each sample as it is scored, so an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_video.cli import run_command
from megatron_video.errors import UserError
from megatron_video.files import write_atomically
from training.alignment.generated import Generated, Sample, read_generated
from training.alignment.scorers import SCORERS, Scorer, UnratedError, find_scorer, scorer_label


def main(argv: Sequence[str]) -> int:
    """Score what has no score yet.

    Raises:
        UserError: no such folder or scorer, a score that is not finite, or scores of other samples.
    """
    arguments = _parse(argv)
    _opened.cache_clear()
    generated, scorers = _opened(arguments.samples, tuple(arguments.scorers))
    names = dict(zip(scorers, _weights(arguments.scorers).values(), strict=True))
    out: Path = arguments.out or arguments.samples / "scores.jsonl"
    done = _begun(out, generated, names)
    left = [sample for sample in generated.samples if sample.index not in done]
    values_of = partial(_values, arguments.samples, tuple(arguments.scorers), arguments.unrated)
    with _workers(arguments.workers) as each, out.open("a", encoding="utf-8") as lines:
        found = each(values_of, [sample.index for sample in left])
        for sample, values in tqdm(zip(left, found, strict=True), "score", len(left), unit="video", disable=None):
            total = _total(values, names)
            lines.write(json.dumps(_line(sample, total, values), ensure_ascii=False) + "\n")
            lines.flush()
    scores = read_scores(out)
    unrated = len(generated.samples) - len(scores)
    if not scores:
        raise UserError(f"--samples {arguments.samples}: none of them is rated")
    report = {"out": str(out), "samples": len(scores), "scored_now": len(left), "unrated": unrated}
    report |= _spread(list(scores.values()))
    report |= _by_category(generated, scores)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else _table(report))
    return 0


def read_scores(path: Path) -> dict[int, float]:
    """Score by number of the sample, without those that were left out as unrated.

    Raises:
        UserError: no such file, or a line that is none of `score`'s.
    """
    return {values["index"]: values["score"] for values in _lines(path) if values["score"] is not None}


def scored_alone(generated: Generated, path: Path) -> tuple[Generated, dict[int, float], int]:
    """The samples that have a score, their scores, and how many were left out as unrated.

    Raises:
        UserError: a sample without a line in the file, or with one of another prompt or seed.
    """
    lines = {values["index"]: values for values in _lines(path)}
    for sample in generated.samples:
        line = lines.get(sample.index, {})
        theirs = line.get("prompt", sample.prompt), line.get("seed", sample.seed)
        if theirs != (sample.prompt, sample.seed):
            raise UserError(
                f"--scores {path} holds scores of other samples: number {sample.index} is {theirs[0]!r} with seed "
                f"{theirs[1]} there, {sample.prompt!r} with seed {sample.seed} in {generated.folder}; score these"
            )
    scores = {index: line["score"] for index, line in lines.items()}
    missing = [sample.index for sample in generated.samples if sample.index not in scores]
    if missing:
        raise UserError(f"{len(missing)} samples of {generated.folder} have no score, first: {missing[0]}; score again")
    kept = [sample for sample in generated.samples if scores[sample.index] is not None]
    found = {sample.index: scores[sample.index] for sample in kept}
    return replace(generated, samples=kept), found, len(generated.samples) - len(kept)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--scores {path}: {error.strerror}; `megatron-video dpo score` writes it") from None
    found = []
    # Not str.splitlines: prompts may hold separators that it would cut at.
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
            score = None if values["score"] is None else float(values["score"])
            found.append({**values, "index": int(values["index"]), "score": score})
        except (ValueError, KeyError, TypeError):
            # The last line of a killed run may be torn; it is scored again.
            if number < len(lines):
                raise UserError(f"{path}, line {number} is no score: {line[:80]}") from None
    return found


def _begun(out: Path, generated: Generated, names: dict[str, float]) -> set[int]:
    """Numbers of the samples that have scores; the file is left with whole lines alone.

    Raises:
        UserError: scores of other samples, or by other scorers.
    """
    if not out.exists():
        return set()
    lines = _lines(out)
    samples = {sample.index: sample for sample in generated.samples}
    for line in lines:
        sample = samples.get(line["index"])
        if sample is None or (sample.prompt, sample.seed) != (line["prompt"], line["seed"]):
            raise UserError(f"--out {out} holds scores of other samples (number {line['index']}); choose another file")
        if list(line["scores"]) != list(names):
            raise UserError(
                f"--out {out} holds scores by {list(line['scores'])}, asked is {list(names)}; choose another"
            )
    write_atomically(out, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    return {line["index"] for line in lines}


def _weights(given: Sequence[str]) -> dict[str, float]:
    weights = {}
    for item in given:
        name, _, weight = item.partition("=")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise UserError(f"--with {item}: {weight!r} is not a weight") from None
    return weights


@contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterable[Any]]]:
    """A `map` over so many processes; one is this process."""
    if count < 1:
        raise UserError(f"--workers {count} must be at least 1")
    if count == 1:
        yield map
        return
    # Spawned: OpenCV and libav keep threads that do not survive a fork. Ctrl-C is this process's to heed.
    pool = ProcessPoolExecutor(count, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool.map
    finally:
        pool.shutdown(cancel_futures=True)


@cache
def _opened(folder: Path, given: tuple[str, ...]) -> tuple[Generated, dict[str, Scorer]]:
    """Samples and scorers, once a process."""
    generated = read_generated(folder)
    names = _weights(given)
    # Scorers before labels: a label reads files whose absence a scorer tells better.
    scorers = [find_scorer(name, generated) for name in names]
    return generated, dict(zip(map(scorer_label, names), scorers, strict=True))


def _values(folder: Path, given: tuple[str, ...], unrated: str, index: int) -> dict[str, float | None]:
    """What each scorer says of one sample."""
    generated, scorers = _opened(folder, given)
    # Samples lie in the order of their numbers.
    sample = generated.samples[index]
    return {name: _value(name, scorer, sample, unrated) for name, scorer in scorers.items()}


def _value(name: str, scorer: Scorer, sample: Sample, unrated: str) -> float | None:
    try:
        return _finite(name, scorer(sample), sample)
    except UnratedError:
        if unrated == "skip":
            return None
        raise


def _total(values: dict[str, float | None], weights: dict[str, float]) -> float | None:
    known = [weight * value for name, weight in weights.items() if (value := values[name]) is not None]
    return sum(known) if len(known) == len(weights) else None


def _finite(name: str, value: float, sample: Sample) -> float:
    if not math.isfinite(value):
        raise UserError(f"{name} gives {sample.file} the score {value}; a score must be finite")
    return float(value)


def _line(sample: Sample, total: float | None, values: dict[str, float | None]) -> dict[str, Any]:
    return {
        "index": sample.index,
        "prompt": sample.prompt,
        "seed": sample.seed,
        "file": sample.file.name,
        "score": total,
        "scores": values,
    }


def _spread(scores: Sequence[float]) -> dict[str, float]:
    ordered = sorted(scores)
    return {"lowest": ordered[0], "median": ordered[len(ordered) // 2], "highest": ordered[-1]}


def _by_category(generated: Generated, scores: dict[int, float]) -> dict[str, Any]:
    """The report's part by category; {} where the list of prompts names none."""
    found = {}
    for name, samples in generated.by_category().items():
        own = [scores[sample.index] for sample in samples if sample.index in scores]
        if own:
            found[name] = {"samples": len(own), "mean": sum(own) / len(own), **_spread(own)}
    return {"by_category": found} if found else {}


def _table(report: dict[str, Any]) -> str:
    width = max(map(len, report.get("by_category", ())), default=0)
    lines = [
        f"  {name:<{width}}  {part['samples']:>5} samples, mean {part['mean']:.4g}, lowest {part['lowest']:.4g}, "
        f"median {part['median']:.4g}, highest {part['highest']:.4g}"
        for name, part in report.get("by_category", {}).items()
    ]
    return "\n".join([_head(report), *lines])


def _head(report: dict[str, Any]) -> str:
    return (
        f"{report['out']}: {report['samples']} samples scored, {report['scored_now']} of them now; lowest "
        f"{report['lowest']:.4g}, median {report['median']:.4g}, highest {report['highest']:.4g}"
        + (f"; {report['unrated']} left out as unrated" if report["unrated"] else "")
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo score", description=__doc__)
    add = parser.add_argument
    add("--samples", type=Path, required=True, help="folder of `megatron-video dpo generate`")
    add(
        "--with",
        dest="scorers",
        action="append",
        required=True,
        metavar="NAME[=WEIGHT]",
        help=f"{', '.join(SCORERS)}, reward:FOLDER of a reward model, ratings:FILE[,FILE] of people, or "
        "package.module:function; several add up by their weights",
    )
    add(
        "--unrated",
        choices=["refuse", "skip"],
        default="refuse",
        help="videos that nobody rated, with ratings:FILE: refuse, or leave out and count (default: %(default)s)",
    )
    add("--workers", type=int, default=1, help="processes (default: %(default)s)")
    add("--out", type=Path, help="JSON lines (default: scores.jsonl in the folder)")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
