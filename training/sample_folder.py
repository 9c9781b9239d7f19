"""The folder of generated samples: what is done in it, under which settings, and what people look at."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from torch.utils.tensorboard import FileWriter

from megatron_video.contact_sheet import evenly_spaced, write_contact_sheet
from megatron_video.errors import UserError
from megatron_video.files import appearing, write_atomically
from megatron_video.video_io import read_frames, write_mp4
from training.sample_latents import latent_file
from training.sample_prompts import Prompt

Frames = npt.NDArray[np.uint8]

SETTINGS_FILE, LISTING_FILE, SHEET_FILE = "settings.json", "samples.jsonl", "contact_sheet.png"
# More would make a picture that no viewer opens.
_MOST_ON_SHEET = 64
_SHEET_COLUMNS = 3
# Longest side of sample videos in TensorBoard, which holds them as GIFs; the mp4 has all of them.
BOARD_PIXELS = 384


class SampleFolder:
    """Samples of one list of prompts under one set of settings.

    Args:
        path: the folder.
        settings: everything that a sample depends on beside its prompt.
        prompts: all prompts; a list that continues the folder's own is allowed.
        is_image: one frame a sample, kept as PNG instead of mp4.

    Raises:
        UserError: the folder holds samples of other settings or prompts, or something else.
    """

    def __init__(self, path: Path, settings: dict[str, Any], prompts: Sequence[Prompt], is_image: bool) -> None:
        self.path, self.prompts = path, prompts
        # One frame is no video: most players show nothing of it.
        self._suffix = ".png" if is_image else ".mp4"
        self._settings = settings
        self._identities = [_identity(prompt) for prompt in prompts]
        self._refuse_other_contents()

    def claim(self, sources: dict[str, str]) -> None:
        """Create the folder and write down the settings, and where the models were read from (which may change)."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = {"settings": self._settings, "sources": sources, "prompts": self._identities}
        _write_text(self.path / SETTINGS_FILE, json.dumps(record, indent=1, ensure_ascii=False) + "\n")

    def file(self, prompt: Prompt) -> Path:
        """Where the prompt's video (or image) is."""
        return self.path / f"{prompt.index:05d}{self._suffix}"

    def missing(self) -> list[int]:
        """Indices of the prompts without a sample."""
        return [prompt.index for prompt in self.prompts if not self.file(prompt).is_file()]

    def undecoded(self) -> list[int]:
        """Indices of the prompts whose latent is there, and no sample."""
        return [index for index in self.missing() if latent_file(self.path, index).is_file()]

    def write(self, prompt: Prompt, frames: Frames, fps: float) -> None:
        """Write one sample, frames uint8 [T, H, W, 3]; the video comes last: its presence means done."""
        sheet = self.path / f"{prompt.index:05d}_sheet.png"
        # First, middle and last frame.
        write_contact_sheet([(prompt.text, frames)], sheet, columns=_SHEET_COLUMNS)
        if self._suffix == ".png":
            _write_image(self.file(prompt), frames[0])
        else:
            write_mp4(self.file(prompt), frames, fps)

    def write_listing(self) -> None:
        """samples.jsonl: one line for every sample that is there."""
        lines = [
            json.dumps(
                {
                    **prompt.tags,
                    "index": prompt.index,
                    "prompt": prompt.text,
                    "seed": prompt.seed,
                    "noise_index": prompt.noise_index,
                    "file": self.file(prompt).name,
                },
                ensure_ascii=False,
            )
            for prompt in self.prompts
            if self.file(prompt).is_file()
        ]
        _write_text(self.path / LISTING_FILE, "".join(f"{line}\n" for line in lines))

    def write_sheet(self) -> None:
        """One picture of all samples, of the first 64 if there are more."""
        # Read back from disk: earlier runs made some of them, and this is what a viewer sees.
        rows = [(prompt.text, self._shown_frames(prompt)) for prompt in self.prompts[:_MOST_ON_SHEET]]
        write_contact_sheet(rows, self.path / SHEET_FILE, columns=_SHEET_COLUMNS)

    def finish(self) -> None:
        """Write what tells of all samples, once they are there."""
        self.write_listing()
        self.write_sheet()

    def _shown_frames(self, prompt: Prompt) -> Frames:
        frames: Frames = read_frames(self.file(prompt))
        # A copy of those alone: 64 whole videos of 204 frames are 20 GB.
        return frames[evenly_spaced(len(frames), _SHEET_COLUMNS)]

    def _refuse_other_contents(self) -> None:
        path = self.path / SETTINGS_FILE
        if not path.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise UserError(f"--out {self.path} exists and was not made by `megatron-video sample`; choose another")
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        self._refuse_other_settings(before["settings"])
        self._refuse_other_prompts(before["prompts"])
        # A shorter list keeps what is known of the longer one.
        self._identities += before["prompts"][len(self._identities) :]

    def _refuse_other_settings(self, before: dict[str, Any]) -> None:
        different = [
            f"{name}: {before.get(name)} there, {self._settings.get(name)} now"
            for name in sorted({*before, *self._settings})
            if before.get(name) != self._settings.get(name)
        ]
        if different:
            raise UserError(
                f"--out {self.path} holds samples of other settings ({'; '.join(different)}); "
                "choose another folder, or give these values again"
            )

    def _refuse_other_prompts(self, before: list[dict[str, Any]]) -> None:
        # Only the common part is compared: a longer list adds samples, a shorter one keeps what is there.
        for index, (there, now) in enumerate(zip(before, self._identities, strict=False)):
            if there != now:
                raise UserError(
                    f"--out {self.path} holds samples of other prompts (number {index}: {there} there, {now} now); "
                    "choose another folder; prompts may only be added at the end"
                )


