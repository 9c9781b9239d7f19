"""Commands of `megatron-video ckpt` with inputs that they must refuse, and what they must say: a table, and its inputs.

The inputs are small and made by `make_inputs`; commands are run in their folder, so that messages hold no long paths.
docs/checkpoint_pages.py writes what happens into docs/checkpoints/refusals.md; tests/unit/test_ckpt_refusals.py
compares it with the table.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from cut_checkpoint import RELEASED_FILE, make_tensors, sign, write_cut_checkpoint, write_released_form
from safetensors.torch import load_file, save_file
from tiny_models import MODEL, write_tiny_vae
from torch import Tensor

from checkpoints_tools import cli
from checkpoints_tools.core_contents import METADATA_FILE
from megatron_video.cli import run_command

QKV = "layers.1.self_attention.linear_qkv.weight"
RELEASED_QKV = "transformer_blocks.1.attn1.wqkv.weight"
STEP = "run/checkpoints/step_00000007"


@dataclass(frozen=True)
class Refusal:
    """One command."""

    command: str
    """After `megatron-video ckpt`."""
    says: str
    """A part of the message."""
    code: int = 2
    """2: bad input, 1: differences or faults were found."""


REFUSALS: dict[str, list[Refusal]] = {
    "Inputs of any command": [
        Refusal("convert --in nowhere --out out", "nowhere is not there"),
        Refusal("convert --in empty --out out", "is in no form that is known"),
        Refusal("convert --in half/step_00000009.writing --out out", "its writing was interrupted"),
        Refusal("convert --in lost/step_00000007 --out out", "common.pt is missing"),
        Refusal("convert --in grown/step_00000007 --out out", "config.yaml has"),
        Refusal("convert --in no_state/step_00000007 --out out", "has no train_state.json"),
        Refusal("convert --in run --out weights", "weights exists already"),
        Refusal("convert --in harmful/step_00000007 --out out", "a pickle that asks for posix.system"),
    ],
    "Released folders and files": [
        Refusal("convert --in released_missing --out out", "lacks tensors: pos_embed.proj.bias"),
        Refusal("convert --in released_unknown --out out", "has unknown tensors: strange.weight"),
        Refusal("convert --in released_shape --out out", "proj_out.bias has shape [7], its config says [4]"),
        Refusal("convert --in released_nan --out out", f"{RELEASED_QKV} holds NaN or infinite values"),
        Refusal("convert --in released_no_json --out out", "config.json is not JSON"),
        Refusal("convert --in released_field --out out", "norm_type='layer_norm'"),
        Refusal("convert --in released_unknown_field --out out", "has fields that no released"),
        Refusal("convert --in released_garbage --out out", "cannot be read as safetensors"),
        Refusal("convert --in released_cut_off --out out", "cannot be read as safetensors"),
        Refusal("convert --in index_lost --out out", "names files that are not there: c.safetensors"),
        Refusal("convert --in index_wrong --out out", "disagree on where these are"),
        Refusal("convert --in index_outside --out out", "names files outside of its folder"),
        Refusal("convert --in twice --out out", "give one of them alone"),
    ],
    "Weights of other programs": [
        Refusal("convert --in torch/harmful.pt --out out", "asks to run posix.system"),
        Refusal("convert --in torch/garbage.pt --out out", "is no whole file of torch.save"),
        Refusal("convert --in torch/nothing.pt --out out", "holds no tensors by name"),
        Refusal("convert --in torch/twice.pt --out out", "holds the model more than once"),
        Refusal("convert --in torch/unknown.pt --out out", "has unknown tensors"),
        Refusal("convert --in torch/plain.pt --key ema --out out", "no tensors of this model under --key ema"),
        Refusal("convert --in no_config/plain.pt --out out", "does not say what model it is of"),
        Refusal("convert --in no_config/plain.pt --config nowhere.yaml --out out", "nowhere.yaml is not there"),
        Refusal("convert --in deepspeed --out out", "it is no checkpoint of DeepSpeed"),
        Refusal("convert --in run --lora lora_unknown --out out", "changes modules that this model has not"),
        Refusal("convert --in run --lora lora_shape --out out", "is for a weight of"),
        Refusal("convert --in run --lora lora_half --out out", "without the other matrix"),
        Refusal("convert --in run --lora empty --out out", "holds no adapter"),
        Refusal("convert --in run --lora lora_shape=0 --out out", "must be a number other than 0"),
    ],
    "convert": [
        Refusal("convert --in run --dtype bf16 --out out", "--allow-lossy"),
        Refusal("convert --in huge --dtype bf16 --allow-lossy '*' --out out", "becomes infinite"),
        Refusal("convert --in run --allow-lossy '*' --out out", "without --dtype nothing is cast"),
        Refusal("convert --in weights --ema --out out", "holds no averaged weights"),
        Refusal("convert --in released --ema --out out", "only megatron-core checkpoints keep averages"),
        Refusal("convert --in run --to file --out out", "does not fit --out out"),
        Refusal("convert --in run --to core --max-shard-gb 1 --out out", "--max-shard-gb cuts released folders"),
        Refusal("convert --in run --max-shard-gb 0 --out out", "must be above 0"),
        Refusal("convert --in run --dry-run --no-verify --out out", "give one of them"),
        Refusal("convert --in nan --out out", f"{QKV} holds NaN or infinite values"),
    ],
    "average": [
        Refusal("average run --out out", "one checkpoint has no mean"),
        Refusal(f"average run {STEP} --out out", "is given twice"),
        Refusal("average run=0 weights --out out", "the weight 0 must be above 0"),
        Refusal("average run other --out out", "hold other models: norm_eps"),
        Refusal("average run nan --out out", "holds NaN or infinite values"),
        Refusal("average run weights --ema --out out", "holds no averaged weights"),
        Refusal("average run released --ema --out out", "only those keep averages"),
        Refusal("average run weights --ema-decay 0.9 --out out", "both after update 7"),
        Refusal("average run released --ema-decay 0.9 --out out", "does not say after which step"),
        Refusal("average run/checkpoints/step_* --ema-decay 0.99 --out out", "lie before the first checkpoint"),
        Refusal("average run=2 weights --ema-decay 0.9 --out out", "leave the =WEIGHT of the sources out"),
        Refusal("average run/checkpoints/step_* --ema-decay 1.5 --out out", "1.5"),
    ],
    "reshard": [
        Refusal("reshard --in run --tp 3 --out out", "tensor_model_parallel_size=3"),
        Refusal("reshard --in run --pp 3 --out out", "pipeline_model_parallel_size=3"),
        Refusal("reshard --in released --out out", "holds no complete checkpoint"),
        Refusal("reshard --in run --ema replace-weights --out out", "needs --drop-optimizer"),
        Refusal("reshard --in weights --ema replace-weights --drop-optimizer --out out", "holds no averaged weights"),
        Refusal("reshard --in run --dtype bf16 --out out", "--allow-lossy"),
        Refusal("reshard --in flipped/step_00000007 --out out", "is damaged: "),
        Refusal("reshard --in nan --dtype bf16 --allow-lossy '*' --out out", "holds NaN or infinite values"),
    ],
    "prune": [
        Refusal("prune --in weights --out out", "holds nothing of what is to be left out"),
        Refusal("prune --in run --in-place --keep-whole -1", "is at least 0"),
        Refusal("prune --in flipped/step_00000007 --out out", "is damaged: "),
        Refusal("prune --in run --out weights", "weights exists already"),
    ],
    "upcycle": [
        Refusal("upcycle --in vae --num-layers 4 --out out", "only a video DiT can be upcycled"),
        Refusal("upcycle --in run --out out", "nothing to do"),
        Refusal("upcycle --in run --in-channels 2 --out out", "weights cannot be taken over to in_channels"),
        Refusal("upcycle --in run --like wider.yaml --out out", "weights cannot be taken over to"),
        Refusal("upcycle --in run --num-layers 5 --depth-schedule blocks --out out", "reaches 4 layers from 2"),
        Refusal("upcycle --in run --num-layers 3 --layers 0,1 --out out", "names 2 layers, num_layers is 3"),
        Refusal("upcycle --in run --num-layers 3 --layers 0,1,2 --out out", "the source has layers 0 to 1"),
        Refusal("upcycle --in run --num-layers 3 --layers 0,x --out out", "is not a list of numbers"),
        Refusal("upcycle --in run --in-channels 8 --zero-new --out out", "no layer is copied"),
        Refusal("upcycle --in nan --num-layers 4 --out out", "holds NaN or infinite values"),
    ],
    "pipeline": [
        Refusal("pipeline --transformer run --vae vae --out out", "a pipeline needs all four models"),
        Refusal("pipeline --in released --out out", "it is no whole pipeline"),
        Refusal("pipeline --in released --vae vae --out out", "give one or other"),
    ],
    "diff": [
        Refusal("diff run vae", "holds a video DiT"),
        Refusal("diff run nowhere", "nowhere is not there"),
        Refusal("diff weights released --ema", "holds averages; leave --ema out"),
        Refusal("diff run weights --optimizer", "holds no optimizer state; leave --optimizer out"),
        Refusal("diff run weights --filter 'none*'", "no tensor is named none*"),
        Refusal("diff run weights --tolerance -1", "must be a number of at least 0"),
        Refusal("diff run nan", "1 of 49 tensors differ", code=1),
        Refusal("diff run released_missing", "only first", code=1),
        Refusal("diff run released_shape", "float32 4 | float32 7", code=1),
    ],
    "verify": [
        Refusal("verify nowhere", "nowhere is not there"),
        Refusal("verify empty", "is in no form that is known"),
        Refusal("verify run --config tiny", "is neither a file nor a preset"),
        Refusal("verify run --config demo --like weights", "give one of them"),
        Refusal("verify run --threads 0", "must be at least 1"),
        Refusal("verify flipped/step_00000007", "has checksum", code=1),
        Refusal("verify cut_off/step_00000007 --quick", "pieces lie beyond", code=1),
        Refusal("verify lost/step_00000007 --quick", "common.pt is missing", code=1),
        Refusal("verify half/step_00000009.writing", "its writing was interrupted", code=1),
        Refusal("verify extra/step_00000007 --quick", "notes.txt is not part of the checkpoint", code=1),
        Refusal("verify no_tensor", f"{QKV} is missing", code=1),
        Refusal("verify nan", f"{QKV} holds 1 NaN and 0 infinite values", code=1),
        Refusal("verify run --like other --quick", "model.norm_eps is 1e-06; other says 1e-05", code=1),
        Refusal("verify run --config demo --quick", "model.num_layers is 2; demo says 6", code=1),
        Refusal("verify harmful/step_00000007 --quick", "a pickle that asks for posix.system", code=1),
        Refusal("verify index_wrong --quick", "it says that", code=1),
        Refusal("verify twice --quick", "is stored 2 times", code=1),
        Refusal("verify released_cut_off --quick", "it is cut off", code=1),
        Refusal("verify released_nan", f"{RELEASED_QKV} holds 1 NaN", code=1),
        Refusal("verify total_size --quick", "it says total_size=12", code=1),
    ],
    "inspect": [
        Refusal("inspect nowhere", "nowhere is not there"),
        Refusal("inspect empty", "is in no form that is known"),
        Refusal("inspect run --tensors --filter 'none*'", "no tensor is named none*"),
        Refusal("inspect harmful/step_00000007", "a pickle that asks for posix.system"),
        Refusal("inspect cut_off/step_00000007 --stats --part all", "cannot be read"),
    ],
}


def run_refusal(refusal: Refusal) -> tuple[int, str]:
    """Exit code and message of a command, in the folder of `make_inputs`."""
    printed, errors = io.StringIO(), io.StringIO()
    arguments: list[str] = []
    for word in shlex.split(refusal.command):
        # As a shell does.
        arguments += sorted(map(str, Path().glob(word))) if "/" in word and "*" in word else [word]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
        code = run_command(cli.main, arguments)
    return code, (printed.getvalue() if code == 1 else errors.getvalue()).strip()


class _Harm:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch harmed",)


def make_inputs(folder: Path) -> None:
    """Everything that the commands are given, in a new folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = make_tensors()
    weights = {name: value for name, value in tensors.items() if not name.startswith(("ema.", "optimizer."))}
    _make_core(folder, tensors, weights)
    _make_released(folder, weights)
    _make_indexes(folder)
    _make_foreign(folder, weights)
    write_tiny_vae(folder)
    (folder / "empty").mkdir()
    model = {name: value for name, value in vars(MODEL).items() if name != "rope_channel_split"}
    (folder / "wider.yaml").write_text(json.dumps({"model": {**model, "num_attention_heads": 8}}, default=list))


