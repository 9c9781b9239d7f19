"""The config.json of a released folder: read into our dataclasses, written as the released one is, and recognised."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.models import KINDS, Kind
from checkpoints_tools.weights import Model
from megatron_video.config_io import build_config, config_to_dict
from megatron_video.errors import UserError

CONFIG_FILE = "config.json"


def read_values(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file.

    Raises:
        UserError: it cannot be read, is not JSON, or no mapping.
    """
    try:
        return parse_values(path.read_text(encoding="utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def parse_values(text: str, origin: str) -> dict[str, Any]:
    """The mapping in a JSON text; `origin` names it in errors.

    Raises:
        UserError: not JSON, or no mapping.
    """
    try:
        values = json.loads(text)
    except ValueError as error:
        raise UserError(f"{origin} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{origin} holds a {type(values).__name__}, not an object of fields")
    return values


def build_sizes(kind: Kind, values: Mapping[str, Any], names: Iterable[str], origin: str) -> Any:
    """The dataclass of a kind from the fields of its config.json.

    Args:
        kind: of the model.
        values: the fields.
        names: released names, after the prefix, of the tensors there; optional ones are part of the sizes.
        origin: for messages.

    Raises:
        UserError: a field that is missing, unknown, or says something that the model here cannot be.
    """
    fields = kind.fields
    missing = [name for name in fields.required if name not in values]
    if missing:
        raise UserError(f"{origin} is no configuration of a {kind.title}: {', '.join(missing)} missing")
    known = {**fields.fixed, **fields.implied}
    wrong = [
        f"{name}={value!r} (released: {known[name]!r})"
        for name, value in values.items()
        if name in known and value != known[name]
    ]
    if wrong:
        raise UserError(f"{origin} describes a {kind.title} that cannot be built here: {', '.join(wrong)}")
    if fields.closed and (unknown := unknown_fields(kind, values)):
        raise UserError(f"{origin} has fields that no released {kind.title} has: {', '.join(unknown)}")
    sizes = {name: values[name] for name in (*fields.shared, *fields.own) if name in values}
    there = set(names)
    sizes |= {name: tensor in there for name, tensor in kind.optional.items()}
    return build_config(kind.config, sizes, origin=origin)


def unknown_fields(kind: Kind, values: Mapping[str, Any]) -> list[str]:
    """Fields of a config.json that nothing is known of."""
    fields = kind.fields
    known = {
        *fields.shared,
        *fields.own,
        *fields.fixed,
        *fields.implied,
        *fields.written,
        *fields.derived,
        *fields.dtypes,
    }
    return [name for name in values if name not in known and not name.startswith("_")]


def released_values(config: Any, kind: Kind, dtype: str) -> tuple[dict[str, Any], list[str]]:
    """Fields of the config.json that the released code reads, and what of `config` it has no place for.

    Args:
        config: the sizes.
        kind: they belong to.
        dtype: of the weights, as "bfloat16".

    Raises:
        UserError: a field without a place in it that changes what the model computes.
    """
    fields, ours = kind.fields, config_to_dict(config)
    default = config_to_dict(kind.config())
    values = dict(fields.fixed) | dict(fields.written)
    values |= {name: ours[name] for name in fields.shared}
    values |= {name: ours[name] for name in fields.own if ours[name] != default[name]}
    values |= {name: getattr(config, source) for name, source in fields.derived.items()}
    values |= {name: before + dtype for name, before in fields.dtypes.items()}
    there = [tensor for name, tensor in kind.optional.items() if ours[name]]
    back = config_to_dict(build_sizes(kind, values, there, "the released form"))
    lost = [name for name in ours if back[name] != ours[name]]
    refused = [f"{name}={ours[name]} (it means {back[name]})" for name in lost if name not in fields.unkept]
    if refused:
        raise UserError(
            f"the released form of a {kind.title} has no place for {', '.join(refused)}: the weights "
            "would compute something else there; keep the megatron-core form"
        )
    return values, [f"{name}={ours[name]}" for name in lost]


def is_same_model(first: Model, second: Model) -> bool:
    """Whether two are equal but for sizes that the released form does not keep."""
    sizes = [config_to_dict(model.config) for model in (first, second)]
    kept = [{k: v for k, v in each.items() if k not in KINDS[first.kind].fields.unkept} for each in sizes]
    return (first.kind, first.shapes, kept[0]) == (second.kind, second.shapes, kept[1])


def config_text(values: Mapping[str, Any]) -> str:
    """A config file as diffusers and transformers write it."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def recognise(values: Mapping[str, Any] | None, names: Iterable[str], origin: Path) -> str:
    """Key in KINDS of what a folder or file holds, by its config.json where there is one, else by tensors' names.

    Raises:
        UserError: nothing known, or several kinds.
    """
    by_config = [] if values is None else [key for key, kind in KINDS.items() if _marked(kind, values)]
    there = set(names)
    by_names = [key for key, kind in KINDS.items() if {kind.signature, kind.prefix + kind.signature} & there]
    found = by_config or by_names
    if len(found) == 1 and (not by_names or found[0] in by_names):
        return found[0]
    known = ", ".join(f"{key} ({kind.title})" for key, kind in KINDS.items())
    says = f"{CONFIG_FILE} says {' or '.join(by_config) or 'nothing known'}" if values is not None else "no config.json"
    raise UserError(
        f"{origin}: what model is it? {says}, the tensors' names say {' or '.join(by_names) or 'nothing known'}; "
        f"say it with --kind: {known}"
    )


def _marked(kind: Kind, values: Mapping[str, Any]) -> bool:
    return any(
        all(name in values and mark in (..., values[name]) for name, mark in group.items())
        for group in kind.fields.marks
    )
