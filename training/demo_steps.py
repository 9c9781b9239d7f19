"""What the demo does, as a table of commands; each is one that a user can type."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_video.config_io import config_dataclass, load_config
from megatron_video.doctor import available_cores
from training.config import PRESET_DIR, PretrainConfig

PROGRAM = (sys.executable, "-m", "megatron_video")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
# How these are shown, and what a user types.
SHOWN_AS = ((PROGRAM, "megatron-video"), (TORCHRUN, "torchrun"))

# Of the raw clips; encoded samples keep it.
FPS = 24
COLOURS = {"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色"}
DIRECTIONS = {"left": "左", "right": "右", "up": "上", "down": "下"}
SHAPES = {"circle": "圆形", "square": "方块", "triangle": "三角形"}


@config_dataclass
class DemoConfig:
    """Sizes of the demo; what is not here comes from the presets of the single commands."""

    seed: int = 0
    """Of the raw clips, all weights, the data order and the noise of training; samples take other seeds."""
    clips: int = 360
    """Raw files: videos and still images."""
    ranks: int = 2
    """Processes of pretraining, which split every layer (tensor parallelism with sequence parallelism)."""
    text: list[str] = field(default_factory=list)
    """Overrides of `megatron-video text build`."""
    vae: list[str] = field(default_factory=list)
    """Overrides of `megatron-video vae train`."""
    buckets: list[str] = field(default_factory=lambda: ["17x48x48", "17x48x64", "1x48x48"])
    """Frames x height x width of the encoded samples."""
    pretrain: list[str] = field(default_factory=list)
    """Overrides of `training.pretrain`."""
    samples: int = 64
    """Videos of the trained and of the untrained model: 4 colours x 4 directions x 2 languages in turn."""
    sampling_steps: int = 30
    """Euler steps."""
    guidance: float = 7.0
    """Classifier-free guidance scale."""
    time_shift: float = 1.0
    """Shift of the sampling times."""
    sample_batch: int = 16
    """Videos made at a time."""
    required_accuracy: float = 0.5
    """Colour and direction of the trained model's videos must be right this often, or the demo fails."""

    def __post_init__(self) -> None:
        """Refuse sizes of nothing; the commands check the rest themselves."""
        for name in ("ranks", "samples", "sampling_steps", "sample_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if not self.buckets:
            raise ValueError("buckets is empty; name at least one, frames x height x width, e.g. 17x48x48")


@dataclass(frozen=True)
class Step:
    """One command. `outputs` are what it alone writes; they are removed before it runs on other inputs than before."""

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    threads: int
    resumable: bool = True
    """Whether it continues from its own half-done outputs; if not, they are removed before another try."""
    kill_at: int | None = None
    """SIGKILL for the whole job once this training step is logged."""

    def shown(self) -> str:
        """The command as a user would type it."""
        for prefix, word in SHOWN_AS:
            if self.command[: len(prefix)] == prefix:
                return f"{word} {shlex.join(self.command[len(prefix) :])}"
        return shlex.join(self.command)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in the demo's folder."""

    out: Path

    @property
    def raw(self) -> Path:
        """Raw clips with their captions."""
        return self.out / "raw"

    def manifest(self, stage: str) -> Path:
        """Manifest written by a stage."""
        return self.out / "manifests" / f"{stage}.parquet"

    @property
    def prompts(self) -> Path:
        """Prompts and seeds of the samples."""
        return self.out / "prompts.jsonl"

    @property
    def vae(self) -> Path:
        """Trained Video-VAE."""
        return self.out / "vae"

    @property
    def text(self) -> Path:
        """Text encoders."""
        return self.out / "text"

    @property
    def shards(self) -> Path:
        """Encoded samples."""
        return self.out / "shards"

    @property
    def run(self) -> Path:
        """Pretraining run."""
        return self.out / "pretrain"

    def samples(self, name: str) -> Path:
        """Videos of the "trained" or "untrained" model."""
        return self.out / f"samples_{name}"

    def measurement(self, name: str) -> Path:
        """Report on the "real", "trained" or "untrained" videos."""
        return self.out / f"measure_{name}.json"

    @property
    def released(self) -> Path:
        """The trained weights under the released Hugging Face names."""
        return self.out / "released"

    @property
    def returned(self) -> Path:
        """Those, converted back."""
        return self.out / "returned"


def plan_steps(config: DemoConfig, out: Path) -> list[Step]:
    """All steps in order."""
    at = Layout(out)
    return [
        *_data_steps(config, at),
        *_encoder_steps(config, at),
        *_train_steps(config, at),
        *_result_steps(config, at),
    ]


def pretrain_config(config: DemoConfig, out: Path) -> PretrainConfig:
    """What `training.pretrain` will run with."""
    return load_config(PretrainConfig, "demo", _pretrain_overrides(config, Layout(out)), PRESET_DIR)


def kill_step(steps: int, save_every: int) -> int:
    """A step about half way that lies between two checkpoints: a third of their distance after one."""
    return max(1, steps // 2 // save_every) * save_every + max(1, save_every // 3)


def requests(config: DemoConfig) -> list[dict[str, Any]]:
    """Prompts with seeds: all colours x directions x languages, the shapes in turn."""
    wanted = list(itertools.product(("en", "zh"), COLOURS, DIRECTIONS))
    shapes = list(SHAPES)
    # Training draws noise by sample and epoch; these seeds name samples that were never trained on.
    first_seed = 1_000_000 * (config.seed + 1)
    # A stride without a common factor with 32: all are met, and even a few requests differ in everything.
    chosen = [wanted[number * 11 % len(wanted)] for number in range(config.samples)]
    return [
        {"prompt": _prompt(colour, direction, shapes[number % len(shapes)], language), "seed": first_seed + number}
        for number, (language, colour, direction) in enumerate(chosen)
    ]


def write_prompts(config: DemoConfig, out: Path) -> None:
    """Write the prompts file if it is not there or differs."""
    text = "".join(json.dumps(request, ensure_ascii=False) + "\n" for request in requests(config))
    path = Layout(out).prompts
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)


def _prompt(colour: str, direction: str, shape: str, language: str) -> str:
    if language == "zh":
        return f"{COLOURS[colour]}{SHAPES[shape]}向{DIRECTIONS[direction]}移动"
    return f"a {colour} {shape} moves {direction}"


def _data_steps(config: DemoConfig, at: Layout) -> list[Step]:
    make = ["make-demo-clips", "--out", at.raw, "--clips", config.clips, "--seed", config.seed]
    steps = [
        _data("raw clips", make, [at.raw]),
        _data("ingest", ["ingest", "--in", at.raw, "--out", at.manifest("ingest")], [at.manifest("ingest")]),
    ]
    for before, stage in itertools.pairwise(("ingest", "segment", "tag", "filter")):
        command = [stage, "--in", at.manifest(before), "--out", at.manifest(stage)]
        steps.append(_data(stage, command, [at.manifest(stage)]))
    steps.append(_measure("measure real clips", "real", ["--manifest", at.manifest("filter"), "--limit", "64"], at))
    return steps


def _encoder_steps(config: DemoConfig, at: Layout) -> list[Step]:
    # Tokenizers and the VAE see the kept clips only, as they would in a real run.
    manifest, vae, text, shards = at.manifest("filter"), at.vae, at.text, at.shards
    build = ["text", "build", "--captions", manifest, "--out", text, "--seed", config.seed, *config.text]
    settings = [f"manifest={manifest}", f"output={vae}", f"seed={config.seed}", *config.vae]
    encode = ["encode", "--in", manifest, "--vae", vae, "--text", text, "--out", shards, "--buckets"]
    return [
        _command("text encoders", build, [text]),
        _command("train the VAE", ["vae", "train", "--config", "vae_demo", *settings], [vae]),
        _data("encode", [*encode, ",".join(config.buckets)], [shards]),
        _data("verify", ["verify", "--in", shards], []),
    ]


def _train_steps(config: DemoConfig, at: Layout) -> list[Step]:
    settings = pretrain_config(config, at.out).training
    overrides = _pretrain_overrides(config, at)
    launch = ("--standalone", "--nproc-per-node", str(config.ranks), "-m", "training.pretrain", "--config", "demo")
    # Both lives are the same command: that is what a scheduler starts again after a node is lost.
    command = (*TORCHRUN, *launch, *overrides)
    threads = _threads_per_rank(config)
    killed_at = kill_step(settings.steps, settings.save_every)
    return [
        Step(f"pretrain, killed after step {killed_at}", command, (at.run,), threads, kill_at=killed_at),
        Step("pretrain, the same command again", command, (), threads),
    ]


def _pretrain_overrides(config: DemoConfig, at: Layout) -> list[str]:
    return [
        f"run.output_dir={at.run}",
        f"run.seed={config.seed}",
        f"data.shards=[{at.shards}]",
        f"parallel.tensor_model_parallel_size={config.ranks}",
        f"parallel.sequence_parallel={str(config.ranks > 1).lower()}",
        # Sampling an untrained model needs the weights before the first step.
        "training.save_initial=true",
        *config.pretrain,
    ]


def _result_steps(config: DemoConfig, at: Layout) -> list[Step]:
    # The released form keeps dtypes, so the way back must give equal bits.
    there = ["ckpt", "convert", "--in", at.run, "--out", at.released]
    back = ["ckpt", "convert", "--in", at.released, "--out", at.returned]
    steps = [
        _command("convert to Hugging Face", there, [at.released], resumable=False),
        _command("convert back", back, [at.returned], resumable=False),
        _command("compare", ["ckpt", "diff", at.run, at.returned, "--json"], []),
    ]
    untrained = at.run / "checkpoints" / "step_00000000"
    for name, checkpoint in (("trained", at.run), ("untrained", untrained)):
        steps.append(_sample(config, name, checkpoint, at))
        steps.append(_measure(f"measure {name}", name, ["--samples", at.samples(name)], at))
    return steps


def _sample(config: DemoConfig, name: str, checkpoint: Path, at: Layout) -> Step:
    frames, height, width = config.buckets[0].split("x")
    size = ["--frames", frames, "--height", height, "--width", width, "--fps", FPS]
    method = ["--steps", config.sampling_steps, "--guidance", config.guidance, "--time-shift", config.time_shift]
    encoders = ["--vae", at.vae, "--text", at.text, "--prompts", at.prompts]
    options = ["--checkpoint", checkpoint, *encoders, "--out", at.samples(name), *size, *method]
    # Every rank holds the whole small model here, and the ranks share the prompts.
    launch = ("--standalone", "--nproc-per-node", config.ranks, "-m", "training.sample")
    command = tuple(map(str, (*TORCHRUN, *launch, *options, "--batch-size", config.sample_batch)))
    return Step(f"sample, {name}", command, (at.samples(name),), _threads_per_rank(config))


def _threads_per_rank(config: DemoConfig) -> int:
    return max(1, available_cores() // config.ranks)


def _measure(title: str, name: str, source: Sequence[object], at: Layout) -> Step:
    report = at.measurement(name)
    return _command(title, ["measure", *source, "--out", report], [report])


def _data(title: str, arguments: Sequence[object], outputs: Sequence[Path]) -> Step:
    return _command(title, ["data", *arguments], outputs)


def _command(title: str, arguments: Sequence[object], outputs: Sequence[Path], resumable: bool = True) -> Step:
    command = (*PROGRAM, *map(str, arguments))
    return Step(title, command, tuple(outputs), available_cores(), resumable)
