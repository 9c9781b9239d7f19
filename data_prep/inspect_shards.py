"""`megatron-video data inspect`: what is in a folder of shards, as tables, plots and pictures.

Statistics of the latents (mean and standard deviation of every channel, over a sample), of text lengths, of buckets and
hours go to OUT/inspect.json, to stdout and to OUT/statistics.png; with --vae, a sample of latents is decoded back to
OUT/contact_sheet.png. `verify` says whether the bytes are whole; this says whether they are the ones wanted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from data_prep.devices import find_device
from data_prep.encode import MANIFEST_FILE
from data_prep.inspect_plots import write_plots
from data_prep.stage import check_folder, stage_parser
from data_prep.workers import progress
from megatron_video.buckets import parse_bucket
from megatron_video.cli import run_command
from megatron_video.contact_sheet import write_contact_sheet
from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.manifest import read_manifest
from megatron_video.shard_schema import write_atomically
from megatron_video.shards import ShardDataset
from megatron_video.vae import VideoVAE, load_vae

JSON_FILE, SHEET_FILE = "inspect.json", "contact_sheet.png"
_QUANTILES = (0.0, 0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True)
class LatentStatistics:
    """Of the posterior, over all positions of a sample of clips."""

    samples: int
    mean: list[float]
    """[z] of the posterior mean."""
    deviation: list[float]
    """[z] standard deviation of the posterior mean."""
    posterior_deviation: list[float]
    """[z] mean of exp(logvar / 2): how much noise a draw adds."""
    largest: float
    """Absolute value."""


@dataclass(frozen=True)
class BucketStatistics:
    """One bucket of the data set."""

    bucket: str
    samples: int
    hours: float | None
    """Of video at its own frame rate; 0 for images, None without a manifest."""
    latent_tokens: int
    """Latent positions of all samples, before the transformer's patches."""


@dataclass(frozen=True)
class InspectReport:
    """What `inspect` found."""

    folder: str
    shards: int
    samples: int
    megabytes: float
    hours: float | None
    buckets: list[BucketStatistics]
    llm_tokens: dict[str, float]
    """Mean and quantiles of Step-LLM tokens a caption."""
    truncated: int | None
    """Captions of the sampled clips whose end the text encoders cut off."""
    languages: dict[str, int]
    latents: LatentStatistics
    contact_sheet: str | None


def main(argv: Sequence[str]) -> int:
    """Command line of the command."""
    parser = stage_parser(
        "inspect", __doc__, "SHARD_FOLDER", "FOLDER", workers=False, check=_check_options, gpu=lambda values: values.vae
    )
    add = parser.add_argument
    add("--vae", type=Path, metavar="PATH", help="the Video-VAE that encoded them, for the contact sheet")
    add("--clips", type=int, default=12, metavar="N", help="clips on the contact sheet (default: %(default)s)")
    statistics = "clips whose latents are read for the statistics (default: %(default)s)"
    add("--sample", type=int, default=1024, metavar="N", help=statistics)
    add("--seed", type=int, default=0, metavar="N", help="draws both samples (default: %(default)s)")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", default=default, help="of the Video-VAE: cpu, cuda, cuda:1 (default here: %(default)s)")
    arguments = parser.parse_args(argv)
    report = run(
        arguments.source,
        arguments.out,
        arguments.vae,
        clips=arguments.clips,
        sample=arguments.sample,
        seed=arguments.seed,
        device=arguments.device,
    )
    if arguments.json:
        print(json.dumps(asdict(report), ensure_ascii=False))
    else:
        _print(report, arguments.out)
    return 0


def _check_options(arguments: argparse.Namespace) -> None:
    _check_numbers(arguments.clips, arguments.sample, arguments.seed)


