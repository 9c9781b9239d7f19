"""The demo's table of steps, its memory of what is done, and the checks of its summary."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from training import demo
from training.demo_steps import DemoConfig, Step, kill_step, requests
from training.demo_summary import check_resume, failed_checks, last_logged_step, read_lives
from training.shape_ruler import parse_caption


def step_writing(path: Path, text: str, name: str = "write", resumable: bool = True) -> Step:
    """A step that appends `text` to a file, so that repeated runs are seen."""
    script = f"open({str(path)!r}, 'a').write({text!r})"
    return Step(name, (sys.executable, "-c", script), (path,), threads=1, resumable=resumable)


def run_all(steps: list[Step], out: Path) -> list[bool]:
    state = demo.DemoState(out, steps)
    return [demo._run_step(step, number, len(steps), state, out) for number, step in enumerate(steps, 1)]


def test_finished_steps_are_not_repeated_and_changes_rerun_what_follows(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert all(run_all([step_writing(first, "a", "one"), step_writing(second, "b", "two")], tmp_path))
    assert all(run_all([step_writing(first, "a", "one"), step_writing(second, "b", "two")], tmp_path))
    assert (first.read_text(), second.read_text()) == ("a", "b")
    # Another command of the first step: both run again, on outputs that were removed.
    assert all(run_all([step_writing(first, "A", "one"), step_writing(second, "b", "two")], tmp_path))
    assert (first.read_text(), second.read_text()) == ("A", "b")
    # A lost output is made again.
    second.unlink()
    assert all(run_all([step_writing(first, "A", "one"), step_writing(second, "b", "two")], tmp_path))
    assert (first.read_text(), second.read_text()) == ("A", "b")


@pytest.mark.parametrize(("resumable", "expected"), [(True, "xx"), (False, "x")])
def test_a_failed_step_is_named_and_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], resumable: bool, expected: str
) -> None:
    output, flag = tmp_path / "output", tmp_path / "flag"
    script = (
        f"import os, sys; open({str(output)!r}, 'a').write('x'); sys.exit(0 if os.path.exists({str(flag)!r}) else 7)"
    )
    step = Step("breaks", (sys.executable, "-c", script), (output,), threads=1, resumable=resumable)
    assert run_all([step], tmp_path) == [False]
    message = capsys.readouterr().err
    assert "step 1, 'breaks', ended with exit code 7" in message
    assert str(tmp_path / "logs" / "01_breaks.log") in message
    flag.touch()
    assert run_all([step], tmp_path) == [True]
    assert output.read_text() == expected


def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for force in (False, True):
        with pytest.raises(UserError, match="no demo"):
            demo._open_folder(tmp_path, force)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_sizes_of_nothing_and_unknown_keys_are_refused() -> None:
    with pytest.raises(UserError, match="samples=0 must be at least 1"):
        load_config(DemoConfig, None, ["samples=0"])
    with pytest.raises(UserError, match="unknown field 'clip'; did you mean 'clips'"):
        load_config(DemoConfig, None, ["clip=3"])


def test_requests_cover_everything_with_seeds_of_their_own() -> None:
    wanted = requests(DemoConfig())
    assert len(wanted) >= 64
    assert len({request["seed"] for request in wanted}) == len(wanted)
    cells = {(*vars(parse_caption(r["prompt"])).values(), r["prompt"].isascii()) for r in wanted}
    assert len(cells) == 4 * 4 * 2
    assert all(None not in cell for cell in cells)


@pytest.mark.parametrize(("steps", "save_every"), [(500, 100), (450, 100), (6, 2), (3, 1), (40, 15)])
def test_the_kill_falls_between_two_checkpoints(steps: int, save_every: int) -> None:
    killed = kill_step(steps, save_every)
    assert killed < steps
    assert killed > save_every
    assert save_every == 1 or killed % save_every


def write_metrics(run: Path, lives: list[range], loss: dict[tuple[int, int], float]) -> None:
    lines = [
        json.dumps({"life": life, "step": step, "loss": loss.get((life, step), 1 / step), "grad_norm": 0.5})
        for life, steps in enumerate(lives, 1)
        for step in steps
    ]
    run.mkdir(exist_ok=True)
    # A killed writer leaves half a line; it is not a step.
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"life": 2, "st']))


@pytest.mark.parametrize(
    ("lives", "loss", "passed"),
    [
        ([range(1, 8), range(6, 11)], {}, True),
        ([range(1, 8), range(6, 11)], {(2, 7): 1 / 7 + 1e-12}, False),
        ([range(1, 8), range(8, 11)], {}, False),  # nothing done twice proves nothing
        ([range(1, 8), range(6, 10)], {}, False),  # the last step is missing
        ([range(1, 7), range(5, 6), range(8, 11)], {}, False),  # a gap
    ],
)
def test_resume_check(tmp_path: Path, lives: list[range], loss: dict[tuple[int, int], float], passed: bool) -> None:
    write_metrics(tmp_path / "run", lives, loss)
    assert check_resume(read_lives(tmp_path / "run"), steps=10)["passed"] is passed
    assert last_logged_step(tmp_path / "run") == lives[-1][-1]
    assert last_logged_step(tmp_path / "nothing") == 0


def test_failed_checks_are_named() -> None:
    def accuracy(share: float) -> dict[str, Any]:
        return {"trained": {part: {"accuracy": share} for part in ("colour", "direction")}}

    good = {"resume_check": {"passed": True}, "conversion_check": {"equal": True}, "accuracy": accuracy(0.9)}
    assert failed_checks(good, 0.5) == []
    bad = {"resume_check": {"passed": False}, "conversion_check": {"equal": False}, "accuracy": accuracy(0.25)}
    assert [check.split(":")[0] for check in failed_checks(bad, 0.5)] == ["resume", "conversion", "colour", "direction"]
