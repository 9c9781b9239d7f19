"""A rank's part of sampling: text, then latents with the other ranks of its replica, then videos."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_video.dit import VideoDiT, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import data_parallel_rank, data_parallel_size
from megatron_video.shard_schema import write_null_text
from megatron_video.text import TextEncoders, TextStates
from training.checkpoint import load_model_weights
from training.prompt_states import encode_texts
from training.sample_decoder import Decoder
from training.sample_folder import SampleFolder
from training.sample_job import Job
from training.sample_latents import latent_file, read_latent, write_latent
from training.sample_prompts import Prompt
from training.sample_ranks import Crew, Sampler, share

T = TypeVar("T")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Work:
    """What this rank does of a job.

    Args:
        job: what there is to do.
        folder: where.
        crew: the other ranks.
        device: to compute on.
    """

    def __init__(self, job: Job, folder: SampleFolder, crew: Crew, device: torch.device) -> None:
        self._job, self._folder, self._crew, self._device = job, folder, crew, device
        self._keeps_latents: bool = job.arguments.latents
        dtype = _DTYPES[job.encoder_precision]
        self._decoder = Decoder(folder, job.arguments.vae, job.arguments.fps, job.step, device, dtype)

    def run(self) -> None:
        """Decode what an earlier run left, and make what is missing; all ranks call it together.

        Kept latents are decoded when the model is gone, so that decoding has the memory, and by all ranks of the
        replica instead of one.
        """
        self._decode(share(self._job.undecoded, dist.get_rank(), dist.get_world_size()))
        ours = share(self._job.unsampled, data_parallel_rank(), data_parallel_size())
        # Where there is nothing for this replica too: the ranks of the whole job read the checkpoint together.
        if self._job.unsampled:
            self._sample([self._job.prompts[index] for index in ours])
            _free_memory()
        if self._keeps_latents:
            self._decode(share(ours, self._crew.ranks.index(dist.get_rank()), len(self._crew.ranks)))
        self._decoder.close()

    def _sample(self, prompts: list[Prompt]) -> None:
        arguments, job = self._job.arguments, self._job
        # On the writer alone: a replica's prompts may take gigabytes.
        texts: dict[str, TextStates] = {}
        self._crew.by_writer(lambda: texts.update(self._encode(prompts) if prompts else {}))
        _free_memory()
        # The checkpoint is read by the computing groups, over which no rank should wait long for one that decodes.
        self._crew.wait()
        model = self._load_model()
        if not self._keeps_latents:
            self._crew.by_writer(self._decoder.load)
        fps = arguments.fps if job.model.use_additional_conditions else None
        sampler = Sampler(job.shape, job.times, arguments.guidance, fps, arguments.round_noise_to_bf16)
        for batch in _batches(prompts, arguments.batch_size):
            wanted = [*(prompt.text for prompt in batch), arguments.negative_prompt]
            *states, negative = self._crew.by_writer(partial(_look_up, texts, wanted))
            latents = sampler.latents(model, batch, states, negative, self._device)
            self._crew.by_writer(partial(self._keep, batch, latents, states))

    def _encode(self, prompts: Sequence[Prompt]) -> dict[str, TextStates]:
        """States of the prompts, of the negative prompt and of none, on the CPU; the encoders are released after it."""
        arguments = self._job.arguments
        # Seeds of a prompt share its states.
        texts = list(dict.fromkeys([*(prompt.text for prompt in prompts), arguments.negative_prompt, ""]))
        encoded = encode_texts(arguments.text, texts, self._device, self._check_widths)
        found = dict(zip(texts, encoded, strict=True))
        cut = [prompt.index for prompt in prompts if found[prompt.text].truncated]
        if cut:
            print(f"the text encoders cut the end of {len(cut)} prompts (numbers {cut[:10]} ...)", file=sys.stderr)
        # Rank 0 has the first share, so it is here whenever anyone is.
        if self._keeps_latents and dist.get_rank() == 0:
            write_null_text(self._folder.path, found[""].llm, found[""].clip)
        return found

    def _check_widths(self, encoders: TextEncoders) -> None:
        (llm, clip), model = encoders.widths, self._job.model
        if model.llm_channels != llm or model.clip_channels not in (None, clip):
            raise UserError(
                f"the text encoders give states of width {llm} (Step-LLM) and {clip} (CLIP), the model was trained "
                f"with caption_channels={model.caption_channels}; give the encoders that its shards were encoded with"
            )

    def _load_model(self) -> list[VideoDiT]:
        """This rank's part of the DiT in eval mode, with the checkpoint's weights."""
        job = self._job
        model = build_dit(job.model, job.parallel, _DTYPES[job.precision], device=self._device, init_seed=None)
        load_model_weights(job.checkpoint, model, averaged=job.arguments.ema)
        for chunk in model:
            chunk.eval().requires_grad_(False)
        return model

    def _keep(self, batch: Sequence[Prompt], latents: Tensor, states: Sequence[TextStates]) -> None:
        for prompt, latent, text in zip(batch, latents, states, strict=True):
            if not latent.isfinite().all():
                raise UserError(
                    f"the model of {self._job.checkpoint} gives numbers that are not finite for prompt {prompt.index} "
                    f"({prompt.text[:60]!r}); sample another checkpoint, or with --precision fp32"
                )
            if self._keeps_latents:
                write_latent(latent_file(self._folder.path, prompt.index), latent, text)
            else:
                # One at a time: decoding needs far more memory than sampling.
                self._decoder.write(prompt, latent)
        if dist.get_rank() == 0 and not self._keeps_latents:
            self._folder.write_listing()

    def _decode(self, indices: Sequence[int]) -> None:
        """Write the samples of these prompts, whose latents are there."""
        for index in _progress(indices, len(indices), "decode"):
            stored = read_latent(latent_file(self._folder.path, index))
            self._decoder.write(self._job.prompts[index], stored.latent)
        self._decoder.release()
        _free_memory()


def _look_up(texts: dict[str, TextStates], wanted: Sequence[str]) -> list[TextStates]:
    return [texts[text] for text in wanted]


def _batches(prompts: list[Prompt], size: int) -> Iterator[list[Prompt]]:
    batches = [prompts[first : first + size] for first in range(0, len(prompts), size)]
    return _progress(batches, len(prompts), "sample")


def _progress(items: Iterable[T], total: int, title: str) -> Iterator[T]:
    """The items, with a bar that counts videos on rank 0."""
    with tqdm(total=total, desc=title, unit="video", disable=None if dist.get_rank() == 0 and total else True) as bar:
        for item in items:
            yield item
            bar.update(len(item) if isinstance(item, list) else 1)


def _free_memory() -> None:
    # Models hang in cycles of hooks.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
