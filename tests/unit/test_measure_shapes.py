"""`megatron-video measure` over real mp4 files: report, interval, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from shape_videos import draw_video

from megatron_video.errors import UserError
from megatron_video.video_io import write_mp4
from training.measure_shapes import main, samples_of
from training.proportions import wilson_interval

SHOWN = [("red", "left"), ("blue", "up"), ("green", "right"), ("yellow", "down")]


def write_samples(folder: Path, prompts: list[str]) -> Path:
    rng = np.random.default_rng(0)
    lines = []
    for number, (prompt, (colour, direction)) in enumerate(zip(prompts, SHOWN, strict=True)):
        name = f"{number}.mp4"
        write_mp4(folder / name, draw_video(rng, colour, direction, blur=1.5, contrast=0.6), fps=8)
        lines.append(json.dumps({"prompt": prompt, "seed": number, "file": name}, ensure_ascii=False))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def test_report_counts_what_the_files_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = ["a red circle moves left", "蓝色方块向上移动", "a green square moves down", "a red square moves down"]
    write_samples(tmp_path, prompts)
    main(["--samples", str(tmp_path), "--json", "--out", str(tmp_path / "report.json")])
    report = json.loads(capsys.readouterr().out)
    assert (report["colour"]["correct"], report["direction"]["correct"], report["both"]["correct"]) == (3, 3, 2)
    assert report["direction"]["classes"]["down"] == {"correct": 1, "total": 2, "seen": {"right": 1, "down": 1}}
    videos = json.loads((tmp_path / "report.json").read_text())["details"]
    assert [v["correct"]["direction"] for v in videos] == [True, True, False, True]
    main(["--samples", str(tmp_path / "samples.jsonl"), "--limit", "2"])
    assert "colour           2/2    100.0%" in capsys.readouterr().out


# Published values: Newcombe (1998), table of worked examples, method 3.
@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(correct: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(correct, total) == pytest.approx((low, high), abs=5e-5)


def test_bad_listings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no .*samples\.jsonl"):
        samples_of(tmp_path)
    listing = tmp_path / "samples.jsonl"
    listing.write_text('{"prompt": "a red circle"}\n')
    with pytest.raises(UserError, match="line 1"):
        samples_of(listing)
    listing.write_text('{"prompt": "a red circle", "file": "gone.mp4"}\n')
    with pytest.raises(UserError, match=r"1 videos that are not there.*gone\.mp4"):
        samples_of(listing)
    listing.write_text("")
    with pytest.raises(UserError, match="lists no samples"):
        samples_of(listing)


def test_prompts_without_shapes_are_refused_with_exit_code_2(tmp_path: Path) -> None:
    write_samples(tmp_path, ["a cat", "a dog", "the sea", "une maison"])
    command = [sys.executable, "-m", "training.measure_shapes", "--samples", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "no caption asks for one colour" in result.stderr
