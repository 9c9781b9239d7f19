"""A blend: folders of shards and the share of the samples that each is to give, in a YAML file.

    blend_version: 1
    sources:
      - shards: /data/films
        weight: 0.7

The file names the encoders that the folders were made with and how many samples each held, so that a folder that was
encoded again or has grown is noticed when the blend is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field
from pathlib import Path

from megatron_video.config_io import build_config, config_dataclass, load_config, save_config
from megatron_video.errors import UserError
from megatron_video.files import appearing
from megatron_video.shard_index_open import open_index
from megatron_video.shard_schema import DatasetInfo
from megatron_video.shards import read_info

BLEND_VERSION = 1


@config_dataclass
class BlendSource:
    """One folder of a blend."""

    shards: str
    """Folder of shards; relative paths count from the blend's own folder."""
    weight: float
    """Share of the samples; the weights need not sum to 1."""
    samples: int | None = None
    """Samples that the folder held when the blend was written."""
    subsets: list[str] | None = None
    """Draw only from samples whose strictest subset (`megatron-video data filter`) is one of these; null: from all."""

    def __post_init__(self) -> None:
        """Refuse a weight that is no share.

        Raises:
            ValueError: naming the folder and the value.
        """
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"weight={self.weight} of {self.shards} must be a number of at least 0")


@config_dataclass
class Blend:
    """Folders of shards with weights."""

    blend_version: int = BLEND_VERSION
    vae_fingerprint: str | None = None
    """Of the Video-VAE of all folders; null: not noted, only compared between them."""
    text_fingerprint: str | None = None
    """Of the text encoders of all folders."""
    sources: list[BlendSource] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Refuse what no program of this version can mean.

        Raises:
            ValueError: a newer version, no source, a folder twice, or no positive weight.
        """
        if self.blend_version > BLEND_VERSION:
            raise ValueError(f"blend_version={self.blend_version}, this program knows up to {BLEND_VERSION}; update it")
        names = [source.shards for source in self.sources]
        twice = sorted({name for name in names if names.count(name) > 1})
        if not names or twice:
            raise ValueError(f"sources names {', '.join(twice)} twice" if twice else "sources is empty")
        if not any(source.weight for source in self.sources):
            raise ValueError("sources: every weight is 0, which leaves nothing to draw")

    @property
    def shares(self) -> list[float]:
        """Fraction of the samples that each source gives; they sum to 1."""
        total = sum(source.weight for source in self.sources)
        return [source.weight / total for source in self.sources]


def read_blend(path: Path) -> tuple[Blend, list[Path]]:
    """Read and check a blend: its fields, that its folders are there, finished, and of one encoding.

    Returns:
        The blend, and the folders of its sources in order.

    Raises:
        UserError: not a blend, a folder is missing or has changed, or the encoders differ.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such blend; `megatron-video data blend --in FOLDER=WEIGHT ... --out {path}`")
    blend = load_config(Blend, path)
    folders = [path.parent / source.shards for source in blend.sources]
    # From the mapped index: dataset_info.json lists every shard, and this runs at every start of a training.
    infos = [open_index(folder).info for folder in folders]
    _check_encoding(path, blend, folders, infos)
    for source, info in zip(blend.sources, infos, strict=True):
        if source.samples is not None and source.samples != info.samples:
            raise UserError(
                f"{path}: {source.shards} held {source.samples} samples when the blend was written and holds "
                f"{info.samples} now; write the blend again"
            )
    return blend, folders


def write_blend(path: Path, folders: Sequence[Path], weights: Sequence[float]) -> Blend:
    """Write a blend of finished folders of shards, with their paths as given made absolute.

    Raises:
        UserError: a folder is unfinished, the encoders differ, or the weights make no blend.
    """
    infos = [read_info(folder) for folder in folders]
    values = {
        "vae_fingerprint": infos[0].vae_fingerprint,
        "text_fingerprint": infos[0].text_fingerprint,
        "sources": [
            {"shards": str(folder.resolve()), "weight": weight, "samples": info.samples}
            for folder, weight, info in zip(folders, weights, infos, strict=True)
        ],
    }
    blend = build_config(Blend, values, origin=f"--in for {path}")
    _check_encoding(path, blend, folders, infos)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise UserError(f"--out {path} is a folder; name a YAML file in it")
    with appearing(path) as temporary:
        save_config(blend, temporary)
    return blend


def _check_encoding(path: Path, blend: Blend, folders: Sequence[Path], infos: Sequence[DatasetInfo]) -> None:
    for name in ("vae_fingerprint", "text_fingerprint"):
        wanted = getattr(blend, name) or getattr(infos[0], name)
        for folder, info in zip(folders, infos, strict=True):
            if getattr(info, name) != wanted:
                raise UserError(
                    f"{path}: {folder} was encoded differently ({name}: {getattr(info, name)}, the blend has {wanted})"
                )
