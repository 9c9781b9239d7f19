"""The tasks of an array together make the bytes of the plain run, whoever is last; so does Ray."""

from __future__ import annotations

import json
import operator
import os
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from tiny_pipeline import Pipeline, data, make_pipeline

from data_prep.parts import Parts, Selection, TableRows
from data_prep.workers import Execution, Shard, parallel_map
from megatron_video.errors import UserError
from megatron_video.manifest import table_from_rows

ROW_STAGES = ("ingest", "segment", "tag")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    return make_pipeline(tmp_path_factory.mktemp("pipeline"), ROW_STAGES)


@pytest.mark.parametrize("stage", ROW_STAGES)
def test_shards_in_any_order_make_the_same_bytes(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str
) -> None:
    out = tmp_path / "out.parquet"
    rows_done = []
    for index in (2, 0, 1):
        assert not out.exists()
        assert data(*pipeline.arguments(stage, out), "--shard", f"{index}/3", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        rows_done.append(report["kept"] + report["dropped_here"] + report["dropped_before"])
        assert report["details"]["joined"] == (index == 1)
    assert out.read_bytes() == pipeline.manifest(stage).read_bytes()
    assert all(rows_done)
    assert not list(tmp_path.glob(".*"))


def test_a_plain_run_does_what_lost_tasks_left(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.parquet"
    arguments = pipeline.arguments("tag", out)
    assert data(*arguments, "--shard", "1/3", "--json") == 0
    done = json.loads(capsys.readouterr().out)
    assert data(*arguments) == 0
    # Only what was left: 7 rows, less those of the task that came to its end.
    rows = done["kept"] + done["dropped_here"] + done["dropped_before"]
    assert f"tag: {7 - rows}/{7 - rows} clips" in capsys.readouterr().err
    assert out.read_bytes() == pipeline.manifest("tag").read_bytes()
    assert data(*arguments, "--shard", "0/3", "--json") == 0
    assert json.loads(capsys.readouterr().out)["up_to_date"]


def test_parts_of_other_settings_are_not_mixed_in(pipeline: Pipeline, tmp_path: Path) -> None:
    out = tmp_path / "out.parquet"
    arguments = pipeline.arguments("segment", out)
    assert data(*arguments[:-1], "10", "--shard", "0/2") == 0
    assert data(*arguments) == 0
    assert out.read_bytes() == pipeline.manifest("segment").read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("shard", ["3/3", "-1/3", "1", "1/0", "a/b", "0/2/3"])
def test_a_wrong_shard_is_refused(
    pipeline: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str], shard: str
) -> None:
    assert data(*pipeline.arguments("tag", tmp_path / "out.parquet"), f"--shard={shard}") == 2
    assert "--shard" in capsys.readouterr().err


@pytest.mark.parametrize(("total", "shards", "part_rows"), [(0, 3, 256), (1, 3, 256), (100, 7, 256), (1000, 2, 10)])
def test_shards_share_out_all_parts_evenly(tmp_path: Path, total: int, shards: int, part_rows: int) -> None:
    parts = [Parts(tmp_path / "m.parquet", "f" * 32, total, part_rows, Shard(n, shards)) for n in range(shards)]
    counts = [
        sum(len(part.items_of(number)) for number in part.missing(Shard(n, shards))) for n, part in enumerate(parts)
    ]
    assert sum(counts) == total
    assert max(counts) - min(counts) <= parts[0].size
    covered = [item for number in range(len(parts[0])) for item in parts[0].items_of(number)]
    assert covered == list(range(total))


def test_lazy_sequences_are_those_of_lists() -> None:
    table = table_from_rows({"clip_id": str(number)} for number in range(20))
    chosen = Selection(TableRows(table), [range(2, 5), range(9, 9), range(15, 20)])
    expected = [table.to_pylist()[number] for number in (2, 3, 4, 15, 16, 17, 18, 19)]
    assert list(chosen) == expected == chosen[:] == [chosen[number] for number in range(len(chosen))]
    with pytest.raises(IndexError):
        chosen[8]


def double(number: int) -> int:
    if number == 33:
        raise UserError("33 is refused")
    return 2 * number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers: int) -> None:
    assert list(parallel_map(double, range(34, 90), workers)) == list(range(68, 180, 2))
    with pytest.raises(UserError, match="33 is refused"):
        list(parallel_map(double, range(90), workers))


def test_ray_that_is_missing_is_a_clear_error(
    pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # None in sys.modules makes the import fail, as without the extra.
    monkeypatch.setitem(sys.modules, "ray", None)
    assert data(*pipeline.arguments("tag", tmp_path / "out.parquet"), "--engine", "ray") == 2
    assert 'pip install "megatron-video[data]"' in capsys.readouterr().err


def kill_at(numbers: list[int], number: int) -> int:
    if number in numbers:
        signal.raise_signal(signal.SIGKILL)
    return number


@pytest.mark.heavy
def test_ray_makes_the_same_bytes(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is in the extra `data`")
    # A Ray of this test's own, whose workers find this module.
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    try:
        for stage in ROW_STAGES:
            out = tmp_path / f"{stage}.parquet"
            assert data(*pipeline.arguments(stage, out), "--engine", "ray") == 0
            assert out.read_bytes() == pipeline.manifest(stage).read_bytes()
        # Order over many blocks, and the error of one item: the local engine's own.
        execution = Execution(2, engine="ray")
        numbers = range(1, 400)
        assert list(parallel_map(partial(operator.floordiv, 5040), numbers, execution)) == [5040 // n for n in numbers]
        with pytest.raises(ZeroDivisionError):
            list(parallel_map(partial(operator.floordiv, 5040), range(-2, 2), execution))
        # An item that kills its process every time must not be tried for ever.
        with pytest.raises(UserError, match=r"--engine ray: .*died"):
            list(parallel_map(signal.raise_signal, [signal.SIGKILL], execution))
        # Where the stage can do without it, it is lost alone: neither its block nor the items behind it are.
        found = parallel_map(partial(kill_at, [5, 70]), range(90), execution, lost=lambda number: -number)
        assert list(found) == [-number if number in (5, 70) else number for number in range(90)]
    finally:
        ray.shutdown()
