"""`data tag --models`: clips in batches, decoded on threads, measured, and scored by the networks of model_tags.

A batch is a fixed stretch of the manifest, so that scores do not depend on how the work is spread. Every worker process
loads the models with its first batch and keeps them; on GPUs a few workers each are enough (--workers).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import overload

import numpy as np

from data_prep.model_tags import TagBatch, check_files, load_models_config, model_fingerprints
from data_prep.model_tags.registry import loaded_once
from data_prep.parts import TableRows
from data_prep.stage import StageReport, check_output, fingerprint_of, lost_row, run_parts
from data_prep.tag import STAGE, tag_clip
from data_prep.workers import Execution, parallel_map
from megatron_video.config_io import config_to_dict
from megatron_video.files import file_sha256
from megatron_video.manifest import Row, dropped, read_manifest
from megatron_video.video_io import VideoError

_DECODE_THREADS = 4


class Batches(Sequence[list[Row]]):
    """Rows in stretches of equal length, the last one shorter."""

    def __init__(self, rows: TableRows, size: int) -> None:
        self._rows, self._size = rows, size

    def __len__(self) -> int:
        return -(-len(self._rows) // self._size)

    @overload
    def __getitem__(self, index: int) -> list[Row]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[Row]]: ...
    def __getitem__(self, index: int | slice) -> list[Row] | list[list[Row]]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._rows[index * self._size : (index + 1) * self._size]


def run_with_models(manifest_in: Path, manifest_out: Path, workers: int | Execution, models: Path) -> StageReport:
    """Tag every kept row, with and without models.

    Raises:
        UserError: the YAML is wrong, or a file of a model is missing or is not what it should be.
    """
    check_output(manifest_in, manifest_out)
    config = load_models_config(models)
    check_files(config)
    prints = model_fingerprints(config)
    rows = TableRows(read_manifest(manifest_in))
    settings = {
        "models": prints,
        "dtype": config.dtype,
        "clips_per_batch": config.clips_per_batch,
        "ocr_min_score": config.ocr.min_score if config.ocr else None,
    }
    fingerprint = fingerprint_of(STAGE, settings, file_sha256(manifest_in))
    process = functools.partial(_tag_batch, json.dumps(config_to_dict(config)), json.dumps(prints))
    batches = Batches(rows, config.clips_per_batch)
    lost = functools.partial(redo_one_by_one, process)
    report = run_parts(STAGE, batches, manifest_out, process, fingerprint, workers, lost=lost)
    return replace(report, rows_in=len(rows), details={**report.details, "models": prints})


def redo_one_by_one(process: Callable[[list[Row]], list[Row]], rows: list[Row]) -> list[Row]:
    """The rows of a batch that killed every process: each alone, so that only the one to blame is dropped."""
    batches = [[row] for row in rows]
    done = parallel_map(process, batches, Execution(1), lambda batch: lost_row(STAGE, batch[0]))
    return [row for result in done for row in result]


def _tag_batch(config_json: str, prints_json: str, rows: list[Row]) -> list[Row]:
    # Before any clip, and outside what may drop one: a wrong model must stop the run.
    tags = loaded_once(config_json, prints_json)
    with ThreadPoolExecutor(_DECODE_THREADS) as threads:
        clips = list(threads.map(_clip, rows))
    scored = [number for number, (_, frames) in enumerate(clips) if frames is not None]
    batch = TagBatch([clips[n][0] for n in scored], [frames for n in scored if (frames := clips[n][1]) is not None])
    scores = {tag.column: tag.score(batch) for tag in tags} if scored else {}
    result = [row for row, _ in clips]
    for place, number in enumerate(scored):
        values = {column: values[place] for column, values in scores.items()}
        result[number] = {**result[number], **values, "tag_models": prints_json}
    return result


def _clip(row: Row) -> tuple[Row, np.ndarray | None]:
    """The tagged row and its frames; no frames where the clip is dropped."""
    if row["dropped_by"]:
        return row, None
    try:
        return tag_clip(row)
    except VideoError as error:
        return dropped(row, STAGE, f"unreadable: {error}"), None
