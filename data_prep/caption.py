"""`megatron-video data caption`: short and dense captions from a model, an endpoint or a file; the original title.

Three columns are filled, caption_short, caption_dense and caption_title, and one of them per clip becomes `caption`,
which the encoders read. Every answer is kept as it comes, so a stopped run asks for nothing twice. A clip that the
source could not answer for, although asked several times, is dropped for now: the same command asks again.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import pyarrow as pa
import torch

from data_prep.caption_config import DEFAULT_PROMPTS, KINDS, Answer, CaptionConfig, Captioner, Kind
from data_prep.caption_endpoint import EndpointCaptioner, EndpointSettings
from data_prep.caption_file import FileCaptioner
from data_prep.caption_journal import Journal, Key, read_answers, remove_journals
from data_prep.caption_mix import CaptionMix, captioned
from data_prep.caption_runner import ask_missing
from data_prep.parts import output_lock
from data_prep.stage import (
    StageReport,
    check_output,
    fingerprint_of,
    finished_fingerprint,
    make_report,
    print_report,
    stage_parser,
    write_finished,
)
from data_prep.workers import Shard, default_workers
from megatron_video.cli import run_command
from megatron_video.config_io import config_to_dict, load_config
from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from megatron_video.manifest import read_manifest, table_from_rows, write_manifest
from megatron_video.run_lock import LockedError

STAGE = "caption"
BATCH_ROWS = 4096


@dataclass(frozen=True)
class CaptionSettings:
    """What is to come out."""

    kinds: tuple[str, ...] = KINDS
    """Columns to fill."""
    mix: CaptionMix | None = None
    """Which kind becomes `caption`; None = dense, else short, else title."""
    on_missing: Literal["drop", "keep"] = "drop"
    """A clip without an answer: dropped, or kept with the caption that it had."""
    max_failures: int = 20
    """So many clips without an answer in a row stop the run: then it is the source that is at fault."""

    def __post_init__(self) -> None:
        if any(kind not in KINDS or self.kinds.count(kind) > 1 for kind in self.kinds) or not self.kinds:
            raise UserError(f"--kinds {','.join(self.kinds)}: each of {', '.join(KINDS)} at most once, and no others")
        if self.max_failures < 1:
            raise UserError(f"--max-failures {self.max_failures} must be at least 1")
        strange = [kind for kind in self.chosen_mix.shares if kind not in self.kinds]
        if strange:
            raise UserError(f"--use {self.chosen_mix.text}: {', '.join(strange)} is not among --kinds")

    @property
    def asked(self) -> tuple[Kind, ...]:
        """The kinds that a source is asked for."""
        return tuple(cast(Kind, kind) for kind in self.kinds if kind != "title")

    @property
    def chosen_mix(self) -> CaptionMix:
        """`mix` or its default."""
        return self.mix or CaptionMix(next(kind for kind in ("dense", "short", "title") if kind in self.kinds))


def main(argv: Sequence[str]) -> int:
    """Command line of the stage."""
    arguments = _parser().parse_args(argv)
    settings, config = _settings(arguments), load_config(CaptionConfig, arguments.prompts)
    shard = Shard.parse(arguments.shard) if arguments.shard else None
    captioner = _captioner(arguments, settings, config)
    try:
        report = run(arguments.source, arguments.out, captioner, settings, config, arguments.workers, shard)
    finally:
        if captioner is not None:
            captioner.close()
    print_report(report, arguments.json)
    return 0


def run(
    manifest_in: Path,
    manifest_out: Path,
    captioner: Captioner | None,
    settings: CaptionSettings,
    config: CaptionConfig,
    workers: int = 1,
    shard: Shard | None = None,
) -> StageReport:
    """Caption every kept row.

    Args:
        captioner: the source; None where only titles are wanted.
        workers: threads that decode frames ahead of the source.
        shard: ask for this share only; the run that finds all answers there writes the manifest.

    Raises:
        UserError: no source for kinds that need one, a prompt is missing, or the source fails for every clip.
    """
    started = time.monotonic()
    check_output(manifest_in, manifest_out)
    _check_source(captioner, settings, config)
    table = read_manifest(manifest_in)
    name = captioner.name if captioner else "title"
    fingerprint = fingerprint_of(STAGE, _identity(settings, config, name), file_sha256(manifest_in))
    with output_lock(manifest_out, shard):
        if finished_fingerprint(manifest_out) == fingerprint:
            done = read_manifest(manifest_out)
            return make_report(STAGE, done, manifest_out, table.num_rows, started, up_to_date=True)
        journal = Journal(manifest_out, name, shard)
        details: dict[str, Any] = {"answers of an earlier run": len(journal.answers)}
        try:
            if captioner is not None:
                ask_missing(table, captioner, settings.asked, config, journal, workers, settings.max_failures, shard)
        finally:
            journal.close()
        details |= captioner.figures() if captioner else {}
        if shard is None:
            result, counts = _join(table, journal.answers, settings, name, manifest_out, fingerprint)
            return make_report(STAGE, result, manifest_out, table.num_rows, started, details={**counts, **details})
    joined = _join_if_last(table, settings, name, manifest_out, fingerprint)
    report = make_report(STAGE, table, manifest_out, table.num_rows, started)
    return replace(report, details={**details, **joined})


def _join(
    table: pa.Table,
    answers: Mapping[Key, Answer],
    settings: CaptionSettings,
    name: str,
    manifest_out: Path,
    fingerprint: str,
) -> tuple[pa.Table, dict[str, int]]:
    result, counts = _filled(table, answers, settings, name)
    counts["to be asked again"] = sum(answer.again for answer in answers.values())
    if counts["to be asked again"]:
        # Without the fingerprint of a finished stage the same command goes on, with the answers that are there.
        write_manifest(result, manifest_out)
    else:
        write_finished(result, manifest_out, fingerprint)
        remove_journals(manifest_out)
    return result, counts


def _join_if_last(
    table: pa.Table, settings: CaptionSettings, name: str, manifest_out: Path, fingerprint: str
) -> dict[str, Any]:
    """Of an array's tasks, the one that finds all answers there writes the manifest."""
    try:
        with output_lock(manifest_out):
            if finished_fingerprint(manifest_out) == fingerprint:
                return {"joined": True}
            answers = read_answers(manifest_out, name)
            kept = table.filter(table["dropped_by"].is_null())["clip_id"].to_pylist()
            missing = sum((clip_id, kind) not in answers for clip_id in kept for kind in settings.asked)
            if not missing:
                _join(table, answers, settings, name, manifest_out, fingerprint)
            return {"joined": not missing, "answers missing": missing}
    except LockedError:
        # Others are at work; the last of them joins.
        return {"joined": False}


