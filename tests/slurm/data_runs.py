"""Small data for tests of data jobs: a folder of clips with captions, a manifest, tiny encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from shape_videos import draw_video
from tiny_models import write_tiny_text_encoders, write_tiny_vae

from data_prep import ingest
from megatron_video.video_io import write_mp4


@dataclass(frozen=True)
class SmallData:
    """Clips, what ingest made of them, and encoders."""

    folder: Path

    @property
    def raw(self) -> Path:
        return self.folder / "raw"

    @property
    def manifest(self) -> Path:
        return self.folder / "ingested.parquet"

    def encode_words(self, out: Path) -> list[str]:
        """Words of `megatron-video data encode` behind the stage's name."""
        places = [f"--in={self.manifest}", f"--vae={self.folder / 'vae'}", f"--text={self.folder / 'text'}"]
        sizes = ["--buckets=17x32x32", "--samples-per-shard=2", "--batch-size=2", "--torch-threads=1"]
        return [*places, f"--out={out}", *sizes]


def write_clips(folder: Path, count: int) -> Path:
    """Clips with captions beside them."""
    folder.mkdir(parents=True)
    for number in range(count):
        write_mp4(folder / f"clip_{number:02d}.mp4", draw_video(np.random.default_rng(number), "red", "left"), fps=25)
        (folder / f"clip_{number:02d}.txt").write_text(f"a red shape, number {number}, moves to the left")
    return folder


def make_small_data(folder: Path, clips: int) -> SmallData:
    """Write clips, captions and encoders, and ingest them."""
    data = SmallData(folder)
    write_clips(data.raw, clips)
    ingest.run(data.raw, data.manifest)
    assert write_tiny_text_encoders(folder) == folder / "text"
    assert write_tiny_vae(folder) == folder / "vae"
    return data


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder of shards that is the same in every run of the same inputs."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in {"report.json", ".lock"})
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}
