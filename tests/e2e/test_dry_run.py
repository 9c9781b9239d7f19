"""Dry runs of pretraining and of a curriculum: what is refused and why, and that what is accepted starts."""

from __future__ import annotations

import csv
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards

from megatron_video.cli import run_command
from training import curriculum, pretrain
from training.checkpoint import newest_checkpoint
from training.checkpoint_files import read_state_values, stored_file, write_state
from training.dry_run import check_disk

STEPS = 2
SETTINGS = [
    *MODEL_OVERRIDES,
    "data.micro_batch_size=4",
    "data.global_batch_size=8",
    "optimizer.warmup_steps=0",
    "training.precision=fp32",
    f"training.steps={STEPS}",
    "training.save_every=1",
    "ema.decay=0.9",
]
GPU = {"gpus": 2, "peak_tflops": {"bf16": 900, "fp32": 60}, "hbm_gbps": 3000}
LINKS = {"nvlink_gbps": 400, "nic_gbps": 50}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a cluster, and a finished run."""
    root = tmp_path_factory.mktemp("dry_run")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").write_text("")
    for name, memory, gpu in (("large", 80, "H100"), ("small", 1e-4, "H100"), ("old", 80, "V100")):
        values = {**GPU, **LINKS, "gpu": gpu, "memory_gib": memory, "reserved_gib": 0.0}
        (root / f"{name}.yaml").write_text(yaml.safe_dump(values))
    assert run_command(pretrain.main, ["--config", str(root / "empty.yaml"), *overrides(root, "finished")]) == 0
    return root


def overrides(folder: Path, name: str) -> list[str]:
    return [*SETTINGS, f"run.output_dir={folder / name}", f"data.shards=[{folder / 'shards'}]"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dry run hides the GPUs from its process, which here is that of all tests."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def dry_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """(exit code, JSON) of a dry run with further settings and options."""

    def call(*further: str, name: str = "new") -> tuple[int, dict[str, Any]]:
        settings = [word for word in further if not word.startswith("--")]
        options = [part for word in further if word.startswith("--") for part in word.split(" ")]
        argv = ["--config", str(folder / "empty.yaml"), *overrides(folder, name), *settings, "--dry-run", "--json"]
        capsys.readouterr()
        code = run_command(pretrain.main, [*argv, *options])
        return code, json.loads(capsys.readouterr().out)

    return call


DryRun = Callable[..., tuple[int, dict[str, Any]]]


def test_accepted_run_starts(folder: Path, dry_run: DryRun) -> None:
    code, found = dry_run(name="started")
    assert (code, found["ok"], found["problems"]) == (0, True, [])
    assert found["stages"][0]["start"] == "random weights"
    # Nothing of it is there yet.
    assert not (folder / "started").exists()
    argv = ["--config", str(folder / "empty.yaml"), *overrides(folder, "started")]
    assert run_command(pretrain.main, argv) == 0
    written = newest_checkpoint(folder / "started" / "checkpoints")
    assert written is not None
    _, files = read_state_values(written)
    # Tensors, and what says which they are.
    predicted = found["stages"][0]["views"]["checkpoint_bytes"]
    assert predicted < sum(file.size for file in files.values()) < 1.5 * predicted


def test_memory_and_time_of_a_cluster(folder: Path, dry_run: DryRun, tmp_path: Path) -> None:
    code, found = dry_run(f"--cluster {folder / 'large.yaml'}", f"--ranks {tmp_path / 'ranks.csv'}")
    assert code == 0
    stage = found["stages"][0]
    # As many GPUs as the cluster has.
    assert (found["gpus"], stage["views"]["ranks"], stage["views"]["built"]) == (2, 2, 2)
    assert stage["plan"]["seconds_per_step"] > 0
    assert found["not_checked"] == []
    # Two micro-batches of four samples for two replicas.
    assert stage["ranks_by_stage"][0]["micro_batches"] == [1, 1]
    rows = list(csv.DictReader((tmp_path / "ranks.csv").open()))
    assert [(row["rank"], row["dp"], row["dp_group"], row["micro_batches"]) for row in rows] == [
        ("0", "0", "0-1", "1"),
        ("1", "1", "0-1", "1"),
    ]


def test_continued_run(folder: Path, dry_run: DryRun) -> None:
    code, found = dry_run("training.steps=5", name="finished")
    assert code == 0
    assert f"step {STEPS}" in found["stages"][0]["start"]
    # The same checkpoint under another layout.
    tp = ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    assert dry_run("training.steps=5", *tp, "--gpus 4", name="finished")[0] == 0


REFUSED = {
    "unknown field": (["model.layers=3"], "config: ", "unknown field 'model.layers'"),
    "layout": (["parallel.tensor_model_parallel_size=2"], "layout: ", "every replica of the model takes"),
    "replicas": (["--gpus 3"], "layout: ", "each of 3 replicas needs a micro-batch"),
    "no shards": (["data.shards=[nowhere]"], "data: ", "nowhere"),
    "empty shards": (["data.shards=[]"], "data: ", "data.shards is empty"),
    "other latents": (["model.in_channels=6"], "data: ", "model.in_channels=6, the shards hold 4"),
    "initial weights": (["run.initial_weights=nowhere"], "checkpoint: ", "nowhere is not a folder"),
    "held-out": (["validation.every=1", "validation.shards=[{shards}]"], "validation: ", "are in data.shards too"),
    "prompts": (
        ["samples.every=1", "samples.prompts=no.txt", "samples.text=nothing", "samples.vae=nothing"],
        "samples: ",
        "no.txt is not readable",
    ),
    "output is a file": (["run.output_dir={shards}/index.parquet/run"], "disk: ", "is a file"),
    "memory": (["--cluster {small}"], "memory: ", "GiB are usable"),
    "the cluster's GPUs": (
        ["parallel.transformer_impl=transformer_engine", "--cluster {old}"],
        "layout: ",
        "needs compute capability 8.0",
    ),
    "option": (["--skip everything"], "options: ", "--skip everything"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_its_reason(folder: Path, dry_run: DryRun, name: str) -> None:
    settings, check, reason = REFUSED[name]
    places = {"shards": folder / "shards", **{name: folder / f"{name}.yaml" for name in ("small", "old")}}
    code, found = dry_run(*(setting.format(**places) for setting in settings))
    assert (code, found["ok"]) == (2, False)
    assert any(problem.startswith(check) and reason in problem for problem in found["problems"]), found["problems"]
    assert not (folder / "new").exists()


def test_all_problems_at_once(folder: Path, dry_run: DryRun) -> None:
    settings = ["data.shards=[a,b]", "parallel.tensor_model_parallel_size=2", "run.initial_weights=nowhere"]
    _, found = dry_run(*settings)
    kinds = [problem.partition(":")[0] for problem in found["problems"]]
    assert kinds == ["data", "data", "layout", "checkpoint"]


def test_skipped_checks_are_named(dry_run: DryRun) -> None:
    settings = ["data.shards=[]", "run.initial_weights=nowhere", "run.output_dir=/dev/null/run"]
    code, found = dry_run(*settings, "--skip data,checkpoint,disk")
    assert code == 0
    assert {text.partition(":")[0] for text in found["not_checked"]} >= {"data", "checkpoint", "disk"}


def test_damaged_shards(folder: Path, dry_run: DryRun, tmp_path: Path) -> None:
    shards = shutil.copytree(folder / "shards", tmp_path / "shards")
    tars = sorted(shards.glob("*.tar"))
    tars[0].unlink()
    tars[1].write_bytes(tars[1].read_bytes()[:-512])
    code, found = dry_run(f"data.shards=[{shards}]")
    assert code == 2
    assert "2 of 3 shards are not as they were written" in found["problems"][0]
    assert f"{tars[0].name} is missing" in found["problems"][0]


def test_full_disk(dry_run: DryRun, monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = dry_run()
    need = found["stages"][0]["disk"]["needed_bytes"]
    usage = shutil.disk_usage("/")
    for free, wanted in ((need, 0), (need - 1, 2)):
        monkeypatch.setattr(check_disk.shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        code, found = dry_run()
        assert code == wanted
    assert "disk: " in found["problems"][0]
    assert "2 checkpoints" in found["problems"][0]


def change_metadata(checkpoint: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Edit a checkpoint's list of tensors, and make it look whole again."""
    path = checkpoint / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))
    values, files = read_state_values(checkpoint)
    write_state(checkpoint, values, files | {path.name: stored_file(path)})


