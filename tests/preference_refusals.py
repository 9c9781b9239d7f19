"""What the steps of Video-DPO must refuse, as a user would type it, and what the user is told.

Read by test_preference_refusals.py, and by write_preference_refusals.py, which makes docs/alignment/refusals.md of it.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from tiny_pairs import PAIRS_INFO, write_tiny_pairs
from tiny_samples import make_samples
from tiny_shards import CLIP_DIM, CLIP_SLOTS, LLM_DIM, MODEL_OVERRIDES, write_tiny_shards

from megatron_video.buckets import parse_bucket
from megatron_video.shard_schema import ShardSample, shard_name, write_null_text
from megatron_video.shards import ShardWriter, finish_dataset
from megatron_video.text import TextStates
from training.reference_errors import FOLDER
from training.sample_latents import latent_file, write_latent

_BLOCK = "steps-to-00000004.safetensors"
_TRAIN = ["dpo", "train", "--config", "tiny.yaml"]


@dataclass(frozen=True)
class Refusal:
    """A command that must not do what it is asked to."""

    what: str
    words: list[str]
    """After `megatron-video`."""
    told: tuple[str, ...]
    """Each must stand in the message."""
    before: Callable[[Path], None] | None = None
    """What makes it so, in a folder that has what `make_inputs` made."""
    prefix: list[str] = field(default_factory=list)
    """Of the command line."""
    code: int = 2
    """Exit code; 0: it is no refusal, and what is told is told on standard output."""

    def command(self) -> str:
        """As typed."""
        return shlex.join([*self.prefix, "megatron-video", *self.words])


def megatron_video(folder: Path, *words: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    """`megatron-video WORDS` in a folder."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": f"{root}:{folder}", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    command = [*(prefix or []), sys.executable, "-m", "megatron_video", *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)


def make_inputs(folder: Path) -> None:
    """Samples, pairs, the run `base` that alignment starts from, and `done`, a run that is aligned."""
    write_tiny_shards(folder / "samples", learnable=True)
    write_tiny_pairs(folder / "pairs")
    make_samples(folder / "generated", {"a red circle": [0.2, 0.9], "a blue square": [0.4, 0.1]})
    settings = [*MODEL_OVERRIDES, "training.precision=fp32", "training.steps=4", "training.log_every=1"]
    settings += ["data.micro_batch_size=1", "data.global_batch_size=2", "optimizer.warmup_steps=0"]
    _write_yaml(folder / "base.yaml", [*settings, "data.shards=[samples]", "run.output_dir=base"])
    own = ["dpo.beta=40", "data.shards=[pairs]", "run.initial_weights=base", "run.output_dir=run", "run.stage=dpo"]
    _write_yaml(folder / "tiny.yaml", [*settings, *own])
    for words in (
        ["pretrain", "--config", "base.yaml"],
        ["pretrain", "--config", "base.yaml", "run.output_dir=other", "run.seed=5"],
        [*_TRAIN, "run.output_dir=done"],
        ["dpo", "score", "--samples", "generated", "--with", "brightness"],
    ):
        found = megatron_video(folder, *words)
        if found.returncode:
            raise RuntimeError(f"{shlex.join(words)}\n{found.stdout}{found.stderr}")


def told(refusal: Refusal, stdout: str, stderr: str) -> str:
    """The message; where the command goes on, the lines that matter."""
    if refusal.code:
        return "\n".join(line for line in stderr.strip().splitlines() if not line.startswith(("reference:", "\r")))
    return "\n".join(line for line in stdout.splitlines() if any(words in line for words in refusal.told))


def own_copy(inputs: Path, folder: Path) -> None:
    """A folder of one refusal: none meets what another has made."""
    shutil.copytree(inputs, folder)


def _write_yaml(path: Path, overrides: list[str]) -> None:
    content: dict[str, dict[str, object]] = {}
    for name, text in (override.split("=", 1) for override in overrides):
        group, key = name.split(".")
        content.setdefault(group, {})[key] = yaml.safe_load(text)
    path.write_text(yaml.safe_dump(content))