class SampleBoard:
    """Samples as animated pictures in TensorBoard.

    The format is a GIF inside an image summary, which is what `add_video` writes when moviepy is installed.

    Args:
        path: log folder.
        suffix: of the event file, when several processes write.
    """

    def __init__(self, path: Path, suffix: str = "") -> None:
        self._writer = FileWriter(str(path), filename_suffix=suffix)

    def add(self, prompt: Prompt, frames: Frames, fps: float, step: int) -> None:
        """Add frames uint8 [T, H, W, 3] under the prompt's number, at the training step of the weights."""
        small = shrunk(frames, BOARD_PIXELS)
        self._writer.add_summary(video_summary(f"samples/{prompt.index:05d}", small, fps, prompt.text), step)
        # Visible at once: sampling large videos takes minutes each.
        self._writer.flush()

    def close(self) -> None:
        """Finish the event file."""
        self._writer.close()


def video_summary(tag: str, frames: Frames, fps: float, text: str) -> Summary:
    """Frames uint8 [T, H, W, 3] as TensorBoard shows them under `tag`, with their prompt."""
    picture = Summary.Image(
        height=frames.shape[1], width=frames.shape[2], colorspace=3, encoded_image_string=animated_gif(frames, fps)
    )
    metadata = SummaryMetadata(display_name=tag.rpartition("/")[2], summary_description=text)
    return Summary(value=[Summary.Value(tag=tag, image=picture, metadata=metadata)])


def shrunk(frames: Frames, longest_side: int) -> Frames:
    """Frames uint8 [T, H, W, 3] scaled down to at most `longest_side` pixels, or as they are."""
    height, width = frames.shape[1:3]
    scale = longest_side / max(height, width)
    if scale >= 1:
        return frames
    size = (round(width * scale), round(height * scale))
    return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def animated_gif(frames: Frames, fps: float) -> bytes:
    """Frames uint8 [T, H, W, 3] as an endlessly looping GIF."""
    first, *rest = [Image.fromarray(frame) for frame in frames]
    output = io.BytesIO()
    first.save(output, "GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
    return output.getvalue()


def _identity(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt.text, "seed": prompt.seed, "noise_index": prompt.noise_index}


def _write_text(path: Path, text: str) -> None:
    write_atomically(path, text.encode())


def _write_image(path: Path, pixels: Frames) -> None:
    with appearing(path) as temporary:
        Image.fromarray(pixels).save(temporary, "PNG")
