"""Which log is shown, and which error comes first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_video.errors import UserError
from slurm.logs import Log, find_attempt, first_error


def attempt_of(folder: Path, name: str, logs: dict[str, str], failures: dict[str, float] | None = None) -> Path:
    attempt = folder / "attempts" / name
    (attempt / "nodes").mkdir(parents=True)
    (attempt / "attempt.json").write_text(json.dumps({"nodes": list(logs)}))
    for node, text in logs.items():
        (attempt / "nodes" / f"{node}.log").write_text(text)
    for rank, (node, when) in enumerate((failures or {}).items()):
        (attempt / "failures").mkdir(exist_ok=True)
        record = {"rank": rank, "node": node, "code": 1, "error": "", "time": when}
        (attempt / "failures" / f"rank_{rank:05d}.json").write_text(json.dumps(record))
    return attempt


def traceback(mark: str, error: str) -> str:
    lines = ["Traceback (most recent call last):", '  File "x.py", line 1, in <module>', "    work()", error]
    return "".join(f"{mark}{line}\n" for line in lines)


def test_first_traceback_is_of_the_rank_that_failed_first(tmp_path: Path) -> None:
    logs = {
        "node1": "fine\n" + traceback("[default0]:", "RuntimeError: connection closed by peer"),
        "node2": traceback("[default1]:", "ValueError: the cause"),
    }
    attempt = attempt_of(tmp_path, "7.0.1", logs, failures={"node1": 20.0, "node2": 10.0})
    found = first_error(attempt)
    assert found is not None
    log, lines = found
    assert (log.stem, lines[-1]) == ("node2", "[default1]:ValueError: the cause")


def test_traceback_of_one_rank_between_the_lines_of_another(tmp_path: Path) -> None:
    pairs = zip(traceback("[default0]:", "KeyError: 'a'").splitlines(), ["[default1]:step 1"] * 4, strict=True)
    text = "\n".join(line for pair in pairs for line in pair)
    found = first_error(attempt_of(tmp_path, "7.0.1", {"node1": text}))
    assert found is not None
    assert found[1] == traceback("[default0]:", "KeyError: 'a'").splitlines()


def test_without_a_traceback_the_error_lines(tmp_path: Path) -> None:
    attempt = attempt_of(tmp_path, "7.0.1", {"node1": "step 1\n[default0]:error: data.shards=[x]: no such folder\n"})
    found = first_error(attempt)
    assert found is not None
    assert found[1] == ["[default0]:error: data.shards=[x]: no such folder"]
    assert first_error(attempt_of(tmp_path, "7.0.2", {"node1": "step 1\n"})) is None


def test_starts_are_counted_over_all_jobs_of_the_run(tmp_path: Path) -> None:
    for job, names in (("0001-a", ["7.0.1", "7.0.2", "7.1.1"]), ("0002-a", ["12.0.1"])):
        folder = tmp_path / "slurm" / job
        folder.mkdir(parents=True)
        (folder / "submitted.json").write_text("{}")
        for name in names:
            attempt_of(folder, name, {"node1": ""})
    second = tmp_path / "slurm" / "0002-a"
    names = [find_attempt(second, number) for number in (1, 2, 3, 4, None)]
    assert [path.name for path in names if path] == ["7.0.1", "7.0.2", "7.1.1", "12.0.1", "12.0.1"]
    with pytest.raises(UserError, match="--attempt 5: the run has had 4 starts"):
        find_attempt(second, 5)


def test_lines_of_one_rank() -> None:
    log = Log(Path("x"), ("[default1]:", "9: "))
    assert [log.has(line) for line in ("[default1]:a", "[default10]:a", "9: a", "19: a", "a")] == [
        True,
        False,
        True,
        False,
        False,
    ]
