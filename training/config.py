"""What a pretraining run is made of: one dataclass, read from YAML and dotted overrides.

Fields whose values no publication states (betas, warm-up, time density, text dropout, ...) are our choice.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Literal

from megatron_video.config_io import config_dataclass
from megatron_video.dit.config import DiTConfig
from megatron_video.errors import UserError
from megatron_video.flow_matching import TimeDensity
from megatron_video.fp8 import Fp8Config
from megatron_video.layout import Hardware, Layout
from megatron_video.layout_rules import check_layout
from megatron_video.parallel import ParallelConfig
from training.checkpoint_config import CheckpointConfig
from training.data_config import DataConfig as DataConfig
from training.fault_config import FaultConfig
from training.optimizer_config import AdamWConfig as AdamWConfig
from training.preference_config import PreferenceConfig
from training.sample_videos_config import SampleVideosConfig
from training.telemetry_config import TelemetryConfig
from training.validation_config import ValidationConfig

PRESET_DIR = Path(__file__).parent / "configs" / "pretrain"


@config_dataclass
class RunConfig:
    """Identity of the run."""

    output_dir: str = "runs/pretrain"
    """Folder of checkpoints, metrics and logs; a run that finds a checkpoint in it continues from there."""
    stage: str = "pretrain"
    """Name of the training stage; part of every noise key, so two stages of one seed draw differently."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""
    initial_weights: str | None = None
    """Run or checkpoint folder whose model weights a new run starts from (optimizer and data position start anew);
    ignored when the run continues from a checkpoint of its own. Null: random initial weights."""
    initial_from_ema: bool = False
    """Take the averaged weights of that checkpoint instead of the trained ones."""
    initial_optimizer: bool = False
    """Take the optimizer's moments and count of updates along with the weights; the learning rate starts anew."""

    def __post_init__(self) -> None:
        """Refuse what cannot be taken.

        Raises:
            ValueError: naming the fields.
        """
        asked = [name for name in ("initial_from_ema", "initial_optimizer") if getattr(self, name)]
        if asked and self.initial_weights is None:
            raise ValueError(f"{asked[0]}=true needs initial_weights, the run or checkpoint to take it from")
        if len(asked) == 2:
            raise ValueError(
                "initial_from_ema=true and initial_optimizer=true: the moments belong to the trained weights, not to "
                "their averages; choose one"
            )


@config_dataclass
class EMAConfig:
    """The averaged weights that a checkpoint holds beside the trained ones."""

    decay: float | None = None
    """Share of the average that survives a step, e.g. 0.9999 (an average over about 1 / (1 - decay) steps); null keeps
    no average. It costs 4 bytes a parameter, divided over the replicas with use_distributed_optimizer."""
    device: Literal["same", "cpu"] = "same"
    """Where the averages are: on the device of the weights, or in host memory (8 bytes a parameter there, divided
    alike, and none on the device), where a thread moves them while training goes on."""

    def __post_init__(self) -> None:
        """Refuse a decay that averages nothing or never moves.

        Raises:
            ValueError: naming the value and what is allowed.
        """
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay={self.decay} must lie between 0 and 1, or be null")


