"""Upcycled weights: the function stays where it is said to, checked against recorded outputs; refusals by field."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from golden_cases import dit as golden_dit
from golden_files import GoldenCase, find_golden_cases
from tiny_models import MODEL, write_tiny_run
from tiny_shards import CLIP_DIM, LATENT_CHANNELS, LLM_DIM, write_tiny_shards
from torch import Tensor

from checkpoints_tools import transfer
from checkpoints_tools.cli import main
from checkpoints_tools.convert import convert
from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.derived import Derivation
from checkpoints_tools.forms import Reading, open_weights
from checkpoints_tools.models import KINDS
from checkpoints_tools.upcycle import UpcycledWeights
from checkpoints_tools.upcycle_plan import Plan, blocks, evenly, interleave, make_plan, stack
from checkpoints_tools.weights import Model
from megatron_video.cli import run_command
from megatron_video.config_io import build_config, config_to_dict
from megatron_video.dit import DiTConfig, VideoDiT
from megatron_video.parallel import destroy_parallel
from training.config import PretrainConfig
from training.pretrain import run_training

GOLDEN = [
    case for case in find_golden_cases(Path(__file__).parents[1] / "golden") if case.kind.startswith("StepVideoModel")
]


@pytest.fixture(autouse=True)
def _no_groups_left() -> Iterator[None]:
    yield
    destroy_parallel()


class Held:
    """`Weights` in memory."""

    def __init__(self, model: Model, tensors: Mapping[str, Tensor]) -> None:
        self.model, self._tensors, self.origin = model, tensors, Path("memory")
        self.templates = {name: tensor.to("meta") for name, tensor in tensors.items()}

    def stored_name(self, name: str) -> str:
        return name

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name]


def upcycled(case: GoldenCase, **changes: Any) -> VideoDiT:
    """The recorded model with other sizes."""
    fields = {golden_dit.FIELDS.get(key, key): value for key, value in case.config.items()}
    fields.pop(None, None)
    old = KINDS["dit"].build(DiTConfig(**fields))
    stored = {name.removeprefix("sd."): value for name, value in case.tensors().items() if name.startswith("sd.")}
    source = Held(old, {ours: stored[theirs] for ours, theirs in old.released.items()})
    new = DiTConfig(**{**config_to_dict(old.config), **changes})
    copies = new.num_layers > old.config.num_layers
    weights = UpcycledWeights(source, make_plan(old.config, new, None, None, zero_new=copies))
    assert weights.plan.keeps_function
    released = {weights.model.released[name]: weights.tensor(name) for name in weights.templates}
    return golden_dit.load_reference_model({**case.config, **changes}, released, torch.float32)


def check(model: VideoDiT, inputs: Mapping[str, Tensor], case: GoldenCase) -> None:
    with torch.no_grad():
        golden_dit.assert_close(model(**inputs), case.tensors()["out"], golden_dit.ABSOLUTE_FP32, case.name)


@pytest.mark.parametrize("case", GOLDEN, ids=[case.name for case in GOLDEN])
def test_new_channels_change_nothing_at_first_and_learn(case: GoldenCase) -> None:
    channels = case.config["in_channels"]
    model = upcycled(case, in_channels=2 * channels)
    inputs = golden_dit.read_inputs(case.tensors())
    latents = inputs.pop("latents")
    condition = 10 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    inputs["latents"] = torch.cat([latents, condition], dim=2)
    check(model, inputs, case)
    model(**inputs).square().mean().backward()
    gradient = model.get_parameter("patch_embedding.weight").grad
    assert gradient is not None
    assert (gradient[:, channels:].flatten(2) != 0).any(dim=0).all()


@pytest.mark.parametrize("case", GOLDEN, ids=[case.name for case in GOLDEN])
def test_zeroed_copies_change_nothing_at_first_and_learn(case: GoldenCase) -> None:
    depth = case.config["num_layers"]
    model = upcycled(case, num_layers=2 * depth + 1)
    inputs = golden_dit.read_inputs(case.tensors())
    check(model, inputs, case)
    model(**inputs).square().mean().backward()
    for number, layer in model.layers.items():
        for branch in ("self_attention.linear_proj", "cross_attention.linear_proj", "mlp.linear_fc2"):
            weight = layer.get_parameter(f"{branch}.weight")
            assert weight.grad is not None
            assert weight.grad.any(), (number, branch)


def test_new_conditions_change_nothing_at_first_and_learn() -> None:
    (case,) = [case for case in GOLDEN if case.name == "dit_video_h4d16"]
    model = upcycled(case, use_additional_conditions=True)
    inputs = golden_dit.read_inputs(case.tensors())
    inputs["fps"] = torch.full((len(inputs["latents"]),), 24.0)
    check(model, inputs, case)
    model(**inputs).square().mean().backward()
    for embedder in ("resolution", "num_frames", "fps"):
        conditioning = model.time_conditioning.get_submodule(f"{embedder}_embedder")
        assert conditioning.get_parameter("linear_1.weight").any()
        gradient = conditioning.get_parameter("linear_2.weight").grad
        assert gradient is not None
        assert gradient.any(), embedder


def test_depth_schedules() -> None:
    assert interleave(3, 6) == [0, 0, 1, 1, 2, 2]
    assert interleave(4, 6) == [0, 0, 1, 2, 2, 3]
    assert stack(3, 7) == [0, 1, 2, 0, 1, 2, 0]
    assert blocks(4, 6) == [0, 1, 2, 1, 2, 3]
    assert blocks(4, 7) == [0, 1, 2, 3, 1, 2, 3]
    assert evenly(5, 3) == [0, 2, 4]
    assert evenly(48, 24)[::23] == [0, 47]
    old, new = DiTConfig(num_layers=4), DiTConfig(num_layers=6)
    for schedule, zeroed in (("interleave", {1, 4}), ("stack", {4, 5}), ("blocks", {3, 4})):
        plan = make_plan(old, new, None, schedule, zero_new=True)
        assert plan.zeroed == zeroed
        assert plan.keeps_function
        assert not make_plan(old, new, None, schedule, zero_new=False).keeps_function


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_run(tmp_path_factory.mktemp("run"))


def upcycle(run: Path, out: Path, *options: str) -> int:
    return run_command(main, ["upcycle", "--in", str(run), "--out", str(out), *options])


def layers_of(folder: Path, source: Path, sources: Sequence[int]) -> None:
    """Every tensor of the new layers is that of its source, all else is as it was."""
    new, old = CoreCheckpoint(folder), CoreCheckpoint(source)
    assert new.model.config.num_layers == len(sources)
    for name in new.templates:
        found = f"layers.{sources[int(name.split('.')[1])]}.{name.split('.', 2)[2]}" if name[:7] == "layers." else name
        assert torch.equal(new.tensor(name), old.tensor(found)), name


@pytest.mark.parametrize(
    ("options", "sources"),
    [
        (["--num-layers", "4"], [0, 0, 1, 1]),
        (["--num-layers", "4", "--depth-schedule", "stack"], [0, 1, 0, 1]),
        (["--layers", "1,0,1"], [1, 0, 1]),
        (["--num-layers", "1"], [0]),
        (["--layers", "1"], [1]),
        (["--layers", "1,1"], [1, 1]),
    ],
)
def test_layers_come_from_where_it_is_said(run: Path, tmp_path: Path, options: list[str], sources: list[int]) -> None:
    assert upcycle(run, tmp_path / "out", *options) == 0
    layers_of(tmp_path / "out", run, sources)


def test_the_record_names_the_source_by_its_weights(run: Path, tmp_path: Path) -> None:
    assert upcycle(run, tmp_path / "out", "--layers", "1", "--in-channels", "6", "--to", "released") == 0
    record = json.loads((tmp_path / "out" / "upcycle.json").read_text())
    assert record["source_digest"] == convert(run, tmp_path / "converted").digest
    assert record["changed"] == {"num_layers": [2, 1], "in_channels": [4, 6]}
    assert (record["layers"], record["new_channels"], record["keeps_function"]) == ([1], 2, False)
    assert open_weights(tmp_path / "out").model.config == DiTConfig(
        **{**config_to_dict(MODEL), "num_layers": 1, "in_channels": 6}
    )


def test_a_run_starts_from_upcycled_weights(tmp_path: Path) -> None:
    write_tiny_shards(tmp_path / "shards", {"1x48x48": 4})

    def loss(name: str, layers: int, weights: Path | None) -> float:
        values = {
            "run": {"output_dir": str(tmp_path / name), "initial_weights": weights and str(weights)},
            "model": {
                "num_layers": layers,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "in_channels": LATENT_CHANNELS,
                "out_channels": LATENT_CHANNELS,
                "caption_channels": [LLM_DIM, CLIP_DIM],
            },
            "data": {"shards": [str(tmp_path / "shards")], "micro_batch_size": 4, "global_batch_size": 4},
            "optimizer": {"learning_rate": 0.1, "warmup_steps": 0},
            "training": {"precision": "fp32", "steps": 2, "save_every": 2},
        }
        assert run_training(build_config(PretrainConfig, values, origin="the test")) == 0
        return float(json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0])["loss"])

    loss("small", 1, None)
    assert upcycle(tmp_path / "small", tmp_path / "deep", "--num-layers", "3", "--zero-new") == 0
    continued = loss("continued", 1, tmp_path / "small")
    # The same first batch: the function is the same, and it has learned something.
    assert loss("deeper", 3, tmp_path / "deep") == pytest.approx(continued, rel=1e-6)
    trained, begun = CoreCheckpoint(tmp_path / "deeper"), CoreCheckpoint(tmp_path / "deep")
    name = "layers.1.mlp.linear_fc2.weight"
    assert not begun.tensor(name).any()
    assert trained.tensor(name).any()


def test_a_dry_run_shows_the_plan_and_writes_nothing(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-layers", "3", "--zero-new", "--in-channels", "6", "--use-additional-conditions", "--dry-run"]
    assert upcycle(run, tmp_path / "out", *options) == 0
    told = capsys.readouterr().out
    assert "layers.1 <- layers.0, adds nothing at first" in told
    assert "zeros for 2 channels" in told
    assert "fps_embedder.linear_1.weight <- drawn anew" in told
    assert "the function at the start is that of the source" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_attention_heads": 8}, "num_attention_heads 4 -> 8"),
        ({"attention_head_dim": 32, "rope_channel_split": None}, "attention_head_dim 16 -> 32"),
        ({"patch_size": 2}, "patch_size 1 -> 2"),
        ({"caption_channels": [64, 32]}, "caption_channels [64, 48] -> [64, 32]"),
        ({"in_channels": 2}, "in_channels 4 -> 2"),
        ({"out_channels": 8}, "out_channels 4 -> 8"),
        ({"norm_eps": 1e-5}, "norm_eps 1e-06 -> 1e-05"),
        ({}, "nothing to do"),
        ({"num_layers": 0}, "num_layers=0 must be at least 1"),
        ({"layers": 3}, "unknown field 'layers'"),
    ],
)
def test_sizes_that_cannot_change_are_refused_by_name(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], model: dict[str, Any], message: str
) -> None:
    path = tmp_path / "target.yaml"
    path.write_text(yaml.safe_dump({"model": config_to_dict(MODEL) | model}))
    assert upcycle(run, tmp_path / "out", "--like", str(path)) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-layers", "5", "--depth-schedule", "blocks"], "blocks reaches 4 layers from 2, not 5"),
        (["--num-layers", "1", "--depth-schedule", "stack"], "2 -> 1 copies none"),
        (["--num-layers", "1", "--zero-new"], "leave some of 0 to 1 out"),
        (["--layers", "1,0,1", "--zero-new"], "change their order"),
        (["--in-channels", "8", "--zero-new"], "no layer is copied"),
        (["--layers", "0,2"], "the source has layers 0 to 1"),
        (["--layers", "0,-1,1"], "--layers -1"),
        (["--layers", "0,1,1", "--num-layers", "4"], "names 3 layers, num_layers is 4"),
        (["--layers", "0,1,1", "--depth-schedule", "stack"], "leave --depth-schedule stack out"),
        (["--layers", "a,b"], "a,b is not a list of numbers"),
        (["--num-layers", "3", "--ema"], "holds no averaged weights"),
        (["--like", "nowhere.yaml"], "no such file"),
        (["--layers", "0,1"], "nothing to do"),
        (["--num-layers", "0"], "num_layers=0 must be at least 1"),
        (["--in-channels", "0"], "in_channels=0 must be at least 1"),
        ([], "nothing to do"),
    ],
)
def test_options_that_contradict_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert upcycle(run, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_stopped_command_goes_on(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--num-layers", "4"]
    assert upcycle(run, tmp_path / "whole", *options) == 0
    monkeypatch.setattr(transfer, "_BYTES_BETWEEN_NOTES", 1)
    tensor, read = UpcycledWeights.tensor, list[str]()

    def read_until_stopped(weights: UpcycledWeights, name: str) -> Tensor:
        read.append(name)
        if len(read) == 30:
            raise KeyboardInterrupt
        return tensor(weights, name)

    monkeypatch.setattr(UpcycledWeights, "tensor", read_until_stopped)
    assert upcycle(run, tmp_path / "out", *options) == 130
    assert not (tmp_path / "out").exists()
    assert upcycle(run, tmp_path / "out", *options) == 0
    assert "continuing" in capsys.readouterr().err
    assert len(read) < len(CoreCheckpoint(tmp_path / "out").templates) + 30
    layers_of(tmp_path / "out", run, [0, 0, 1, 1])
    records = [json.loads((tmp_path / name / "upcycle.json").read_text()) for name in ("whole", "out")]
    assert records[0]["source_digest"] == records[1]["source_digest"]


def test_what_was_begun_with_another_reading_does_not_go_on(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.safetensors"
    adapter.write_bytes(b"1")

    def identity(**reading: Any) -> dict[str, Any]:
        return Derivation("upcycle", [tmp_path / "source"], {"layers": [0]}, Reading(**reading)).identity

    assert identity() == identity(tell=print)
    with_adapter = identity(loras=(str(adapter),))
    assert len({json.dumps(each) for each in (identity(), identity(ignored=("x",)), with_adapter)}) == 3
    adapter.write_bytes(b"12")
    assert identity(loras=(str(adapter),)) != with_adapter


def test_plans_name_their_sources() -> None:
    plan = Plan(DiTConfig(num_layers=1), DiTConfig(num_layers=2), (0, 0), frozenset({1}))
    assert plan.source("layers.1.norm1.weight") == "layers.0.norm1.weight"
    assert plan.source("layers.1.mlp.linear_fc2.weight") is None
    assert plan.source("head.projection.weight") == "head.projection.weight"
