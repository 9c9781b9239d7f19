"""Weights that other programs wrote: which of the stored tensors are the model's, and what it is.

Trainers put a model into dicts, wrap it in modules and beside an optimizer; its own names, released or ours, are the
ends of the stored ones. What stands before them must be known, and be one thing only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import yaml
from torch import Tensor

from checkpoints_tools.models import KINDS
from checkpoints_tools.released import CONFIG_FILE, read_config
from checkpoints_tools.torch_files import StoredTensors
from checkpoints_tools.weights import Model
from checkpoints_tools.wording import Tell
from megatron_video.config_io import build_config
from megatron_video.errors import UserError

# Names of wrapping modules, which stand anywhere in a name.
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
# What a model's weights are called by those who save it; a name may begin with several.
ROOTS = (
    "app",
    "averaged_model",
    "dit",
    "ema",
    "ema_model",
    "model",
    "model_state_dict",
    "module",
    "net",
    "params",
    "state_dict",
    "transformer",
    "vae",
    "weights",
)
OPTIMIZERS = ("optim.", "optimizer.", "optimizers.", "optimizer_state_dict.")
TOP = "."
"""The key of tensors that no dict holds."""
YAML_FILE = "config.yaml"
_SHOWN = 5


class ForeignWeights:
    """A model's tensors among what another program stored, by our names.

    Args:
        stored: all that is there.
        model: what is looked for.
        key: what stands before the model's names; None: found out.
        ignored: patterns of names (`*` and `?`) to leave out.
        tell: gets a line about everything that was chosen.

    Raises:
        UserError: the model's tensors are not there, or several sets of them are, or others are among them.
    """

    def __init__(
        self, stored: StoredTensors, model: Model, key: str | None, ignored: Sequence[str], tell: Tell
    ) -> None:
        self._tensors, self._model = stored, model
        self._ours = {theirs: ours for ours, theirs in model.released.items()} | {name: name for name in model.shapes}
        names = {unwrapped(name): name for name in stored.templates}
        if len(names) != len(stored.templates):
            raise UserError(f"{stored.origin} holds tensors twice, with and without {', '.join(WRAPPERS)}")
        self._prefix = self._chosen(names, key)
        self._stored = self._renamed(_inside(names, self._prefix, self._counts(names)), ignored)
        templates = stored.templates
        self._templates = {ours: templates[name] for ours, name in self._stored.items()}
        if self._prefix or any(cleaned != name for cleaned, name in names.items()):
            wrappers = [wrapper for wrapper in WRAPPERS if any(wrapper in name for name in names.values())]
            shown = ", ".join([*([f"{self._prefix}."] if self._prefix else []), *wrappers])
            tell(f"{stored.origin}: {len(self._stored)} tensors taken, without {shown} in their names")

    @property
    def origin(self) -> Path:
        """File or folder."""
        return self._tensors.origin

    @property
    def model(self) -> Model:
        """What was looked for."""
        return self._model

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Our name -> shape and dtype."""
        return self._templates

    def stored_name(self, name: str) -> str:
        """The name there; of a tensor that is missing, the released one."""
        return self._stored.get(name) or self._model.released.get(name, name)

    def tensor(self, name: str) -> Tensor:
        """One tensor, in its stored dtype."""
        return self._tensors.tensor(self._stored[name])

    def _counts(self, names: Mapping[str, str]) -> dict[str, int]:
        """What stands before names of the model -> how many, without what only a few names of some layer have."""
        found: Counter[str] = Counter()
        for name in names:
            parts = name.split(".")
            found.update(".".join(parts[:i]) for i in range(len(parts)) if ".".join(parts[i:]) in self._ours)
        most = max(found.values(), default=0)
        return {prefix: count for prefix, count in sorted(found.items()) if 2 * count >= most}

    def _chosen(self, names: Mapping[str, str], key: str | None) -> str:
        counts = self._counts(names)
        if key is not None:
            prefix = "" if key == TOP else key
            if prefix not in counts:
                raise UserError(
                    f"{self.origin}: no tensors of this model under --key {key}; {self._sets(names, counts)}"
                )
            return prefix
        candidates = [prefix for prefix in counts if not f"{prefix}.".startswith(OPTIMIZERS)]
        known = [prefix for prefix in candidates if not prefix or set(prefix.split(".")) <= set(ROOTS)]
        if len(candidates) == len(known) == 1:
            return known[0]
        if len(known) > 1:
            raise UserError(f"{self.origin} holds the model more than once; {self._sets(names, counts)}")
        raise UserError(f"{self.origin}: which weights are meant is not clear; {self._sets(names, counts)}")

    def _sets(self, names: Mapping[str, str], counts: Mapping[str, int]) -> str:
        if not counts:
            shown = ", ".join(list(names)[:_SHOWN])
            return f"no name is one of this {KINDS[self._model.kind].title}'s; the first are {shown}"
        keys = ", ".join(f"--key {prefix or TOP} ({count} tensors)" for prefix, count in counts.items())
        return f"give one of {keys}"

    def _renamed(self, inside: Mapping[str, str], ignored: Sequence[str]) -> dict[str, str]:
        """Our name -> stored name."""
        found: dict[str, str] = {}
        unknown = []
        for name, stored in inside.items():
            if any(fnmatchcase(name, pattern) or fnmatchcase(stored, pattern) for pattern in ignored):
                continue
            ours = self._ours.get(name)
            if ours is None:
                unknown.append(stored)
            elif ours in found:
                raise UserError(f"{self.origin} holds {ours} as {found[ours]} and as {stored}; --ignore one of them")
            else:
                found[ours] = stored
        if unknown:
            more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
            raise UserError(
                f"{self.origin} has unknown tensors: {', '.join(unknown[:_SHOWN])}{more}; --ignore PATTERN leaves out "
                "what is no weight"
            )
        return found


