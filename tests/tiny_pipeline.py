"""A folder of tiny captioned clips, and the row stages over it, each as its command line."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_prep import cli
from megatron_video.cli import run_command
from megatron_video.manifest import kept_rows, read_manifest
from megatron_video.video_io import write_mp4

STAGES = ("ingest", "segment", "tag", "filter", "caption", "balance")
CLIPS = 7


@dataclass(frozen=True)
class Pipeline:
    """Manifests of a run of every stage, and the arguments that made them."""

    folder: Path

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    def manifest(self, stage: str) -> Path:
        return self.folder / f"{stage}.parquet"

    def arguments(self, stage: str, out: Path) -> list[str]:
        """Command line of the stage, from the plain run's input to `out`."""
        number = STAGES.index(stage)
        source = self.manifest(STAGES[number - 1]) if number else self.raw
        own = {
            "segment": ["--min-frames", "8"],
            "filter": ["--rules", str(self.folder / "rules.yaml")],
            "caption": ["--captions", str(self.folder / "captions.jsonl"), "--kinds", "short,dense"],
            "balance": ["--embeddings", str(self.folder / "vectors.parquet"), "--clusters", "2"],
        }
        workers = ["--workers", "1"] if stage in ("ingest", "segment", "tag", "caption") else []
        return [stage, "--in", str(source), "--out", str(out), *workers, *own.get(stage, [])]


def data(*arguments: object) -> int:
    """Exit code of `megatron-video data ARGUMENTS`, in this process."""
    return run_command(cli.main, [str(argument) for argument in arguments])


def make_raw(folder: Path, clips: int = CLIPS) -> Path:
    """Moving textures with sidecar captions; the last file is a copy of the first, and one is no video."""
    folder.mkdir(parents=True)
    for number in range(clips - 2):
        rng = np.random.default_rng(number)
        picture = cv2.resize(rng.uniform(0, 255, (8, 12, 3)).astype(np.float32), (96, 64)).clip(0, 255)
        frames = np.stack([np.roll(picture, step, axis=1) for step in range(20)]).astype(np.uint8)
        write_mp4(folder / f"clip{number}.mp4", frames, fps=24, crf=12)
    (folder / f"clip{clips - 2}.mp4").write_bytes(b"no video at all")
    (folder / f"clip{clips - 1}.mp4").write_bytes((folder / "clip0.mp4").read_bytes())
    for number in range(clips):
        (folder / f"clip{number}.txt").write_text(f"clip number {number}", encoding="utf-8")
    return folder


def make_pipeline(folder: Path, stages: tuple[str, ...] = STAGES) -> Pipeline:
    """Run `stages` one after the other."""
    pipeline = Pipeline(folder)
    make_raw(pipeline.raw)
    (folder / "rules.yaml").write_text(
        "rules: [{tag: brightness, min: 124}, {tag: motion_mean, max: 40, media: videos}]"
    )
    for stage in stages:
        if stage == "caption":
            _write_captions(pipeline)
        if stage == "balance":
            _write_vectors(pipeline)
        assert data(*pipeline.arguments(stage, pipeline.manifest(stage))) == 0
    return pipeline


def _write_captions(pipeline: Pipeline) -> None:
    rows = kept_rows(read_manifest(pipeline.manifest("filter")))
    lines = [{"clip_id": row["clip_id"], "short": "a texture", "dense": f"{row['caption']} moves"} for row in rows]
    (pipeline.folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")


def _write_vectors(pipeline: Pipeline) -> None:
    names = [row["clip_id"] for row in kept_rows(read_manifest(pipeline.manifest("caption")))]
    vectors = np.random.default_rng(0).normal(size=(len(names), 8)).astype(np.float32)
    table = pa.table({"clip_id": names, "embedding": list(vectors)})
    pq.write_table(table, pipeline.folder / "vectors.parquet")