def _check_numbers(clips: int, sample: int, seed: int) -> None:
    for name, value, least in (("clips", clips, 1), ("sample", sample, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"--{name} {value} must be at least {least}")


def run(
    folder: Path,
    out: Path,
    vae: Path | None = None,
    *,
    clips: int = 12,
    sample: int = 1024,
    seed: int = 0,
    device: str = "cpu",
) -> InspectReport:
    """Inspect a finished folder of shards; writes inspect.json, statistics.png and, with a VAE, contact_sheet.png.

    Raises:
        UserError: no finished shards, an empty data set, a damaged sample, or another VAE than the one that encoded.
    """
    dataset = ShardDataset(folder)
    if not len(dataset):
        raise UserError(f"{folder} holds no samples; there is nothing to inspect")
    _check_numbers(clips, sample, seed)
    check_folder(out, "--out")
    place = find_device(device)
    if vae is not None:
        _check_vae(dataset, vae)
    latents, truncated = latent_statistics(dataset, drawn(len(dataset), sample, seed))
    buckets = bucket_statistics(dataset)
    tokens = dataset.index["llm_tokens"].to_numpy()
    sheet = None if vae is None else _contact_sheet(dataset, load_vae(vae, device=place), out, clips, seed)
    info = dataset.dataset_info
    report = InspectReport(
        folder=str(folder),
        shards=len(info.shards),
        samples=len(dataset),
        megabytes=round(sum(shard["bytes"] for shard in info.shards) / 1e6, 2),
        hours=_sum_hours(buckets),
        buckets=buckets,
        llm_tokens={"mean": round(float(tokens.mean()), 2)} | _quantiles(tokens),
        truncated=truncated,
        languages=_languages(dataset),
        latents=latents,
        contact_sheet=str(sheet) if sheet else None,
    )
    write_plots(asdict(report), tokens, out)
    write_atomically(out / JSON_FILE, json.dumps(asdict(report), ensure_ascii=False, indent=1).encode())
    return report


def drawn(count: int, wanted: int, seed: int) -> list[int]:
    """At most `wanted` different numbers below `count`, ascending (shards are read in order)."""
    generator = np.random.default_rng(seed)
    return sorted(generator.choice(count, min(count, wanted), replace=False).tolist())


def latent_statistics(dataset: ShardDataset, numbers: Sequence[int]) -> tuple[LatentStatistics, int]:
    """Statistics per channel, one sample in memory at a time; and how many captions were cut."""
    channels = dataset.dataset_info.latent_channels
    count, truncated, largest = 0, 0, 0.0
    sums, squares, noise = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    for number in progress(numbers, len(numbers), "inspect", unit="sample"):
        sample = dataset[number]
        # [t, z, h, w] -> [z, positions]
        mean, deviation = (part.transpose(0, 1).flatten(1) for part in sample.mean_and_deviation)
        sums += mean.sum(dim=1)
        squares += mean.square().sum(dim=1)
        noise += deviation.sum(dim=1)
        count += mean.shape[1]
        largest = max(largest, float(mean.abs().max()))
        truncated += bool(sample.metadata.get("text_truncated"))
    means = sums / count
    deviations = (squares / count - means.square()).clamp(min=0).sqrt()
    statistics = LatentStatistics(
        samples=len(numbers),
        mean=_rounded(means),
        deviation=_rounded(deviations),
        posterior_deviation=_rounded(noise / count),
        largest=round(largest, 4),
    )
    return statistics, truncated


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 6) for value in values.tolist()]


def bucket_statistics(dataset: ShardDataset) -> list[BucketStatistics]:
    """Samples, hours and latent positions of every bucket, by the index and the manifest."""
    hours = _hours(dataset)
    return [
        BucketStatistics(
            bucket=name,
            samples=count,
            hours=None if hours is None else round(hours.get(name, 0.0), 4),
            latent_tokens=count * parse_bucket(name).latent_shape.tokens,
        )
        for name, count in dataset.dataset_info.buckets.items()
    ]


