"""A curriculum: pretraining stages in order, each from the weights of the one before."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_video.config_io import build_config, config_dataclass, config_to_dict, read_values
from megatron_video.errors import UserError
from training.config import PRESET_DIR, PretrainConfig

CURRICULUM_PRESET_DIR = Path(__file__).parent / "configs" / "curriculum"

# What the curriculum itself decides about every stage.
_OWN_FIELDS = ("output_dir", "initial_weights", "initial_from_ema", "initial_optimizer")
_FOLDER_NAME = re.compile(r"\w[\w.-]*")


@config_dataclass
class StageConfig:
    """One stage of a curriculum."""

    preset: str | None = None
    """YAML file or preset of `pretrain`; null: every field's default."""
    take: Literal["weights", "ema", "weights_and_optimizer"] = "weights"
    """What it takes from the stage before: the trained weights, their average, or the optimizer's moments as well."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the stage, as in a pretraining configuration; they stand above `common` and the preset."""


@config_dataclass
class CurriculumConfig:
    """Stages that are run one after the other."""

    output_dir: str
    """Every stage is a run in a folder of its name in here."""
    stages: dict[str, StageConfig]
    """Stages by name, in order."""
    common: dict[str, Any] = field(default_factory=dict)
    """Fields that all stages share, as in a pretraining configuration; they stand above the presets."""

    def __post_init__(self) -> None:
        """Refuse names that are no folders, and fields that the curriculum decides.

        Raises:
            ValueError: naming the stage or the field.
        """
        if not self.stages:
            raise ValueError("stages is empty: name at least one")
        first = next(iter(self.stages))
        if self.stages[first].take != "weights":
            raise ValueError(f"stages.{first}.take={self.stages[first].take}: there is no stage before the first one")
        for name in self.stages:
            if not _FOLDER_NAME.fullmatch(name):
                raise ValueError(f"stages.{name}: a stage's name is that of its folder: letters, digits, _, - and .")
        for name, stage in self.stages.items():
            # The first stage may start from anything.
            _refuse_own_fields(
                f"stages.{name}.settings", stage.settings, ["output_dir"] if name == first else _OWN_FIELDS
            )
        _refuse_own_fields("common", self.common, _OWN_FIELDS)


def _refuse_own_fields(place: str, values: dict[str, Any], own: Sequence[str]) -> None:
    run = values.get("run")
    if not isinstance(run, dict):
        return
    for name in own:
        if name in run:
            raise ValueError(
                f"{place}.run.{name}={run[name]!r}: the curriculum sets it, from its output_dir, the order of the "
                "stages and `take`"
            )


@dataclass(frozen=True)
class Stage:
    """A stage, ready to run."""

    name: str
    config: PretrainConfig
    take: str
    """As StageConfig.take; "nothing" for the first one."""


def resolve_stages(curriculum: CurriculumConfig) -> list[Stage]:
    """Every stage's own configuration, checked alone and against the one before it.

    Raises:
        UserError: naming the stage and the field.
    """
    stages: list[Stage] = []
    for name, stage in curriculum.stages.items():
        before = stages[-1] if stages else None
        values = read_values(stage.preset, PRESET_DIR) if stage.preset is not None else {}
        for upper in (curriculum.common, stage.settings):
            values = _merged(values, upper)
        run = values.setdefault("run", {})
        run.setdefault("stage", name)
        run["output_dir"] = f"{curriculum.output_dir}/{name}"
        if before is not None:
            run |= {
                "initial_weights": before.config.run.output_dir,
                "initial_from_ema": stage.take == "ema",
                "initial_optimizer": stage.take == "weights_and_optimizer",
            }
        config = build_config(PretrainConfig, values, origin=f"stage {name!r} of the curriculum")
        stages.append(Stage(name, config, "nothing" if before is None else stage.take))
    _check_chain(stages)
    return stages


def _check_chain(stages: list[Stage]) -> None:
    if stages and len({stage.config.run.stage for stage in stages}) < len(stages):
        names = ", ".join(f"{stage.name}: {stage.config.run.stage}" for stage in stages)
        raise UserError(f"run.stage must differ from stage to stage, or they draw the same noise; it is {names}")
    for before, stage in itertools.pairwise(stages):
        there, here = config_to_dict(before.config.model), config_to_dict(stage.config.model)
        wrong = [f"model.{key}={here[key]}, there {there[key]}" for key in here if here[key] != there[key]]
        if wrong:
            raise UserError(f"stage {stage.name!r} cannot take the weights of {before.name!r}: {'; '.join(wrong)}")
        if stage.take == "ema" and before.config.ema.decay is None:
            raise UserError(
                f"stage {stage.name!r} takes averaged weights, and {before.name!r} keeps none: set "
                f"stages.{before.name}.settings.ema.decay, or stages.{stage.name}.take=weights"
            )


def _merged(lower: dict[str, Any], upper: dict[str, Any]) -> dict[str, Any]:
    """`upper` over `lower`, group by group."""
    values = deepcopy(lower)
    for key, value in upper.items():
        # {} means: none of what is below (bucket_weights={}).
        if isinstance(value, dict) and value and isinstance(values.get(key), dict):
            values[key] = _merged(values[key], value)
        else:
            values[key] = deepcopy(value)
    return values
