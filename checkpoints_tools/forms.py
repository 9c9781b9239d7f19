"""The forms in which weights are stored, and how each is recognised."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from checkpoints_tools.core import CoreCheckpoint
from checkpoints_tools.core_contents import METADATA_FILE
from checkpoints_tools.deepspeed_files import DeepSpeedCheckpoint, Values, is_deepspeed
from checkpoints_tools.deepspeed_universal import UniversalCheckpoint, is_universal
from checkpoints_tools.foreign import ForeignWeights, find_model
from checkpoints_tools.lora import AdapterSource, merged
from checkpoints_tools.models import KINDS
from checkpoints_tools.released import ReleasedFolder, is_released
from checkpoints_tools.torch_files import SUFFIXES, StoredTensors, TorchDistributedCheckpoint, TorchFile
from checkpoints_tools.torch_pickles import TRUST_OPTION
from checkpoints_tools.weights import Weights
from checkpoints_tools.wording import Tell, tell_on_stderr
from megatron_video.errors import UserError
from training.checkpoint_files import STATE_FILE


@dataclass(frozen=True)
class Reading:
    """How weights are to be read, where a form leaves it open; the command line's options."""

    form: str | None = None
    """Name of the form; None: the first that is recognised."""
    kind: str | None = None
    """Key in KINDS of a released model that cannot be told by its config.json and names."""
    config: Path | None = None
    """File with the model's sizes, for forms that do not store them."""
    key: str | None = None
    """What stands before the model's names, where it stands there several times."""
    ignored: tuple[str, ...] = ()
    """Patterns of stored names to leave out."""
    trust_pickle: bool = False
    """Run whatever a pickle asks for."""
    deepspeed_weights: Values = "fp32"
    """Which weights of DeepSpeed's."""
    loras: tuple[str, ...] = ()
    """Adapters to merge, PATH or PATH=WEIGHT."""
    tell: Tell = tell_on_stderr
    """Gets a line about everything that was chosen."""

    @property
    def files(self) -> list[Path]:
        """What is read beside the weights."""
        return [*([self.config] if self.config else []), *(AdapterSource.parse(text).path for text in self.loras)]


@dataclass(frozen=True)
class Form:
    """One form."""

    name: str
    title: str
    recognised_by: str
    """For messages."""
    recognises: Callable[[Path], bool]
    open: Callable[[Path, Reading], Weights]


def _foreign(stored: StoredTensors, reading: Reading) -> Weights:
    """The model among stored tensors."""
    model = find_model(stored.origin, reading.config, reading.tell)
    return ForeignWeights(stored, model, reading.key, reading.ignored, reading.tell)


def _deepspeed(form: Callable[[Path, Values, bool], StoredTensors], path: Path, reading: Reading) -> StoredTensors:
    try:
        return form(path, reading.deepspeed_weights, reading.trust_pickle)
    # Files that are whole and hold other things where DeepSpeed has its own.
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{path} is not laid out as DeepSpeed 0.9 or later lays it out ({reason})") from None


def _is_core(path: Path) -> bool:
    # Also what was such a folder and is damaged, to be refused for what it lacks; train_vae.py has a step_... too.
    named = path.name.startswith("step_") and not is_released(path)
    return (path / STATE_FILE).exists() or named or any(_checkpoints(path))


def _is_distributed(path: Path) -> bool:
    return (path / METADATA_FILE).is_file() and not (path / STATE_FILE).exists() and not path.name.startswith("step_")


def _checkpoints(path: Path) -> list[Path]:
    return [folder for pattern in ("step_[0-9]*", "checkpoints/step_[0-9]*") for folder in path.glob(pattern)]