def _make_core(folder: Path, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    step = write_cut_checkpoint(folder / STEP, tensors)
    write_cut_checkpoint(folder / "run/checkpoints/step_00000004", make_tensors(seed=1), step=4)
    write_cut_checkpoint(folder / "weights", weights)
    write_cut_checkpoint(folder / "other", weights, model=replace(MODEL, norm_eps=1e-5))
    write_cut_checkpoint(folder / "no_tensor", {name: value for name, value in weights.items() if name != QKV})
    for name, value in (("nan", float("nan")), ("huge", 3.4e38)):
        write_cut_checkpoint(folder / name, {**weights, QKV: _with(weights[QKV], value)})
    for name in ("flipped", "lost", "grown", "no_state", "harmful", "extra", "cut_off"):
        shutil.copytree(step, folder / name / step.name)
    shutil.copytree(step, folder / "half" / "step_00000009.writing")
    _flip(folder / "flipped" / step.name / "__0_0.distcp")
    (folder / "lost" / step.name / "common.pt").unlink()
    os.truncate(folder / "cut_off" / step.name / "__0_0.distcp", 5000)
    with open(folder / "grown" / step.name / "config.yaml", "a", encoding="utf-8") as file:
        file.write("# more\n")
    (folder / "no_state" / step.name / "train_state.json").unlink()
    (folder / "harmful" / step.name / METADATA_FILE).write_bytes(pickle.dumps(_Harm()))
    sign(folder / "harmful" / step.name)
    (folder / "extra" / step.name / "notes.txt").write_text("a note")


def _make_released(folder: Path, weights: Mapping[str, Tensor]) -> None:
    whole = write_released_form(folder / "released", weights)
    stored = load_file(whole / RELEASED_FILE)
    changes: dict[str, dict[str, Tensor | None]] = {
        "missing": {"pos_embed.proj.bias": None},
        "unknown": {"strange.weight": torch.ones(2)},
        "shape": {"proj_out.bias": torch.ones(7)},
        "nan": {RELEASED_QKV: _with(stored[RELEASED_QKV], float("nan"))},
    }
    for name, change in changes.items():
        copy = _copy(whole, f"released_{name}")
        save_file({key: v for key, v in {**stored, **change}.items() if v is not None}, copy / RELEASED_FILE)
    (_copy(whole, "released_no_json") / "config.json").write_text("{")
    config = json.loads((whole / "config.json").read_text())
    for name, field in (("field", {"norm_type": "layer_norm"}), ("unknown_field", {"depth": 3})):
        (_copy(whole, f"released_{name}") / "config.json").write_text(json.dumps(config | field))
    (_copy(whole, "released_garbage") / RELEASED_FILE).write_bytes(b"\xff" * 100)
    content = (whole / RELEASED_FILE).read_bytes()
    (_copy(whole, "released_cut_off") / RELEASED_FILE).write_bytes(content[:-100])


def _make_indexes(folder: Path) -> None:
    """Released weights in two files, with indexes that are wrong."""
    stored = load_file(folder / "released" / RELEASED_FILE)
    names = sorted(stored)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    placed = {name: file for file, members in files.items() for name in members}
    total = sum(tensor.nbytes for tensor in stored.values())
    other = {"a.safetensors": "b.safetensors", "b.safetensors": "a.safetensors"}
    maps: dict[str, tuple[dict[str, str], int]] = {
        "lost": ({**placed, "ghost": "c.safetensors"}, total),
        "wrong": ({**placed, RELEASED_QKV: other[placed[RELEASED_QKV]]}, total),
        "outside": ({**placed, RELEASED_QKV: "../a.safetensors"}, total),
    }
    for name, (placement, size) in [*((f"index_{n}", m) for n, m in maps.items()), ("total_size", (placed, 12))]:
        copy = _copy(folder / "released", name)
        (copy / RELEASED_FILE).unlink()
        for file, members in files.items():
            save_file({each: stored[each] for each in members}, copy / file)
        index = {"metadata": {"total_size": size}, "weight_map": placement}
        (copy / f"{RELEASED_FILE}.index.json").write_text(json.dumps(index))
    twice = _copy(folder / "released", "twice")
    (twice / RELEASED_FILE).rename(twice / "a.safetensors")
    shutil.copy(twice / "a.safetensors", twice / "b.safetensors")


def _make_foreign(folder: Path, weights: Mapping[str, Tensor]) -> None:
    place = folder / "torch"
    place.mkdir()
    shutil.copy(folder / "weights" / "config.yaml", place)
    plain = dict(weights)
    files: dict[str, Any] = {
        "plain": plain,
        "harmful": {"model": plain, "more": _Harm()},
        "nothing": {"step": 3},
        "twice": {"model": plain, "ema": plain},
        "unknown": {**plain, "strange.weight": torch.ones(2)},
    }
    for name, content in files.items():
        torch.save(content, place / f"{name}.pt")
    (place / "garbage.pt").write_bytes(b"no zip")
    (folder / "no_config").mkdir()
    shutil.copy(place / "plain.pt", folder / "no_config")
    (folder / "deepspeed").mkdir()
    torch.save({}, folder / "deepspeed" / "mp_rank_00_model_states.pt")
    shutil.copy(place / "config.yaml", folder / "deepspeed")
    good = "base_model.model.transformer_blocks.0.attn1.wqkv"
    adapters: dict[str, dict[str, Tensor]] = {
        "unknown": {f"base_model.model.other.lora_{part}.weight": torch.ones(shape) for part, shape in _LORA.items()},
        "shape": {f"{good}.lora_{part}.weight": torch.ones(shape) for part, shape in _LORA.items()},
        "half": {f"{good}.lora_A.weight": torch.ones(2, 64)},
    }
    for name, content in adapters.items():
        target = folder / f"lora_{name}"
        target.mkdir()
        save_file(content, target / "adapter_model.safetensors")
        (target / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 2}))


_LORA = {"A": (2, 8), "B": (8, 2)}


def _copy(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.with_name(name)))


def _with(tensor: Tensor, value: float) -> Tensor:
    changed = tensor.clone()
    changed.view(-1)[5] = value
    return changed


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
