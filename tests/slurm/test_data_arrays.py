"""Data stages as arrays on a real cluster: what fails costs nobody else, and is done again alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Cluster
from data_runs import SmallData, contents, make_small_data

from data_prep import encode
from data_prep.encode import EncodeSettings
from data_prep.recipe import Run, run_recipe
from megatron_video.buckets import parse_buckets
from megatron_video.cli import run_command
from slurm.chain_record import ChainRecord, find_chain
from slurm.chain_status import StageState, chain_states
from slurm.command import main as slurm_command
from slurm.data_chain import main as submit_data

SHARDS = 3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    return make_small_data(tmp_path_factory.mktemp("data"), clips=2 * SHARDS)


def profile(folder: Path, *setup: str) -> str:
    """A profile of the test's cluster whose tasks run some lines of shell first."""
    path = folder / "profile.yaml"
    slurm = {"partition": "gpu", "gpus_per_node": 0, "cpus_per_node": 2, "memory_per_node": "2G"}
    values = {"slurm": slurm, "software": {"setup": list(setup)}, "environment": {"OMP_NUM_THREADS": "1"}}
    path.write_text(json.dumps(values | {"shared_folders": ["/tmp"]}))
    return f"--profile={path}"


def chain_at(output: Path) -> ChainRecord:
    record = find_chain(str(output))
    assert record is not None
    return record


def resume(output: Path) -> int:
    return run_command(slurm_command, ["resume", str(output)])


def states_after(cluster: Cluster, output: Path, seconds: float = 300) -> dict[str, StageState]:
    """States of the stages when no job of the chain is left in the queue."""
    for number in chain_at(output).numbers():
        cluster.wait(number, seconds)
    return {state.name: state for state in chain_states(chain_at(output))}


def test_a_failing_shard_is_done_again_alone_to_the_bytes_of_one_process(
    cluster: Cluster, data: SmallData, tmp_path: Path
) -> None:
    out, mended = tmp_path / "shards", tmp_path / "mended"
    # The second task's disk is too small for a shard, as long as nobody has mended it.
    limit = f'if [ "${{SLURM_ARRAY_TASK_ID:-}}" = 1 ] && [ ! -e {mended} ]; then ulimit -f 8; fi'
    words = [profile(tmp_path, limit), f"--shards={SHARDS}", "--cpus=2", "--verify", "encode", *data.encode_words(out)]
    assert run_command(submit_data, words) == 0
    states = states_after(cluster, out)
    shards = states["shards"]
    assert (shards.state, shards.done, shards.failed) == ("failed", SHARDS - 1, [1])
    assert "the limit on the size of a file is reached" in shards.messages[1]
    assert (states["join"].state, states["verify"].state) == ("cancelled", "cancelled")
    assert not (out / "dataset_info.json").exists()
    finished = {path.name: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    assert len(finished) == SHARDS - 1

    mended.touch()
    assert resume(out) == 0
    (again,) = chain_at(out).jobs["shards"][1:]
    assert again.units == [1]
    states = states_after(cluster, out)
    assert [state.state for state in states.values()] == ["done", "done", "done"]
    assert {name: (out / name).stat().st_mtime_ns for name in finished} == finished
    settings = EncodeSettings(parse_buckets("17x32x32"), samples_per_shard=2, batch_size=2)
    alone = tmp_path / "alone"
    encode.run(data.manifest, alone, data.folder / "vae", data.folder / "text", settings, torch_threads=1)
    assert contents(out) == contents(alone)
    # Nothing is left, so nothing is submitted.
    assert resume(out) == 0
    assert len(chain_at(out).jobs["shards"]) == 2


def test_a_recipe_as_a_chain_of_arrays_makes_the_bytes_of_one_process(
    cluster: Cluster, data: SmallData, tmp_path: Path
) -> None:
    recipe, work, alone = tmp_path / "recipe.yaml", tmp_path / "work", tmp_path / "alone"
    recipe.write_text("stages: [ingest, {segment: {min_frames: 2}}]")
    words = [profile(tmp_path), "--shards=2", "--throttle=1", "--cpus=1", "run"]
    assert run_command(submit_data, [*words, f"--recipe={recipe}", f"--in={data.raw}", f"--work={work}"]) == 0
    states = states_after(cluster, work)
    units = {name: (state.state, state.done) for name, state in states.items()}
    assert units == {
        "1-ingest": ("done", 2),
        "1-ingest-join": ("done", 1),
        "2-segment": ("done", 2),
        "2-segment-join": ("done", 1),
        "report": ("done", 1),
    }
    run_recipe(recipe, Run(data.raw, alone))
    for name in ("1-ingest.parquet", "2-segment.parquet"):
        assert (work / name).read_bytes() == (alone / name).read_bytes()
    assert "2-segment" in (work / "report.md").read_text()
