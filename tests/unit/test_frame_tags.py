"""Tags that need no model, on clips whose figures are known from how they were made."""

from __future__ import annotations

from pathlib import Path

import cv2
import imagehash
import numpy as np
import pytest
from PIL import Image

from data_prep import frame_tags, ingest, tag
from megatron_video.manifest import VERSION_2_COLUMNS, Row, read_manifest
from megatron_video.video_io import write_mp4

SUBTITLE = {"en": "It was a dark night at sea.", "zh": "那是海上一个漆黑的夜晚。"}
NEEDS_MODEL = {"aesthetic", "nsfw", "watermark", "ocr_area", "text_video_score", "tag_models"}


def picture(seed: int, height: int = 96, width: int = 128, cell: int = 8) -> np.ndarray:
    """Smooth colour noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    noise = rng.uniform(0.2, 0.8, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
    return (cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC).clip(0, 1) * 255).astype(np.uint8)


def panned(seed: int, frames: int, pixels: int) -> np.ndarray:
    wide = picture(seed, width=128 + pixels * frames)
    return np.stack([wide[:, t * pixels : t * pixels + 128] for t in range(frames)])


def tagged(folder: Path, frames: np.ndarray, crf: int = 4) -> Row:
    folder.mkdir(parents=True)
    write_mp4(folder / "clip.mp4", frames, fps=24, crf=crf)
    (folder / "clip.txt").write_text("a clip")
    ingest.run(folder, folder / "1.parquet")
    tag.run(folder / "1.parquet", folder / "2.parquet")
    (row,) = read_manifest(folder / "2.parquet").to_pylist()
    assert row["dropped_by"] is None, row["drop_reason"]
    return row


def subtitled(frame: np.ndarray, text: str, size: int, row: int = -1) -> tuple[np.ndarray, float]:
    """White text with a dark rim, centred, and the share of the picture under its box."""
    height, width = frame.shape[:2]
    font = cv2.FontFace("sans")
    (_, _, w, h) = cv2.getTextSize((0, 0), text, (0, 0), font, size)
    origin = ((width - w) // 2, row if row > 0 else height - 2 * size)
    frame = frame.copy()
    # The rim: the same text in black, shifted to all sides.
    for dx, dy in ((-2, 0), (2, 0), (0, -2), (0, 2)):
        cv2.putText(frame, text, (origin[0] + dx, origin[1] + dy), (0, 0, 0), font, size)
    cv2.putText(frame, text, origin, (255, 255, 255), font, size)
    return frame, w * h / (width * height)


# --- borders, blur, motion, colour ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("top", "bottom", "left", "right"), [(12, 12, 0, 0), (0, 0, 16, 16), (10, 2, 6, 20), (0, 0, 0, 0), (3, 5, 7, 9)]
)
def test_given_borders_are_found(tmp_path: Path, top: int, bottom: int, left: int, right: int) -> None:
    frames = panned(1, 12, 2)
    frames[:, :top] = frames[:, 96 - bottom :] = frames[:, :, :left] = frames[:, :, 128 - right :] = 0
    row = tagged(tmp_path / "in", frames)
    # Odd edges go inwards to the next even pixel.
    x, y = left + left % 2, top + top % 2
    right_edge, lower_edge = 128 - right - right % 2, 96 - bottom - bottom % 2
    assert [row[f"crop_{name}"] for name in ("x", "y")] == [x, y]
    assert [row["crop_width"], row["crop_height"]] == [right_edge - x, lower_edge - y]
    assert row["border_share"] == pytest.approx(1 - row["crop_width"] * row["crop_height"] / (96 * 128), abs=1e-6)
    assert row["short_side"] == min(row["crop_width"], row["crop_height"])


def test_a_black_clip_has_no_border_and_no_figures_that_are_not_numbers(tmp_path: Path) -> None:
    row = tagged(tmp_path / "in", np.zeros((12, 96, 128, 3), np.uint8))
    assert (row["border_share"], row["crop_width"], row["short_side"]) == (0, 128, 96)
    assert (row["static_share"], row["flicker"], row["text_area"], row["motion_max"]) == (1, 0, 0, 0)


def test_blur_falls_with_every_step_of_blurring(tmp_path: Path) -> None:
    sharp = panned(2, 10, 2)
    levels = []
    for sigma in (0, 0.7, 1.5, 3, 6):
        clip = np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) if sigma else frame for frame in sharp])
        levels.append(tagged(tmp_path / f"s{sigma}", clip)["blur"])
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > 3 * levels[-1] > 0


@pytest.mark.parametrize("pixels", [1, 2, 4])
def test_motion_is_the_pixels_a_frame_of_a_pan(tmp_path: Path, pixels: int) -> None:
    row = tagged(tmp_path / "in", panned(3, 12, pixels))
    # The unit is a picture of 256 pixels on the long side; this one has 128.
    assert row["motion_mean"] == pytest.approx(2 * pixels, rel=0.12)


@pytest.mark.parametrize(("saturation", "value"), [(0, 128), (80, 200), (200, 120), (255, 255)])
def test_saturation_and_brightness_of_one_colour(saturation: int, value: int) -> None:
    hsv = np.full((2, 32, 48, 3), (30, saturation, value), np.uint8)
    frames = np.stack([cv2.cvtColor(frame, cv2.COLOR_HSV2RGB) for frame in hsv])
    found = tag.saturation_and_brightness(frames)
    assert found[0] == pytest.approx(saturation, abs=2)
    assert found[1] == pytest.approx(value, abs=1)


# --- static, flicker ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amplitude", [0, 4, 15])
def test_flicker_is_the_step_between_neighbouring_frames(tmp_path: Path, amplitude: int) -> None:
    frames = np.full((16, 96, 128, 3), 120, np.int16) + picture(4).astype(np.int16) // 4
    frames += (amplitude * np.where(np.arange(16) % 2, 1, -1)).astype(np.int16)[:, None, None, None]
    row = tagged(tmp_path / "in", frames.astype(np.uint8))
    assert row["flicker"] == pytest.approx(2 * amplitude, abs=0.6)


def test_a_steady_pan_and_a_slow_fade_do_not_flicker(tmp_path: Path) -> None:
    assert tagged(tmp_path / "pan", panned(5, 16, 2))["flicker"] < 1
    fade = (picture(5)[None] * np.linspace(1, 0.6, 16)[:, None, None, None]).astype(np.uint8)
    assert tagged(tmp_path / "fade", fade)["flicker"] < 5


@pytest.mark.parametrize("still_columns", [0, 32, 64, 128])
def test_static_share_is_the_part_that_stands_still(tmp_path: Path, still_columns: int) -> None:
    frames = panned(6, 24, 3)
    frames[:, :, :still_columns] = frames[:1, :, :still_columns]
    row = tagged(tmp_path / "in", frames)
    # Where the pan shows flat spots, they count as still.
    assert row["static_share"] == pytest.approx(still_columns / 128, abs=0.04)


# --- text -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize(("height", "width", "size"), [(360, 640, 26), (720, 1280, 44), (640, 360, 22)])
def test_rendered_subtitles_are_found_and_plain_pictures_are_clean(
    height: int, width: int, size: int, language: str
) -> None:
    clean = np.stack([picture(seed, height, width, cell=40) for seed in (7, 8, 9)])
    assert frame_tags.text_area(clean) < 0.002
    drawn = [subtitled(frame, SUBTITLE[language], size) for frame in clean]
    found = frame_tags.text_area(np.stack([frame for frame, _ in drawn]))
    assert 0.5 * drawn[0][1] < found < 1.6 * drawn[0][1]


def test_text_that_moves_through_the_scene_is_no_overlay() -> None:
    frames = [picture(seed, 360, 640, cell=40) for seed in range(8)]
    moving = [subtitled(frame, SUBTITLE["en"], 26, row=40 + 40 * t)[0] for t, frame in enumerate(frames)]
    assert frame_tags.text_area(np.stack(moving)) < 0.005
    assert all(frame_tags.text_area(frame[None]) > 0.02 for frame in moving)


def test_more_text_has_more_area() -> None:
    frame = picture(10, 360, 640, cell=40)
    one = subtitled(frame, SUBTITLE["en"], 26)[0]
    two = subtitled(one, SUBTITLE["en"], 26, row=60)[0]
    areas = [frame_tags.text_area(f[None]) for f in (frame, one, two)]
    assert areas[0] < 0.002
    assert areas[2] == pytest.approx(2 * areas[1], rel=0.25)


def test_bars_lattices_and_noise_are_no_text() -> None:
    grid = np.indices((360, 640)).sum(axis=0)
    patterns = {
        "noise": np.random.default_rng(0).integers(0, 256, (360, 640)),
        "checks": (np.indices((360, 640)) // 16).sum(axis=0) % 2 * 255,
        "diagonal": grid // 24 % 2 * 255,
        "bar": np.pad(np.full((20, 400), 255), ((100, 240), (100, 140))),
    }
    for name, grey in patterns.items():
        frame = np.repeat(grey[..., None], 3, axis=-1).astype(np.uint8)
        assert frame_tags.text_area(frame[None]) < 0.002, name


# --- perceptual hash ------------------------------------------------------------------------------------------------


def test_the_hash_is_imagehashs_of_the_middle_frame_inside_the_borders(tmp_path: Path) -> None:
    frames = panned(11, 17, 2)
    bordered = np.pad(frames, ((0, 0), (16, 16), (0, 0), (0, 0)))
    plain, framed = tagged(tmp_path / "a", frames), tagged(tmp_path / "b", bordered)
    middle = tag.sampled_frames(0, 17)[4]
    expected = imagehash.phash(Image.fromarray(frames[middle]))
    for row in (plain, framed):
        assert len(row["phash"]) == 16
        assert imagehash.hex_to_hash(row["phash"]) - expected <= 4


def test_hashes_of_a_reencode_are_near_and_of_other_clips_far(tmp_path: Path) -> None:
    hashes = {}
    for name, (seed, crf) in {"a": (12, 4), "a again": (12, 30), "b": (13, 4), "c": (14, 4)}.items():
        row = tagged(tmp_path / name, panned(seed, 12, 2), crf)
        hashes[name] = imagehash.hex_to_hash(row["phash"])
    assert hashes["a"] - hashes["a again"] <= 6
    assert min(hashes[x] - hashes[y] for x, y in (("a", "b"), ("a", "c"), ("b", "c"))) >= 14


# --- rows -----------------------------------------------------------------------------------------------------------


def test_every_tag_is_filled_for_videos_and_images_have_no_figures_of_change(tmp_path: Path) -> None:
    columns = {name for name, _, stage, _ in VERSION_2_COLUMNS if stage == "tag"} - NEEDS_MODEL
    video = tagged(tmp_path / "video", panned(15, 10, 1))
    assert {name for name in columns if video[name] is None} == set()
    Image.fromarray(picture(16)).save(tmp_path / "still.png")
    (tmp_path / "still.txt").write_text("a still")
    ingest.run(tmp_path, tmp_path / "1.parquet")
    tag.run(tmp_path / "1.parquet", tmp_path / "2.parquet")
    image = next(row for row in read_manifest(tmp_path / "2.parquet").to_pylist() if row["is_image"])
    assert {name for name in columns if image[name] is None} == {"static_share", "flicker"}
    assert all(video[name] is None for name in NEEDS_MODEL)
