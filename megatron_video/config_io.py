"""Configuration: dataclasses checked by pydantic, YAML presets, dotted overrides, one clear error for what is wrong.

Override values are parsed as YAML, so `steps=10`, `name=demo`, `betas=[0.9,0.95]` and `resume=null` mean what they say.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass
from pydantic_core import ErrorDetails
from typing_extensions import dataclass_transform

from megatron_video.errors import UserError

T = TypeVar("T")

# Numbers in YAML 1.1 need a dot ("1.0e-4"); pydantic's lax mode reads "1e-4" as the float it is meant to be.
_CONFIG = ConfigDict(extra="forbid", use_attribute_docstrings=True, validate_default=True)


@dataclass_transform(kw_only_default=True)
def config_dataclass(cls: type[T]) -> type[T]:
    """Make `cls` a keyword-only dataclass whose fields are type-checked and whose unknown fields are refused.

    A string below a field is its documentation. Relations between fields go in `__post_init__`, as `ValueError`s
    whose message names the fields, the values and what is allowed.
    """
    return pydantic_dataclass(config=_CONFIG, kw_only=True)(cls)  # type: ignore[return-value]


def load_config(
    cls: type[T], source: str | Path | None, overrides: Sequence[str] = (), preset_dir: Path | None = None
) -> T:
    """Read `source` (a YAML file, or the name of a preset in `preset_dir`), apply `key.sub=value` overrides, validate.

    Raises:
        UserError: no such file or preset, not YAML, an unknown field, a wrong type, or a contradiction.
    """
    path = _find(source, preset_dir) if source is not None else None
    values = _read_yaml(path) if path is not None else {}
    for override in overrides:
        _apply_override(values, override)
    return build_config(cls, values, origin=str(path) if path else "defaults")


def read_values(source: str | Path, preset_dir: Path | None = None) -> dict[str, Any]:
    """Plain values of a YAML file or preset, not validated.

    Raises:
        UserError: no such file or preset, or not YAML.
    """
    return _read_yaml(_find(source, preset_dir))


def build_config(cls: type[T], values: dict[str, Any], origin: str) -> T:
    """Validate plain `values` as `cls`; `origin` names where they came from in the error.

    Raises:
        UserError: an unknown field, a wrong type, or a contradiction.
    """
    try:
        return TypeAdapter(cls).validate_python(values)
    except ValidationError as error:
        lines = [_explain(cls, detail) for detail in error.errors()]
        raise UserError(f"configuration from {origin}: " + "\n  ".join(lines)) from None


def config_to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain lists, dicts and scalars, ready for YAML or JSON."""
    plain: dict[str, Any] = TypeAdapter(type(config)).dump_python(config, mode="json")
    return plain


def save_config(config: Any, path: Path) -> None:
    """Write the resolved configuration as YAML."""
    path.write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")


def _find(source: str | Path, preset_dir: Path | None) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    preset = preset_dir / f"{source}.yaml" if preset_dir else None
    if preset and preset.is_file():
        return preset
    if preset_dir is None:
        raise UserError(f"{path}: no such file")
    presets = sorted(p.stem for p in preset_dir.glob("*.yaml"))
    hint = f"; presets: {', '.join(presets)}" if presets else ""
    raise UserError(f"configuration {str(source)!r} is neither a file nor a preset{hint}")


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not readable as YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of fields, not a {type(values).__name__}")
    return values


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r} is not of the form field.subfield=value")
    *parents, leaf = key.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise UserError(f"override {override!r}: {parent!r} holds {child!r}, not a group of fields")
        node = child
    try:
        node[leaf] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not YAML: {error}") from None


def _explain(cls: type, detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    name = ".".join(location) or "configuration"
    if detail["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        return _explain_unknown(cls, location)
    if detail["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return f"field {name!r} is missing"
    message = detail["msg"].removeprefix("Value error, ")
    if detail["type"] == "value_error":
        return f"{name}: {message}" if location else message
    return f"{name}={detail['input']!r}: {message}"


def _explain_unknown(cls: type, location: list[str]) -> str:
    fields = _fields_at(cls, location[:-1])
    near = difflib.get_close_matches(location[-1], fields, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"unknown field {'.'.join(location)!r}{hint} Allowed here: {', '.join(sorted(fields)) or 'nothing'}"


def _fields_at(cls: Any, path: list[str]) -> list[str]:
    # Numbers of list entries are no fields.
    for part in (part for part in path if not part.isdigit()):
        hints = get_type_hints(cls) if dataclasses.is_dataclass(cls) else {}
        candidates = [hints.get(part), *getattr(hints.get(part), "__args__", ())]
        cls = next((c for c in candidates if dataclasses.is_dataclass(c)), None)
    return [field.name for field in dataclasses.fields(cls)] if dataclasses.is_dataclass(cls) else []
