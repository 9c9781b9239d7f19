"""Contact sheets: geometry and pixels against Pillow's reading of the PNG, captions in two scripts."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from megatron_video.contact_sheet import evenly_spaced, write_contact_sheet
from megatron_video.errors import UserError


def video(frames: int, height: int, width: int, colour: tuple[int, int, int]) -> np.ndarray:
    return np.full((frames, height, width, 3), colour, np.uint8)


def test_frames_appear_in_rgb_order_and_at_the_asked_scale(tmp_path: Path) -> None:
    path = write_contact_sheet([("red", video(9, 20, 30, (250, 10, 20)))], tmp_path / "a" / "sheet.png", 3, scale=2)
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert (pixels == (250, 10, 20)).all(-1).sum() == 3 * 40 * 60
    assert [p.name for p in path.parent.iterdir()] == ["sheet.png"]


@pytest.mark.parametrize("caption", ["a red circle moves left", "蓝色方块向上移动"])
def test_caption_is_drawn_with_real_glyphs(tmp_path: Path, caption: str) -> None:
    blank = video(6, 48, 48, (255, 255, 255))
    drawn = np.asarray(Image.open(write_contact_sheet([(caption, blank)], tmp_path / "text.png")))
    marks = np.asarray(Image.open(write_contact_sheet([("?" * len(caption), blank)], tmp_path / "marks.png")))
    assert (drawn < 100).sum() > 50
    assert (drawn != marks).any()
    # Missing glyphs would all look alike; each character of the captions is drawn as itself.
    font = cv2.FontFace("sans")
    shapes = set()
    for character in set(caption) - {" "}:
        _, glyph = cv2.putText(np.full((40, 40, 3), 255, np.uint8), character, (4, 30), (0, 0, 0), font, 20)
        shapes.add(glyph.tobytes())
    assert len(shapes) == len(set(caption) - {" "})


def test_many_videos_of_different_sizes_fill_a_grid(tmp_path: Path) -> None:
    rows = [
        (
            f"video {i} with a caption too long for one line and even for two of them",
            video(1 + i, 48, 48 + 16 * (i % 2), (0, 90, 0)),
        )
        for i in range(30)
    ]
    width, height = Image.open(write_contact_sheet(rows, tmp_path / "sheet.png", columns=3)).size
    assert width <= 1700
    assert height <= 2600


def test_evenly_spaced_keeps_first_and_last() -> None:
    assert evenly_spaced(17, 3) == [0, 8, 16]
    assert evenly_spaced(2, 6) == [0, 1]
    assert evenly_spaced(1, 6) == [0]


def test_bad_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no videos"):
        write_contact_sheet([], tmp_path / "x.png")
    with pytest.raises(UserError, match="not uint8"):
        write_contact_sheet([("a", np.zeros((3, 8, 8, 3), np.float32))], tmp_path / "x.png")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
