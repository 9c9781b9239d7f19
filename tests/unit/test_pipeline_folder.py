"""The folder of all models: put together, loaded by the libraries that the public code uses, and taken apart."""

from __future__ import annotations

import json
import resource
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import CAPTIONS, write_tiny_run, write_tiny_text_encoders, write_tiny_vae

from checkpoints_tools import cli
from checkpoints_tools.forms import open_weights
from checkpoints_tools.pipeline_layout import CONFIGS, FOLDERS
from checkpoints_tools.released_config import config_text
from checkpoints_tools.weights import Weights, digest
from megatron_video.cli import run_command
from megatron_video.files import file_sha256
from megatron_video.text import TextEncoders, text_folders
from megatron_video.vae import load_vae

# Bytes of the files on huggingface.co/stepfun-ai/stepvideo-ti2v, which has the same pipeline class.
RELEASED_BYTES = {"model_index.json": 243, "scheduler/scheduler_config.json": 174}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run, and the other models as they are built for small runs."""
    folder = tmp_path_factory.mktemp("sources")
    text = write_tiny_text_encoders(folder)
    parts = {"transformer": write_tiny_run(folder), "vae": write_tiny_vae(folder)}
    return parts | {"clip": text / "clip", "llm": text / "step_llm"}


def run(*arguments: str | Path) -> int:
    return run_command(cli.main, ["pipeline", *map(str, arguments)])


def options(sources: dict[str, Path]) -> list[str]:
    return [text for part, path in sources.items() for text in (f"--{part}", str(path))]


@pytest.fixture(scope="module")
def pipeline(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("pipeline") / "whole"
    assert run(*options(sources), "--out", output, "--other-sizes", "--max-shard-gb", "0.0002") == 0
    return output


def digests(weights: Weights) -> dict[str, str]:
    return {name: digest(weights.tensor(name)) for name in weights.templates}


def test_folder_holds_what_the_public_code_asks_for_by_name(pipeline: Path, sources: dict[str, Path]) -> None:
    files = {str(path.relative_to(pipeline)) for path in pipeline.rglob("*") if path.is_file()}
    assert {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/vae_v2.safetensors",
        "hunyuan_clip/clip_text_encoder/config.json",
        "hunyuan_clip/tokenizer/vocab.txt",
        "step_llm/config.json",
        "step_llm/step1_chat_tokenizer.model",
    } <= files
    assert not [name for name in files if Path(name).name.startswith(".")]
    for name, size in RELEASED_BYTES.items():
        assert (pipeline / name).stat().st_size == size
    for part, place in FOLDERS.items():
        assert digests(open_weights(pipeline / place)) == digests(open_weights(sources[part])), part
    vocabulary = pipeline / "hunyuan_clip/tokenizer/vocab.txt"
    assert file_sha256(vocabulary) == file_sha256(sources["clip"] / "vocab.txt")


def test_our_own_loaders_take_it(pipeline: Path, sources: dict[str, Path]) -> None:
    cpu = torch.device("cpu")
    ours = TextEncoders.load(*text_folders(pipeline), cpu, torch.float32)
    built = TextEncoders.load(sources["clip"], sources["llm"], cpu, torch.float32)
    for a, b in zip(ours.encode(CAPTIONS), built.encode(CAPTIONS), strict=True):
        assert torch.equal(a.clip, b.clip)
        assert torch.equal(a.llm, b.llm)
    latents = torch.ones(1, 1, 4, 1, 1)
    assert torch.equal(load_vae(pipeline / "vae").decode(latents), load_vae(sources["vae"]).decode(latents))


def test_transformers_loads_clip_as_the_public_code_does(pipeline: Path, sources: dict[str, Path]) -> None:
    from transformers import BertModel, BertTokenizer

    folder = pipeline / "hunyuan_clip"
    tokenizer = BertTokenizer.from_pretrained(folder / "tokenizer")
    model, found = BertModel.from_pretrained(folder / "clip_text_encoder", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    stored = load_file(sources["clip"] / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    assert all(torch.equal(value, stored[name]) for name, value in model.state_dict().items())
    encoders = TextEncoders.load(sources["clip"], sources["llm"], torch.device("cpu"), torch.float32)
    # Slots of the small encoder; the public code's 77 are more than its positions.
    inputs = tokenizer(
        CAPTIONS, padding="max_length", max_length=encoders.clip_length, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        states = model.eval()(inputs.input_ids, attention_mask=inputs.attention_mask).last_hidden_state
    for state, expected in zip(states, encoders.encode(CAPTIONS), strict=True):
        torch.testing.assert_close(state, expected.clip, rtol=0, atol=1e-5)


def test_transformers_loads_step_llm_as_the_public_code_does(pipeline: Path, sources: dict[str, Path]) -> None:
    """By PreTrainedModel and a plain PretrainedConfig, whose fields the public modules read."""
    from transformers import PretrainedConfig, PreTrainedModel

    from megatron_video.text.step_llm import StepLLM, StepLLMConfig

    class Step1Model(PreTrainedModel):
        config_class = PretrainedConfig

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            for name in ("seq_length", "use_flash_attn", "attention_dropout", "hidden_dropout", "params_dtype"):
                assert hasattr(config, name), name
            assert not config.fp32_residual_connection
            assert not config.embedding_weights_in_fp32
            ours = StepLLM(StepLLMConfig.from_json(config.to_dict(), "config.json"))
            self.tok_embeddings, self.transformer = ours.tok_embeddings, ours.transformer
            self.post_init()

    _, found = Step1Model.from_pretrained(pipeline / "step_llm", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_diffusers_loads_transformer_and_scheduler_by_the_index(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stand-ins for the public code's two modules, which model_index.json names; the libraries are real."""
    from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config

    expected = {
        name: value
        for path in (pipeline / "transformer").glob("*.safetensors")
        for name, value in load_file(path).items()
    }

    class StepVideoModel(ModelMixin, ConfigMixin):
        # Arguments as in the public code; diffusers refuses or drops what is not among them.
        @register_to_config
        def __init__(
            self,
            num_attention_heads: int = 48,
            attention_head_dim: int = 128,
            in_channels: int = 64,
            out_channels: int = 64,
            num_layers: int = 48,
            dropout: float = 0.0,
            patch_size: int = 1,
            norm_type: str = "ada_norm_single",
            norm_elementwise_affine: bool = False,
            norm_eps: float = 1e-6,
            use_additional_conditions: bool = False,
            caption_channels: Any = (6144, 1024),
            attention_type: str = "parallel",
        ) -> None:
            super().__init__()
            for name, value in expected.items():
                _set(self, name.split("."), torch.nn.Parameter(torch.zeros_like(value)))

    class FlowMatchDiscreteScheduler(SchedulerMixin, ConfigMixin):
        @register_to_config
        def __init__(
            self,
            num_train_timesteps: int = 1000,
            reverse: bool = True,
            solver: str = "none",
            device: str | None = "none",
        ) -> None:
            self.started = True

    class StepVideoPipeline(DiffusionPipeline):
        def __init__(self, transformer: StepVideoModel, scheduler: FlowMatchDiscreteScheduler) -> None:
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

    _stand_in(monkeypatch, "stepvideo.modules.model", StepVideoModel, ModelMixin)
    _stand_in(monkeypatch, "stepvideo.diffusion.scheduler", FlowMatchDiscreteScheduler, SchedulerMixin)
    loaded = StepVideoPipeline.from_pretrained(pipeline)
    state = loaded.transformer.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())
    assert loaded.transformer.config.num_layers == 2
    assert loaded.transformer.config.caption_channels == [64, 48]
    scheduler = loaded.scheduler.config
    assert (scheduler.reverse, scheduler.solver, scheduler.device) == (False, "euler", None)


