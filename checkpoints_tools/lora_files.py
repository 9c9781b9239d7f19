"""Low-rank adapters as PEFT and diffusers store them: which tensors they change, by what matrices and how strongly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.safetensors_files import SUFFIX, SafetensorsFiles
from checkpoints_tools.torch_files import StoredTensors, TorchFile
from megatron_video.errors import UserError

CONFIG_FILE = "adapter_config.json"
# By PEFT, by PEFT before it wrote safetensors, and by diffusers, which keeps the configuration in the file's header.
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_HEADER_KEY = "lora_adapter_metadata"
# What a key ends with -> which of an adapter's tensors it is.
ENDS = {
    "lora_A": "down",
    "lora_B": "up",
    "lora_down": "down",
    "lora_up": "up",
    "lora.down": "down",
    "lora.up": "up",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}
_KEY = re.compile(rf"(?P<module>.+)\.(?P<end>{'|'.join(map(re.escape, ENDS))})(?:\.default)?(?:\.weight)?")
# Fields of the configuration that are read, or that change nothing about the weights.
READ_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora")
NEUTRAL_FIELDS = (
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
)
# Of the others, values that change nothing; what starts from other base weights than the model's is not among them.
FIXED_FIELDS: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "megatron_core": ("megatron.core",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
}


@dataclass(frozen=True)
class LowRank:
    """What an adapter does to one weight: adds scale * up @ down."""

    module: str
    """As the adapter names it."""
    down: str
    """Stored name of the matrix [rank, inputs...]."""
    up: str
    """Stored name of the matrix [outputs, rank]."""
    magnitude: str | None
    """Stored name of DoRA's lengths [outputs], to which the rows of the sum are brought."""
    scale: float
    outputs: int
    """Rows of the sum."""
    inputs: int
    """Values of a row."""


