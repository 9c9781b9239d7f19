"""Checkpoints through ranks of one layout after another: released -> core -> core -> released, and six layout pairs.

    python tests/round_trip.py --out docs/checkpoints/round_trip.md

writes what was found. The ranks are processes on this machine (gloo); each really builds its part of the model, loads
and saves it.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from golden_cases import dit as golden_dit
from golden_files import GoldenCase, find_golden_cases
from golden_released import recorded_weights, with_weights, write_dit
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.convert import convert
from checkpoints_tools.core_contents import CoreContents, Part
from checkpoints_tools.core_layout import CoreLayout
from checkpoints_tools.models import KINDS
from checkpoints_tools.reshard import Target, reshard
from megatron_video import device
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.parallel import destroy_parallel, initialize_parallel
from training.checkpoint import (
    TrainState,
    load_checkpoint,
    load_model_weights,
    read_model_config,
    save_checkpoint,
    step_folder,
)
from training.config import AdamWConfig, PretrainConfig
from training.ema import EMA
from training.layout_matrix.checkpoints import OTHER_SEED, train_and_save
from training.layout_matrix.report import markdown_table
from training.layout_matrix.runner import ONE_PROCESS
from training.layout_matrix.table import LAYOUTS, STEPS, Dtype, LayoutCase, Workload
from training.layout_matrix.worker import build, model_config
from training.local_ranks import RankPool
from training.optimizer import build_optimizer, wrap_data_parallel

BY_NAME = {case.name: case for case in (ONE_PROCESS, *LAYOUTS)}
GOLDEN, GOLDEN_DIR = "dit_video_h4d16", Path(__file__).parent / "golden"
# Saved in, then loaded and saved in.
PAIRS: tuple[tuple[str, str, Dtype], ...] = (
    ("tp2_pp2", "tp4_cp2_all_gather", "bfloat16"),
    ("one_process", "tp2_sp_dp2_zero1", "bfloat16"),
    ("pp2_vpp2", "cp2_a2a", "float32"),
    ("dp2_fsdp", "tp2", "float32"),
    ("dp4_zero1_overlap", "pp2", "bfloat16"),
    ("tp4", "one_process", "float32"),
)
# The same without ranks: `ckpt reshard`.
RESHARDED: tuple[tuple[str, Target], ...] = (
    ("tp2_pp2", Target(tensor=4, context=2)),
    ("dp4_zero1_overlap", Target(tensor=2, pipeline=2, data=2, zero1=True)),
)
# Layouts that read a checkpoint of one process, and one cut for them.
READERS: tuple[tuple[str, Target], ...] = (
    ("tp4", Target(tensor=4)),
    ("pp2", Target(pipeline=2)),
    ("tp2_sp_pp2_dp2_zero1", Target(tensor=2, pipeline=2, data=2, zero1=True)),
)
STATE: tuple[Part, ...] = ("optimizer", "averages")


@dataclass(frozen=True)
class Hashes:
    """Combined sha256 of a checkpoint's tensors, each by name, type, shape and bytes."""

    tensors: int
    weights: str
    state: str
    """Optimizer and averages."""

    @staticmethod
    def of(folder: Path) -> Hashes:
        """Of one step's folder."""
        contents = CoreContents(folder)
        weights, state = contents.of_part("weights"), contents.of_part(*STATE)
        return Hashes(
            len(weights) + len(state),
            combined((fqn, contents.tensor(fqn)) for fqn in sorted(weights)),
            combined((fqn, contents.tensor(fqn)) for fqn in sorted(state)),
        )


@dataclass(frozen=True)
class Trip:
    """One checkpoint, before and after."""

    way: str
    dtype: str
    before: Hashes
    after: Hashes
    seconds: float
    """Of loading and saving, or of resharding."""


@dataclass(frozen=True)
class WholeTrip:
    """The recorded model through all forms."""

    ways: list[str]
    """What happened to it."""
    tensors: int
    before: str
    after: str
    different: list[str]
    """Released names of tensors whose sha256 is another one."""
    largest_error: float
    """Of the output in fp32 against the recorded one."""


def sha256(name: str, tensor: Tensor) -> bytes:
    """Of a tensor with its name."""
    found = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    found.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return found.digest()


