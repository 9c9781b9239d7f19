"""The whole loop of Video-DPO on tiny models: two rounds from one file, interrupted, gone on, reported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import preference_gain
import pytest
import yaml
from tiny_models import write_tiny_models

from megatron_video.errors import UserError
from training.alignment import rounds
from training.alignment.win_rate import compare
from training.checkpoint import read_config

PROMPTS = ["a red circle moves left", "a blue square moves up", "蓝色方块向上移动", "a green circle moves down"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_tiny_models(folder, PROMPTS)
    model = {"model": read_config(folder / "run" / "checkpoints" / "step_00000007")["model"]}
    common = {
        "data": {"micro_batch_size": 2, "global_batch_size": 4, "text_dropout": 0.0},
        "training": {"steps": 4, "precision": "fp32", "save_every": 2, "log_every": 1},
        "optimizer": {"learning_rate": 1e-4, "warmup_steps": 1},
        "dpo": {"beta": 100.0},
    }
    (folder / "dpo.yaml").write_text(yaml.safe_dump(model | common))
    settings = {
        "output_dir": str(folder / "rounds"),
        "start": str(folder / "run"),
        "vae": str(folder / "vae"),
        "text": str(folder / "text"),
        "prompts": str(folder / "prompts.txt"),
        "evaluation_prompts": str(folder / "prompts.txt"),
        "config": str(folder / "dpo.yaml"),
        "seeds": 2,
        "score": ["brightness"],
        "judge": ["shape_motion"],
        "reward_model": {"epochs": 2, "held_out": 0.27},
        "sampling": {"frames": 17, "height": 32, "width": 48, "fps": 8, "steps": 2, "guidance": 1.0, "time_shift": 1.0},
    }
    (folder / "rounds.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.mark.heavy
def test_two_rounds_from_one_file(models: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "megatron_video", "dpo", "rounds", "--config", str(models / "rounds.yaml")]
    # Ended while the first round goes on: what is done stays done, and nothing goes on behind its back.
    running = subprocess.Popen([*command, "rounds=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("== ") and "training.dpo" in line:
            break
    running.terminate()
    running.communicate()
    result = subprocess.run([*command, "rounds=2", "--json"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "-m training.alignment.generate" not in result.stdout.split("-m training.dpo")[0]
    report = json.loads(result.stdout.splitlines()[-1])
    assert [item["pairs"] for item in report["rounds"]] == [4, 4]
    for item in report["rounds"]:
        for judged in ("brightness", "shape_motion", "reward model"):
            gain = item["gains"][judged]["over_the_start"]
            assert gain["wins"] + gain["ties"] + gain["losses"] == len(PROMPTS)
        assert set(item["seconds"]) == {"generate", "score", "pair", "reward", "train", "evaluate", "judge"}
    root = models / "rounds"
    seeds = [
        [json.loads(line)["seed"] for line in (root / f"round_0{number}" / "prompts.jsonl").read_text().splitlines()]
        for number in (1, 2)
    ]
    # Every video has noise of its own, in both rounds; the second starts from the model of the first.
    assert len({*seeds[0], *seeds[1]}) == 2 * 2 * len(PROMPTS)
    config = yaml.safe_load((root / "round_02" / "train" / "config.yaml").read_text())
    assert config["run"]["initial_weights"] == str(root / "round_01" / "train")
    # The second reward model goes on with the first, which knew how to judge the second's pairs before.
    tuned = json.loads((root / "round_02" / "reward" / "reward_model.json").read_text())["trained"]
    assert tuned["init"] == str(root / "round_01" / "reward")
    assert report["rounds"][1]["reward_model"]["before"] == tuned["folders"][0]["before"]
    assert [folder["pairs"] for folder in tuned["folders"]] == [str(root / f"round_0{n}" / "pairs") for n in (2, 1)]
    assert (root / "side_by_side.png").stat().st_size > 1000
    with pytest.raises(UserError, match="seeds: 2 there, 3 here"):
        rounds.main(["--config", str(models / "rounds.yaml"), "seeds=3"])


@pytest.mark.heavy
def test_a_round_waits_for_people(models: Path) -> None:
    root = models / "people"
    command = [sys.executable, "-m", "megatron_video", "dpo", "rounds", "--config", str(models / "rounds.yaml")]
    command += [f"output_dir={root}", "people=true", "rounds=1", "pairing.pairs_per_prompt=4"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    wanted = root / "round_01" / "ratings.jsonl"
    rate = f"megatron-video dpo rate --samples {root / 'round_01' / 'samples'} --out {wanted} --rater NAME"
    assert f"round 1 waits for people's votes in {wanted}: {rate}" in result.stderr
    # Of every prompt's two videos, the second.
    votes = [{"rater": "ann", "index_a": 2 * n, "index_b": 2 * n + 1, "vote": "b"} for n in range(len(PROMPTS))]
    wanted.write_text("".join(json.dumps(vote) + "\n" for vote in votes))
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pairs = json.loads((root / "round_01" / "pairs" / "pairs_report.json").read_text())
    assert (pairs["pairs"], pairs["ratings"]["compared"]) == (4, 4)


@pytest.mark.heavy
def test_the_benchmark_judges_every_training(models: Path, tmp_path: Path) -> None:
    file, page, name = tmp_path / "gain.json", tmp_path / "gain.md", "30 % of the labels flipped"
    options = ["--config", str(models / "rounds.yaml"), "--out", str(file), "--page", str(page), "--only", name]
    preference_gain.main([f"output_dir={models / 'measured'}", "rounds=1", *options])
    start, first, flipped = json.loads(file.read_text())["rows"]
    assert [row["training"] for row in (start, first, flipped)] == ["the demo's model", "round 1", name]
    evaluations = [models / "measured" / f"round_0{number}" / "evaluation" for number in (0, 1)]
    assert first["win_rate"] == compare(*evaluations).rate
    pairs = json.loads((models / "measured" / "flipped_pairs" / "pairs_report.json").read_text())
    trained = yaml.safe_load((models / "measured" / "variants" / "07" / "train" / "config.yaml").read_text())
    assert trained["data"]["shards"] == [str(models / "measured" / "flipped_pairs")]
    assert pairs["rules"]["flip_labels"] == 0.3
    assert f"| {name} | {flipped['win_rate']:.1%}" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seeds=1", "seeds=1 must be at least 2"),
        ("score=[]", "score is empty"),
        ("rounds=0", "rounds=0"),
        ("prompts=nowhere.txt", "nowhere.txt is not readable"),
        ("sampling.frame=17", "frame"),
        ("sampling_layout=[--steps=4]", "sampling_layout has '--steps', which is none of --tensor-parallel-size"),
    ],
)
def test_what_gives_no_rounds_is_refused(change: str, said: str, models: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        rounds.main(["--config", str(models / "rounds.yaml"), f"output_dir={tmp_path / 'out'}", change])
