"""`megatron-video dpo features`, or `torchrun ... -m training.alignment.features`: features of the DiT for latents.

The model runs over every latent, noised to the given times with noise that depends on the prompt alone. Hidden states
after the given layers are pooled over tokens: mean, standard deviation, and the root mean square of the change from
frame to frame, so that motion is not averaged away. Layers behind the last one wanted are not computed. The same
command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_video.cli import run_command
from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from training.alignment.feature_files import FeatureFiles, Features, FeatureSettings
from training.alignment.feature_latents import Latents, open_latents

if TYPE_CHECKING:
    from megatron_video.dit import DiTConfig
    from megatron_video.parallel import ParallelConfig
    from training.alignment.feature_pass import FeaturePass
    from training.reference_pass import Reference

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(argv: Sequence[str]) -> int:
    """Check everything that can be checked before the model is loaded, then compute what is missing.

    Raises:
        UserError: an argument that cannot work, by name, or features of something else in the folder.
    """
    arguments = _parse(argv)
    # The device comes first: it decides what the imports below may assume.
    from megatron_video.device import initialize

    device = initialize()
    from megatron_video.parallel import destroy_parallel, initialize_parallel
    from training.checkpoint import find_checkpoint, read_config, read_model_config
    from training.reference_pass import Reference

    reference = Reference(find_checkpoint(arguments.checkpoint), arguments.ema)
    model = read_model_config(reference.checkpoint)
    _check(arguments, model)
    precision = arguments.precision or read_config(reference.checkpoint).get("training", {}).get("precision", "bf16")
    parallel = _parallel(arguments, model, precision)
    latents = open_latents(arguments.data)
    _check_encoders(reference.checkpoint, latents)
    settings = FeatureSettings(
        reference.fingerprint(), tuple(arguments.layer), tuple(arguments.t), arguments.seed, precision
    )
    folder = arguments.out or settings.folder_in(latents.folder)
    files = FeatureFiles(folder, settings, latents.fingerprint, len(latents), str(arguments.checkpoint.resolve()))
    try:
        initialize_parallel(parallel, seed=0, device_info=device)
        made = _compute(
            files, latents, arguments.batch_size, lambda: _model(reference, model, parallel, settings, device)
        )
        if torch.distributed.get_rank() == 0:
            _report(arguments, files, made)
    finally:
        destroy_parallel()
    return 0


def command_for(settings: FeatureSettings, checkpoint: str, data: Path) -> str:
    """The command that computes features of these settings for a folder."""
    words = ["megatron-video", "dpo", "features", "--checkpoint", checkpoint, "--data", str(data)]
    words += ["--layer", *map(str, settings.layers), "--t", *map(str, settings.times)]
    words += ["--seed", str(settings.seed), "--precision", settings.precision]
    return shlex.join([*words, *(["--ema"] if settings.checkpoint.endswith(" averaged") else [])])


def find_features(settings: FeatureSettings, checkpoint: str, latents: Latents, given: Sequence[Path]) -> FeatureFiles:
    """The features of a folder's latents: in one of the folders `given`, else beside its own files.

    Raises:
        UserError: of other settings or unfinished, or none are there; says the command that makes them.
    """
    command = command_for(settings, checkpoint, latents.folder)
    wanted = FeatureFiles(settings.folder_in(latents.folder), settings, latents.fingerprint, len(latents), checkpoint)
    of_these = [files for files in map(FeatureFiles.open, given) if files.data == latents.fingerprint]
    if not of_these and not wanted.folder.is_dir():
        raise UserError(
            f"{latents.folder}: there are no features of these latents in {wanted.folder}"
            f"{' or ' + ', '.join(map(str, given)) if given else ''}; make them: {command}"
        )
    files = of_these[0] if of_these else FeatureFiles.open(wanted.folder)
    wanted.check(files)
    if files.missing():
        out = "" if files.folder == wanted.folder else f" --out {shlex.quote(str(files.folder))}"
        raise UserError(f"{files.folder}: {len(files.missing())} blocks are missing; go on with: {command}{out}")
    return files


def _compute(files: FeatureFiles, latents: Latents, batch_size: int, load: Callable[[], FeaturePass]) -> int:
    """Compute the blocks that are missing, on all ranks; how many latents those are."""
    import torch.distributed as dist

    from megatron_video.parallel import data_parallel_rank, data_parallel_size
    from training.sample_ranks import decided_by_rank_0

    missing = decided_by_rank_0(lambda: _claimed(files))
    if missing:
        feature_pass = load()
        share = missing[data_parallel_rank() :: data_parallel_size()]
        with _progress(sum(files.end(first) - first for first in share)) as bar:
            for first in share:
                _write_block(files, latents, first, batch_size, feature_pass, bar)
    # Every replica's files are there from here on.
    dist.barrier()
    return sum(files.end(first) - first for first in missing)


def _claimed(files: FeatureFiles) -> list[int]:
    files.claim()
    return files.missing()


def _write_block(
    files: FeatureFiles, latents: Latents, first: int, batch_size: int, feature_pass: FeaturePass, bar: Any
) -> None:
    from training.alignment.feature_pass import batches
    from training.sample_ranks import writes_for_replica

    found = []
    for batch in batches((latents[number] for number in range(first, files.end(first))), batch_size):
        found.append(feature_pass.run(batch))
        bar.update(len(batch))
    if writes_for_replica():
        files.write(first, Features(*(torch.cat(column) for column in zip(*found, strict=True))))


def _model(
    reference: Reference, model: DiTConfig, parallel: ParallelConfig, settings: FeatureSettings, device: Any
) -> FeaturePass:
    from megatron_video.dit import build_dit
    from training.alignment.feature_pass import FeaturePass

    chunks = build_dit(model, parallel, _DTYPES[settings.precision], device=device.device, init_seed=None)
    feature_pass = FeaturePass(chunks, settings)
    # After layers were taken off: nothing of theirs is read.
    reference.load_into(chunks)
    return feature_pass


def _check(arguments: argparse.Namespace, model: DiTConfig) -> None:
    arguments.layer, arguments.t = sorted(set(arguments.layer)), sorted(set(arguments.t))
    wrong = [layer for layer in arguments.layer if not 0 <= layer < model.num_layers]
    if wrong:
        raise UserError(f"--layer {wrong[0]}: the model has the layers 0 to {model.num_layers - 1}")
    wrong_times = [time for time in arguments.t if not 0 <= time < 1]
    if wrong_times:
        raise UserError(f"--t {wrong_times[0]} must lie in [0, 1); 0 is noise, near 1 hardly any is left")
    if arguments.batch_size < 1:
        raise UserError(f"--batch-size {arguments.batch_size} must be at least 1")


def _parallel(arguments: argparse.Namespace, model: DiTConfig, precision: Any) -> ParallelConfig:
    from megatron_video.layout import Hardware, Layout
    from megatron_video.layout_rules import check_layout
    from megatron_video.parallel import ParallelConfig, launched_ranks

    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    layout = {name: getattr(arguments, name.replace("_model", "")) for name in names}
    layout |= {name: getattr(arguments, name) for name in ("sequence_parallel", "cp_comm_type", "transformer_impl")}
    parallel = build_config(ParallelConfig, layout, origin="the command line")
    hardware = Hardware.detect()
    check_layout(Layout(parallel, model, precision, world_size=launched_ranks(), hardware=hardware))
    return parallel


def _check_encoders(checkpoint: Path, latents: Latents) -> None:
    from training.trained_encoders import trained_encoders

    for name, trained in trained_encoders(checkpoint).items():
        if trained != latents.encoders[name]:
            raise UserError(
                f"--data {latents.folder} was made with other encoders ({name}: {latents.encoders[name]}) than those "
                f"that {checkpoint} was trained with ({trained}); give the latents of its own"
            )


def _progress(count: int) -> Any:
    """Of this replica's latents, shown by rank 0."""
    import torch.distributed as dist
    from tqdm import tqdm

    return tqdm(total=count, desc="features", unit="latent", disable=None if dist.get_rank() == 0 else True)


