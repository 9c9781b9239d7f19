"""Configuration of on-policy rounds of preference alignment."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from megatron_video.config_io import config_dataclass
from training.sample_options import LAYOUT_OPTIONS

PRESET_DIR = Path(__file__).parent.parent / "configs" / "rounds"


@config_dataclass
class SamplingConfig:
    """How videos are generated; as the options of `megatron-video sample`."""

    frames: int = 204
    height: int = 544
    width: int = 992
    fps: float = 25.0
    steps: int = 50
    guidance: float = 9.0
    time_shift: float = 13.0
    batch_size: int = 1
    ema: bool = False
    """With the averaged weights, where the run has some."""

    def options(self) -> list[str]:
        """For the command line."""
        given = {name.replace("_", "-"): value for name, value in vars(self).items() if name != "ema"}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return [*words, *(["--ema"] if self.ema else [])]


@config_dataclass
class PairingConfig:
    """Which pairs are made; as the options of `megatron-video dpo pair`."""

    margin: float = 0.0
    pairs_per_prompt: int = 1
    least_difference: float = 0.05
    flip_labels: float = 0.0

    def options(self) -> list[str]:
        """For the command line."""
        return [word for name, value in vars(self).items() for word in (f"--{name.replace('_', '-')}", str(value))]


@config_dataclass
class RewardConfig:
    """The reward model of the rounds; as the options of `megatron-video dpo reward`."""

    epochs: int = 30
    held_out: float = 0.1
    """Share of the prompts whose pairs only validate."""
    learning_rate: float = 1e-3
    """In the first round."""
    tuning_learning_rate: float = 2e-4
    """In later rounds, which go on with the model of the one before, on all pairs so far."""

    def options(self, number: int) -> list[str]:
        """For the command line, in a round counted from 1."""
        rate = self.learning_rate if number == 1 else self.tuning_learning_rate
        given = {"epochs": self.epochs, "held-out": self.held_out, "learning-rate": rate}
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


@config_dataclass
class RoundsConfig:
    """Rounds of generate, score, pair, train; each begins with the model that the one before ended with."""

    output_dir: str
    """Folder of all rounds."""
    start: str
    """Run or checkpoint folder that the first round starts from."""
    vae: str
    """Video-VAE."""
    text: str
    """Folder of the text encoders."""
    prompts: str
    """Prompt file to generate from."""
    evaluation_prompts: str
    """Prompt file to tell gains by; every round samples it with the same noise."""
    config: str
    """Preset or file of `megatron-video dpo train`."""
    rounds: int = 2
    seeds: int = 4
    """Videos of every prompt; each round has seeds of its own."""
    score: list[str] = field(default_factory=list)
    """Scorers as `megatron-video dpo score --with` takes them; gains are told by them too."""
    people: bool = False
    """Pairs are those that people compared: every round stops after generating until their votes (`megatron-video dpo
    rate`) are in its `ratings.jsonl`. `score` then tells the gains alone."""
    judge: list[str] = field(default_factory=list)
    """Further scorers that only judge: what training has not seen."""
    reward_model: RewardConfig | None = None
    """Train a reward model on the pairs of the first round, tune it with those of every later one, and let it judge
    each round; null: none."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """Generation."""
    pairing: PairingConfig = field(default_factory=PairingConfig)
    """Pairs."""
    train: list[str] = field(default_factory=list)
    """Overrides of the training, such as dpo.beta=500."""
    workers: int = 1
    """Processes that score."""
    launcher: list[str] = field(default_factory=list)
    """What starts ranks, such as [torchrun, --standalone, --nproc-per-node, "8"]; []: one process."""
    sampling_layout: list[str] = field(default_factory=list)
    """Options of generation for the layout of those ranks, such as [--tensor-parallel-size, "8"]."""

    def __post_init__(self) -> None:
        """Refuse what gives no rounds.

        Raises:
            ValueError: naming the field and the value.
        """
        if self.rounds < 1:
            raise ValueError(f"rounds={self.rounds} must be at least 1")
        if self.seeds < 2:
            raise ValueError(f"seeds={self.seeds} must be at least 2, to have videos to compare")
        if not self.score:
            raise ValueError("score is empty; name a scorer, such as shape_motion")
        known = LAYOUT_OPTIONS.values()
        for word in self.sampling_layout:
            option = word.partition("=")[0]
            if option.startswith("-") and option not in known:
                raise ValueError(f"sampling_layout has {option!r}, which is none of {', '.join(known)}")
