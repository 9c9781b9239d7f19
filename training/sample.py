"""`megatron-video sample`, or for several ranks `torchrun ... -m training.sample`: prompts -> videos.

Every finished video stays: the same command continues where it was interrupted, and refuses to mix settings. A video
depends on its prompt, seed and settings only, not on the batch size or on the number of ranks (beyond rounding).
Ranks beyond the tensor-parallel size share the prompts among them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_video.cli import run_command
from megatron_video.config_io import build_config
from megatron_video.errors import UserError
from megatron_video.fingerprint import fingerprint_files, vae_fingerprint
from megatron_video.flops import LatentShape, latent_shape
from megatron_video.sampler import uses_negative
from megatron_video.scheduler import sigmas
from megatron_video.text import TextEncoders, TextStates, text_fingerprint, text_folders
from training.sample_prompts import Prompt, read_prompts, with_seeds

if TYPE_CHECKING:
    from megatron_video.device import DeviceInfo
    from megatron_video.dit import DiTConfig, VideoDiT
    from megatron_video.layout import Precision
    from megatron_video.parallel import ParallelConfig
    from megatron_video.vae import VideoVAE
    from training.sample_folder import SampleFolder

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """All that the ranks agree on before they start."""

    arguments: argparse.Namespace
    checkpoint: Path
    model: DiTConfig
    parallel: ParallelConfig
    shape: LatentShape
    times: Tensor
    """[steps + 1] fp32."""
    prompts: list[Prompt]
    precision: Precision
    device: DeviceInfo

    @property
    def fps_condition(self) -> float | None:
        """What the model is told of the frame rate; None if it has no such condition."""
        return self.arguments.fps if self.model.use_additional_conditions else None


def main(argv: Sequence[str]) -> int:
    """Check everything that can be checked before anything big is loaded, then sample."""
    arguments = _parse(argv)
    # The device comes first: it decides what the imports below may assume.
    from megatron_video.device import initialize

    device = initialize()
    from megatron_video.parallel import destroy_parallel, initialize_parallel
    from training.sample_folder import SampleFolder

    job = prepare(arguments, device)
    chosen = settings(job)
    if not arguments.other_encoders:
        _compare_encoders(job, chosen)
    folder = SampleFolder(arguments.out, chosen, job.prompts, is_image=arguments.frames == 1)
    try:
        initialize_parallel(job.parallel, seed=0, device_info=device)
        made = sample(job, folder)
        if dist.get_rank() == 0:
            _report(arguments, folder, made)
    finally:
        destroy_parallel()
    return 0


def prepare(arguments: argparse.Namespace, device: DeviceInfo) -> Job:
    """Read prompts and sizes.

    Raises:
        UserError: an argument that cannot work, by name.
    """
    from megatron_video.layout import Hardware, Layout
    from megatron_video.layout_rules import check_layout
    from megatron_video.parallel import ParallelConfig, launched_ranks
    from training.checkpoint import find_checkpoint, read_config, read_model_config

    # In the order in which a user would mend them.
    checkpoint = find_checkpoint(arguments.checkpoint)
    uses_negative(arguments.guidance)
    for name in ("batch_size", "fps", "seeds"):
        if getattr(arguments, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} must be above 0")
    layout = {
        "tensor_model_parallel_size": arguments.tensor_parallel_size,
        "sequence_parallel": arguments.sequence_parallel,
        "transformer_impl": arguments.transformer_impl,
    }
    trained_in = read_config(checkpoint).get("training", {}).get("precision", "bf16")
    job = Job(
        arguments=arguments,
        checkpoint=checkpoint,
        model=read_model_config(checkpoint),
        parallel=build_config(ParallelConfig, layout, origin="the command line"),
        shape=latent_shape(arguments.frames, arguments.height, arguments.width),
        times=sigmas(arguments.steps, arguments.time_shift),
        prompts=with_seeds(read_prompts(arguments.prompts, arguments.seed, arguments.limit), arguments.seeds),
        precision=arguments.precision or trained_in,
        device=device,
    )
    ranks, hardware = launched_ranks(), Hardware.detect()
    check_layout(Layout(job.parallel, job.model, job.precision, world_size=ranks, hardware=hardware))
    return job


def settings(job: Job) -> dict[str, Any]:
    """Everything that a sample depends on beside its prompt; batch size and ranks are not among it."""
    arguments = job.arguments
    # What is not here may differ between runs into one folder.
    names = ("frames", "height", "width", "fps", "steps", "guidance", "time_shift", "negative_prompt", "ema")
    state_file, weight_files = job.checkpoint / "train_state.json", sorted(job.checkpoint.glob("*.distcp"))
    return {
        "checkpoint": f"{job.checkpoint.name} {fingerprint_files([state_file, *weight_files])}",
        "vae": vae_fingerprint(arguments.vae),
        "text": text_fingerprint(*text_folders(arguments.text)),
        "precision": job.precision,
        "encoder_precision": _encoder_precision(job.device),
        "round_noise_to_bf16": arguments.round_noise_to_bf16,
        # Not in folders without, which are older.
        **({"latents": True} if arguments.latents else {}),
        **{name: getattr(arguments, name) for name in names},
    }


def _compare_encoders(job: Job, chosen: dict[str, Any]) -> None:
    from training.trained_encoders import check_encoders

    unknown = check_encoders(job.checkpoint, chosen, {"vae": job.arguments.vae, "text": job.arguments.text})
    if unknown and int(os.environ.get("RANK", "0")) == 0:
        print(unknown, file=sys.stderr)


def sample(job: Job, folder: SampleFolder) -> int:
    """Make the samples that are missing, on all ranks.

    Returns:
        How many were made, over all ranks.
    """
    # One rank looks: with shared file systems ranks may see different folders, and then wait for each other forever.
    missing = _decided_by_rank_0(folder.missing() if dist.get_rank() == 0 else None)
    if dist.get_rank() == 0:
        folder.claim({name: str(getattr(job.arguments, name).resolve()) for name in ("checkpoint", "vae", "text")})
    dist.barrier()
    if missing:
        _sample_share(job, folder, _share(missing, job.prompts))
    # Every replica's files are there from here on.
    dist.barrier()
    if dist.get_rank() == 0:
        folder.write_listing()
        folder.write_sheet()
    return len(missing)


def _sample_share(job: Job, folder: SampleFolder, prompts: list[Prompt]) -> None:
    """This replica's part: text, then latents batch by batch, decoded and written by its first rank."""
    from megatron_video.generation import generate_latents, to_pixels
    from megatron_video.shard_schema import write_null_text
    from training.sample_folder import SampleBoard
    from training.sample_latents import latent_file, write_latent

    states, negative, empty = encode_text(job, prompts)
    if job.arguments.latents and dist.get_rank() == 0:
        write_null_text(folder.path, empty.llm, empty.clip)
    model = load_model(job)
    vae = load_decoder(job) if _is_writer() else None
    board = SampleBoard(folder.path / "tensorboard", f".{dist.get_rank()}") if _is_writer() else None
    step = _trained_steps(job.checkpoint)
    for batch in _batches(prompts, job.arguments.batch_size):
        # All ranks of the replica compute this together; noise is drawn on each, being a function of the prompt.
        latents = generate_latents(
            model,
            [states[prompt.index] for prompt in batch],
            negative,
            torch.cat([prompt.noise(job.shape, job.model.in_channels) for prompt in batch]).to(job.device.device),
            job.times,
            job.arguments.guidance,
            fps=job.fps_condition,
            round_initial_to_bf16=job.arguments.round_noise_to_bf16,
        )
        if vae is None or board is None:
            continue
        for prompt, latent in zip(batch, latents, strict=True):
            if job.arguments.latents:
                write_latent(latent_file(folder.path, prompt.index), latent, states[prompt.index])
            # One at a time: decoding needs far more memory than sampling.
            with torch.no_grad():
                frames = to_pixels(vae.decode(latent[None])[0])
            folder.write(prompt, frames, job.arguments.fps)
            board.add(prompt, frames, job.arguments.fps, step)
        if dist.get_rank() == 0:
            folder.write_listing()
    if board is not None:
        board.close()