def _filled(
    table: pa.Table, answers: Mapping[Key, Answer], settings: CaptionSettings, name: str
) -> tuple[pa.Table, dict[str, int]]:
    counts: Counter[str] = Counter()
    batches = []
    # Some thousand rows at a time: as Python objects a manifest takes twenty times its memory.
    for batch in table.to_batches(max_chunksize=BATCH_ROWS):
        rows = [captioned(row, answers, settings, name, counts) for row in batch.to_pylist()]
        batches.append(table_from_rows(rows))
    return pa.concat_tables(batches or [table_from_rows([])]), dict(sorted(counts.items()))


def _identity(settings: CaptionSettings, config: CaptionConfig, name: str) -> dict[str, Any]:
    return {
        "kinds": settings.kinds,
        "use": settings.chosen_mix.text,
        "on_missing": settings.on_missing,
        "source": name,
        "prompts": config_to_dict(config),
    }


def _check_source(captioner: Captioner | None, settings: CaptionSettings, config: CaptionConfig) -> None:
    if settings.asked and captioner is None:
        raise UserError(f"--kinds {','.join(settings.kinds)} need a source: --vlm, --endpoint or --captions")
    missing = [kind for kind in settings.asked if kind not in config.prompts]
    if missing and captioner is not None and captioner.looks:
        raise UserError(f"--prompts has no prompt for {', '.join(missing)}, which --kinds asks for")


