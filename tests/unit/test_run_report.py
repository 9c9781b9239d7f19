"""Records of a run: what counts as done, where the time went, the report and the watch panel."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from megatron_video.cli import run_command
from training import report, watch
from training.effective_time import find_lives, wall_time
from training.run_records import kept_steps, read_run
from training.run_tail import RunTail
from training.telemetry import open_lines
from training.watch_panel import sparkline

START = 1_700_000_000.0
STEP_SECONDS = 2.0


def moment(seconds: float) -> str:
    return datetime.fromtimestamp(START + seconds, UTC).isoformat(timespec="milliseconds")


def metric(step: int, life: int, ended: float, **changes: Any) -> str:
    line = {
        "step": step,
        "loss": 2.0 - 0.01 * step,
        "grad_norm": 1.0,
        "learning_rate": 1e-4,
        "step_seconds": STEP_SECONDS,
        "data_seconds": 0.5,
        "samples": 8,
        "tokens": 100,
        "flops": 1e12,
        "refused": False,
        "loss_by_time": [None, *[1.0 + index / 10 for index in range(9)]],
        "positions_by_time": [0, *[10] * 9],
        "life": life,
        "time": START + ended,
    }
    return json.dumps(line | changes)


def event(kind: str, at: float, life: int, step: int, **fields: Any) -> str:
    return json.dumps({"time": moment(at), "life": life, "rank": 0, "event": kind, "step": step, **fields})


def save(at: float, life: int, step: int) -> str:
    fields = {
        "checkpoint": f"run/checkpoints/step_{step:08d}",
        "seconds": 9.0,
        "blocked_seconds": 3.0,
        "bytes": 1 << 30,
    }
    return event("save", at, life, step, **fields)


def losses(loss: float) -> dict[str, Any]:
    return {"loss": loss, "by_time": [loss, loss / 2], "by_bucket": {"17x32x32": [loss, loss / 2]}}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Life 1: steps 1 to 5, saved after 3, then killed. Life 2 from 60 s: steps 4 and 5 again, and 6, then stopped."""
    run = tmp_path / "run"
    run.mkdir()
    lives = [
        {"life": number, "started": moment(at), "first_step": first, "world_size": 2}
        | {"host": "node", "megatron_video": "1.0", "git_revision": None}
        for number, at, first in ((1, 0, 0), (2, 60, 3))
    ]
    (run / "run_info.json").write_text(json.dumps({"lives": lives}))
    (run / "status.json").write_text(json.dumps({"state": "stopped", "step": 6}))
    (run / "config.yaml").write_text(yaml.safe_dump({"training": {"steps": 10, "peak_tflops": 1.0}}))
    # Start-up takes 10 s, and training waits 3 s for the save.
    first = [metric(step, 1, 10 + 2 * step + (3 if step > 3 else 0)) for step in range(1, 6)]
    sizes = {"activation_rms": {"layers.0": 1.0}, "grad_norm": {"layers.0": 2.0}, "param_norm": {"layers.0": 3.0}}
    second = [
        metric(4, 2, 72, refused=True, loss=float("nan"), memory={"host_rss": 3 << 30, "cuda_allocated": 5 << 30}),
        metric(5, 2, 74, layer_norms=sizes),
        metric(6, 2, 81),
    ]
    # The kill tore a line.
    (run / "metrics.jsonl").write_text("\n".join([*first, '{"step": 6, "lo', *second]) + "\n")
    happened = [
        event("start", 9, 1, 0, world_size=2),
        save(19, 1, 3),
        event("resume", 69, 2, 3, checkpoint="run/checkpoints/step_00000003", world_size=2),
        event("refused_step", 72, 2, 4, loss="nan", grad_norm=1.0, in_a_row=1, batches=[]),
        event("validation", 79, 2, 5, seconds=5.0, quantiles=[0.25, 0.75], losses={"trained": losses(1.5)}),
        event("stop", 82, 2, 6, state="stopped", reason="SIGTERM <b>"),
    ]
    (run / "events.jsonl").write_text("\n".join(happened) + "\n")
    return run


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ([1, 2, 3], [1, 1, 1]),
        ([1, 2, 3, 2, 3], [1, 0, 0, 1, 1]),
        # Undone twice.
        ([1, 2, 3, 4, 2, 3, 2, 3, 4], [1, 0, 0, 0, 0, 0, 1, 1, 1]),
        ([], []),
    ],
)
def test_a_step_number_that_comes_again_undoes_what_followed_it(steps: list[int], kept: list[int]) -> None:
    assert kept_steps(np.array(steps, dtype=np.float64)).tolist() == [bool(value) for value in kept]


