"""`megatron-video data make-demo-clips`: a folder of real encoded clips of moving coloured shapes, with captions.

The folder looks like what a user brings: mp4 (H.264) in two resolutions and still images, most of them in one listing
(`captions.jsonl`), some with sidecar files in another folder under the same basenames, and a few hard cases among
them: a cut inside a clip, black borders, a file that is cut short. Nothing downstream knows that it was made here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from data_prep.workers import default_workers, parallel_map, progress
from megatron_video.errors import UserError
from megatron_video.video_io import write_mp4

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (222, 40, 38),
    "green": (40, 186, 60),
    "blue": (48, 84, 230),
    "yellow": (238, 212, 40),
}
SHAPES = ("circle", "square", "triangle")
# unit steps in picture coordinates (x to the right, y down)
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

_CHINESE_COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
_CHINESE_SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形"}
_CHINESE_DIRECTIONS = {"left": "向左", "right": "向右", "up": "向上", "down": "向下"}
CHINESE = _CHINESE_COLOURS | _CHINESE_SHAPES | _CHINESE_DIRECTIONS
# (language, template); every caption of a clip is one of these
VIDEO_CAPTIONS = (
    ("en", "a {colour} {shape} moves {direction}"),
    ("zh", "{colour}{shape}{direction}移动"),
    ("en", "a {colour} {shape} moving {direction}"),
    ("zh", "一个{colour}的{shape}正在{direction}移动"),
    ("en", "the {colour} {shape} is moving {direction}"),
    ("zh", "{colour}的{shape}{direction}移动"),
)
IMAGE_CAPTIONS = (
    ("en", "a {colour} {shape}"),
    ("zh", "{colour}{shape}"),
    ("en", "a picture of a {colour} {shape}"),
    ("zh", "一个{colour}的{shape}"),
)
JOINED_CAPTIONS = {"en": "{}, then {}", "zh": "{}，然后{}"}

SIZES = ((96, 96), (128, 96))  # width, height
FPS = 24
MIN_FRAMES, MAX_FRAMES = 24, 27  # at least 17 are left after segment drops three at each end
REFERENCE_STEPS = 16  # the travel below is over 17 frames
TRAVEL_SHARE = (0.34, 0.48)  # of the frame's side along the motion
RADIUS_SHARE = (0.21, 0.26)  # of the shorter side
MARGIN = 2  # pixels between a shape and the edge
BACKGROUND_GREY = (32, 64)  # above what counts as black border
CUT_BACKGROUND_GREY = (30, 150)  # of the scene after a cut
MIN_CONTRAST = 28  # grey levels between shape and background, so that motion is seen without colour too
BORDER_ROWS = 12
MIN_CLIPS = 12
_MARKER = ".made.json"


@dataclass(frozen=True)
class Scene:
    """One shape on a plain background; a still if it has no direction."""

    colour: tuple[int, int, int]
    shape: str
    centre: tuple[float, float]
    """First position, pixels (x, y)."""
    velocity: tuple[float, float]
    """Pixels a frame."""
    radius: float
    background: int
    width: int
    height: int
    num_frames: int


@dataclass(frozen=True)
class Clip:
    """A file to be written: its scenes one after the other, and what spoils it."""

    path: str
    scenes: tuple[Scene, ...]
    caption: str
    border: int = 0
    """Black rows above and below."""
    truncated: bool = False
    sidecar: str | None = None
    """Suffix of the caption file beside it; None = it is in the listing."""


def main(argv: Sequence[str]) -> int:
    """Command line of `megatron-video data make-demo-clips`."""
    parser = argparse.ArgumentParser(prog="megatron-video data make-demo-clips", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to make; it must not exist, or be of this seed")
    parser.add_argument("--clips", type=int, default=360, help="number of videos and images together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=default_workers(), help="processes")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = make_demo_clips(arguments.out, arguments.clips, arguments.seed, arguments.workers)
    text = ", ".join(f"{name} {value}" for name, value in report.items())
    print(json.dumps(report) if arguments.json else f"{arguments.out}: {text}")
    return 0


def make_demo_clips(out: Path, clips: int, seed: int, workers: int = 1) -> dict[str, int]:
    """Write the folder `out`; it appears complete or not at all. Returns counts of what is in it.

    Raises:
        UserError: fewer than 12 clips, or `out` holds something else.
    """
    if clips < MIN_CLIPS:
        raise UserError(f"--clips {clips} must be at least {MIN_CLIPS}: every kind of clip occurs once")
    plan = plan_clips(clips, seed)
    settings = {"clips": clips, "seed": seed}
    if not _already_made(out, settings):
        # Beside the final place, so that one rename publishes everything.
        partial = out.with_name(f".{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        for folder in {str(Path(clip.path).parent) for clip in plan}:
            (partial / folder).mkdir(parents=True, exist_ok=True)
        write = functools.partial(_write_clip, str(partial))
        list(progress(parallel_map(write, plan, workers), len(plan), "make-demo-clips"))
        _write_listing(partial, plan)
        (partial / _MARKER).write_text(json.dumps(settings))
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, out)
    return _counts(plan)


def plan_clips(clips: int, seed: int) -> list[Clip]:
    """What is written, balanced over colour, direction and shape; a pure function of its arguments."""
    rng = np.random.default_rng([seed, 0x5EED])
    # Every combination once before any comes again.
    combinations = list(itertools.product(COLOURS, DIRECTIONS, SHAPES))
    num_images, num_hard = clips // 6, max(2, clips // 100)
    num_videos = clips - num_images
    order = [c for _ in range(1 + clips // len(combinations)) for c in rng.permutation(len(combinations))]
    plan = []
    for index in range(num_videos):
        # The order of kinds is by index, so that every kind is there whatever the number of clips.
        kind = "truncated" if not index else "cut" if index <= num_hard else "border" if index <= 2 * num_hard else ""
        plan.append(_plan_video(rng, index, [combinations[order[index]], combinations[order[-1 - index]]], kind))
    plan += [_plan_image(rng, index, combinations[order[-1 - index]]) for index in range(num_images)]
    return plan


def render(scene: Scene) -> np.ndarray:
    """uint8 [T, H, W, 3]; edges are anti-aliased by the covered share of each pixel."""
    frames = np.empty((scene.num_frames, scene.height, scene.width, 3), np.float32)
    y, x = np.mgrid[: scene.height, : scene.width] + 0.5
    colour = np.asarray(scene.colour, np.float32)
    for t in range(scene.num_frames):
        centre_x = scene.centre[0] + t * scene.velocity[0]
        centre_y = scene.centre[1] + t * scene.velocity[1]
        # A pixel whose centre lies on the edge is half covered.
        covered = np.clip(0.5 - _distance(scene.shape, x - centre_x, y - centre_y, scene.radius), 0, 1)[..., None]
        frames[t] = scene.background + covered * (colour - scene.background)
    return np.rint(frames).astype(np.uint8)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Signed distance to the shape's edge in pixels (negative inside); no shape reaches further than `radius`."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - 0.9 * radius
    # Equilateral, one corner up, moved down so that its bounding box is centred.
    inner = radius / np.sqrt(3)
    y = y - inner / 2
    return np.maximum(np.sqrt(0.75) * np.abs(x) - 0.5 * y, y) - inner


def _plan_video(rng: np.random.Generator, index: int, words: list[tuple[str, str, str]], kind: str) -> Clip:
    width, height = SIZES[(index + index // 48) % len(SIZES)]
    language, template = VIDEO_CAPTIONS[rng.integers(len(VIDEO_CAPTIONS))]
    used = words if kind == "cut" else words[:1]
    edge = BORDER_ROWS if kind == "border" else 0
    scenes = [_plan_scene(rng, word, width, height - 2 * edge) for word in used]
    if kind == "cut":
        scenes[1] = replace(scenes[1], background=_background(rng, np.asarray(scenes[1].colour), scenes[0].background))
    captions = [_caption(language, template, colour, shape, direction) for colour, direction, shape in used]
    caption = captions[0] if len(captions) == 1 else JOINED_CAPTIONS[language].format(*captions)
    # Every eighth plain clip goes to another folder under a basename that is taken in the first one.
    aside = not kind and index % 8 == 7
    return Clip(
        path=f"more/clip_{index // 8:04d}.mp4" if aside else f"clips/clip_{index:04d}.mp4",
        scenes=tuple(scenes),
        caption=caption,
        border=edge,
        truncated=kind == "truncated",
        sidecar=(".txt", ".json")[index // 8 % 2] if aside else None,
    )


def _plan_image(rng: np.random.Generator, index: int, word: tuple[str, str, str]) -> Clip:
    width, height = SIZES[index % len(SIZES)]
    language, template = IMAGE_CAPTIONS[rng.integers(len(IMAGE_CAPTIONS))]
    scene = _plan_scene(rng, word, width, height, still=True)
    caption = _caption(language, template, word[0], word[2], "")
    return Clip(path=f"images/image_{index:04d}{('.png', '.jpg')[index // 2 % 2]}", scenes=(scene,), caption=caption)


def _plan_scene(
    rng: np.random.Generator, word: tuple[str, str, str], width: int, height: int, still: bool = False
) -> Scene:
    word_colour, direction, shape = word
    colour = np.clip(np.asarray(COLOURS[word_colour]) + rng.integers(-12, 13, 3), 0, 255)
    num_frames = 1 if still else int(rng.integers(MIN_FRAMES, MAX_FRAMES + 1))
    radius = float(rng.uniform(*RADIUS_SHARE)) * min(width, height)
    step = np.asarray(DIRECTIONS[direction], float)
    side = np.asarray((width, height), float)
    free = side - 2 * (radius + MARGIN)
    speed = rng.uniform(*TRAVEL_SHARE) * (side @ np.abs(step)) / REFERENCE_STEPS
    # All of the clip's travel must fit between the edges, so that the shape is whole in every frame.
    speed = min(speed, (free @ np.abs(step)) / max(num_frames - 1, 1))
    travel = step * speed * (num_frames - 1)
    first = radius + MARGIN + np.maximum(-travel, 0) + rng.uniform(size=2) * (free - np.abs(travel))
    return Scene(
        colour=(int(colour[0]), int(colour[1]), int(colour[2])),
        shape=shape,
        centre=(float(first[0]), float(first[1])),
        velocity=(float(step[0] * speed), float(step[1] * speed)),
        radius=radius,
        background=_background(rng, colour),
        width=width,
        height=height,
        num_frames=num_frames,
    )


def _background(rng: np.random.Generator, colour: np.ndarray, apart_from: int | None = None) -> int:
    """A grey that contrasts with the shape, and with the scene before a cut."""
    lowest, highest = BACKGROUND_GREY if apart_from is None else CUT_BACKGROUND_GREY
    levels = np.arange(lowest, highest + 1)
    fits = np.abs(levels - colour @ np.array([0.299, 0.587, 0.114])) >= MIN_CONTRAST
    if apart_from is not None:
        fits &= np.abs(levels - apart_from) >= MIN_CONTRAST
    return int(rng.choice(levels[fits]))


def _caption(language: str, template: str, colour: str, shape: str, direction: str) -> str:
    words = {"colour": colour, "shape": shape, "direction": direction}
    if language == "zh":
        words = {name: CHINESE.get(word, "") for name, word in words.items()}
    return template.format(**words)


def _write_clip(root: str, clip: Clip) -> None:
    path = Path(root) / clip.path
    frames = np.concatenate([render(scene) for scene in clip.scenes])
    if clip.border:
        frames = np.pad(frames, ((0, 0), (clip.border, clip.border), (0, 0), (0, 0)))
    if path.suffix == ".mp4":
        write_mp4(path, frames, FPS, crf=16, preset="veryfast")
    else:
        Image.fromarray(frames[0]).save(path, quality=95)
    if clip.truncated:
        os.truncate(path, int(path.stat().st_size * 0.6))
    if clip.sidecar == ".txt":
        path.with_suffix(".txt").write_text(clip.caption + "\n", encoding="utf-8")
    elif clip.sidecar == ".json":
        path.with_suffix(".json").write_text(json.dumps({"caption": clip.caption}, ensure_ascii=False))


def _write_listing(root: Path, plan: list[Clip]) -> None:
    # What is wrong with a clip is written nowhere: finding it is the stages' work.
    entries = [{"path": clip.path, "caption": clip.caption} for clip in plan if clip.sidecar is None]
    lines = [json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries]
    (root / "captions.jsonl").write_text("".join(lines), encoding="utf-8")


def _already_made(out: Path, settings: dict[str, int]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    marker = out / _MARKER
    if marker.is_file() and json.loads(marker.read_text()) == settings:
        return True
    raise UserError(f"--out {out} is there and holds something else; name a new folder or remove it")


def _counts(plan: list[Clip]) -> dict[str, int]:
    videos = [clip for clip in plan if clip.path.endswith(".mp4")]
    return {
        "videos": len(videos),
        "images": len(plan) - len(videos),
        "with_sidecar": sum(clip.sidecar is not None for clip in plan),
        "with_cut": sum(len(clip.scenes) > 1 for clip in plan),
        "with_border": sum(clip.border > 0 for clip in plan),
        "truncated": sum(clip.truncated for clip in plan),
    }
