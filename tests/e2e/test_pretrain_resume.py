"""A pretraining run on two ranks (TP 2 + SP) that is killed, stopped, damaged and continued."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint
from tiny_shards import MODEL_OVERRIDES, write_tiny_shards
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_video.cli import run_command
from training.checkpoint import step_folder
from training.pretrain import main
from training.trained_encoders import trained_encoders

pytestmark = pytest.mark.distributed

STEPS, SAVE_EVERY = 40, 7
SETTINGS = [
    *MODEL_OVERRIDES,
    "run.seed=3",
    "data.micro_batch_size=4",
    "data.global_batch_size=8",
    "optimizer.learning_rate=1e-3",
    "optimizer.warmup_steps=5",
    "training.precision=fp32",
    f"training.steps={STEPS}",
    f"training.save_every={SAVE_EVERY}",
    "training.keep_checkpoints=2",
]
TWO_RANKS = ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrain")
    write_tiny_shards(root / "shards")
    (root / "empty.yaml").write_text("")
    return root


def command(folder: Path, name: str, *overrides: str, ranks: int = 2) -> list[str]:
    launch = [sys.executable, "-m"]
    if ranks > 1:
        launch += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
    files = [f"run.output_dir={folder / name}", f"data.shards=[{folder / 'shards'}]"]
    layout = TWO_RANKS if ranks == 2 else []
    config = ["training.pretrain", "--config", str(folder / "empty.yaml")]
    return [*launch, *config, *SETTINGS, *layout, *files, *overrides]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=600)


def metrics(run_dir: Path) -> dict[int, dict[int, dict[str, Any]]]:
    """life -> step -> line of metrics.jsonl."""
    lives: dict[int, dict[int, dict[str, Any]]] = {}
    path = run_dir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line)
        lives.setdefault(values["life"], {})[values["step"]] = values
    return lives


def start_until_step(arguments: list[str], run_dir: Path, step: int) -> subprocess.Popen[str]:
    """Start a job and return when it has logged `step` in a new life."""
    life = len(metrics(run_dir)) + 1
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 300
    while step not in metrics(run_dir).get(life, {}):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no progress"
        time.sleep(0.01)
    return process


def kill_everything(process: subprocess.Popen[str]) -> list[psutil.Process]:
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in tree:
        member.kill()
    process.communicate()
    return tree


def assert_same(found: dict[int, dict[str, Any]], expected: dict[int, dict[str, Any]]) -> None:
    """Bit for bit: JSON holds floats to their last digit."""
    for step, line in found.items():
        for name in ("loss", "grad_norm", "learning_rate", "samples", "tokens"):
            assert line[name] == expected[step][name], (step, name)


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[int, dict[str, Any]]:
    result = run(command(folder, "uninterrupted"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "finished at step 40/40" in result.stdout
    lives = metrics(folder / "uninterrupted")
    assert list(lives) == [1]
    assert sorted(lives[1]) == list(range(1, STEPS + 1))
    return lives[1]


def test_what_a_run_leaves(folder: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    run_dir = folder / "uninterrupted"
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step_00000035",
        "step_00000040",
    ]
    assert json.loads((run_dir / "status.json").read_text()) == {"state": "finished", "step": STEPS}
    # Fingerprints of the encoders that the shards were made with: `sample` compares them.
    assert trained_encoders(run_dir / "checkpoints" / "step_00000040") == {"vae": "vae", "text": "text"}
    life = json.loads((run_dir / "run_info.json").read_text())["lives"][0]
    assert life["world_size"] == 2
    assert life["packages"]["megatron-core"]
    assert list((run_dir / "tensorboard").iterdir())
    # It learns: made-up latents have no structure but their mean, which a few steps find.
    losses = [uninterrupted[step]["loss"] for step in sorted(uninterrupted)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_killed_at_a_random_step_and_continued(folder: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    run_dir, arguments = folder / "killed", command(folder, "killed")
    # The second save waits for the first, which is written while training goes on: behind it, one is complete.
    # The last steps are left out: a test that is held up for a moment would find the run at its end.
    step = random.Random(os.getpid()).randint(2 * SAVE_EVERY + 1, STEPS - 15)
    tree = kill_everything(start_until_step(arguments, run_dir, step))
    _, alive = psutil.wait_procs(tree, timeout=60)
    assert not alive
    result = run(arguments)
    assert result.returncode == 0, result.stdout + result.stderr
    lives = metrics(run_dir)
    first = min(lives[2])
    assert f"continuing from {run_dir}/checkpoints/step_{first - 1:08d}" in result.stdout
    assert (first - 1) % SAVE_EVERY == 0
    assert max(lives[1]) < STEPS
    assert max(lives[2]) == STEPS
    assert_same(lives[1], uninterrupted)
    assert_same(lives[2], uninterrupted)


def test_sigterm_saves_and_the_next_life_goes_on(folder: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    run_dir, arguments = folder / "stopped", command(folder, "stopped")
    process = start_until_step(arguments, run_dir, 10)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=300)[0]
    status = json.loads((run_dir / "status.json").read_text())
    assert status["state"] == "stopped", output
    assert f"saved {run_dir}/checkpoints/step_{status['step']:08d}" in output
    # Another node count: one rank takes over from two, to rounding.
    assert run(command(folder, "stopped", f"training.steps={status['step'] + 2}", ranks=1)).returncode == 0
    lives = metrics(run_dir)
    assert_same(lives[1], uninterrupted)
    assert sorted(lives[2]) == [status["step"] + 1, status["step"] + 2]
    for step, line in lives[2].items():
        assert line["loss"] == pytest.approx(uninterrupted[step]["loss"], rel=1e-5)


def test_sigusr1_on_one_process_gives_the_requeue_code(folder: Path) -> None:
    process = start_until_step(command(folder, "requeue", ranks=1), folder / "requeue", 3)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 143, output


def run_here(folder: Path, name: str, *overrides: str) -> dict[int, dict[int, dict[str, Any]]]:
    arguments = command(folder, name, *overrides, ranks=1)
    assert run_command(main, arguments[arguments.index("--config") :]) == 0
    return metrics(folder / name)


@pytest.mark.parametrize("sharded", ["false", "true"])
def test_the_first_checkpoint_changes_nothing_and_can_be_continued(folder: Path, sharded: str) -> None:
    overrides = ["training.steps=5", "training.save_initial=true", f"parallel.use_distributed_optimizer={sharded}"]
    name = f"initial_{sharded}"
    plain = run_here(folder, f"plain_{sharded}", *overrides, "training.save_initial=false")[1]
    assert_same(run_here(folder, name, *overrides)[1], plain)
    shutil.rmtree(step_folder(folder / name, 5))
    assert_same(run_here(folder, name, *overrides)[2], plain)


def test_a_stage_starts_from_the_weights_of_another(folder: Path) -> None:
    run_here(folder, "first_stage", "training.steps=2", "optimizer.warmup_steps=0")
    start = ["training.steps=1", "optimizer.warmup_steps=0", "training.save_initial=true", "run.seed=8"]
    run_here(folder, "second_stage", *start, f"run.initial_weights={folder / 'first_stage'}")
    assert weights(step_folder(folder / "second_stage", 0)) == weights(step_folder(folder / "first_stage", 2))
    assert weights(step_folder(folder / "second_stage", 0)) != weights(step_folder(folder / "second_stage", 1))


def weights(checkpoint: Path) -> dict[str, list[float]]:
    """The model's tensors, read without megatron-core."""
    names = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    state = {
        name: torch.empty(entry.size)
        for name, entry in names.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer.")
    }
    assert len(state) > 40
    torch.distributed.checkpoint.load(state, checkpoint_id=checkpoint, no_dist=True)
    return {name: tensor.flatten().tolist() for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=3", "num_layers: 2 there, 3 here"),
        ("run.seed=4", "data plan"),
        ("model.number_of_layers=3", "unknown field 'model.number_of_layers'"),
        ("data.shards=[/nowhere]", "/nowhere"),
        ("model.in_channels=6", "model.in_channels=6"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    folder: Path,
    uninterrupted: dict[int, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
    override: str,
    message: str,
) -> None:
    before = (folder / "uninterrupted" / "metrics.jsonl").read_bytes()
    arguments = command(folder, "uninterrupted", override, ranks=1)
    assert run_command(main, arguments[arguments.index("--config") :]) == 2
    assert message in capsys.readouterr().err
    assert (folder / "uninterrupted" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_refused_by_name(folder: Path, uninterrupted: dict[int, dict[str, Any]]) -> None:
    run_dir = folder / "uninterrupted"
    newest = run_dir / "checkpoints" / "step_00000040"
    data_file = next(newest.glob("*.distcp"))
    data_file.write_bytes(data_file.read_bytes()[:100])
    result = run(command(folder, "uninterrupted"))
    assert result.returncode != 0
    assert f"{newest} is damaged: {data_file.name} has 100 bytes" in result.stderr
    result = run(command(folder, "uninterrupted", "checkpoint.on_damage=older"))
    assert f"ignoring {newest}: {data_file.name} has 100 bytes" in result.stderr
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"continuing from {run_dir}/checkpoints/step_00000035" in result.stdout
    assert_same(metrics(run_dir)[2], uninterrupted)
