"""One picture of what several models make of the same prompts and noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megatron_video.contact_sheet import write_contact_sheet
from megatron_video.video_io import read_frames
from training.alignment.generated import read_generated
from training.alignment.score import read_scores

_FRAMES = 5


def write_side_by_side(
    folders: Mapping[str, Path], path: Path, prompts: int = 12, scores: str = "scores.jsonl"
) -> None:
    """Write a contact sheet: a row for each of the first prompts, a column for each model, scores in the captions.

    Args:
        folders: scored samples of the same prompts and seeds, by what the model is called.
        path: the PNG.
        prompts: rows; the first ones, not chosen ones.
        scores: name of the file of scores in every folder.

    Raises:
        UserError: a folder is unfinished, or has no scores.
    """
    models = [
        (name, read_generated(folder).samples[:prompts], read_scores(folder / scores))
        for name, folder in folders.items()
    ]
    rows = [
        (f"{name} ({values[sample.index]:.3g}): {sample.prompt}", read_frames(sample.file))
        for row in zip(*(samples for _, samples, _ in models), strict=True)
        for sample, (name, _, values) in zip(row, models, strict=True)
    ]
    write_contact_sheet(rows, path, columns=_FRAMES, across=len(models))
