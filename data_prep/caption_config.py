"""What a caption is made with: the prompts, the frames, and the one interface that all sources of captions have."""

from __future__ import annotations

import functools
import hashlib
import html
import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import cv2
import numpy as np

from megatron_video.buckets import crop_of
from megatron_video.config_io import config_dataclass, config_to_dict
from megatron_video.contact_sheet import evenly_spaced
from megatron_video.manifest import Row
from megatron_video.video_io import VideoError, read_frames

DEFAULT_PROMPTS = Path(__file__).with_name("caption_prompts.yaml")
Kind = Literal["short", "dense"]
KINDS = ("short", "dense", "title")
_ADDRESS = re.compile(r"(?:https?://|www\.)\S+")


@config_dataclass
class Prompt:
    """One question about a clip."""

    user: str
    """The question; `{title}` stands for the original title."""
    system: str = ""
    """System message; empty = none, which every chat template accepts."""
    max_tokens: int = 256
    """Longest answer, in the model's tokens."""


@config_dataclass
class CaptionConfig:
    """Everything that an answer depends on, besides the model and the clip."""

    prompts: dict[Kind, Prompt]
    """What is asked for each kind of caption."""
    frames: int = 8
    """Frames shown, evenly from the first to the last; 1 for an image."""
    long_side: int = 448
    """Pixels to which a larger frame is shrunk."""
    jpeg_quality: int = 90
    """Of the frames that go to an endpoint, 1 to 100."""
    temperature: float = 0.0
    """0 = the likeliest token each time."""
    refusals: list[str]
    """Beginnings of answers that are no caption."""

    def __post_init__(self) -> None:
        if self.frames < 1 or self.long_side < 16 or not 1 <= self.jpeg_quality <= 100 or self.temperature < 0:
            raise ValueError(
                f"frames={self.frames} must be at least 1, long_side={self.long_side} at least 16, "
                f"jpeg_quality={self.jpeg_quality} 1 to 100, temperature={self.temperature} not negative"
            )

    @property
    def fingerprint(self) -> str:
        """8 hex digits that stand for all of it in the manifest."""
        return hashlib.sha256(json.dumps(config_to_dict(self), sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Answer:
    """What came back for one clip and kind: a text, or the problem why there is none."""

    text: str = ""
    problem: str = ""
    cut: bool = False
    """The answer ended at the limit of tokens, not by itself."""
    again: bool = False
    """The problem is the source's and may pass: the next run asks again."""


@dataclass
class Clip:
    """A clip that is asked about."""

    row: Row
    frames: np.ndarray
    """uint8 [T, H, W, 3], RGB; T=0 for a source that does not look."""
    jpeg_quality: int = 90

    @functools.cached_property
    def jpegs(self) -> list[bytes]:
        """The frames as JPEG files; made once for all kinds."""
        options = [cv2.IMWRITE_JPEG_QUALITY, self.jpeg_quality]
        pictures = (cv2.cvtColor(frame, cv2.COLOR_RGB2BGR) for frame in self.frames)
        return [cv2.imencode(".jpg", picture, options)[1].tobytes() for picture in pictures]


class Captioner(Protocol):
    """A source of captions. `ask` may be called from `concurrency` threads at once."""

    name: str
    """Goes into the manifest and decides whether old answers are still good."""
    batch_size: int
    concurrency: int
    looks: bool
    """Whether it needs the frames."""

    def ask(self, kind: Kind, clips: Sequence[Clip]) -> list[Answer]:
        """One answer a clip, in order; a `UserError` stops the run."""
        ...

    def figures(self) -> dict[str, int]:
        """Counts for the report."""
        ...

    def close(self) -> None:
        """Let go of connections, and end what still waits."""
        ...


def load_clip(row: Row, config: CaptionConfig, looks: bool) -> Clip | VideoError:
    """The frames of a clip inside its black borders; what cannot be read comes back as the error."""
    if not looks:
        return Clip(row, np.zeros((0, 0, 0, 3), np.uint8))
    try:
        return Clip(row, clip_frames(row, config.frames, config.long_side), config.jpeg_quality)
    except VideoError as error:
        return error


def clip_frames(row: Row, count: int, long_side: int) -> np.ndarray:
    """Up to `count` frames from the first to the last, inside black borders, uint8 [T, H, W, 3].

    Larger ones are shrunk to `long_side` pixels.

    Raises:
        VideoError: the file cannot be read, or lacks the frames.
    """
    length = row["end_frame"] - row["start_frame"]
    numbers = [row["start_frame"] + index for index in evenly_spaced(length, count)]
    crop = crop_of(row)
    width, height = (crop.width, crop.height) if crop else (row["width"], row["height"])
    factor = min(1.0, long_side / max(width, height))
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    return read_frames(row["source"], indices=numbers, size=size, crop=crop)


def prompt_text(prompt: Prompt, row: Row) -> str:
    """The question with the clip's title in it."""
    # Not str.format: titles and prompts may hold braces of their own.
    return prompt.user.replace("{title}", original_title(row) or "none")


def original_title(row: Row) -> str:
    """The title, or the caption that came with the file: in NFC, without mark-up, links and line breaks."""
    # Once a model's caption stands in `caption`, only the older columns know the title.
    written = row["caption_title"] if row["caption_kind"] else row["caption"]
    text = html.unescape(row["title"] or written or "")
    text = _ADDRESS.sub(" ", unicodedata.normalize("NFC", text))
    visible = "".join(c if unicodedata.category(c) not in ("Cc", "Cs") else " " for c in text)
    return " ".join(visible.split())


def checked(answer: Answer, config: CaptionConfig) -> Answer:
    """The answer stripped; an empty one or a refusal becomes a problem."""
    if answer.problem:
        return answer
    text = answer.text.strip()
    if not text:
        return Answer(problem="empty answer")
    if _plain(text).startswith(tuple(_plain(beginning) for beginning in config.refusals)):
        return Answer(problem=f"refused: {text[:80]}")
    return Answer(text=text, cut=answer.cut)


def _plain(text: str) -> str:
    return text.replace("’", "'").casefold()