def test_effective_training_time_counts_each_step_once(folder: Path) -> None:
    records = read_run(folder)
    spent = wall_time(records)
    # Kept are steps 1 to 3 of the first life and 4 to 6 of the second.
    assert records.steps.kept_column("step").tolist() == [1, 2, 3, 4, 5, 6]
    assert spent.steps == 6 * STEP_SECONDS
    assert (spent.lost_steps, spent.lost_step_count) == (2 * STEP_SECONDS, 2)
    assert spent.total == 82
    assert spent.effective == pytest.approx(12 / 82)
    # Life 1 ends with its last record at 23 s, life 2 begins at 60 s; its first step begins at 70 s.
    assert (spent.startup, spent.down) == (pytest.approx(20), pytest.approx(37))
    assert (spent.checkpoints, spent.checkups) == (3, 5)
    assert sum(spent.parts().values()) == pytest.approx(spent.total)
    assert spent.refused_step_count == 1
    first, second = find_lives(records)
    assert (first.end_reason, second.end_reason) == ("", "stopped: SIGTERM <b>")


def test_measurements_of_undone_steps_are_left_out(folder: Path) -> None:
    undone = metric(5, 1, 23, memory={"host_rss": 1}, layer_norms={"grad_norm": {}})
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text().replace(metric(5, 1, 23), undone))
    with (folder / "events.jsonl").open("a") as file:
        fields = {"quantiles": [0.5], "losses": {"trained": losses(1.0)}}
        file.write(event("validation", 83, 2, 5, seconds=1.0, **fields) + "\n")
    records = read_run(folder)
    assert [step for step, _ in records.steps.memory] == [4]
    assert [step for step, _ in records.steps.layer_norms] == [5]
    assert [found["losses"]["trained"]["loss"] for found in records.kept_events_of("validation")] == [1.0]


def test_a_life_without_a_step_has_undone_what_came_after_its_checkpoint(folder: Path) -> None:
    info = json.loads((folder / "run_info.json").read_text())
    info["lives"].append({**info["lives"][-1], "life": 3, "started": moment(100), "first_step": 5})
    (folder / "run_info.json").write_text(json.dumps(info))
    records = read_run(folder)
    assert records.steps.kept_column("step").tolist() == [1, 2, 3, 4, 5]
    assert wall_time(records).total == 100


def test_the_html_report_stands_alone_and_holds_the_figures(folder: Path) -> None:
    assert run_command(report.main, [str(folder)]) == 0
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Effective training time: 12.0 s / 82.0 s = 14.63%." in page
    # 6 steps of 1 TFLOP in 12 s on two devices of 1 TFLOP/s.
    assert "MFU 25.00%" in page
    assert "killed: no record of its end" in page
    assert "SIGTERM &lt;b&gt;" in page
    pictures = re.findall(r'src="([^"]*)"', page)
    assert len(pictures) == 10
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture.removeprefix("data:image/png;base64,"))))
        assert image.width == 1000
        # Axes alone have few colours.
        assert len(image.convert("RGB").getcolors(1 << 20) or []) > 50
    for title in ("Loss by t", "Validation", "Layers", "Memory", "Where the wall time went", "Faults and restarts"):
        assert f"<h2>{title}</h2>" in page