def combined(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Sha256 over the tensors' own."""
    found = hashlib.sha256()
    for name, tensor in tensors:
        found.update(sha256(name, tensor))
    return found.hexdigest()


def load_and_save(case: LayoutCase, workload: Workload, source: str, target: str) -> None:
    """On a rank: take a checkpoint with its optimizer and averages over, and save it."""
    session = build(case, workload, init_seed=OTHER_SEED)
    state = load_checkpoint(Path(source), session.model, session.optimizer, session.ema)
    config = PretrainConfig(model=model_config(workload), parallel=case.config)
    save_checkpoint(Path(target), session.model, session.optimizer, state, config, ema=session.ema)


def bytes_read(case: LayoutCase, workload: Workload, source: str) -> int:
    """On a rank: what it reads to load a checkpoint with its optimizer and averages."""
    session = build(case, workload, init_seed=OTHER_SEED)
    before = _read_so_far()
    load_checkpoint(Path(source), session.model, session.optimizer, session.ema)
    return _read_so_far() - before


def _read_so_far() -> int:
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def take_over(case: LayoutCase, source: str, target: str, weights_only: bool) -> None:
    """On a rank: a model of the checkpoint's sizes takes its weights, or all of it, and saves them as a run does."""
    parallel, info = case.config, device.initialize()
    initialize_parallel(parallel, seed=OTHER_SEED, device_info=info)
    dit: DiTConfig = read_model_config(source)
    chunks = build_dit(dit, parallel, torch.float32, device=info.device, init_seed=OTHER_SEED)
    if weights_only:
        load_model_weights(Path(source), chunks)
    model = wrap_data_parallel(chunks, parallel)
    optimizer = build_optimizer(model, AdamWConfig(), parallel)
    ema = EMA(optimizer, 0.9)
    state = TrainState() if weights_only else load_checkpoint(Path(source), model, optimizer, ema)
    save_checkpoint(Path(target), model, optimizer, state, PretrainConfig(model=dit, parallel=parallel), ema=ema)


def golden_case() -> GoldenCase:
    """The recorded DiT; its four heads divide over four tensor-parallel ranks."""
    return next(case for case in find_golden_cases(GOLDEN_DIR) if case.name == GOLDEN)


def whole_trip(ranks: RankPool, folder: Path) -> tuple[WholeTrip, Mapping[str, Tensor]]:
    """Released -> core -> saved by TP2 PP2 -> saved by TP4 CP2 -> released; also gives the tensors at the end."""
    first, second = BY_NAME["tp2_pp2"], BY_NAME["tp4_cp2_all_gather"]
    case = golden_case()
    released = write_dit(case, folder / "released")
    convert(released, folder / "core")
    ranks.run(take_over, first, str(folder / "core"), str(folder / "first"), True, ranks=first.ranks)
    between = step_folder(folder / "first", 0)
    ranks.run(take_over, second, str(between), str(folder / "second"), False, ranks=second.ranks)
    convert(step_folder(folder / "second", 0), folder / "returned")
    before, after = recorded_weights(case), _stored(folder / "returned")
    trip = WholeTrip(
        ["released", "core", f"job in {first.name}", f"job in {second.name}", "released"],
        len(after),
        combined((name, before[name]) for name in sorted(before)),
        combined((name, after[name]) for name in sorted(after)),
        sorted(name for name in {*before, *after} if _hash_of(before, name) != _hash_of(after, name)),
        largest_error(case, after),
    )
    return trip, after


def largest_error(case: GoldenCase, weights: dict[str, Tensor]) -> float:
    """Of our model's fp32 output with these weights, against the recorded one."""
    tensors = with_weights(case, weights)
    model = golden_dit.load_reference_model(case.config, weights, torch.float32)
    with torch.no_grad():
        output = model(**golden_dit.read_inputs(tensors))
    destroy_parallel()
    return float((output - tensors["out"]).abs().max())


def pair_trip(ranks: RankPool, folder: Path, writer: str, reader: str, dtype: Dtype) -> Trip:
    """Trained and saved in one layout, loaded and saved in another."""
    workload = replace(Workload(), dtype=dtype)
    source = saved_in(ranks, folder, writer, workload)
    target = folder / f"{writer} {reader}"
    started = time.perf_counter()
    arguments = (BY_NAME[reader], workload, str(source), str(target))
    ranks.run(load_and_save, *arguments, ranks=BY_NAME[reader].ranks)
    seconds = time.perf_counter() - started
    after = Hashes.of(step_folder(target, STEPS))
    return Trip(f"{writer} -> {reader}", dtype, Hashes.of(source), after, seconds)


def reshard_trip(ranks: RankPool, folder: Path, writer: str, target: Target) -> Trip:
    """Trained and saved in one layout, cut for another by the tool."""
    source = saved_in(ranks, folder, writer, Workload(dtype="bfloat16"))
    sizes = target.describe()
    zero1 = ["zero1"] if sizes.pop("zero1") else []
    name = "_".join([f"{axis}{size}" for axis, size in sizes.items() if size > 1] + zero1)
    started = time.perf_counter()
    reshard(source, folder / f"{writer} cut {name}", target)
    seconds = time.perf_counter() - started
    after = Hashes.of(folder / f"{writer} cut {name}")
    return Trip(f"{writer} -> `ckpt reshard` {name}", "bfloat16", Hashes.of(source), after, seconds)


def reading(ranks: RankPool, folder: Path, reader: str, target: Target) -> list[str]:
    """Layout, MB that its hungriest rank reads of one process's checkpoint and of one cut for it, and their ratio."""
    case, workload = BY_NAME[reader], Workload(dtype="bfloat16")
    source, cut = saved_in(ranks, folder, ONE_PROCESS.name, workload), folder / f"cut for {reader}"
    reshard(source, cut, target)
    counts = [max(ranks.run(bytes_read, case, workload, str(path), ranks=case.ranks)) for path in (source, cut)]
    return [reader, *(f"{count / 1e6:.2f}" for count in counts), f"{counts[0] / counts[1]:.1f}"]


def released_ratio(tensor_ranks: int) -> float:
    """By the sizes of the released 30B: values that one process's pieces make a rank read, over those it needs."""
    model = KINDS["dit"].build(DiTConfig())
    layout = CoreLayout(model.config, Target(tensor=tensor_ranks).parallel(), model.shapes, 1)
    needed = sum(math.prod(layout.weight(name)[0].sizes) for name in model.shapes)
    return sum(math.prod(shape) for shape in model.shapes.values()) / needed


def saved_in(ranks: RankPool, folder: Path, writer: str, workload: Workload) -> Path:
    """The checkpoint of a few training steps in a layout."""
    run = folder / f"{writer} {workload.dtype}"
    if not run.exists():
        ranks.run(train_and_save, BY_NAME[writer], workload, str(run), ranks=BY_NAME[writer].ranks)
    return step_folder(run, STEPS)


def _stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def _hash_of(tensors: Mapping[str, Tensor], name: str) -> bytes | None:
    return sha256(name, tensors[name]) if name in tensors else None


def report(whole: WholeTrip, trips: Sequence[Trip], readings: Sequence[list[str]]) -> str:
    """Markdown."""
    equal = f"all {whole.tensors} tensors equal by sha256" if not whole.different else f"DIFFERENT: {whole.different}"
    rows = [
        [trip.way, trip.dtype, str(trip.before.tensors)]
        + [value[:16] for value in (trip.before.weights, trip.after.weights, trip.before.state, trip.after.state)]
        + ["equal" if trip.before == trip.after else "DIFFERENT", f"{trip.seconds:.1f}"]
        for trip in trips
    ]
    header = ["saved in -> loaded and saved in", "weights", "tensors", "weights before", "after"]
    header += ["optimizer, EMA before", "after", "", "s"]
    return f"""# Checkpoints through real ranks

Written by `python tests/round_trip.py --out docs/checkpoints/round_trip.md`; torch {torch.__version__}, ranks are
processes on this machine (gloo). A combined sha256 goes over name, type, shape and bytes of every tensor.

## Released weights, there and back

The recorded DiT `{GOLDEN}`: {" -> ".join(whole.ways)}.

- before `{whole.before}`
- after `{whole.after}`
- {equal}; largest error of its fp32 output against the recorded one {whole.largest_error:.1e}

## Layout pairs

A run of {STEPS} steps with AdamW and EMA; the checkpoint is loaded by a job of other initial weights in the second
layout, which saves it. The first 16 hexadecimal digits; in the last rows no job, but the tool cuts it.

{markdown_table(header, rows)}

## What a rank reads

MB that the rank which reads most reads to load weights, optimizer and EMA: of the checkpoint of one process, and of
the same cut for its layout by `ckpt reshard`. A piece is read as a whole, however little of it a rank needs.

{markdown_table(["layout", "of one process", "cut for it", "ratio"], readings)}

Most of this small model are embedders, which every rank reads as a whole. By the sizes of the released 30B the ratio
is {released_ratio(8):.2f} for 8 tensor-parallel ranks and {released_ratio(4):.2f} for 4.
"""


def main(argv: Sequence[str]) -> int:
    """Run all of it; 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.md")
    arguments = parser.parse_args(argv)
    with RankPool(8, "cpu") as ranks, tempfile.TemporaryDirectory(prefix="round_trip_") as place:
        folder = Path(place)
        whole, _ = whole_trip(ranks, folder / "whole")
        trips = [pair_trip(ranks, folder, *pair) for pair in PAIRS]
        trips += [reshard_trip(ranks, folder, *pair) for pair in RESHARDED]
        readings = [reading(ranks, folder, *each) for each in READERS]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(report(whole, trips, readings), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))
    return int(bool(whole.different) or any(trip.before != trip.after for trip in trips))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
