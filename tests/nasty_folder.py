"""A folder with one file of every nasty kind, and what must become of each: for ingest's tests and the whole chain's.

The table below is the whole list; other tests may add to the folder.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pillow_heif
from nasty_videos import CODECS, Codec, cut_short, faded, scenes, trimmed_copy, write_gif, write_sound, write_video
from PIL import Image

FASTSTART = {"movflags": "+faststart"}
LONG_CAPTION = ("a very long story of a red square " * 300)[:10_000]
PQ = "colorprim=bt2020:transfer=smpte2084:colormatrix=bt2020nc"
HDR = Codec("libx265", ".mp4", "yuv420p10le", {"x265-params": f"pools=none:frame-threads=1:log-level=none:{PQ}"})


@dataclass(frozen=True)
class Fate:
    """What ingest and segment must make of a file."""

    clips: tuple[tuple[int, int], ...] = ()
    """Frame spans of the clips that segment keeps, with its default settings."""
    dropped_by: str | None = None
    reason: str = ""
    """What the reason begins with."""
    caption: str = "a caption"


def _variable(path: Path, seed: int) -> None:
    times = [0, *np.cumsum(np.random.default_rng(seed).integers(1, 5, 59)).tolist()]
    write_video(path, scenes([60], 72, 96, seed), times=times)


def _truncated(path: Path, codec: str, seed: int) -> None:
    whole = path.with_name(f".whole{path.suffix}")
    write_video(whole, scenes([60], 72, 96, seed), CODECS[codec], container=FASTSTART if path.suffix == ".mp4" else {})
    cut_short(whole, path, 0.6)
    whole.unlink()


def _trimmed(path: Path, seed: int) -> None:
    whole = path.with_name(".whole.mp4")
    write_video(whole, scenes([120], 72, 96, seed), Codec("libx264", ".mp4", options={"g": "48"}))
    trimmed_copy(whole, path, seconds=3, lead=1)
    whole.unlink()


def _renamed(path: Path, suffix: str, seed: int) -> None:
    real = path.with_name(f".real{suffix}")
    if suffix == ".jpg":
        _picture(seed).save(real)
    else:
        write_video(real, scenes([40], 72, 96, seed))
    real.rename(path)


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(scenes([1], 72, 96, seed)[0])


def _exif_turned(path: Path, seed: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(scenes([1], 71, 95, seed)[0]).save(path, exif=exif)


def _animated(path: Path, seed: int) -> None:
    pictures = [Image.fromarray(frame) for frame in scenes([5], 48, 64, seed)]
    pictures[0].save(path, save_all=True, append_images=pictures[1:])


def _faded(path: Path) -> None:
    write_video(path, faded(scenes([110], 72, 96, 35), start=40, black=20, end=70, ramp=10))


_WHOLE = Fate(((3, 57),))
_TWO = Fate(((3, 57), (63, 107)))
_PICTURE = Fate(((0, 1),))
_UNREADABLE = Fate(dropped_by="ingest", reason="unreadable")
_NO_CAPTION = Fate(dropped_by="ingest", reason="no caption", caption="")

# path in the folder -> (maker, fate)
FILES: dict[str, tuple[Callable[[Path], object], Fate]] = {
    **{
        f"codecs/{name}{codec.suffix}": (
            lambda path, codec=codec, seed=seed: write_video(path, scenes([60, 50], 72, 96, seed), codec),
            _TWO,
        )
        for seed, (name, codec) in enumerate(CODECS.items())
    },
    "variable.mp4": (lambda path: _variable(path, 20), _WHOLE),
    "variable.mkv": (lambda path: _variable(path, 21), _WHOLE),
    "phone/rotated.mov": (
        lambda path: write_video(path, scenes([60], 72, 96, 22), Codec("libx264", ".mov"), rotation=90),
        _WHOLE,
    ),
    "phone/hdr.mp4": (lambda path: write_video(path, scenes([60], 72, 96, 23), HDR, hdr=True), _WHOLE),
    "sound/Ünïcode 一个 🎬 'quoted'.mp4": (
        lambda path: write_video(path, scenes([60], 72, 96, 24), audio=True, title="Titel 标题"),
        _WHOLE,
    ),
    "odd/odd.webm": (lambda path: write_video(path, scenes([60], 73, 97, 25), CODECS["vp9"]), _WHOLE),
    "a/clip.mp4": (lambda path: write_video(path, scenes([60], 72, 96, 26)), _WHOLE),
    "b/clip.mp4": (lambda path: write_video(path, scenes([60], 72, 96, 27)), _WHOLE),
    "b/copy.mp4": (
        lambda path: shutil.copyfile(path.with_name("clip.mp4"), path),
        Fate(dropped_by="ingest", reason="copy: same bytes as "),
    ),
    "b/trimmed.mp4": (lambda path: _trimmed(path, 28), Fate(((3, 45),))),
    "b/fade.mp4": (lambda path: _faded(path), Fate()),
    "pictures/plain.png": (lambda path: _picture(29).save(path), _PICTURE),
    "pictures/turned.jpg": (lambda path: _exif_turned(path, 30), _PICTURE),
    "pictures/still.webp": (lambda path: _picture(31).save(path), _PICTURE),
    "pictures/still.avif": (lambda path: _picture(46).save(path), _PICTURE),
    "pictures/phone.heic": (lambda path: pillow_heif.from_pillow(_picture(47)).save(path), _PICTURE),
    "pictures/animation.avif": (lambda path: _animated(path, 48), _UNREADABLE),
    "pictures/animation.gif": (lambda path: write_gif(path, scenes([30], 72, 96, 32)), Fate(((3, 27),))),
    "pictures/animation.webp": (lambda path: _animated(path, 33), _UNREADABLE),
    "renamed/video.avi": (lambda path: _renamed(path, ".mp4", 34), Fate(((3, 37),))),
    "renamed/video.jpg": (lambda path: _renamed(path, ".mp4", 36), Fate(((3, 37),))),
    "renamed/picture.mp4": (lambda path: _renamed(path, ".jpg", 37), _PICTURE),
    "broken/truncated.mp4": (lambda path: _truncated(path, "h264", 38), _UNREADABLE),
    "broken/truncated.mkv": (lambda path: _truncated(path, "hevc-10-bit", 39), _UNREADABLE),
    "broken/truncated.avi": (lambda path: _truncated(path, "mpeg4", 40), _UNREADABLE),
    "broken/zero.mp4": (lambda path: path.touch(), _UNREADABLE),
    "broken/text.mp4": (lambda path: path.write_text("no video at all\n" * 50), _UNREADABLE),
    "broken/noise.mkv": (lambda path: path.write_bytes(np.random.default_rng(0).bytes(5000)), _UNREADABLE),
    "broken/text.png": (lambda path: path.write_text("no picture"), _UNREADABLE),
    "broken/sound only.mp4": (lambda path: write_sound(path), _UNREADABLE),
    "short/three frames.mp4": (
        lambda path: write_video(path, scenes([3], 72, 96, 41)),
        Fate(dropped_by="segment", reason="too short: 0 frames"),
    ),
    "captions/none.mp4": (lambda path: write_video(path, scenes([60], 72, 96, 42)), _NO_CAPTION),
    "captions/empty.mp4": (lambda path: write_video(path, scenes([60], 72, 96, 43)), _NO_CAPTION),
    "captions/long.mp4": (
        lambda path: write_video(path, scenes([60], 72, 96, 44)),
        Fate(((3, 57),), caption=LONG_CAPTION),
    ),
    "captions/broken.mp4": (
        lambda path: write_video(path, scenes([60], 72, 96, 45)),
        Fate(dropped_by="ingest", reason="sidecar: broken.json"),
    ),
}


def make_nasty_folder(folder: Path) -> dict[str, Fate]:
    """Write all files with their captions; the fate of each by its absolute path."""
    for name, (make, fate) in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        make(path)
        _write_caption(path, fate)
    # What a folder scan must pass over.
    (folder / ".hidden.mp4").write_bytes(b"hidden")
    (folder / "readme.md").write_text("not media")
    return {str((folder / name).absolute()): fate for name, (_, fate) in FILES.items()}


def _write_caption(path: Path, fate: Fate) -> None:
    if path.stem == "broken":
        path.with_suffix(".json").write_text("{")
    elif path.stem == "empty":
        path.with_suffix(".txt").write_text(" \n")
    elif path.stem != "none":
        path.with_suffix(".txt").write_text(fate.caption, encoding="utf-8")