def drop(stored: dict[str, Any]) -> None:
    del stored["optimizer.state.exp_avg.head.projection.weight"]


def reshape(stored: dict[str, Any]) -> None:
    stored["head.projection.weight"].size = (5, 7)


def cut(stored: dict[str, Any]) -> None:
    del stored["head.projection.weight"].chunks[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drop, "optimizer.state.exp_avg.head.projection.weight is missing"),
        (reshape, "head.projection.weight is (5, 7) there, (4, 32) here"),
        (cut, "head.projection.weight has 0 of its 128 elements"),
    ],
)
def test_checkpoint_without_what_ranks_ask_for(
    folder: Path, dry_run: DryRun, change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    name = f"broken_{change.__name__}"
    shutil.copytree(folder / "finished", folder / name)
    newest = newest_checkpoint(folder / name / "checkpoints")
    assert newest is not None
    change_metadata(newest, change)
    code, found = dry_run(name=name)
    assert code == 2
    assert any(reason in problem for problem in found["problems"]), found["problems"]


def test_weights_of_another_run(folder: Path, dry_run: DryRun) -> None:
    taken = f"run.initial_weights={folder / 'finished'}"
    for further in ([], ["run.initial_from_ema=true"], ["run.initial_optimizer=true"]):
        assert dry_run(taken, *further)[0] == 0
    code, found = dry_run(taken, "model.num_layers=3")
    assert code == 2
    assert "num_layers: 2 there, 3 here" in found["problems"][0]


def test_curriculum(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stage = {"settings": {"training": {"steps": 2}}}
    common = {"model": {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4}}
    common["model"] |= {"out_channels": 4, "caption_channels": [16, 8]}
    common |= {"data": {"shards": [str(folder / "shards")]}, "optimizer": {"warmup_steps": 0}}
    path = folder / "stages.yaml"
    second = {"settings": {"training": {"steps": 3}, "data": {"buckets": ["9x9x9"]}}}
    path.write_text(
        yaml.safe_dump(
            {"output_dir": str(folder / "stages"), "stages": {"one": stage, "two": second}, "common": common}
        )
    )
    code = run_command(curriculum.main, ["--config", str(path), "--dry-run", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert code == 2
    # The second stage's weights come from the first, which is not there yet.
    assert [problem for problem in found["problems"] if "checkpoint" in problem] == []
    assert all(problem.startswith("stage 'two': ") for problem in found["problems"]), found["problems"]
    code = run_command(curriculum.main, ["--config", str(path), "--through", "one", "--dry-run", "--json"])
    assert code == 0


@pytest.mark.heavy
def test_30b_on_3000_gpus_takes_less_than_a_minute() -> None:
    command = ["pretrain", "--config", "step_video_30b_t2vi_540_s1", "--dry-run", "--cluster", "h800_step_video"]
    skipped = ["--skip", "data,checkpoint,disk", "--json"]
    result = subprocess.run(
        [sys.executable, "-m", "megatron_video", *command, *skipped], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(result.stdout)
    assert found["ok"]
    assert sum(row["ranks"] for row in found["stages"][0]["ranks_by_stage"]) == 3000
    # Of one core, imports included: how long it takes by the clock depends on what else runs.
    assert found["cpu_seconds"] < 60
    # The model of a rank alone would take 7 GiB.
    assert found["peak_rss_mib"] < 2048