def encode_text(job: Job, prompts: list[Prompt]) -> tuple[dict[int, TextStates], TextStates, TextStates]:
    """Text states by prompt index, of the negative prompt and of none, the same on all ranks of a replica.

    The first rank of the replica encodes; the encoders are released before the model is loaded.
    """
    states: list[TextStates] | None = None
    if _is_writer():
        clip, llm = text_folders(job.arguments.text)
        encoders = TextEncoders.load(clip, llm, job.device.device, _DTYPES[_encoder_precision(job.device)])
        _check_widths(job.model, encoders)
        texts = [*(prompt.text for prompt in prompts), job.arguments.negative_prompt, ""]
        # Shards hold bf16 states, so this is what the model was trained on.
        states = [encoded.to(torch.device("cpu"), torch.bfloat16) for encoded in encoders.encode(texts)]
        _warn_truncated(prompts, states)
    states = _from_writer(states)
    states = [encoded.to(job.device.device, torch.bfloat16) for encoded in states]
    return {prompt.index: encoded for prompt, encoded in zip(prompts, states, strict=False)}, states[-2], states[-1]


def load_model(job: Job) -> VideoDiT:
    """The DiT in eval mode with the checkpoint's weights, in this run's layout."""
    from megatron_video.dit import build_dit
    from training.checkpoint import load_model_weights

    dtype = _DTYPES[job.precision]
    # One chunk: sampling uses no pipeline stages.
    (model,) = build_dit(job.model, job.parallel, dtype, device=job.device.device, init_seed=None)
    load_model_weights(job.checkpoint, [model], averaged=job.arguments.ema)
    model.eval().requires_grad_(False)
    return model