def _hours(dataset: ShardDataset) -> dict[str, float] | None:
    path = dataset.folder / MANIFEST_FILE
    if not path.is_file():
        return None
    table = read_manifest(path)
    moving = table.filter(pc.and_(table["dropped_by"].is_null(), pc.greater(table["fps"], 0.0)))
    seconds = pc.divide(1.0, moving["fps"])
    sums = pa.table({"bucket": moving["bucket"], "seconds": seconds}).group_by("bucket").aggregate([("seconds", "sum")])
    return {row["bucket"]: parse_bucket(row["bucket"]).frames * row["seconds_sum"] / 3600 for row in sums.to_pylist()}


def _sum_hours(buckets: Sequence[BucketStatistics]) -> float | None:
    hours = [bucket.hours for bucket in buckets]
    return None if None in hours else round(sum(value for value in hours if value is not None), 4)


def _languages(dataset: ShardDataset) -> dict[str, int]:
    path = dataset.folder / MANIFEST_FILE
    if not path.is_file():
        return {}
    table = read_manifest(path)
    counts = pc.value_counts(table.filter(table["dropped_by"].is_null())["language"]).to_pylist()
    return {row["values"] or "unknown": row["counts"] for row in sorted(counts, key=lambda row: -row["counts"])}


def _quantiles(values: npt.NDArray[Any]) -> dict[str, float]:
    return {f"p{round(100 * q)}": float(v) for q, v in zip(_QUANTILES, np.quantile(values, _QUANTILES), strict=True)}


def _check_vae(dataset: ShardDataset, vae: Path) -> None:
    found, wanted = vae_fingerprint(vae), dataset.dataset_info.vae_fingerprint
    if found != wanted:
        raise UserError(
            f"--vae {vae} did not encode {dataset.folder} (fingerprint {found}, the shards have {wanted}); "
            "its pictures of these latents would mean nothing"
        )


def _contact_sheet(dataset: ShardDataset, vae: VideoVAE, out: Path, clips: int, seed: int) -> Path:
    rows = list(_decoded(dataset, vae, drawn(len(dataset), clips, seed)))
    return write_contact_sheet(rows, out / SHEET_FILE)


@torch.inference_mode()
def _decoded(dataset: ShardDataset, vae: VideoVAE, numbers: Sequence[int]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    for number in numbers:
        sample = dataset[number]
        # The mean and not a draw: what the encoder says, without the noise that training adds.
        mean, _ = sample.mean_and_deviation
        frames = vae.decode(mean[None].to(sample.moments.dtype))[0].float().clamp(-1, 1)
        pixels = ((frames + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        yield f"{dataset.index['bucket'][number].as_py()}  {sample.metadata.get('caption', sample.key)}", pixels


def _print(report: InspectReport, out: Path) -> None:
    hours = "unknown" if report.hours is None else f"{report.hours:.3f}"
    print(
        f"inspect: {report.folder}: {report.samples} samples, {report.shards} shards, {report.megabytes} MB, {hours} h"
    )
    print(f"  {'bucket':<16}{'samples':>9}{'hours':>10}{'latent positions':>18}")
    for bucket in report.buckets:
        value = "-" if bucket.hours is None else f"{bucket.hours:.3f}"
        print(f"  {bucket.bucket:<16}{bucket.samples:>9}{value:>10}{bucket.latent_tokens:>18}")
    print("  Step-LLM tokens  " + "  ".join(f"{name} {value:g}" for name, value in report.llm_tokens.items()))
    print(f"  languages        {report.languages or 'unknown'}, {report.truncated} captions cut in the sample")
    latents = report.latents
    print(f"  latents of {latents.samples} samples, largest {latents.largest:g}")
    print(f"  {'channel':>9}{'mean':>10}{'deviation':>11}{'posterior':>11}")
    rows = zip(latents.mean, latents.deviation, latents.posterior_deviation, strict=True)
    for channel, (mean, deviation, posterior) in enumerate(rows):
        print(f"  {channel:>9}{mean:>10.4f}{deviation:>11.4f}{posterior:>11.4f}")
    print(f"-> {out}")


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