def _begun(folder: Path) -> None:
    """A run that was killed behind the reference's pass: errors, and no checkpoint."""
    (folder / "run").mkdir()
    shutil.copytree(folder / "done" / FOLDER, folder / "run" / FOLDER)


def _cut(folder: Path) -> None:
    _begun(folder)
    path = folder / "run" / FOLDER / _BLOCK
    path.write_bytes(path.read_bytes()[:-30])


def _flipped(folder: Path) -> None:
    _begun(folder)
    path = folder / "run" / FOLDER / _BLOCK
    content = bytearray(path.read_bytes())
    content[-1] ^= 4
    path.write_bytes(content)


def _deleted(folder: Path) -> None:
    _begun(folder)
    (folder / "run" / FOLDER / _BLOCK).unlink()


def _changed_weights(folder: Path) -> None:
    """The reference was trained on under the same name of a checkpoint."""
    _begun(folder)
    shutil.rmtree(folder / "base")
    shutil.move(folder / "other", folder / "base")


def _not_finite(folder: Path) -> None:
    generator, bucket = torch.Generator().manual_seed(0), "17x48x48"
    shape = parse_bucket(bucket).latent_shape
    with ShardWriter(folder / "broken", shard_name(0)) as writer:
        for number in range(4):
            winner, loser = (torch.randn(shape[0], 4, *shape[1:], generator=generator) for _ in range(2))
            winner[0, 0, 0, 0] = float("nan") if number == 2 else 0.0
            text = torch.randn(5, LLM_DIM, generator=generator), torch.randn(CLIP_SLOTS, CLIP_DIM, generator=generator)
            metadata = {"caption": "a red circle", "fps": 25.0}
            writer.add(ShardSample(f"pair-{number}", winner, *text, metadata, loser=loser), parse_bucket(bucket))
    write_null_text(folder / "broken", torch.randn(2, LLM_DIM), torch.zeros(CLIP_SLOTS, CLIP_DIM))
    finish_dataset(folder / "broken", PAIRS_INFO)


def _begun_on_other_pairs(folder: Path) -> None:
    _begun(folder)
    _not_finite(folder)


def _other_encoders(folder: Path) -> None:
    shutil.rmtree(folder / "pairs")
    write_tiny_pairs(folder / "pairs")
    path = folder / "pairs" / "dataset_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vae_fingerprint": "another"}))


def _other_shape(folder: Path) -> None:
    text = TextStates(torch.randn(5, LLM_DIM), torch.randn(CLIP_SLOTS, CLIP_DIM), 5, 5)
    write_latent(latent_file(folder / "generated", 1), torch.randn(3, 4, 3, 4), text)


def _own_reward(folder: Path) -> None:
    (folder / "rewards.py").write_text("def broken(sample):\n    return float('nan')\n")


def _other_samples(folder: Path) -> None:
    make_samples(folder / "others", {"a green circle": [0.3, 0.6]})
    shutil.copy(folder / "generated" / "scores.jsonl", folder / "others" / "scores.jsonl")


def _without_latent(folder: Path) -> None:
    latent_file(folder / "generated", 0).unlink()


def _other_prompts(folder: Path) -> None:
    make_samples(folder / "others", {"a green circle": [0.3, 0.6]})


_PAIR = ["dpo", "pair", "--samples", "generated", "--out", "new_pairs"]

