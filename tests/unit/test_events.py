"""events.jsonl: one schema, lines of several writers, a life that died while writing."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest

from training.events import EVENTS_FILE, EventLog, read_events
from training.telemetry import record_life


def test_an_event_has_what_every_line_has_and_its_own_fields(tmp_path: Path) -> None:
    record_life(tmp_path, 0)
    record_life(tmp_path, 5)
    EventLog(tmp_path, rank=1, world_size=2).record("start", 5, world_size=2, note=float("nan"))
    (line,) = [json.loads(text) for text in (tmp_path / EVENTS_FILE).read_text().splitlines()]
    assert line.pop("time").endswith("+00:00")
    assert line == {"life": 2, "rank": 1, "event": "start", "step": 5, "world_size": 2, "note": "nan"}


@pytest.mark.parametrize(("kind", "details"), [("starting", {}), ("resume", {"checkpoint": "x"})])
def test_what_the_table_does_not_know_is_refused(tmp_path: Path, kind: str, details: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="EVENTS" if kind == "starting" else "world_size"):
        EventLog(tmp_path, rank=0, world_size=1).record(kind, 0, **details)
    assert read_events(tmp_path) == []


def write_many(folder: Path, rank: int) -> None:
    log = EventLog(folder, rank, 4)
    for step in range(50):
        log.record("start", step, world_size=4, padding="x" * 500)


def test_several_ranks_add_whole_lines(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=write_many, args=(tmp_path, rank)) for rank in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert sorted((event["rank"], event["step"]) for event in read_events(tmp_path)) == [
        (rank, step) for rank in range(4) for step in range(50)
    ]


def test_a_torn_line_costs_itself_alone(tmp_path: Path) -> None:
    log = EventLog(tmp_path, rank=0, world_size=1)
    log.record("start", 0, world_size=1)
    with (tmp_path / EVENTS_FILE).open("a") as stream:
        stream.write('{"event": "sa\n')
    log.record("stop", 3, state="stopped", reason="signal")
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "stop"]
    assert [event["step"] for event in read_events(tmp_path, "stop")] == [3]
