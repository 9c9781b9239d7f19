"""Encoding beside training: FLOPs of the encoders against a counter on the real ones, and the split of GPUs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertModel

from megatron_video.cli import run_command
from megatron_video.config_io import load_config
from megatron_video.shard_schema import ShardSample, encode_sample
from megatron_video.text.step_llm import StepLLM, StepLLMConfig, position_bias
from megatron_video.vae.config import VAEConfig
from megatron_video.vae.encoder import VideoEncoder
from training.config import PRESET_DIR, PretrainConfig
from training.planner.cluster import Cluster, load_cluster
from training.planner.command import main
from training.planner.encoder_work import ClipSize, clip_work, llm_weight_bytes, llm_work, vae_work
from training.planner.encoders import EncodingPlan, encode_seconds, feeding_gpus, plan_encoding
from training.planner.shape import ModelShape
from training.planner.stored import sample_bytes
from training.planner.work import MicroBatch

SMALL_VAE = VAEConfig(latent_channels=8, encoder_multipliers=(1, 2, 2, 4), num_res_blocks=1)
SMALL_LLM = StepLLMConfig(
    hidden_size=96,
    num_layers=3,
    num_attention_heads=6,
    num_attention_groups=2,
    ffn_hidden_size=300,
    padded_vocab_size=50,
)
STAGE = "step_video_30b_t2vi_540_s1"


def counted(call: Callable[[], Any]) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return load_cluster("h800_step_video", ("price_per_gpu_hour=2", "storage.price_per_terabyte_month=200"))


@pytest.fixture(scope="module")
def found(cluster: Cluster) -> EncodingPlan:
    planned = plan_encoding(load_config(PretrainConfig, STAGE, (), PRESET_DIR), cluster, 256, 0.1)
    assert isinstance(planned, EncodingPlan)
    return planned


# FLOPs.


@pytest.mark.parametrize("size", [(17, 32, 48), (1, 64, 32), (34, 32, 32)])
def test_flops_of_a_small_vae_are_those_that_run(size: tuple[int, int, int]) -> None:
    encoder = VideoEncoder(SMALL_VAE).eval()
    chunks = torch.zeros(1, 3, *size).split(17, dim=2)
    assert vae_work(SMALL_VAE, *size).flops == counted(lambda: [encoder(chunk) for chunk in chunks])


@pytest.mark.parametrize("size", [(17, 64, 96), (17, 192, 320), (1, 256, 256)])
def test_flops_of_the_released_vae_are_those_of_its_modules(size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        encoder = VideoEncoder(VAEConfig()).eval()
    assert vae_work(VAEConfig(), *size).flops == counted(lambda: encoder(torch.empty(1, 3, *size, device="meta")))


@pytest.mark.parametrize(("config", "tokens", "device"), [(SMALL_LLM, 19, "cpu"), (StepLLMConfig(), 179, "meta")])
def test_flops_and_weights_of_step_llm(config: StepLLMConfig, tokens: int, device: str) -> None:
    with torch.device(device):
        model = StepLLM(config).bfloat16()
        # A plain product of scores, as the counter knows it on every device.
        model._bias = position_bias(config.num_attention_heads, tokens).to(device, torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert llm_weight_bytes(config) == 2 * parameters
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert llm_work(config, tokens).flops == counted(lambda: model(ids))


def test_flops_of_clip() -> None:
    size = ClipSize(layers=3, hidden_size=64, ffn_size=128, tokens=21)
    config = BertConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=128
    )
    model = BertModel._from_config(config, attn_implementation="eager", add_pooling_layer=False)
    ids = torch.zeros(1, 21, dtype=torch.long)
    assert clip_work(size).flops == counted(lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids)))
    # Two FLOPs a token for each of the 302 million parameters in the released matrices.
    assert clip_work(ClipSize()).gemm_flops == 2 * 77 * 24 * 12 * 1024**2


# Bytes.


def test_bytes_of_a_sample_are_those_in_a_shard() -> None:
    shape = replace(ModelShape(4, 64, 4, 256), in_channels=8, llm_channels=64, clip_channels=48)
    batch = MicroBatch(1, tokens=36 * 34, text_tokens=77 + 100)
    moments = torch.zeros(36, 16, 17, 2)
    texts = torch.zeros(100, 64), torch.zeros(77, 48)
    payloads = encode_sample(ShardSample("a", moments, *texts, metadata={}))
    stored = len(payloads["latent"]) + len(payloads["text"])
    assert stored == pytest.approx(sample_bytes(shape, batch), abs=500)


# The split.


def test_as_many_gpus_encode_as_training_consumes(found: EncodingPlan) -> None:
    rate = found.encoding_seconds_per_step / found.step_seconds
    assert found.beside % 8 == 0
    assert rate * 1.1 <= found.beside < rate * 1.1 + 8
    encoding = found.plan.gpus - found.split_plan.gpus
    needed = found.encoding_seconds_per_step * found.split_share / found.split_step_seconds
    assert needed * 1.1 <= encoding * 1.01
    assert encoding <= found.beside


def test_training_never_waits_with_them_and_does_with_fewer(found: EncodingPlan) -> None:
    def waited(encoders: int, steps: int = 400) -> float:
        """Seconds that training waits for its samples, which lie ready for two steps at most."""
        ready, clock, waits = 0.0, 0.0, 0.0
        of_a_step = found.encoding_seconds_per_step / encoders
        for _ in range(steps):
            ready = max(ready, clock - 2 * of_a_step) + of_a_step
            waits += max(0.0, ready - clock)
            clock = max(clock, ready) + found.step_seconds
        return waits

    first_fill = found.encoding_seconds_per_step / found.beside
    assert waited(found.beside) == pytest.approx(first_fill)
    # Without the spare ones and one node less.
    too_few = round(found.beside / 1.1) - 16
    assert waited(too_few) > 50 * first_fill


def test_whole_nodes_encode() -> None:
    cluster = load_cluster("h100")
    assert [feeding_gpus(seconds, 0.0, cluster) for seconds in (0.1, 8.0, 8.1)] == [8, 8, 16]
    assert feeding_gpus(8.0, 0.1, cluster) == 16


def test_ahead_of_time_costs_what_it_encodes_once(found: EncodingPlan) -> None:
    one, two = found.epochs()[:2]
    assert one["ahead_gpu_hours"] == pytest.approx(2 * two["ahead_gpu_hours"])
    assert one["every_time_gpu_hours"] == pytest.approx(1.1 * one["ahead_gpu_hours"])
    even = found.break_even_epochs()
    assert even > 1
    hours, stored = found.encoding_gpu_hours(even), found.stored_terabytes(even)
    months = found.steps * found.step_seconds / (30.44 * 86400)
    assert 2 * hours + 200 * stored * months == pytest.approx(2 * one["every_time_gpu_hours"])


def test_seconds_add_up_their_kinds() -> None:
    cluster = load_cluster("h100")
    work = llm_work(StepLLMConfig(), 100)
    peak = 989e12
    assert encode_seconds(work, cluster) == pytest.approx(
        work.gemm_flops / (0.7 * peak) + work.attention_flops / (0.56 * peak)
    )


def test_plan_encoders(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    picture = tmp_path / "encoders.png"
    command = ["encoders", "--config", STAGE, "--cluster", "h800_step_video"]
    assert main([*command, "--json", "--plot", str(picture)]) == 0
    tables = json.loads(capsys.readouterr().out)["tables"]
    assert sum(row["share"] for row in tables["Encoding of one sample"]) == pytest.approx(1)
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--headroom", "-1"], "--headroom -1"),
        (["--set", "gpus=8", "data.global_batch_size=2"], "needs"),
        (["--set", "efficiency.convolution=2"], "convolution=2"),
    ],
)
def test_bad_input_is_refused_by_name(capsys: pytest.CaptureFixture[str], change: list[str], message: str) -> None:
    assert run_command(main, ["encoders", "--config", STAGE, "--cluster", "h800_step_video", *change]) == 2
    shown = capsys.readouterr()
    assert message in shown.err + shown.out