REFUSALS: list[Refusal] = [
    Refusal(
        "resume with another beta",
        [*_TRAIN, "run.output_dir=done", "dpo.beta=50", "training.steps=9"],
        ("dpo.beta: 40.0 there, 50.0 here",),
    ),
    Refusal(
        "resume with another loss",
        [*_TRAIN, "run.output_dir=done", "dpo.loss=ipo", "training.steps=9"],
        ("dpo.loss: dpo there, ipo here",),
    ),
    Refusal(
        "reference errors of another checkpoint",
        [*_TRAIN, "run.initial_weights=other"],
        ("computed for something else", "reference: step_00000004", "Restore these values"),
        _begun,
    ),
    Refusal(
        "reference errors of another checkpoint of the same name",
        _TRAIN,
        ("computed for something else", "reference: step_00000004"),
        _changed_weights,
    ),
    Refusal("reference errors of another seed", [*_TRAIN, "run.seed=9"], ("seed: 0 there, 9 here",), _begun),
    Refusal(
        "reference errors of other pairs",
        [*_TRAIN, "data.shards=[broken]"],
        ("computed for something else", "data set:"),
        _begun_on_other_pairs,
    ),
    Refusal("a file of reference errors that was cut off", _TRAIN, (_BLOCK, "damaged", "delete it"), _cut),
    Refusal("one flipped bit in it", _TRAIN, (_BLOCK, "checksum", "delete it"), _flipped),
    Refusal(
        "a file of reference errors that is missing: computed again, and said so",
        _TRAIN,
        ("reference errors: 4 steps from step 0 on are computed once",),
        _deleted,
        code=0,
    ),
    Refusal(
        "no room for the reference errors",
        _TRAIN,
        ("reference's errors cannot be written", "Make room"),
        prefix=["prlimit", "--fsize=300"],
    ),
    Refusal(
        "latents that are not finite",
        [*_TRAIN, "data.shards=[broken]"],
        ("latent of the winner", "not finite", "pair-2"),
        _not_finite,
    ),
    Refusal(
        "pairs of other encoders than the reference's",
        _TRAIN,
        ("other encoders", "vae: another", "megatron-video dpo generate"),
        _other_encoders,
    ),
    Refusal("samples where pairs are needed", [*_TRAIN, "data.shards=[samples]"], ("single samples, not preference",)),
    Refusal(
        "pairs where samples are needed",
        ["pretrain", "--config", "base.yaml", "run.output_dir=new", "data.shards=[pairs]"],
        ("holds preference pairs",),
    ),
    Refusal("no reference", [*_TRAIN, "run.initial_weights=null"], ("run.initial_weights", "dpo.reference_weights")),
    Refusal("a reference that is not there", [*_TRAIN, "run.initial_weights=nowhere"], ("nowhere",)),
    Refusal("a reference of another size", [*_TRAIN, "model.num_layers=4"], ("num_layers",)),
    Refusal(
        "averaged weights that it does not have",
        [*_TRAIN, "dpo.reference_from_ema=true"],
        ("holds no averaged weights",),
    ),
    Refusal("a configuration without `dpo`", ["dpo", "train", "--config", "base.yaml"], ("has no group `dpo`",)),
    Refusal("a beta that means nothing", [*_TRAIN, "dpo.beta=-1"], ("beta=-1.0 must be above 0",)),
    Refusal("more wrong labels than right ones", [*_TRAIN, "dpo.label_smoothing=0.6"], ("label_smoothing=0.6",)),
    Refusal(
        "a swapped reference with Megatron-FSDP",
        [*_TRAIN, "dpo.reference=swapped", "parallel.use_megatron_fsdp=true"],
        ("dpo.reference=swapped", "parallel.use_megatron_fsdp=true", "precomputed"),
    ),
    Refusal("members of a pair that differ in shape", _PAIR, ("differ in shape",), _other_shape),
    Refusal("videos without latents", _PAIR, ("--latents",), _without_latent),
    Refusal(
        "a score that is not finite",
        ["dpo", "score", "--samples", "generated", "--with", "rewards:broken", "--out", "new.jsonl"],
        ("the score nan",),
        _own_reward,
    ),
    Refusal(
        "a reward that nobody knows",
        ["dpo", "score", "--samples", "generated", "--with", "niceness"],
        ("niceness", "known are"),
    ),
    Refusal(
        "scores of other samples",
        ["dpo", "pair", "--samples", "others", "--out", "new_pairs"],
        ("other samples",),
        _other_samples,
    ),
    Refusal(
        "videos that nobody scored",
        ["dpo", "pair", "--samples", "generated", "--scores", "none.jsonl", "--out", "new_pairs"],
        ("none.jsonl", "megatron-video dpo score"),
    ),
    Refusal("ties alone", [*_PAIR, "--margin", "2"], ("no pair is left",)),
    Refusal(
        "win rate over other prompts",
        ["dpo", "win-rate", "--before", "generated", "--after", "others"],
        ("others",),
        _other_prompts,
    ),
    Refusal("a step that is none", ["dpo", "judge"], ("unknown step 'judge'", "win-rate")),
]
