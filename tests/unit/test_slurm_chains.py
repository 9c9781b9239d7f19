"""Chains of jobs without a cluster: files that cannot be, who waits for whom, units, results, locks of lost tasks."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from data_prep import job_steps
from data_prep.cli import STAGES
from data_prep.stage import checked_parser
from megatron_video.errors import UserError
from slurm.chain import Chain, ChainStage, load_chain, safe_name, spread_units
from slurm.convert_chain import needed_memory_gb, needed_seconds
from slurm.data_chain import Size, step_stages
from slurm.results import Result, read_results, result_path, write_result
from slurm.sampling_stage import copy_problems
from slurm.stages_chain import _by_stage
from slurm.stale_locks import free_stale_locks
from slurm.task import last_json, last_word

NOW = datetime(2026, 11, 23, tzinfo=UTC).timestamp()
ATTEMPT = Result(unit=3, state="running", job="17", host="node2", started=NOW)


def chain_file(folder: Path, stages: list[dict[str, Any]] | str, **fields: Any) -> Path:
    path = folder / "chain.yaml"
    text = stages if isinstance(stages, str) else json.dumps({"name": "c", "run_dir": "r", "stages": stages, **fields})
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ({"name": "b", "command": "tag --in x"}, "command 'tag' is none of `megatron-video`: .*data"),
        ({"name": "b", "command": "data tag", "after": ["c"]}, "waits for 'c', which is not above it: a"),
        ({"name": "a", "command": "data tag"}, "stage a is there twice"),
        ({"name": "b", "command": "data 'tag"}, "No closing quotation"),
        ({"name": "b", "command": "data tag", "gpu": 1}, "unknown field 'stages.1.gpu'; did you mean 'gpus'"),
        ({"name": "b", "command": "data tag", "time": "soon"}, "soon"),
        ({"name": "b", "command": "data tag", "array": 0}, "array=0 must be at least 1"),
        ({"name": "b", "command": "data tag", "throttle": 2}, "throttle=2 needs array"),
        ({"name": "b", "command": "data tag", "nodes": 2}, "nodes=2 needs ranks"),
        ({"name": "b", "command": "pretrain", "kind": "pretrain"}, "a training needs run_dir"),
        ({"name": "b/c", "command": "data tag"}, "as it becomes a folder"),
    ],
)
def test_a_chain_that_cannot_be_is_refused_by_name(stage: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_chain(chain_file(tmp_path, [{"name": "a", "command": "data tag"}, stage]))


def test_no_file_and_no_yaml_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_chain(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not readable as YAML"):
        load_chain(chain_file(tmp_path, "name: [1"))


def test_times_are_slurms_and_not_yamls(tmp_path: Path) -> None:
    text = "name: c\nrun_dir: r\nstages:\n" + "".join(
        f"  - {{name: s{number}, command: data tag, time: {time}}}\n"
        for number, time in enumerate(["2:00:00", "1:30", "90", "1-00:00:00", "null"])
    )
    seconds = [stage.seconds for stage in load_chain(chain_file(tmp_path, text)).stages[:4]]
    assert seconds == [7200, 90, 5400, 86400]


def test_a_stage_waits_for_the_one_above_unless_it_says_otherwise(tmp_path: Path) -> None:
    stages = [{"name": name, "command": "data tag"} for name in "abcd"]
    stages[2]["after"], stages[3] = [], stages[3] | {"after": ["a"], "after_any": ["c"]}  # type: ignore[assignment]
    chain = load_chain(chain_file(tmp_path, stages))
    assert [chain.awaited(stage) for stage in chain.stages] == [[], ["a"], [], ["a"]]


def test_commands_under_a_launcher_are_modules() -> None:
    plain = ChainStage(name="a", command=["sample", "--out", "x"])
    assert plain.job_command == ["sample", "--out", "x"]
    assert replace(plain, ranks=2).job_command == ["-m", "training.sample", "--out", "x"]


@pytest.mark.parametrize(
    ("command", "nodes", "ranks", "problem"),
    [
        ("dpo generate --tensor-parallel-size 8", 16, 8, None),
        ("dpo generate --tensor-parallel-size=2 --context-parallel-size 8", 2, 8, None),
        ("dpo generate --tensor-parallel-size=2 --context-parallel-size 8", 1, 8, "takes 16 ranks, .* divide 8"),
        ("sample --pipeline-parallel-size 3", 2, 4, r"3 ranks, which do not divide 8 \(nodes=2 x ranks=4\)"),
        ("sample --context-parallel-size 2", 1, None, r"do not divide 1 \(no ranks, so one process\)"),
        ("sample --tensor-parallel-size two", 1, 2, "--tensor-parallel-size two: not a number"),
        ("sample --tensor-parallel-size 0", 1, 2, "takes 0 ranks"),
        ("dpo score --tensor-parallel-size 3", 1, 2, None),
    ],
)
def test_a_stage_that_samples_needs_ranks_for_whole_copies(
    command: str, nodes: int, ranks: int | None, problem: str | None
) -> None:
    found = copy_problems(ChainStage(name="a", command=command.split(), nodes=nodes, ranks=ranks))
    assert bool(found) == (problem is not None)
    assert problem is None or re.search(problem, found[0])


def test_units_are_spread_over_the_tasks_that_the_cluster_allows() -> None:
    assert spread_units([0, 1, 2], most=1001) == [[0], [1], [2]]
    assert spread_units(list(range(7)), most=3) == [[0, 3, 6], [1, 4], [2, 5]]
    assert spread_units([4], most=3) == [[4]]


def options(**values: Any) -> argparse.Namespace:
    standard = {
        "shards": 4,
        "throttle": 2,
        "cpus": None,
        "memory_gb": None,
        "time": None,
        "verify": False,
        "name": None,
    }
    return argparse.Namespace(**(standard | values))


def spread_stages() -> dict[str, bool]:
    """Which stages take --shard, as their own parsers say."""
    import importlib

    found = {}
    for stage in (name for name in STAGES if name not in job_steps._NO_JOBS):
        parser = checked_parser(importlib.import_module(STAGES[stage][0]).main, None)
        found[stage] = any("--shard" in action.option_strings for action in parser._actions)
    return found


def test_what_takes_shards_becomes_an_array_and_what_does_not_one_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("slurm.data_chain.size_of", lambda *_: Size(gpus=0, cpus=2, memory_gb=1.0))
    words = {
        "filter": [],
        "encode": ["--vae=v", "--text=t", "--buckets=1x48x48"],
        "balance": ["--embeddings=e.npy"],
        "split": ["--parts=a=1,b=1"],
    }
    kinds = spread_stages()
    assert sum(kinds.values()) >= 5
    for stage, spread in kinds.items():
        out = [] if stage == "verify" else [f"--out={tmp_path / stage}"]
        step = job_steps.stage_step(stage, [*_source(stage), *out, *words.get(stage, [])])
        assert step.spread == spread, stage
        chain = step_stages(vars(step), stage, options(), None)  # type: ignore[arg-type]
        assert [one.array for one in chain] == ([4, None] if spread else [None]), stage
        assert ("--shard={task}/{tasks}" in chain[0].command) == spread
        assert (chain[0].throttle == 2) == spread


def _source(stage: str) -> list[str]:
    return ["--in", "a", "b"] if stage == "merge" else ["--in=a"]


def test_a_gpu_is_asked_for_where_the_stage_says_that_it_is_worth_one() -> None:
    encode = ["--in=a", "--out=b", "--vae=v", "--text=t", "--buckets=1x48x48"]
    assert job_steps.stage_step("encode", encode).gpu
    assert not job_steps.stage_step("encode", [*encode, "--device", "cpu"]).gpu
    assert job_steps.stage_step("caption", ["--in=a", "--out=b", "--vlm=m"]).gpu
    assert not job_steps.stage_step("caption", ["--in=a", "--out=b", "--captions=c.jsonl"]).gpu
    assert not job_steps.stage_step("tag", ["--in=a", "--out=b"]).gpu
    # Encode's own --workers are its GPUs.
    assert job_steps.stage_step("encode", encode).cpu_option == "--decode-threads"
    assert job_steps.stage_step("tag", ["--in=a", "--out=b"]).cpu_option == "--workers"
    assert job_steps.stage_step("tag", ["--in=a", "--out=b", "--workers", "3"]).cpu_option is None


def test_what_a_stage_refuses_is_refused_before_submission() -> None:
    with pytest.raises(UserError, match="how many with --shards"):
        job_steps.stage_step("tag", ["--in=a", "--out=b", "--shard=0/2"])
    with pytest.raises(UserError, match="unknown stage 'tags'"):
        job_steps.stage_step("tags", [])
    with pytest.raises(UserError, match="1x48"):
        job_steps.stage_step("encode", ["--in=a", "--out=b", "--vae=v", "--text=t", "--buckets=1x48"])


def test_results_survive_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    write_result(tmp_path, ATTEMPT)
    write_result(tmp_path, replace(ATTEMPT, state="done", seconds=2.0, report={"kept": 3}))
    write_result(tmp_path, replace(ATTEMPT, unit=4))
    result_path(tmp_path, 4).write_text("{")
    assert read_results(tmp_path, 6) == {3: replace(ATTEMPT, state="done", seconds=2.0, report={"kept": 3})}


def lock(folder: Path, host: str, since: float) -> Path:
    path = folder / ".out.parquet.lock.3-of-8"
    path.write_text(json.dumps({"pid": 5, "host": host, "since": datetime.fromtimestamp(since, UTC).isoformat()}))
    return path


@pytest.mark.parametrize(
    ("attempts", "host", "since", "over", "removed"),
    [
        ([ATTEMPT], "node2", NOW + 5, True, True),
        # Its job still runs.
        ([ATTEMPT], "node2", NOW + 5, False, False),
        # Another run of the user's, on another node or at another time.
        ([ATTEMPT], "node1", NOW + 5, True, False),
        ([ATTEMPT], "node2", NOW - 7200, True, False),
        ([replace(ATTEMPT, state="failed", seconds=10.0)], "node2", NOW + 5, False, True),
        ([replace(ATTEMPT, state="failed", seconds=10.0)], "node2", NOW + 7200, False, False),
        # Another task of the chain is at work there, and it may be its own.
        ([replace(ATTEMPT, state="failed"), replace(ATTEMPT, unit=4)], "node2", NOW + 5, False, False),
    ],
)
def test_only_locks_of_lost_tasks_are_removed(
    tmp_path: Path, attempts: list[Result], host: str, since: float, over: bool, removed: bool
) -> None:
    path = lock(tmp_path, host, since)
    lines = free_stale_locks([path, tmp_path / "none"], attempts, lambda _: over)
    assert (len(lines), path.exists()) == (int(removed), not removed)


def test_the_last_word_of_a_command_is_its_error() -> None:
    text = "start\nerror: --in x: not there\nsrun: error: node1: task 0: Exited with exit code 2\n"
    assert last_word(text) == "error: --in x: not there"
    assert last_word("a\n\nb\n") == "b"
    assert last_json('noise\n{"kept": 2}\nmore\n') == {"kept": 2}
    assert last_json("[1]\n{broken\n") == {}


def test_nodes_of_stages() -> None:
    stages = ["a", "b"]
    assert _by_stage("--nodes", "4", stages) == {"a": "4", "b": "4"}
    assert _by_stage("--nodes", "4,b=16", stages) == {"a": "4", "b": "16"}
    for text, message in (("b=2", "no number for a"), ("0", "must be at least 1"), ("1,c=2", "no such stage ahead")):
        with pytest.raises(UserError, match=message):
            _by_stage("--nodes", text, stages)


def test_what_a_conversion_asks_for() -> None:
    # The 30B: measured 3 to 3.5 minutes, 1.35 GB.
    assert (needed_seconds(58_700_000_000), needed_memory_gb(58_700_000_000)) == (600, 2.7)
    assert needed_seconds(600_000_000_000) == 6000
    assert needed_memory_gb(1_000_000) < 1.1


def test_names_of_jobs() -> None:
    assert safe_name("my shards (2)") == "my-shards-2"
    assert Chain(name=safe_name("视频"), run_dir="r", stages=[ChainStage(name="a", command=["data"])]).name == "chain"