@config_dataclass
class TrainingConfig:
    """Length, precision and bookkeeping of the run."""

    steps: int = 1000
    """Optimizer steps of the whole run."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Type of weights and activations; optimizer state, gradient sums, time and loss are fp32 in both."""
    save_every: int = 500
    """Steps between checkpoints; the last step is always saved."""
    save_initial: bool = False
    """Also save the weights before the first step, as step_00000000."""
    keep_checkpoints: int = 3
    """Newest checkpoints that are kept; 0 keeps all. step_00000000 is never deleted."""
    log_every: int = 10
    """Steps between console lines and TensorBoard points; metrics.jsonl has every step."""
    peak_tflops: float | None = None
    """Peak dense TFLOP/s of one device at this precision, for MFU (H100 / H800 / H200 bf16: 989); null leaves MFU
    out."""
    max_refused_steps: int = 20
    """Consecutive steps that may be refused for a non-finite loss or gradient before the run stops with an error."""

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing.

        Raises:
            ValueError: naming the field and the value.
        """
        for name in ("steps", "save_every", "log_every", "max_refused_steps"):
            _check_positive(name, getattr(self, name))
        if self.keep_checkpoints < 0:
            raise ValueError(f"keep_checkpoints={self.keep_checkpoints} must not be negative")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ValueError(f"peak_tflops={self.peak_tflops} must be above 0, or null")


@config_dataclass
class PretrainConfig:
    """Everything that defines a pretraining run."""

    run: RunConfig = field(default_factory=RunConfig)
    """Identity: output folder, stage, seed."""
    model: DiTConfig = field(default_factory=DiTConfig)
    """The diffusion transformer."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Layout over ranks."""
    fp8: Fp8Config = field(default_factory=Fp8Config)
    """Linear layers in FP8."""
    data: DataConfig = field(default_factory=DataConfig)
    """Data set and batches."""
    optimizer: AdamWConfig = field(default_factory=AdamWConfig)
    """AdamW and the learning rate."""
    ema: EMAConfig = field(default_factory=EMAConfig)
    """Averaged weights."""
    flow: TimeDensity = field(default_factory=TimeDensity)
    """Density of the training timesteps."""
    training: TrainingConfig = field(default_factory=TrainingConfig)
    """Length, precision, checkpoints, logs."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """How checkpoints are written, checked and kept."""
    faults: FaultConfig = field(default_factory=FaultConfig)
    """End of the job's time, hangs, spikes, slow ranks."""
    telemetry: TelemetryConfig = field(default_factory=TelemetryConfig)
    """Measurements beside the steps."""
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    """Loss on held-out samples."""
    samples: SampleVideosConfig = field(default_factory=SampleVideosConfig)
    """Sample videos during training."""
    dpo: PreferenceConfig | None = None
    """Train on preference pairs (`python -m training.dpo`); null: on samples."""

    def __post_init__(self) -> None:
        """Refuse contradictions between the groups.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        # Relations inside one group are checked there; here are those between groups.
        try:
            check_layout(self.layout())
        except UserError as refusal:  # pydantic collects ValueErrors, and says where the configuration came from
            raise ValueError(str(refusal)) from None
        warmup, fall = self.optimizer.warmup_steps, self.optimizer.fall_steps(self.training.steps)
        if warmup > self.training.steps:
            raise ValueError(f"optimizer.warmup_steps={warmup} is more than training.steps={self.training.steps}")
        if warmup + fall > self.training.steps:
            raise ValueError(
                f"optimizer.warmup_steps={warmup} and the {fall} steps of its decay are more than training.steps="
                f"{self.training.steps}; shorten one of them"
            )
        if self.dpo is not None:
            self._check_preferences(self.dpo)
        uses_averages = any(group.every and group.ema for group in (self.validation, self.samples))
        if uses_averages and self.ema.decay is not None and self.fp8.param_gather:
            raise ValueError(
                "validation.ema and samples.ema put the averaged weights in the place of the trained ones and back, "
                "which weights kept in FP8 (fp8.param_gather=true) may not survive unchanged; set both to false"
            )

    def _check_preferences(self, dpo: PreferenceConfig) -> None:
        """Refuse what pairs do not go with.

        Raises:
            ValueError: naming the fields, the values and the way out.
        """
        if dpo.reference_weights is None and self.run.initial_weights is None:
            raise ValueError("dpo needs a reference: set run.initial_weights, or dpo.reference_weights")
        refused = {
            f"data.pack_tokens={self.data.pack_tokens}": self.data.pack_tokens is not None,
            f"data.max_corrupt_samples={self.data.max_corrupt_samples}": self.data.max_corrupt_samples > 0,
        }
        for setting, is_set in refused.items():
            if is_set:
                raise ValueError(f"{setting} does not go with preference pairs; leave it at its default")
        if dpo.reference == "swapped":
            for name, is_set in {
                "parallel.use_megatron_fsdp": self.parallel.use_megatron_fsdp,
                "fp8.param_gather": self.fp8.param_gather,
            }.items():
                if is_set:
                    raise ValueError(
                        f"dpo.reference=swapped exchanges whole weights, which {name}=true does not keep; take "
                        "dpo.reference=precomputed"
                    )

    def layout(
        self, world_size: int | None = None, hardware: Hardware | None = None, buckets: list[str] | None = None
    ) -> Layout:
        """All that is known of the layout, for megatron_video.layout_rules; `buckets`: those that the shards hold."""
        return Layout(
            self.parallel,
            self.model,
            self.training.precision,
            self.fp8,
            world_size=world_size,
            micro_batches=self.data.micro_batches_per_step,
            micro_batch_size=self.data.samples_dealt_together,
            samples_per_draw=self.data.samples_per_draw,
            balance=self.data.balance,
            images_per_video=self.data.images_per_video,
            pack_tokens=self.data.pack_tokens,
            cpu_offload=self.optimizer.cpu_offload,
            buckets=buckets or self.data.buckets,
            hardware=hardware,
        )

    @property
    def pack_positions(self) -> int | None:
        """data.pack_tokens in latent positions."""
        return None if self.data.pack_tokens is None else self.data.pack_tokens * self.model.patch_size**2

    def data_parallel_size(self, world_size: int) -> int:
        """Replicas of the model on `world_size` ranks.

        Raises:
            UserError: the layout cannot work on so many ranks.
        """
        # Here and not in __post_init__: the number of ranks is known when a job starts.
        layout = self.layout(world_size)
        check_layout(layout)
        return layout.data_parallel_size


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} must be at least 1")