def load_decoder(job: Job) -> VideoVAE:
    """The Video-VAE.

    Raises:
        UserError: it has another number of latent channels than the model.
    """
    from megatron_video.vae import load_vae

    vae = load_vae(job.arguments.vae, device=job.device.device, dtype=_DTYPES[_encoder_precision(job.device)])
    if vae.config.latent_channels != job.model.out_channels:
        raise UserError(
            f"--vae {job.arguments.vae} has latent_channels={vae.config.latent_channels}, "
            f"the model of {job.checkpoint} out_channels={job.model.out_channels}; give the VAE it was trained with"
        )
    return vae


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video sample", description=__doc__)
    add = parser.add_argument
    add("--ema", action="store_true", help="use the averaged weights (of a run with ema.decay)")
    add("--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint) or checkpoint folder")
    add("--vae", type=Path, required=True, help="Video-VAE folder, or released .safetensors file")
    add("--text", type=Path, required=True, help="folder with the text encoders: clip/ and step_llm/ in it")
    add("--other-encoders", action="store_true", help="use --vae and --text though the shards were made with others")
    add("--prompts", type=Path, required=True, help='.txt, one a line, or .jsonl with {"prompt": ..., "seed": ...}')
    add("--out", type=Path, required=True, help="folder for videos, contact sheets, samples.jsonl, tensorboard/")
    add("--frames", type=int, default=204, help="1 (image) or a multiple of 17 (default: %(default)s)")
    add("--height", type=int, default=544, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--width", type=int, default=992, help="pixels, a multiple of 16 (default: %(default)s)")
    add("--fps", type=float, default=25.0, help="of the written videos (default: %(default)s)")
    add("--steps", type=int, default=50, help="Euler steps (default: %(default)s)")
    add("--guidance", type=float, default=9.0, help="classifier-free guidance scale; 1 = none (default: %(default)s)")
    add("--time-shift", type=float, default=13.0, help="density of steps near noise; 1 = even (default: %(default)s)")
    add("--seed", type=int, default=0, help="of prompts that bring none (default: %(default)s)")
    add(
        "--seeds", type=int, default=1, help="videos of every prompt: its seed and the next ones (default: %(default)s)"
    )
    add("--latents", action="store_true", help="keep latents and text states too, for preference pairs")
    add("--negative-prompt", default="", help="what guidance moves away from (default: the empty caption)")
    add("--batch-size", type=int, default=1, help="prompts sampled together (default: %(default)s)")
    add("--limit", type=int, help="sample only the first N prompts")
    add("--precision", choices=sorted(_DTYPES), help="of the model (default: what it was trained in)")
    add("--round-noise-to-bf16", action="store_true", help="round the initial noise as the released pipeline does")
    add("--tensor-parallel-size", type=int, default=1, help="ranks per copy of the model (default: %(default)s)")
    add("--sequence-parallel", action="store_true", help="split tokens over the tensor-parallel ranks too")
    add("--transformer-impl", choices=("local", "transformer_engine"), default="local", help="layers to use")
    add("--json", action="store_true", help="print the report as JSON")
    return parser.parse_args(argv)


def _report(arguments: argparse.Namespace, folder: SampleFolder, made: int) -> None:
    total = len(folder.prompts)
    report = {"out": str(folder.path), "samples": total, "made": made, "kept": total - made}
    if arguments.json:
        print(json.dumps(report))
    else:
        print(f"{folder.path}: {total} samples, {made} of them made now; look at contact_sheet.png")


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    with tqdm(total=len(prompts), desc="sample", unit="video", disable=None if dist.get_rank() == 0 else True) as bar:
        for start in range(0, len(prompts), size):
            batch = prompts[start : start + size]
            yield batch
            bar.update(len(batch))


def _share(missing: list[int], prompts: list[Prompt]) -> list[Prompt]:
    from megatron_video.parallel import data_parallel_rank, data_parallel_size

    # Dealt out in turn, so that neighbours in the file finish at about the same time.
    return [prompts[index] for index in missing[data_parallel_rank() :: data_parallel_size()]]


def _is_writer() -> bool:
    from megatron.core import parallel_state

    return bool(parallel_state.get_tensor_model_parallel_rank() == 0)


def _from_writer(value: Any) -> Any:
    from megatron.core import parallel_state

    box = [value]
    # Encoding on one rank is cheaper, and makes the states equal bit for bit.
    source = parallel_state.get_tensor_model_parallel_src_rank()
    dist.broadcast_object_list(box, src=source, group=parallel_state.get_tensor_model_parallel_group())
    return box[0]


def _decided_by_rank_0(value: Any) -> Any:
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _encoder_precision(device: DeviceInfo) -> str:
    # The released API runs both in bf16 on GPUs; on CPUs bf16 convolutions are slower, not faster.
    return "bf16" if device.device.type == "cuda" else "fp32"


def _check_widths(model: DiTConfig, encoders: TextEncoders) -> None:
    llm, clip = encoders.widths
    if model.llm_channels != llm or model.clip_channels not in (None, clip):
        raise UserError(
            f"the text encoders give states of width {llm} (Step-LLM) and {clip} (CLIP), the model was trained with "
            f"caption_channels={model.caption_channels}; give the encoders that its shards were encoded with"
        )


def _warn_truncated(prompts: list[Prompt], states: list[TextStates]) -> None:
    cut = [prompt.index for prompt, encoded in zip(prompts, states, strict=False) if encoded.truncated]
    if cut:
        print(f"the text encoders cut the end of {len(cut)} prompts (numbers {cut[:10]} ...)", file=sys.stderr)


def _trained_steps(checkpoint: Path) -> int:
    from training.checkpoint import read_state

    return read_state(checkpoint).step


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