# In the order in which they are tried: any folder with a safetensors file may be a released one.
FORMS = (
    Form(
        "deepspeed-universal",
        "universal checkpoint of DeepSpeed",
        "a folder with zero/NAME/fp32.pt, or whose file latest_universal names one",
        is_universal,
        lambda path, reading: _foreign(_deepspeed(UniversalCheckpoint, path, reading), reading),
    ),
    Form(
        "deepspeed",
        "DeepSpeed checkpoint of ZeRO 0, 1, 2 or 3",
        "a folder with *mp_rank_00_model_states.pt, or whose file latest names one",
        is_deepspeed,
        lambda path, reading: _foreign(_deepspeed(DeepSpeedCheckpoint, path, reading), reading),
    ),
    Form(
        "torch-dcp",
        "torch distributed checkpoint (FSDP, FSDP2)",
        f"a folder with {METADATA_FILE}",
        _is_distributed,
        lambda path, reading: _foreign(TorchDistributedCheckpoint(path), reading),
    ),
    Form(
        "released",
        "released Hugging Face form",
        "a folder with *.safetensors (or CLIP's pytorch_model.bin and config.json), or one file *.safetensors",
        is_released,
        lambda path, reading: ReleasedFolder(path, reading.kind, reading.config, reading.tell, reading.trust_pickle),
    ),
    Form(
        "core",
        "megatron-core distributed checkpoint",
        f"a run folder, or a folder with {STATE_FILE}",
        _is_core,
        lambda path, reading: CoreCheckpoint(path),
    ),
    Form(
        "torch",
        "one file of torch.save",
        f"a file {', '.join(f'*{suffix}' for suffix in SUFFIXES)}",
        lambda path: path.is_file() and path.suffix in SUFFIXES,
        lambda path, reading: _foreign(TorchFile(path, reading.trust_pickle), reading),
    ),
)


def open_weights(path: Path, reading: Reading = Reading()) -> Weights:
    """Open weights of any form.

    Raises:
        UserError: the path is of no known form, or not of the one it is said to be of, or what lies there is damaged.
    """
    if not path.exists():
        raise UserError(f"{path} is not there")
    return adapted(find_form(path, reading.form).open(path, reading), reading)


def adapted(weights: Weights, reading: Reading) -> Weights:
    """The weights with the adapters of `reading` merged, or as they are if it names none.

    Raises:
        UserError: an adapter that is damaged, or of another kind, model or shape.
    """
    if not reading.loras:
        return weights
    sources = [AdapterSource.parse(text) for text in reading.loras]
    return merged(weights, sources, reading.trust_pickle, reading.tell)


def find_form(path: Path, name: str | None = None) -> Form:
    """The form with this name, or the first one by which a path is recognised.

    Raises:
        UserError: none.
    """
    found = [form for form in FORMS if (form.name == name if name else form.recognises(path))]
    if not found:
        looked = "; ".join(f"{form.recognised_by} ({form.title})" for form in FORMS)
        raise UserError(f"{path} is in no form that is known. Looked for: {looked}. --form NAME tells which it is")
    return found[0]


def add_reading_options(command: argparse.ArgumentParser) -> None:
    """The options of a command that reads weights of any form."""
    group = command.add_argument_group("reading weights of other programs")
    names = "; ".join(f"{form.name}: {form.recognised_by}" for form in FORMS)
    group.add_argument("--form", choices=[f.name for f in FORMS], help=f"recognised unless given ({names})")
    kinds = ", ".join(f"{key}: {kind.title}" for key, kind in KINDS.items())
    group.add_argument("--kind", choices=list(KINDS), help=f"of a released model that cannot be told ({kinds})")
    group.add_argument("--config", type=Path, help="file with the model's sizes, config.json or YAML, if not beside it")
    group.add_argument("--key", help="take the tensors under this name where the model is there several times")
    group.add_argument("--ignore", action="append", default=[], metavar="PATTERN", help="leave out stored names")
    group.add_argument(
        "--deepspeed-weights",
        choices=["fp32", "module"],
        default="fp32",
        help="the optimizer's fp32 weights (default), or the module's as it computed with them",
    )
    group.add_argument(
        TRUST_OPTION,
        action="store_true",
        help="run whatever a .pt file asks for, which can be anything; only for files of people you trust",
    )


def add_lora_option(command: argparse.ArgumentParser) -> None:
    """The option of a command that merges adapters into the weights that it reads."""
    command.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[=WEIGHT]",
        help="merge an adapter of PEFT or diffusers, W + WEIGHT * scale * B A; may be given several times",
    )


def reading_of(arguments: argparse.Namespace) -> Reading:
    """What `add_reading_options`, and `add_lora_option` where a command has it, took."""
    return Reading(
        form=arguments.form,
        kind=arguments.kind,
        config=arguments.config,
        key=arguments.key,
        ignored=tuple(arguments.ignore),
        trust_pickle=arguments.trust_pickle,
        deepspeed_weights=arguments.deepspeed_weights,
        loras=tuple(getattr(arguments, "lora", [])),
    )
