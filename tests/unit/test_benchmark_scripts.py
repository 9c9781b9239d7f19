"""The benchmarks run, at sizes that say nothing about speed: their tables hold what was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import average_gain
import balance_bench
import block_bench
import checkpoint_bench
import cpu_step_bench
import fused_bench
import gradient_by_beta
import plan_bench
import preference_bench
import pytest
import reward_features
import telemetry_bench
import torch
from tiny_features import tiny_pairs, tiny_run

from megatron_video.flops import training_flops


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert content["environment"]["packages"]["torch"] == torch.__version__
    assert content["environment"]["commit"]
    return content


@pytest.mark.heavy
def test_block_bench_times_ours_and_the_plain_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = "--hidden 64 --head-dim 16 --tokens 20 --shards 1 2 --layers 1 2 --text-tokens 9 --hidden-text 2"
    file = tmp_path / "block.json"
    block_bench.main([*sizes.split(), "--device", "cpu", "--dtype", "float32", "--variants", "local", "plain", "te",
                      "--warmup", "1", "--repeats", "2", "--out", str(file)])  # fmt: skip
    rows = read(file)["rows"]
    # shards x variants x (two stacks and one set of linears)
    assert len(rows) == 2 * 3 * 3
    measured = [row for row in rows if row["variant"] != "te"]
    assert all(row["status"] == "ok" for row in measured)
    stack = next(row for row in measured if (row["shard"], row["layers"], row["part"]) == (2, 2, "block"))
    assert stack["tflops"] * 1e12 * stack["ms"] / 1e3 == pytest.approx(training_flops(2, 64, 20, 9) / 2)
    if not torch.cuda.is_available():
        assert all(row["status"].startswith("unavailable: ") for row in rows if row["variant"] == "te")
    assert "of_ceiling" in capsys.readouterr().out


def test_fused_bench_times_every_operation(tmp_path: Path) -> None:
    file = tmp_path / "fused.json"
    fused_bench.main(["--hidden", "64", "--head-dim", "16", "--tokens", "20", "--device", "cpu", "--dtype", "float32",
                      "--forms", "plain", "kernel", "--warmup", "1", "--repeats", "2", "--out", str(file)])  # fmt: skip
    rows = read(file)["rows"]
    assert [row["status"] for row in rows if row["form"] == "plain"] == ["ok"] * 4
    # What was asked for and cannot be had is said, not replaced.
    assert all("need CUDA" in row["status"] for row in rows if row["form"] == "kernel")


def test_cpu_step_bench_compares_equal_models(tmp_path: Path) -> None:
    file = tmp_path / "cpu_step.json"
    cpu_step_bench.main(["--layers", "1", "--heads", "2", "--head-dim", "16", "--grid", "1", "2", "3",
                         "--steps", "2", "--warmup", "1", "--out", str(file)])  # fmt: skip
    content = read(file)
    assert len(content["rows"]) == 3
    losses = [row["ours"]["loss"] for row in content["rows"]]
    assert losses == pytest.approx([row["plain"]["loss"] for row in content["rows"]], rel=1e-5)
    assert len(set(losses)) == 3
    assert content["summary"]["median cpu_s"]["ratio"] > 0
    assert content["summary"]["peak_rss_mib"]["plain"] > 50


def test_telemetry_bench_pairs_every_kind_of_step(tmp_path: Path) -> None:
    file = tmp_path / "telemetry.json"
    sizes = "--layers 1 --heads 2 --head-dim 16 --grid 1 2 3 --pairs 3 --warmup 1 --repeats 3"
    telemetry_bench.main([*sizes.split(), "--out", str(file)])
    content = read(file)
    assert [row["step"] for row in content["summary"]["costs"]] == ["ordinary", "shown", "layers"]
    assert len(content["rows"]) == 9
    # At this size writing a line to TensorBoard is a large part of a step; less than ten steps' time it is anywhere.
    assert abs(content["summary"]["overhead cpu_s"]) < 10


@pytest.mark.heavy
def test_preference_bench_measures_every_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "preference.json"
    sizes = "--layers 2 --heads 2 --head-dim 16 --bucket 17x48x48 --steps 2 --warmup 1"
    preference_bench.main([*sizes.split(), "--layouts", "one process", "PP2", "--out", str(file)])
    content = read(file)
    assert [row["layout"] for row in content["rows"]] == ["one process"] * 2 + ["PP2"] * 2
    found = content["summary"]["layouts"]
    assert list(found["one process"]) == [*preference_bench.WAYS, "pass"]
    assert list(found["PP2"]) == ["pretraining", "precomputed", "swapped", "pass"]
    # Bytes are no matter of the machine's load: a second model is seen, and what replaces it costs what it claims to.
    memory = {way: found["one process"][way]["memory"] for way in preference_bench.WAYS}
    held = memory["swapped"]["host"]
    assert memory["precomputed"]["ratio"] < preference_bench.TARGETS["memory"]
    assert memory["resident"]["peak"] - memory["precomputed"]["peak"] == pytest.approx(held, rel=0.2)
    assert held > 0.1
    assert "peak ratio" in capsys.readouterr().out


@pytest.mark.heavy
def test_gradients_grow_with_beta(tmp_path: Path) -> None:
    file, page = tmp_path / "gradient.json", tmp_path / "gradient.md"
    sizes = ["--betas", "2", "400", "--steps", "4", "--learning-rate", "1e-5"]
    gradient_by_beta.main([*sizes, "--out", str(file), "--page", str(page)])
    small, large = read(file)["rows"]
    # The first step's margins are zero: beta / 4 times the norm of the mean difference of the errors' gradients.
    assert large["first"] == pytest.approx(200 * small["first"], rel=1e-3)
    assert (small["clipped %"], large["clipped %"]) == (0, 100)
    assert "| 400 |" in page.read_text()


def test_balance_bench_finds_what_it_planted(tmp_path: Path) -> None:
    file = tmp_path / "balance.json"
    sizes = "--clips 4000 --width 32 --concepts 10 --clusters 40 --iterations 5 --threads 1 --hash-copies 0.03"
    balance_bench.main([*sizes.split(), "--out", str(file)])
    content = read(file)
    found = {row["what"]: row for row in content["rows"]}
    assert found["copies by embedding"]["planted"] > 100
    assert found["copies by embedding"]["share"] > 0.98
    assert found["copies by hash"]["planted"] > 50
    assert found["copies by hash"]["share"] == 1
    assert found["copies by embedding"]["wrong"] == found["copies by hash"]["wrong"] == 0
    assert content["summary"]["purity"] > 0.97
    assert 0 < content["summary"]["peak_anonymous_mib"] <= content["summary"]["peak_with_file_pages_mib"]


def test_plan_bench_times_every_preset(tmp_path: Path) -> None:
    plan_bench.main(["--samples", "50000", "--replicas", "4", "--steps", "2", "--out", str(tmp_path / "plan.json")])
    rows = json.loads((tmp_path / "plan.json").read_text())["rows"]
    assert [row["preset"] for row in rows] == list(plan_bench.PRESETS)
    assert all(row["rank_share_ms"] > 0 and row["peak_kib"] < 10_000 for row in rows)
    assert rows[0]["samples_a_step"] == 15_000


def test_checkpoint_bench_saves_both_ways(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "checkpoint.json"
    sizes = "--layers 1 --heads 2 --head-dim 16 --grid 1 2 3 --repeats 2 --threads 1"
    checkpoint_bench.main([*sizes.split(), "--out", str(file)])
    content = read(file)
    assert sorted(row["save"] for row in content["rows"] if "save" in row) == ["asynchronous"] * 2 + ["synchronous"] * 2
    summary = content["summary"]
    blocked = summary["blocked_s"]
    assert summary["share"] == blocked["asynchronous"] / blocked["synchronous"]
    assert summary["gigabytes"]["synchronous"] == pytest.approx(summary["gigabytes"]["asynchronous"], rel=1e-3)
    assert "target below 5%" in capsys.readouterr().out


@pytest.mark.heavy
def test_average_gain_judges_every_average(tmp_path: Path) -> None:
    file, page = tmp_path / "average_gain.json", tmp_path / "average.md"
    sizes = "--steps 32 --every 2 --seeds 1 --layers 1 --learning-rate 1e-3"
    average_gain.main([*sizes.split(), "--out", str(file), "--page", str(page)])
    content = read(file)
    ways = {row["way"] for row in content["summary"]["table"]}
    assert ways == {"EMA kept by the run", "mean of last n", "EMA from weights", "EMA from stored EMAs"}
    errors = [row["error"] for row in content["rows"] if "error" in row]
    assert sorted(errors) == errors
    kept, rebuilt = (
        next(row["loss"] for row in content["rows"] if (row["kind"], row["what"]) == (kind, 0.98))
        for kind in ("EMA kept by the run", "EMA from weights")
    )
    assert rebuilt == pytest.approx(kept, rel=1e-2)
    assert "mean of the last 8" in page.read_text()
    assert page.with_suffix(".png").stat().st_size > 10_000


@pytest.mark.heavy
def test_reward_features_judges_every_pair_of_every_way_once(tmp_path: Path) -> None:
    run, pairs = tiny_run(tmp_path), tiny_pairs(tmp_path)
    file, page = tmp_path / "features.json", tmp_path / "features.md"
    sizes = "--layers 0 1 --times 0.5 --shares 1 0.5 --seeds 1 --epochs 2"
    given = ["--checkpoint", str(run), "--pairs", str(pairs), "--out", str(file), "--page", str(page)]
    reward_features.main([*sizes.split(), *given])
    content = read(file)
    # Latents, their statistics, two layers, both of them, and latents with one and with both.
    assert len(content["rows"]) == 2 * 7
    assert all(len(row["right"]) == 34 for row in content["rows"])
    table = content["summary"]["table"]
    assert all(row["alone_right"] == 0 == row["latents_alone_right"] for row in table if row["way"] == "latents")
    assert len([line for line in page.read_text().splitlines() if line.startswith("|")]) == 2 + len(table)
