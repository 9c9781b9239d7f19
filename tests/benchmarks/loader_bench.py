"""Reading shards: ours by number, in order and shuffled, against webdataset and Megatron-Energon on the same tars.

    python tests/benchmarks/loader_bench.py --energon /path/to/venv    # a Python that has megatron-energon and torch
    python tests/benchmarks/loader_bench.py                            # without Energon

Every reader is a process of its own, without loader workers, that turns every sample into the same tensors (moments,
Step-LLM and CLIP states, metadata); readers take turns, and imports, opening and one pass to warm up are not counted.
The others are used as their documentation has it; ours compares the checksum of every sample, they have none.
Below: what a rank's batches cost (read, posterior and noise drawn, padded), and what that means for a node.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load

COLUMNS = ["reader", "samples_per_s", "samples_per_cpu_s", "mb_per_cpu_s", "wall_s", "cpu_s", "same_samples"]
BUILD_COLUMNS = ["bucket", "part", "ms_a_sample"]
READERS = ("ours in order", "ours shuffled", "ours unverified", "webdataset", "energon")
Decoded = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]]

# Step-Video paper, 6.1: T2I at 256 px, images a second on a node of 8 GPUs, tensor parallel 8.
IMAGES_PER_NODE_SECOND, RANKS_PER_NODE = 56, 8


def main(argv: Sequence[str] | None = None) -> None:
    """Write shards, read them with every reader in turns, build batches; print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bucket", default="1x256x256")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--per-shard", type=int, default=32)
    parser.add_argument("--llm-tokens", type=int, default=320)
    parser.add_argument("--llm-width", type=int, default=6144)
    parser.add_argument("--channels", type=int, default=64, help="of the latent; moments have twice as many")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--energon", type=Path, help="virtual environment with megatron-energon")
    parser.add_argument("--folder", type=Path, help="work below this folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--reader", nargs=2, metavar=("READER", "SHARDS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.reader:
        print(json.dumps(timed(arguments.reader[0], Path(arguments.reader[1]))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        compare(arguments, Path(scratch) / "shards")


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Measure, print and write."""
    import children
    import report

    write_shards(arguments, folder)
    readers = [name for name in READERS if name != "energon" or arguments.energon]
    if arguments.energon:
        prepare_energon(arguments.energon, folder)
    ways = {name: partial(_child, name, folder, arguments.energon) for name in readers}
    figures = children.in_turns(ways, arguments.repeats)
    megabytes = sum(path.stat().st_size for path in folder.glob("*.tar")) / 1e6
    digests = {values["digest"] for repetitions in figures.values() for values in repetitions}
    rows = []
    for name in readers:
        median = children.medians(figures[name])
        rates = {"samples_per_s": arguments.samples / median["wall_s"]}
        rates |= {"samples_per_cpu_s": arguments.samples / median["cpu_s"], "mb_per_cpu_s": megabytes / median["cpu_s"]}
        rows.append(
            {"reader": name, **rates, **median, "same_samples": len(digests) == 1, "repetitions": figures[name]}
        )
    report.print_table(rows, COLUMNS)
    built = build_costs(arguments, folder)
    report.print_table(built, BUILD_COLUMNS)
    others = [row["samples_per_cpu_s"] for row in rows if not row["reader"].startswith("ours")]
    ours = next(row["samples_per_cpu_s"] for row in rows if row["reader"] == "ours shuffled")
    seconds = next(row["ms_a_sample"] for row in built if row["part"] == "whole batch") / 1e3
    summary = {
        "ours shuffled / better of the others, samples per CPU second": ours / max(others),
        "MB of tars": megabytes,
        "cores a rank at 56 samples/s": IMAGES_PER_NODE_SECOND * seconds,
        "cores a node at 56 images/s, TP8": IMAGES_PER_NODE_SECOND * seconds * RANKS_PER_NODE,
    }
    print(json.dumps(summary, indent=1))
    settings = {
        key: value for key, value in vars(arguments).items() if key not in ("out", "folder", "reader", "energon")
    }
    out = arguments.out or report.RESULTS / "loader.json"
    report.write(out, settings, [*rows, *built], summary)


def write_shards(arguments: argparse.Namespace, folder: Path) -> None:
    """Samples of the sizes of real ones, other bytes in each."""
    from megatron_video.buckets import parse_bucket
    from megatron_video.shards import DatasetInfo, ShardSample, ShardWriter, finish_dataset, write_null_text

    bucket, generator = parse_bucket(arguments.bucket), torch.Generator().manual_seed(0)
    frames, height, width = bucket.latent_shape
    moments = torch.randn(frames, 2 * arguments.channels, height, width, generator=generator).bfloat16()
    llm = torch.randn(arguments.llm_tokens, arguments.llm_width, generator=generator).bfloat16()
    clip = torch.randn(77, 1024, generator=generator).bfloat16()
    for number, start in enumerate(range(0, arguments.samples, arguments.per_shard)):
        with ShardWriter(folder, f"shard-{number:06d}.tar") as writer:
            for place in range(start, min(start + arguments.per_shard, arguments.samples)):
                metadata = {"caption": "a caption " * 40, "fps": 25.0, "bucket": bucket.name}
                key = f"{place:024x}-000003-000207"
                writer.add(ShardSample(key, moments.roll(place), llm.roll(place), clip, metadata), bucket)
    write_null_text(folder, llm[:2], clip)
    finish_dataset(folder, DatasetInfo("vae", "text", arguments.channels, arguments.llm_width, 1024, 77))


def prepare_energon(environment: Path, folder: Path) -> None:
    """The metadata that Energon wants beside the tars."""
    options = ["--num-workers", "1", "--split-ratio", "1,0,0", "--non-interactive", "--sample-type", "CrudeWebdataset"]
    command = [str(environment / "bin" / "energon"), "prepare", str(folder), *options, "--no-progress"]
    subprocess.run(command, check=True, capture_output=True, stdin=subprocess.DEVNULL)


def _child(name: str, folder: Path, environment: Path | None) -> dict[str, Any]:
    import children

    python = str(environment / "bin" / "python") if name == "energon" and environment else sys.executable
    figures: dict[str, Any] = json.loads(
        children.run_child([python, __file__, "--reader", name, str(folder)]).output.splitlines()[-1]
    )
    return figures


def timed(name: str, folder: Path) -> dict[str, Any]:
    """Read all samples once to warm up, then once for the clock."""
    torch.set_num_threads(1)
    make = {"webdataset": read_webdataset, "energon": read_energon}.get(name) or partial(read_ours, name)
    read = make(folder)
    sum(1 for _ in read())
    wall, cpu = time.perf_counter(), time.process_time()
    found = list(map(_touched, read()))
    times = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    # In any order: the same samples with the same numbers in them.
    return times | {"samples": len(found), "digest": float(sum(value for _, value in sorted(found)))}


def _touched(sample: Decoded) -> tuple[str, float]:
    key, moments, llm, clip, metadata = sample
    return key, float(moments.flatten()[-1] + llm.flatten()[-1] + clip.flatten()[-1]) + len(metadata["caption"])


def read_ours(name: str, folder: Path) -> Callable[[], Iterator[Decoded]]:
    """By number, through the index; "unverified" leaves the checksums out, as the others do."""
    from megatron_video.shards import ShardDataset

    dataset = ShardDataset(folder, verify=name != "ours unverified")
    order = np.arange(len(dataset))
    if name != "ours in order":
        np.random.default_rng(0).shuffle(order)

    def read() -> Iterator[Decoded]:
        for number in order.tolist():
            sample = dataset[number]
            yield sample.key, sample.moments, sample.llm, sample.clip, sample.metadata

    return read


def _decode(key: str, payloads: dict[str, bytes]) -> Decoded:
    """What a user of the other readers writes."""
    text = load(payloads["text.safetensors"])
    moments = load(payloads["latent.safetensors"])["moments"]
    return key, moments, text["llm"], text["clip"], json.loads(payloads["json"])


def read_webdataset(folder: Path) -> Callable[[], Iterator[Decoded]]:
    """The library's pipeline with a decoding function."""
    import webdataset

    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def read() -> Iterator[Decoded]:
        dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
        yield from dataset.map(lambda sample: _decode(sample["__key__"], sample))

    return read


def read_energon(folder: Path) -> Callable[[], Iterator[Decoded]]:
    """A crude data set with a cooker, one sample a batch, no workers, no shuffle buffer."""
    from megatron.energon import (
        Cooker,
        DefaultTaskEncoder,
        Sample,
        WorkerConfig,
        basic_sample_keys,
        edataclass,
        get_loader,
        get_train_dataset,
        stateless,
    )

    @edataclass
    class DecodedSample(Sample):  # type: ignore[misc]
        decoded: Any

    @stateless
    def cook(sample: Any) -> DecodedSample:
        return DecodedSample(**basic_sample_keys(sample), decoded=_decode(_key(sample), sample))

    class Encoder(DefaultTaskEncoder):  # type: ignore[misc]
        cookers = [Cooker(cook)]  # noqa: RUF012
        decoder = None

    count = json.loads((folder / "dataset_info.json").read_text())["samples"]

    def read() -> Iterator[Decoded]:
        dataset = get_train_dataset(
            str(folder),
            batch_size=None,
            worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
            shuffle_buffer_size=None,
            max_samples_per_sequence=None,
            task_encoder=Encoder(),
            repeat=False,
        )
        found = 0
        for item in get_loader(dataset):
            yield item.decoded
            found += 1
        assert found == count

    return read


def _key(sample: Any) -> str:
    # Energon puts the shard before it.
    key: str = sample["__key__"]
    return key.rsplit("/", 1)[-1]


def build_costs(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """Milliseconds of CPU a sample: of the whole batch as a rank's worker builds it, and of its parts alone."""
    from megatron_video.dit import DiTConfig
    from megatron_video.flow_matching import TimeDensity
    from megatron_video.noise import NoiseSource
    from training.balance import PlannedBatch
    from training.data import BatchBuilder
    from training.data_set import TrainingData

    torch.set_num_threads(1)
    data, noise = TrainingData([str(folder)]), NoiseSource(0, "bench")
    sizes = {"in_channels": arguments.channels, "out_channels": arguments.channels}
    model = DiTConfig(caption_channels=[arguments.llm_width, 1024], **sizes)
    builder = BatchBuilder(data, noise, TimeDensity(), 0.0, torch.bfloat16, model)
    samples = np.arange(min(16, len(data)))
    planned = PlannedBatch(arguments.bucket, samples, np.zeros(len(samples), dtype=np.int64))
    shape = data[0].moments.chunk(2, dim=1)[0].shape
    parts: dict[str, Callable[[], object]] = {
        "whole batch": lambda: builder.build(planned),
        "read and decode": lambda: [data[int(sample)] for sample in samples],
        "noise and posterior draws": lambda: [
            (noise.noise(1, int(s), shape), noise.posterior(1, int(s), shape)) for s in samples
        ],
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(arguments.repeats + 1):
        for name, work in parts.items():
            since = time.process_time()
            work()
            times[name].append(1e3 * (time.process_time() - since) / len(samples))
    # The first time warms up.
    return [
        {"bucket": arguments.bucket, "part": name, "ms_a_sample": float(np.median(found[1:]))}
        for name, found in times.items()
    ]


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