def _settings(arguments: argparse.Namespace) -> CaptionSettings:
    mix = CaptionMix(arguments.use) if arguments.use else None
    return CaptionSettings(tuple(arguments.kinds.split(",")), mix, arguments.on_missing, arguments.max_failures)


def _check(arguments: argparse.Namespace) -> None:
    _settings(arguments)
    if arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers} must be at least 1")
    if arguments.endpoint is not None:
        if not arguments.model:
            raise UserError("--endpoint needs --model, the name under which the endpoint serves it")
        _endpoint_settings(arguments)
    if arguments.shard:
        Shard.parse(arguments.shard)


def _captioner(arguments: argparse.Namespace, settings: CaptionSettings, config: CaptionConfig) -> Captioner | None:
    if arguments.captions is not None:
        return FileCaptioner(arguments.captions, settings.asked)
    if arguments.endpoint is not None:
        return EndpointCaptioner(_endpoint_settings(arguments), config)
    if arguments.vlm is None:
        return None
    # Only now: loading transformers' models takes seconds that the other sources need not wait for.
    from data_prep.caption_vlm import VlmCaptioner

    return VlmCaptioner(arguments.vlm, config, arguments.device, arguments.dtype, arguments.batch_size)


def _endpoint_settings(arguments: argparse.Namespace) -> EndpointSettings:
    return EndpointSettings(
        url=arguments.endpoint,
        model=arguments.model,
        api_key_env=arguments.api_key_env,
        concurrency=arguments.concurrency,
        requests_per_minute=arguments.requests_per_minute,
        timeout=arguments.timeout,
        retries=arguments.retries,
        longest_wait=arguments.longest_wait,
    )


def _parser() -> argparse.ArgumentParser:
    parser = stage_parser(STAGE, __doc__, workers=False, check=_check, gpu=lambda arguments: arguments.vlm)
    add = parser.add_argument
    kinds = ",".join(KINDS)
    add("--kinds", default=kinds, metavar="KIND,...", help="columns to fill (default: %(default)s)")
    add("--use", metavar="KIND=SHARE,...", help="which becomes `caption`: dense (default), or dense=0.6,short=0.4")
    add("--on-missing", choices=["drop", "keep"], default="drop", help="clips that get no answer (default: drop)")
    failures = "clips in a row without an answer that stop it (default: %(default)s)"
    add("--max-failures", type=int, default=20, metavar="N", help=failures)
    prompts = "prompts, frames, refusals (default: %(default)s)"
    add("--prompts", type=Path, default=DEFAULT_PROMPTS, metavar="YAML", help=prompts)
    add("--workers", type=int, default=default_workers(), metavar="N", help="threads that decode (default: all CPUs)")
    add("--shard", metavar="I/N", help="ask for share I (from 0) of N; the last one joins them")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--vlm", type=Path, metavar="FOLDER", help="vision-language model for transformers")
    source.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible, such as http://localhost:8000/v1")
    source.add_argument("--captions", type=Path, metavar="FILE", help=".jsonl, .csv or .parquet with clip_id or path")
    local = parser.add_argument_group("with --vlm").add_argument
    default = "cuda" if torch.cuda.is_available() else "cpu"
    local("--device", default=default, help="cpu or a GPU, such as cuda:0 (default here: %(default)s)")
    local("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16", help="default: %(default)s")
    local("--batch-size", type=int, default=4, metavar="N", help="clips a pass (default: %(default)s)")
    remote = parser.add_argument_group("with --endpoint").add_argument
    remote("--model", metavar="NAME", help="name under which the endpoint serves the model")
    remote("--api-key-env", metavar="VARIABLE", help="environment variable that holds the key")
    remote("--concurrency", type=int, default=16, metavar="N", help="requests under way at once (default: %(default)s)")
    remote("--requests-per-minute", type=float, metavar="N", help="retries count too (default: no limit)")
    remote("--timeout", type=float, default=120, metavar="SECONDS", help="for a whole request (default: %(default)s)")
    remote("--retries", type=int, default=5, metavar="N", help="further tries of a request (default: %(default)s)")
    wait = "between two tries at most (default: %(default)s)"
    remote("--longest-wait", type=float, default=60, metavar="SECONDS", help=wait)
    return parser


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