def find_model(origin: Path, config: Path | None, tell: Tell) -> Model:
    """The model whose weights lie in `origin`, by a config file: the given one, or one in the folder or the one above.

    Raises:
        UserError: there is none, or it is of no known model.
    """
    if config is not None and not config.is_file():
        raise UserError(f"--config {config} is not there")
    folders = [origin, origin.parent] if origin.is_dir() else [origin.parent]
    places = [folder / name for folder in folders for name in (CONFIG_FILE, YAML_FILE)]
    found = config or next((place for place in places if place.is_file()), None)
    if found is None:
        raise UserError(
            f"{origin} does not say what model it is of, and there is no {', '.join(map(str, places))}: give --config "
            f"FILE, the released {CONFIG_FILE}, or a YAML file with the section "
            + " or ".join(kind.section for kind in KINDS.values())
        )
    if config is None:
        tell(f"{origin}: sizes from {found}")
    return _model_of_yaml(found) if found.suffix in (".yaml", ".yml") else read_config(found, tell=tell)


def _model_of_yaml(path: Path) -> Model:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {error}") from None
    sections = [kind for kind in KINDS.values() if isinstance(values, dict) and kind.section in values]
    if len(sections) != 1:
        raise UserError(f"{path} must have one of the sections {', '.join(kind.section for kind in KINDS.values())}")
    (kind,) = sections
    return kind.build(build_config(kind.config, values[kind.section], origin=str(path)))


def unwrapped(name: str) -> str:
    """A stored name without those of wrapping modules."""
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def _inside(names: Mapping[str, str], prefix: str, others: Mapping[str, int]) -> dict[str, str]:
    """Name without the prefix -> stored name; at the top, without what has another prefix or is an optimizer's."""
    if prefix:
        return {name.removeprefix(f"{prefix}."): s for name, s in names.items() if name.startswith(f"{prefix}.")}
    apart = (*OPTIMIZERS, *(f"{other}." for other in others if other))
    return {name: stored for name, stored in names.items() if not name.startswith(apart)}