class Adapter:
    """One adapter: a folder of PEFT or diffusers, or the weight file alone."""

    def __init__(self, path: Path, trust_pickle: bool = False) -> None:
        """Read names and shapes, and no matrix.

        Raises:
            UserError: no adapter there; keys that are not understood; matrices that do not fit each other or the
                configuration; a kind of adapter that cannot be merged.
        """
        self.path = path
        file = _weight_file(path)
        self._stored: StoredTensors | SafetensorsFiles = (
            SafetensorsFiles([file]) if file.suffix == SUFFIX else TorchFile(file, trust_pickle)
        )
        self._config = _config(path, file)
        modules = self._modules()
        self._refuse_unused_patterns(modules)
        self.changes = [self._low_rank(module, keys) for module, keys in modules.items()]
        """One for every weight that it changes."""

    def delta(self, change: LowRank, shape: tuple[int, ...]) -> Tensor:
        """up @ down in fp32 in the shape of the weight, not scaled."""
        up, down = (self._stored.tensor(name).float().flatten(1) for name in (change.up, change.down))
        return (up @ down).view(shape)

    def magnitude(self, change: LowRank) -> Tensor | None:
        """DoRA's lengths in fp32."""
        return None if change.magnitude is None else self._stored.tensor(change.magnitude).float().flatten()

    def _modules(self) -> dict[str, dict[str, str]]:
        """Module -> which tensor -> stored name."""
        modules: dict[str, dict[str, str]] = {}
        strange = []
        for name in self._stored.templates:
            match = _KEY.fullmatch(name)
            if match is None:
                strange.append(name)
            else:
                modules.setdefault(match["module"], {})[ENDS[match["end"]]] = name
        if strange or not modules:
            raise UserError(
                f"{self.path} holds tensors that are no parts of a low-rank adapter: {', '.join(strange[:5])}; keys "
                "must end in lora_A.weight and lora_B.weight (or lora_down, lora_up, lora_magnitude_vector, alpha)"
            )
        return modules

    def _low_rank(self, module: str, keys: Mapping[str, str]) -> LowRank:
        missing = {"down", "up"} - keys.keys()
        if missing:
            raise UserError(f"{self.path}: {module} has {', '.join(keys.values())} without the other matrix")
        down, up = (tuple(self._stored.templates[keys[part]].shape) for part in ("down", "up"))
        if len(down) < 2 or len(up) < 2 or math.prod(up[1:]) != down[0]:
            raise UserError(f"{self.path}: {keys['up']} {list(up)} and {keys['down']} {list(down)} do not multiply")
        uses_dora = bool(self._config.get("use_dora"))
        if uses_dora != ("magnitude" in keys):
            said = "says use_dora" if uses_dora else "does not say use_dora"
            raise UserError(f"{self.path}: {CONFIG_FILE} {said}, {module} has {', '.join(keys.values())}")
        scale = self._scale(module, down[0], keys.get("alpha"))
        return LowRank(module, keys["down"], keys["up"], keys.get("magnitude"), scale, up[0], math.prod(down[1:]))

    def _scale(self, module: str, rank: int, alpha_key: str | None) -> float:
        wanted = self._of_module("rank_pattern", module, self._config.get("r", rank))
        if wanted != rank:
            raise UserError(f"{self.path}: the matrices of {module} have rank {rank}, {CONFIG_FILE} says {wanted}")
        # Without a word about it, trainers take alpha = rank.
        alpha = self._of_module("alpha_pattern", module, self._config.get("lora_alpha", rank))
        if alpha_key is not None:
            alpha = float(self._stored.tensor(alpha_key))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not math.isfinite(alpha):
            raise UserError(f"{self.path}: alpha of {module} is {alpha!r}, not a number")
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def _of_module(self, field: str, module: str, default: Any) -> Any:
        """The first pattern of a table that matches the end of a module's name, as PEFT looks it up."""
        table = self._config.get(field) or {}
        return next((value for pattern, value in table.items() if self._matches(field, pattern, module)), default)

    def _matches(self, field: str, pattern: str, module: str) -> bool:
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise UserError(f"{self.path}: {field} has {pattern!r}, which is no pattern ({error})") from None

    def _refuse_unused_patterns(self, modules: Mapping[str, Any]) -> None:
        for field in ("rank_pattern", "alpha_pattern"):
            for pattern in self._config.get(field) or {}:
                if not any(self._matches(field, pattern, module) for module in modules):
                    raise UserError(f"{self.path}: {field} has {pattern!r}, and the adapter no such module")


def _weight_file(path: Path) -> Path:
    found = [path] if path.is_file() else [path / name for name in WEIGHT_FILES if (path / name).is_file()]
    if not found:
        raise UserError(f"{path} holds no adapter; looked for {', '.join(WEIGHT_FILES)}")
    if len(found) > 1:
        raise UserError(f"{path} holds {' and '.join(file.name for file in found)}; name one of the files")
    return found[0]


def _config(path: Path, file: Path) -> dict[str, Any]:
    """The configuration beside the weights, or in their header; empty if there is none."""
    beside = file.parent / CONFIG_FILE
    if beside.is_file():
        values = _parsed(beside.read_text(encoding="utf-8", errors="replace"), beside)
    elif file.suffix == SUFFIX:
        values = _header(file)
    else:
        values = {}
    _refuse_other_kinds(values, path)
    return values


def _header(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, framework="pt") as stored:
            metadata = stored.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}") from None
    values = _parsed(metadata.get(_HEADER_KEY, "{}"), file)
    # Adapters of several models may share a file; theirs have the model's name before the field.
    return {name.rpartition(".")[2]: value for name, value in values.items()}


def _parsed(text: str, origin: Path) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{origin} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds no fields of an adapter")
    return values


def _refuse_other_kinds(values: Mapping[str, Any], path: Path) -> None:
    for name, value in values.items():
        # PEFT writes all fields of its version; what is not switched on does nothing.
        if name in (*READ_FIELDS, *NEUTRAL_FIELDS) or value in (None, False, [], {}):
            continue
        if name not in FIXED_FIELDS or value not in FIXED_FIELDS[name]:
            raise UserError(f"{path}: {name}={value!r} is no plain low-rank adapter, and cannot be merged here")
