"""The data of a run: its shards are there and can be read, fit the model, and so do held-out samples and prompts."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_video.errors import UserError
from megatron_video.fingerprint import vae_fingerprint
from megatron_video.shards import ShardDataset
from training.build_trainer import check_position_count
from training.checkups import HELD_OUT_RECORD, open_held_out
from training.config import PretrainConfig
from training.data_plan import DataPlan
from training.data_set import TrainingData
from training.data_sources import sources_of
from training.dry_run.findings import Findings
from training.held_out import check_held_out
from training.prompt_states import check_encoders
from training.run_plan import plan_run
from training.sample_prompts import read_prompts
from training.sample_videos import refuse_other_vae

CHECK = "data"
_SHOWN = 3


@dataclass(frozen=True)
class CheckedData:
    """The data of a run that can be trained on."""

    data: TrainingData
    plan: DataPlan

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of it."""
        return {"data set": self.data.fingerprint(), **self.plan.identity()}


def check_data(config: PretrainConfig, findings: Findings) -> CheckedData | None:
    """Open and try everything that the run reads; None where its own shards cannot be trained on."""
    data = _open(config, findings)
    if data is None:
        return None
    with findings.check(CHECK):
        data.check_model(config.model)
    for dataset in data.datasets:
        with findings.check(CHECK):
            _check_files(dataset)
    plan = _plan(config, data, findings)
    for bucket, group in data.buckets.items():
        with findings.check(CHECK):
            data[int(group[np.array([0])][0])]
        if not len(group):
            findings.note(f"bucket {bucket} has no sample")
    if data.absent_buckets:
        findings.note(f"not in the shards (data.buckets): {', '.join(data.absent_buckets)}")
    if config.validation.every:
        with findings.check("validation"):
            _check_held_out(config, data)
    if config.samples.every:
        _check_samples(config, data, findings)
    return None if plan is None else CheckedData(data, plan)


def _open(config: PretrainConfig, findings: Findings) -> TrainingData | None:
    """The data set; one problem for each folder that is no finished shards."""
    with findings.check(CHECK):
        for folder in (folder for source in sources_of(config.data) for folder in source.folders):
            with findings.check(CHECK):
                ShardDataset(folder)
    if not findings.passed(CHECK):
        return None
    with findings.check(CHECK):
        return TrainingData.open(config.data, pairs=config.dpo is not None)
    return None


def _plan(config: PretrainConfig, data: TrainingData, findings: Findings) -> DataPlan | None:
    with findings.check(CHECK):
        plan = plan_run(config, data)
        check_position_count(config, data, plan.sizes.draw)
        return plan
    return None


def _check_files(dataset: ShardDataset) -> None:
    """Every shard is there with all its bytes; their checksums are compared when samples are read."""
    wrong = list(_wrong_files(dataset))
    if wrong:
        shown = "; ".join(wrong[:_SHOWN])
        raise UserError(
            f"{dataset.folder}: {len(wrong)} of {len(dataset.dataset_info.shards)} shards are not as they were written "
            f"({shown}); copy or encode them again"
        )


def _wrong_files(dataset: ShardDataset) -> Iterator[str]:
    # One listing: a look-up for each of a hundred thousand files takes minutes on network file systems.
    with os.scandir(dataset.folder) as entries:
        found = {entry.name: entry for entry in entries if entry.name.endswith(".tar")}
    for record in dataset.dataset_info.shards:
        name = record["name"]
        if name not in found:
            yield f"{name} is missing"
        elif (size := found[name].stat().st_size) != record.get("bytes", size):
            yield f"{name} has {size:,} bytes, written were {record['bytes']:,}"


def _check_held_out(config: PretrainConfig, data: TrainingData) -> None:
    held_out = open_held_out(config, data)
    known = Path(config.run.output_dir) / HELD_OUT_RECORD
    # The run keeps a record of what it has compared; a dry run may read it, and writes nothing there.
    with tempfile.TemporaryDirectory() as scratch:
        record = Path(scratch) / HELD_OUT_RECORD
        if known.is_file():
            shutil.copyfile(known, record)
        check_held_out(data.folders, held_out.folders, record)


def _check_samples(config: PretrainConfig, data: TrainingData, findings: Findings) -> None:
    settings, info = config.samples, data.datasets[0].dataset_info
    with findings.check("samples"):
        read_prompts(Path(str(settings.prompts)), settings.seed, settings.limit)
    with findings.check("samples"):
        refuse_other_vae(str(settings.vae), vae_fingerprint(Path(str(settings.vae))), info.vae_fingerprint)
    with findings.check("samples"):
        check_encoders(str(settings.text), info.text_fingerprint)
