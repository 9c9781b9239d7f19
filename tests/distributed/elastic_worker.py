"""A training run that writes down every sample it trains on; run on the ranks of a pool by test_elastic_runs.py."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from megatron_video.config_io import load_config
from megatron_video.parallel import data_parallel_rank
from training.config import PretrainConfig
from training.data import StepData
from training.data_set import TrainingData
from training.pretrain import run_training
from training.trainer import Trainer


def train(overrides: list[str], life: int) -> int:
    """Train, and leave consumed_LIFE_RANK.jsonl in the run's folder: a line a sample, as the loop was given it."""
    config = load_config(PretrainConfig, None, overrides)
    steps_from_here = Trainer.steps_from_here

    def noted(trainer: Trainer) -> Iterator[StepData]:
        path = Path(config.run.output_dir) / f"consumed_{life}_{data_parallel_rank()}.jsonl"
        with path.open("w") as stream:
            for step in steps_from_here(trainer):
                # What is built ahead and never asked for does not come here.
                for line in consumed(trainer.data, step):
                    stream.write(json.dumps({"step": trainer.state.step, **line}) + "\n")
                stream.flush()
                yield step

    with patch.object(Trainer, "steps_from_here", noted):
        return run_training(config, keep_distributed=True)


def consumed(data: TrainingData, step: StepData) -> Iterator[dict[str, object]]:
    """Key, epoch and a digest of time, noise and data of every sample of one replica's step."""
    for planned, batch in zip(step.planned, step.batches, strict=True):
        assert len(planned.samples) == len(batch.latents)
        for row, (sample, epoch) in enumerate(zip(planned.samples, planned.epochs, strict=True)):
            numbers = [batch.timestep[row], batch.latents[row], batch.target[row]]
            digest = hashlib.sha256(b"".join(number.contiguous().numpy().tobytes() for number in numbers))
            yield {"key": data[int(sample)].key, "epoch": int(epoch), "digest": digest.hexdigest()}