def test_the_markdown_report_has_its_pictures_beside_it(folder: Path, tmp_path: Path) -> None:
    assert run_command(report.main, [str(folder), "--out", str(tmp_path / "out" / "run.md")]) == 0
    text = (tmp_path / "out" / "run.md").read_text(encoding="utf-8")
    linked = re.findall(r"\]\((.*?)\)", text)
    assert len(linked) == 10
    for name in linked:
        assert Image.open(tmp_path / "out" / name).format == "PNG"
    assert "| effective training time | 14.63% |" in text
    assert "| 17x32x32 | 1.125 |" in text  # of 1.5 and 0.75


@pytest.mark.parametrize("command", [report.main, watch.main])
def test_a_folder_without_a_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int]
) -> None:
    assert run_command(command, [str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_without_a_step_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "metrics.jsonl").unlink()
    assert run_command(report.main, [str(folder)]) == 2
    assert "has not done a step yet" in capsys.readouterr().err
    assert run_command(watch.main, [str(folder), "--once"]) == 0
    assert "none yet" in capsys.readouterr().out


@pytest.mark.parametrize("command", [report.main, watch.main])
def test_records_of_an_older_version_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], command: Callable[[list[str]], int]
) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0, "life": 1}\n')
    assert run_command(command, [str(folder), *(["--once"] if command is watch.main else [])]) == 2
    assert "an older version wrote them" in capsys.readouterr().err


def test_watch_shows_several_runs_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(watch.main, ["--once", str(folder), str(folder)]) == 0
    shown = capsys.readouterr().out
    assert shown.count("stopped  start 2 on 2 ranks (node)") == 2
    for part in ("6 of 10 (60.0%)", "MFU 25.0%", "waiting for data 25.0%", "1 restarts, 1 refused step"):
        assert shown.count(part) == 2, part
    for part in ("5.00 GiB tensors on a device", "1.5 trained", "step 3", "SIGTERM"):
        assert part in shown
    # Mean of the finite losses; steps 4 and 5 of the first life were undone.
    assert f"{np.mean([1.99, 1.98, 1.97, 1.95, 1.94]):.4g}" in shown


def test_watch_follows_a_growing_run(folder: Path) -> None:
    tail = RunTail(folder)
    tail.read()
    assert [line["step"] for line in tail.steps] == [1, 2, 3, 4, 5, 6]
    line = metric(7, 2, 90)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line[:30])
        file.flush()
        tail.read()
        assert tail.steps[-1]["step"] == 6
        file.write(line[30:] + "\n")
        # The run goes back to step 5 and does step 6 again.
        file.write(metric(6, 3, 99) + "\n")
    tail.read()
    assert [(line["step"], line["life"]) for line in tail.steps][-2:] == [(5, 2), (6, 3)]


def test_watch_says_that_a_running_job_is_silent(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "status.json").write_text(json.dumps({"state": "running", "step": 3}))
    run_command(watch.main, ["--once", str(folder)])
    assert "no step for" in capsys.readouterr().out
    lines = (folder / "metrics.jsonl").read_text() + metric(7, 2, time.time() - START) + "\n"
    (folder / "metrics.jsonl").write_text(lines)
    run_command(watch.main, ["--once", str(folder)])
    assert "no step for" not in capsys.readouterr().out


def test_a_torn_line_does_not_spoil_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for content, expected in ((None, "new\n"), ("old\n", "old\nnew\n"), ("old\nto", "old\nto\nnew\n")):
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content)
        with open_lines(path) as lines:
            lines.write("new\n")
        assert path.read_text() == expected


def test_sparklines_rise_with_the_values() -> None:
    assert sparkline([1, 2, 3]) == "▁▅█" or sparkline([1, 2, 3]) == "▁▄█"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁▁"
    assert sparkline([]) == ""
    curve = sparkline(list(range(1000)), 40)
    assert len(curve) == 40
    assert list(curve) == sorted(curve)


def test_ctrl_c_ends_watching_and_leaves_the_last_panel(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    readings = []

    def wait(seconds: float) -> None:
        readings.append(seconds)
        if len(readings) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("training.watch.time.sleep", wait)
    assert run_command(watch.main, [str(folder), "--every", "0.5"]) == 0
    assert readings == [0.5] * 3
    assert "6 of 10" in capsys.readouterr().out.rpartition("╭")[2]
