"""Contradictory and unknown settings of a pretraining run are refused by name; presets are what the paper says."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from megatron_video.buckets import parse_bucket
from megatron_video.config_io import load_config
from megatron_video.errors import UserError
from megatron_video.parallel import ParallelConfig
from training.config import PRESET_DIR, AdamWConfig, PretrainConfig
from training.optimizer import learning_rate

REFUSED = [
    (
        ["model.num_attention_heads=6", "parallel.tensor_model_parallel_size=4"],
        "that work: parallel.tensor_model_parallel_size=2, 3, 6",
    ),
    (["model.num_layers=6", "parallel.pipeline_model_parallel_size=4"], "num_layers=6"),
    (["parallel.sequence_parallel=true"], "tensor_model_parallel_size"),
    (["data.global_batch_size=10", "data.micro_batch_size=4"], "nearest: 8 or 12"),
    (["data.draw_size=6", "data.micro_batch_size=4"], "draw_size=6"),
    (["data.text_dropout=1.5"], "text_dropout=1.5"),
    (["data.micro_batch_size=0"], "micro_batch_size=0"),
    (["data.bucket_weights={a: -1}"], "bucket_weights.a"),
    (["optimizer.learning_rate=0"], "learning_rate=0"),
    (["optimizer.betas=[0.9, 1.0]"], "betas"),
    (["optimizer.decay=wsd"], "needs the length of its fall"),
    (["optimizer.decay=wsd", "optimizer.decay_steps=9", "optimizer.decay_fraction=0.1"], "decay_steps=9"),
    (["optimizer.decay=wsd", "optimizer.decay_fraction=1.5"], "decay_fraction=1.5"),
    (["optimizer.decay=wsd", "optimizer.decay_steps=0"], "decay_steps=0"),
    (["optimizer.decay=cosine", "optimizer.decay_shape=linear"], "decay_shape=linear: of use with decay=wsd only"),
    (["optimizer.decay=wsd", "optimizer.decay_steps=900", "training.steps=1500"], "the 900 steps of its decay"),
    (["optimizer.warmup_steps=2000", "training.steps=1000"], "warmup_steps=2000"),
    (["training.precision=fp16"], "fp32"),
    (["training.stepz=4"], "did you mean 'steps'"),
    (["training.steps=many"], "training.steps='many'"),
    (["flow.std=0"], "std=0"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_contradictions_are_refused_by_name(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("[", r"\[").replace("(", r"\(")):
        load_config(PretrainConfig, None, overrides)


@pytest.mark.parametrize(
    ("world", "overrides", "message"),
    [
        (3, ["parallel.tensor_model_parallel_size=2"], "nearest that work: world_size=2; or parallel.tensor"),
        (3, ["data.global_batch_size=2"], "each of 3 replicas needs a micro-batch.*nearest that work: .*_size=3, 4, 5"),
        (3, ["data.global_batch_size=8", "data.balance=none"], "nearest that work: data.global_batch_size=6, 9, 12"),
        (
            2,
            [
                "parallel.pipeline_model_parallel_size=2",
                "parallel.virtual_pipeline_model_parallel_size=2",
                "data.global_batch_size=3",
            ],
            "interleaved",
        ),
    ],
)
def test_layouts_that_do_not_fit_the_ranks_are_refused(world: int, overrides: list[str], message: str) -> None:
    config = load_config(PretrainConfig, None, overrides)
    with pytest.raises(UserError, match=message):
        config.data_parallel_size(world)


# (stage, learning rate, samples a node, iterations, samples seen) as printed in Table 6 of arXiv 2502.10248
TABLE_6 = [
    ("t2i_256_s1", 1e-4, 40, 53_000, 0.8e9),
    ("t2i_256_s2", 1e-4, 40, 200_000, 3e9),
    ("t2vi_192_s1", 6e-5, 4, 171_000, 256e6),
    ("t2vi_192_s2", 6e-5, 4, 101_000, 151e6),
    ("t2vi_192_s3", 6e-5, 4, 158_000, 237e6),
    ("t2vi_540_s1", 2e-5, 2, 23_000, 17.3e6),
    ("t2vi_540_s2", 1e-5, 2, 17_000, 8.5e6),
    ("t2vi_540_s3", 1e-5, 1, 6_000, 1.5e6),
]


@pytest.mark.parametrize(("stage", "rate", "per_node", "steps", "seen"), TABLE_6, ids=[row[0] for row in TABLE_6])
def test_presets_of_the_30b_follow_table_6(stage: str, rate: float, per_node: int, steps: int, seen: float) -> None:
    config = load_config(PretrainConfig, f"step_video_30b_{stage}", [], PRESET_DIR)
    assert config.optimizer.learning_rate == rate
    assert config.training.steps == steps
    assert config.data.global_batch_size * steps == pytest.approx(seen, rel=0.03)
    nodes = config.data.global_batch_size // per_node
    # A node of 8 GPUs is one replica.
    assert config.data_parallel_size(8 * nodes) == nodes
    assert config.model.hidden_size == 6144
    # Table 2: TP 8 with sequence parallelism and ZeRO-1, without CP and PP; 83.33 % of 48 layers recomputed at 540P.
    parallel = config.parallel
    assert parallel == ParallelConfig(
        tensor_model_parallel_size=8,
        sequence_parallel=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        recompute_granularity="full" if "540" in stage else None,
        recompute_num_layers=40 if "540" in stage else None,
    )
    pixels = {"t2i_256": 256 * 256, "t2vi_192": 192 * 320, "t2vi_540": 544 * 992}[stage[:-3]]
    buckets = [parse_bucket(name) for name in config.data.buckets or []]
    assert {bucket.frames for bucket in buckets} == ({1} if stage.startswith("t2i") else {1, 68, 136, 204})
    assert all(bucket.height * bucket.width == pytest.approx(pixels, rel=0.1) for bucket in buckets)


def test_each_stage_of_the_30b_starts_from_the_one_before() -> None:
    names = [f"step_video_30b_{row[0]}" for row in TABLE_6] + ["step_video_30b_sft"]
    configs = [load_config(PretrainConfig, name, [], PRESET_DIR) for name in names]
    assert [config.run.initial_weights for config in configs] == [None, *(f"runs/{name}" for name in names[:-1])]
    assert [config.run.output_dir for config in configs] == [f"runs/{name}" for name in names]
    assert len({config.run.stage for config in configs}) == len(names)
    # Images are left out of fine-tuning (section 8).
    assert {parse_bucket(name).frames for name in configs[-1].data.buckets or []} == {68, 136, 204}


def test_shift_of_the_30b_is_that_of_68_frames() -> None:
    for resolution, stage in (("192x320", "t2vi_192_s1"), ("544x992", "t2vi_540_s3"), ("544x992", "sft")):
        config = load_config(PretrainConfig, f"step_video_30b_{stage}", [], PRESET_DIR)
        tokens = parse_bucket(f"68x{resolution}").latent_shape.tokens
        assert config.flow.shift_base_tokens == tokens


def test_every_preset_of_this_command_loads() -> None:
    for path in PRESET_DIR.glob("*.yaml"):
        load_config(PretrainConfig, path.stem, [], PRESET_DIR)


def test_configuration_survives_saving(tmp_path: Path) -> None:
    from megatron_video.config_io import save_config

    config = load_config(PretrainConfig, "demo", ["training.steps=77"], PRESET_DIR)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(PretrainConfig, tmp_path / "config.yaml") == config


def test_learning_rate_warms_up_and_decays() -> None:
    constant = AdamWConfig(learning_rate=1.0, warmup_steps=4)
    assert [learning_rate(step, constant, 100) for step in (0, 1, 3, 4, 99)] == [0.25, 0.5, 1, 1, 1]
    cosine = AdamWConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=0, decay="cosine")
    assert learning_rate(0, cosine, 101) == 1.0
    assert learning_rate(25, cosine, 101) == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate(100, cosine, 101) == pytest.approx(0.2)


def wsd(**values: object) -> AdamWConfig:
    return AdamWConfig(learning_rate=1.0, min_learning_rate=0.2, warmup_steps=2, decay="wsd", **values)


def test_wsd_stays_and_falls_in_the_last_steps_only() -> None:
    linear = [learning_rate(step, wsd(decay_steps=4), 10) for step in range(10)]
    assert linear == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    assert [learning_rate(step, wsd(decay_fraction=0.4), 10) for step in range(10)] == linear
    root = [learning_rate(step, wsd(decay_steps=4, decay_shape="one_minus_sqrt"), 10) for step in (5, 6, 9)]
    assert root == pytest.approx([1, 0.2 + 0.8 * (1 - math.sqrt(0.25)), 0.2])
    cosine = [learning_rate(step, wsd(decay_steps=4, decay_shape="cosine"), 10) for step in (5, 7, 9)]
    assert cosine == pytest.approx([1, 0.6, 0.2])


def test_a_longer_run_of_wsd_has_the_same_steps_until_the_shorter_one_fell() -> None:
    config = wsd(decay_steps=4)
    shorter, longer = ([learning_rate(step, config, total) for step in range(total)] for total in (10, 15))
    assert longer[:6] == shorter[:6]
    assert longer[6:11] == [1.0] * 5
    assert longer[11:] == pytest.approx(shorter[6:])