def _report(arguments: argparse.Namespace, files: FeatureFiles, made: int) -> None:
    settings = files.settings
    report = {"out": str(files.folder), "latents": files.count, "made": made}
    if arguments.json:
        print(json.dumps(report))
    else:
        print(
            f"{files.folder}: features of {files.count} latents after layers {list(settings.layers)} at t "
            f"{list(settings.times)}, {made} of them made now"
        )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video dpo features", description=__doc__)
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint) or checkpoint folder")
    add("--ema", action="store_true", help="use the averaged weights (of a run with ema.decay)")
    add("--data", type=Path, required=True, help="folder of `dpo pair`, or of `dpo generate`")
    add("--layer", type=int, nargs="+", required=True, help="after which layers, counted from 0")
    add("--t", type=_time, nargs="+", required=True, help="noised to which times in [0, 1); 0 is noise")
    add("--seed", type=int, default=0, help="of the noise (default: %(default)s)")
    add("--out", type=Path, help="folder (default: DATA/features/NAME, where `reward` and `score` look for them)")
    add("--batch-size", type=int, default=1, help="latents of one shape together (default: %(default)s)")
    add("--precision", choices=sorted(_DTYPES), help="of the model (default: what it was trained in)")
    add("--tensor-parallel-size", type=int, default=1, help="ranks over which weights are cut")
    add("--sequence-parallel", action="store_true", help="cut tokens over the tensor-parallel ranks too")
    add("--pipeline-parallel-size", type=int, default=1, help="stages into which the layers are cut")
    add("--context-parallel-size", type=int, default=1, help="ranks over which the tokens are cut")
    add("--cp-comm-type", choices=("a2a", "all_gather", "p2p"), default="a2a", help="(default: %(default)s)")
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers to use")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def _time(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError
    return value


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
