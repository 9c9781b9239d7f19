"""The released form of a model: a folder with config.json and safetensors files, or one such file alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from checkpoints_tools.models import KINDS, Kind
from checkpoints_tools.released_config import (
    CONFIG_FILE,
    build_sizes,
    config_text,
    parse_values,
    read_values,
    recognise,
    released_values,
    unknown_fields,
)
from checkpoints_tools.safetensors_files import (
    INDEX_SUFFIX,
    SUFFIX,
    SafetensorsFiles,
    find_weight_files,
)
from checkpoints_tools.torch_files import TorchFile
from checkpoints_tools.weights import Model
from checkpoints_tools.wording import Tell, tell_on_stderr
from megatron_video.errors import UserError

PIPELINE_FILE = "model_index.json"
# In the header of a file that is to stand alone: the text of its config.json.
CONFIG_KEY = "config.json"
PICKLED_FILE = "pytorch_model.bin"
# The released CLIP keeps its weights and its tokenizer in two folders beside each other.
CLIP_MODEL_FOLDER = "clip_text_encoder"
_SHOWN = 5


class _Stored(Protocol):
    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Stored name -> shape and dtype."""

    def tensor(self, name: str) -> Tensor:
        """One tensor."""


class ReleasedFolder:
    """Tensors of a released folder or file by our names, read one at a time.

    Args:
        path: folder with config.json and weights (safetensors, or CLIP's pytorch_model.bin), or a safetensors file.
            Without config.json beside it or in the file, what is there is taken to have the released sizes.
        kind: key in KINDS; None: found out by config.json or the tensors' names.
        config: config.json that lies elsewhere.
        tell: gets a line about what was assumed and what is left out.
        trust_pickle: run whatever a pytorch_model.bin asks for.

    Raises:
        UserError: no weights, a file that is damaged, a model that is not known or not clear.
    """

    def __init__(
        self,
        path: Path,
        kind: str | None = None,
        config: Path | None = None,
        tell: Tell = tell_on_stderr,
        trust_pickle: bool = False,
    ) -> None:
        self._path = path
        folder = _model_folder(path)
        config_file = config or (folder if folder.is_dir() else folder.parent) / CONFIG_FILE
        self._files = _open_files(folder, KINDS[kind].stem if kind else None, trust_pickle)
        values = _read_sizes(config_file, config is not None, self._files)
        key = kind or recognise(values, self._files.templates, path)
        parts = _parts(KINDS[key], self._files.templates)
        self.model = _model(KINDS[key], values, parts, config_file, tell)
        _tell_left_out(path, KINDS[key], self._files.templates.keys() - set(parts.values()), tell)
        ours = {theirs: ours for ours, theirs in self.model.released.items()}
        # What is unknown keeps its own name, to be refused by it.
        self._stored = {ours.get(KINDS[key].prefix + part, part): stored for part, stored in parts.items()}

    @property
    def origin(self) -> Path:
        """What was opened."""
        return self._path

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and dtype, on the meta device."""
        templates = self._files.templates
        return {name: templates[stored] for name, stored in self._stored.items()}

    def stored_name(self, name: str) -> str:
        """The name in the file; of a tensor that is missing, the released one."""
        return self._stored.get(name) or self.model.released.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        return self._files.tensor(self._stored[name])

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files.path(self._stored[name]) if isinstance(self._files, SafetensorsFiles) else self._path


def is_released(path: Path) -> bool:
    """Whether something looks like weights in this form, or like folders that hold such weights."""
    if not path.is_dir():
        return path.suffix == SUFFIX
    folders = (path / PIPELINE_FILE).is_file() or (path / CLIP_MODEL_FOLDER).is_dir()
    pickled = (path / PICKLED_FILE).is_file() and (path / CONFIG_FILE).is_file()
    return folders or pickled or any(path.glob(f"*{SUFFIX}"))


def read_config(path: Path, names: Iterable[str] = (), tell: Tell = tell_on_stderr) -> Model:
    """The model of a config.json.

    Args:
        path: the file.
        names: released names, after the prefix, of the tensors there, for parts of which the file says nothing.
        tell: gets a line about fields that are passed over.

    Raises:
        UserError: it is of no known model, or says something that the model here cannot be.
    """
    values = read_values(path)
    kind = KINDS[recognise(values, (), path)]
    return _model(kind, values, {name: name for name in names}, path, tell)


def released_config(model: Model, templates: Mapping[str, Tensor], tell: Tell = tell_on_stderr) -> str:
    """Content of the config.json that the released code reads.

    Args:
        model: to be described.
        templates: shapes and dtypes of its tensors; some files name the dtype.
        tell: gets a line about sizes without effect that it has no place for.

    Raises:
        UserError: the released form has no place for one of the model's sizes.
    """
    kind = KINDS[model.kind]
    values, lost = released_values(model.config, kind, main_dtype(templates))
    default = kind.config()
    told = [each for each in lost if each != f"{(name := each.partition('=')[0])}={getattr(default, name)}"]
    if told:
        tell(f"left out, for the released {CONFIG_FILE} of a {kind.title} has no place for it: {', '.join(told)}")
    return config_text(values)


def write_config(folder: Path, model: Model, templates: Mapping[str, Tensor], tell: Tell = tell_on_stderr) -> None:
    """Write what `released_config` makes."""
    (folder / CONFIG_FILE).write_text(released_config(model, templates, tell), encoding="utf-8")


def main_dtype(templates: Mapping[str, Tensor]) -> str:
    """Type of most values, as "bfloat16"."""
    counts: Counter[str] = Counter()
    for template in templates.values():
        counts[str(template.dtype).removeprefix("torch.")] += template.numel()
    return counts.most_common(1)[0][0]


def _model_folder(path: Path) -> Path:
    if (path / PIPELINE_FILE).is_file():
        raise UserError(
            f"{path} is a whole pipeline of several models ({PIPELINE_FILE}): give the folder of one of them, as "
            f"{path / 'transformer'}, or take it apart with `megatron-video ckpt pipeline --in {path}`"
        )
    inner = path / CLIP_MODEL_FOLDER
    return inner if inner.is_dir() else path


def _open_files(path: Path, stem: str | None, trust_pickle: bool) -> _Stored:
    if path.is_file():
        return SafetensorsFiles([path])
    stems = [stem] if stem else sorted({kind.stem for kind in KINDS.values()})
    found = [each for each in stems if any((path / f"{each}{suffix}").is_file() for suffix in (SUFFIX, INDEX_SUFFIX))]
    if len(found) > 1:
        raise UserError(f"{path} holds several models: {', '.join(found)}; give one file, or say which with --kind")
    if not found and not any(path.glob(f"*{SUFFIX}")) and (path / PICKLED_FILE).is_file():
        return TorchFile(path / PICKLED_FILE, trust_pickle)  # as CLIP is released
    return SafetensorsFiles(find_weight_files(path, found[0] if found else None))


def _read_sizes(config_file: Path, is_asked_for: bool, files: _Stored) -> dict[str, Any] | None:
    """Of a file that is asked for, else of a file's own header, else of the file beside it; None: nothing says them."""
    own = files.metadata.get(CONFIG_KEY) if isinstance(files, SafetensorsFiles) else None
    if own is not None and not is_asked_for:
        return parse_values(own, f"{CONFIG_KEY} in the header of the weights in {config_file.parent}")
    if is_asked_for or config_file.is_file():
        return read_values(config_file)
    return None


def _parts(kind: Kind, names: Iterable[str]) -> dict[str, str]:
    """Name after the prefix -> stored name, without what is known to be no part of the model."""
    prefix = kind.prefix if any(name.startswith(kind.prefix) for name in names) else ""
    parts = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    return {part: name for part, name in parts.items() if not part.startswith(kind.other_parts)}


def _model(kind: Kind, values: Mapping[str, Any] | None, parts: Iterable[str], config_file: Path, tell: Tell) -> Model:
    if values is None:
        tell(f"no {config_file}: taken to be a {kind.title} of the released sizes (--config FILE says others)")
        there = set(parts)
        return kind.build(kind.config(**{name: tensor in there for name, tensor in kind.optional.items()}))
    unknown = [] if kind.fields.closed else unknown_fields(kind, values)
    if unknown:
        tell(f"{config_file}: left out: fields of which nothing is known here: {_some(unknown)}")
    return kind.build(build_sizes(kind, values, parts, str(config_file)))


def _tell_left_out(path: Path, kind: Kind, names: Iterable[str], tell: Tell) -> None:
    if listed := sorted(names):
        tell(f"{path}: left out: {len(listed)} tensors that are no part of a {kind.title}: {_some(listed)}")


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
