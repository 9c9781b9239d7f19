"""Clips to shard samples: decode on threads, Video-VAE moments by batch, text states once per caption of a shard."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data_prep.decode import Decoder, build_decoder
from data_prep.encode_plan import STAGE, PlannedShard, window_of
from megatron_video.buckets import Bucket, crop_of
from megatron_video.manifest import Row, dropped
from megatron_video.shard_schema import ShardSample
from megatron_video.text import TextEncoders, TextStates, text_folders
from megatron_video.vae import VideoVAE, load_vae
from megatron_video.video_io import VideoError

# Told which clip is about to be decoded, and None when its decoding is over.
Watch = Callable[[str | None], None]


@dataclass(frozen=True)
class Suspicion:
    """How to go about a shard on which processes have died: one clip after another, so that the guilty one is seen."""

    watch: Watch
    deadly: frozenset[str] = frozenset()
    """Ids of clips that are not decoded again."""


class ClipEncoder:
    """The two encoders on one device."""

    def __init__(
        self,
        vae: Path,
        text: Path,
        device: torch.device,
        dtype: torch.dtype,
        decoder: str = "pyav",
        kinds: Sequence[str] = (),
    ) -> None:
        """Load the weights.

        Args:
            vae: folder (config.json, model.safetensors) or released .safetensors file.
            text: folder with both text encoders.
            device: where they run.
            dtype: of their arithmetic.
            decoder: "pyav" or "dali".
            kinds: of captions that are encoded beside each other; (): the column `caption` alone.
        """
        self.device, self.kinds = device, kinds
        self.decoder: Decoder = build_decoder(decoder, device)
        self.vae: VideoVAE = load_vae(vae, device=device, dtype=dtype)
        self.text = TextEncoders.load(*text_folders(text), device, dtype)

    def encode_shard(
        self, shard: PlannedShard, batch_size: int, threads: ThreadPoolExecutor, suspicion: Suspicion | None = None
    ) -> Iterator[tuple[Row, ShardSample | None]]:
        """Yield each row of the shard in order, with its sample, or dropped and with None.

        Batches are cut by the plan, so that a shard does not depend on what was done before it.
        """
        captions: dict[str, TextStates] = {}
        batches = [shard.rows[start : start + batch_size] for start in range(0, len(shard.rows), batch_size)]
        pending = [] if suspicion else self._submit(threads, batches[0], shard.bucket)
        for number, rows in enumerate(batches):
            if suspicion:
                decoded = [self._decode_watched(row, shard.bucket, suspicion) for row in rows]
            else:
                decoded = [future.result() for future in pending]
                # The next batch is decoded while this one is encoded; more would only hold memory.
                pending = self._submit(threads, batches[number + 1], shard.bucket) if rows is not batches[-1] else []
            self._add_captions(captions, [text for row in rows for text in captions_of(row, self.kinds).values()])
            yield from self._encode_batch(rows, decoded, captions, shard.bucket)

    def text_states(self, captions: Sequence[str]) -> list[TextStates]:
        """States of captions; the empty one is the null text."""
        return self.text.encode(list(captions))

    def _add_captions(self, known: dict[str, TextStates], captions: Sequence[str]) -> None:
        # Each caption once, in the order of the rows: a set would make the batches vary from run to run.
        new = list(dict.fromkeys(caption for caption in captions if caption not in known))
        known.update(zip(new, self.text_states(new), strict=True) if new else ())

    def _encode_batch(
        self,
        rows: Sequence[Row],
        decoded: Sequence[Tensor | VideoError],
        captions: dict[str, TextStates],
        bucket: Bucket,
    ) -> Iterator[tuple[Row, ShardSample | None]]:
        videos = [frames for frames in decoded if not isinstance(frames, VideoError)]
        # Those that failed to decode take no part; the others stay in order.
        moments = iter(self._moments(videos) if videos else ())
        for row, frames in zip(rows, decoded, strict=True):
            if isinstance(frames, VideoError):
                yield dropped(row, STAGE, f"unreadable: {frames}"), None
                continue
            # A latent that is not finite would poison every later step of training.
            latent = next(moments)
            if not torch.isfinite(latent).all():
                yield dropped(row, STAGE, "not finite: the Video-VAE gave infinite or undefined values"), None
                continue
            texts = captions_of(row, self.kinds)
            states = {kind: captions[text] for kind, text in texts.items()}
            first = next(iter(states.values()))
            # A caption of no named kind is the only one.
            named = {kind: (of.llm, of.clip) for kind, of in states.items() if kind}
            metadata = _metadata(row, bucket, texts, any(of.truncated for of in states.values()))
            yield row, ShardSample(row["clip_id"], latent, first.llm, first.clip, metadata, named)

    @torch.inference_mode()
    def _moments(self, videos: Sequence[Tensor]) -> Tensor:
        """uint8 [T, H, W, 3] each -> [B, t, 2z, h, w] on the CPU, as it will be stored."""
        # To the device as bytes, a quarter of what floats would take.
        pixels = torch.stack([video.to(self.device) for video in videos]).permute(0, 1, 4, 2, 3)
        return self.vae.encode_moments(pixels).to("cpu", torch.bfloat16)

    def _submit(
        self, threads: ThreadPoolExecutor, rows: Sequence[Row], bucket: Bucket
    ) -> list[Future[Tensor | VideoError]]:
        return [threads.submit(self._decode, row, bucket) for row in rows]

    def _decode(self, row: Row, bucket: Bucket) -> Tensor | VideoError:
        # A failure is a value, as it concerns this clip only.
        try:
            return self.decoder.decode(row, bucket)
        except VideoError as error:
            return error

    def _decode_watched(self, row: Row, bucket: Bucket, suspicion: Suspicion) -> Tensor | VideoError:
        if row["clip_id"] in suspicion.deadly:
            return VideoError(f"{row['source']}: the process that decodes it dies every time")
        suspicion.watch(row["clip_id"])
        decoded = self._decode(row, bucket)
        suspicion.watch(None)
        return decoded


def captions_of(row: Row, kinds: Sequence[str]) -> dict[str, str]:
    """The captions of a clip that are encoded, by kind; its column `caption`, under "", where it has none of them."""
    texts = {kind: row[f"caption_{kind}"] for kind in kinds if row[f"caption_{kind}"]}
    return texts or {"": row["caption"]}


def _metadata(row: Row, bucket: Bucket, texts: Mapping[str, str], truncated: bool) -> dict[str, object]:
    start, end = window_of(row, bucket)
    crop = crop_of(row)
    named = {"captions": dict(texts)} if "" not in texts else {}
    return named | {
        "caption": next(iter(texts.values())),
        "language": row["language"],
        "bucket": bucket.name,
        # The name only: a shard must not depend on where the raw files lay.
        "file_name": Path(row["source"]).name,
        "content_hash": row["content_hash"],
        "start_frame": start,
        "end_frame": end,
        "fps": row["fps"],
        "is_image": row["is_image"],
        "crop": list(crop) if crop else None,
        "text_truncated": truncated,
    }