def _stand_in(monkeypatch: pytest.MonkeyPatch, module: str, *classes: type) -> None:
    parts = module.split(".")
    for name in (".".join(parts[: i + 1]) for i in range(len(parts))):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for each in classes:
        # diffusers also looks for the base class there, which the public module imports.
        setattr(sys.modules[module], each.__name__, each)


def _set(module: torch.nn.Module, path: list[str], parameter: torch.nn.Parameter) -> None:
    for name in path[:-1]:
        if not hasattr(module, name):
            module.add_module(name, torch.nn.Module())
        module = getattr(module, name)
    module.register_parameter(path[-1], parameter)


def test_taken_apart_and_put_together_again_nothing_changes(
    pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, again = tmp_path / "parts", tmp_path / "again"
    assert run("--in", pipeline, "--out", parts, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {part["direction"] for part in report["parts"].values()} == {"released -> core"}
    assert all(part["verified"] for part in report["parts"].values())
    for place in FOLDERS.values():
        assert run_command(cli.main, ["verify", str(parts / place)]) == 0
    cores = {part: parts / place for part, place in FOLDERS.items()}
    assert run(*options(cores), "--out", again, "--other-sizes", "--max-shard-gb", "0.0002") == 0
    names = {path.relative_to(pipeline) for path in pipeline.rglob("*") if path.is_file()}
    assert names == {path.relative_to(again) for path in again.rglob("*") if path.is_file()}
    assert [name for name in names if file_sha256(pipeline / name) != file_sha256(again / name)] == []


def test_a_failed_write_leaves_what_is_done_and_the_same_command_goes_on(
    sources: dict[str, Path], pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, partial = tmp_path / "whole", tmp_path / "whole.partial"
    arguments = [*options(sources), "--out", output, "--other-sizes", "--max-shard-gb", "0.0002"]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Room for the files of the transformer, not for that of the VAE.
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, before[1]))
    try:
        assert run(*arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "vae_v2.safetensors: File too large" in capsys.readouterr().err
    assert not output.exists()
    written = (partial / "transformer/config.json").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert f"continuing {partial}" in capsys.readouterr().err
    assert not partial.exists()
    assert (output / "transformer/config.json").stat().st_mtime_ns == written
    names = {path.relative_to(pipeline) for path in pipeline.rglob("*") if path.is_file()}
    assert names == {path.relative_to(output) for path in output.rglob("*") if path.is_file()}
    assert [name for name in names if file_sha256(pipeline / name) != file_sha256(output / name)] == []


def test_what_the_public_code_cannot_load_is_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    assert run(*options(sources), "--out", output) == 2
    error = capsys.readouterr().err
    for reason in ("transformer: attention_head_dim=16, not 128", "vae: latent_channels=4, not 64", "--other-sizes"):
        assert reason in error
    assert not output.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": "clip"}, "the part 'vae' is a Video-VAE"),
        ({"llm": None}, "needs all four models: --llm missing"),
        ({"clip": "nowhere"}, "no vocab.txt in"),
    ],
)
def test_wrong_parts_are_refused(
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str | None],
    message: str,
) -> None:
    given = {part: path for part, path in sources.items() if changes.get(part, "") is not None}
    given |= {part: sources.get(other, tmp_path / other) for part, other in changes.items() if other}
    assert run(*options(given), "--out", tmp_path / "out", "--other-sizes") == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_of_another_model_and_widths_that_do_not_fit_are_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (sources["clip"] / "vocab.txt").read_text().splitlines()
    (tmp_path / "vocab.txt").write_text("\n".join(words[:-1]) + "\n")
    arguments = [*options(sources), "--out", tmp_path / "out", "--other-sizes", "--dry-run"]
    assert run(*arguments, "--clip-tokenizer", tmp_path) == 2
    assert f"{len(words) - 1} tokens, the embedding {len(words)} rows" in capsys.readouterr().err
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((sources["vae"] / name).read_bytes())
    assert run(*arguments) == 0
    assert "would be written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_whole_pipeline_is_no_single_model(pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(cli.main, ["convert", "--in", str(pipeline), "--out", str(tmp_path / "out")]) == 2
    assert f"{pipeline / 'transformer'}" in capsys.readouterr().err
    assert run("--in", pipeline / "transformer", "--out", tmp_path / "out") == 2
    assert "has no model_index.json" in capsys.readouterr().err


def test_other_models_are_refused_where_a_dit_is_wanted(sources: dict[str, Path], tmp_path: Path) -> None:
    from megatron_video.errors import UserError
    from training.checkpoint import check_same_model, read_model_config

    core = tmp_path / "vae_core"
    assert run_command(cli.main, ["convert", "--in", str(sources["vae"]), "--out", str(core)]) == 0
    with pytest.raises(UserError, match="holds a Video-VAE and not a video DiT"):
        read_model_config(core)
    model = open_weights(sources["transformer"]).model
    with pytest.raises(UserError, match="holds a Video-VAE and not a video DiT"):
        check_same_model(core, model.config)


def test_configs_are_written_as_diffusers_writes_them() -> None:
    assert {name: len(config_text(values)) for name, values in CONFIGS.items()} == RELEASED_BYTES
