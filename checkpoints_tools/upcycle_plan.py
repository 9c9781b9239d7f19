"""From which tensors of a smaller video DiT every tensor of a larger, or otherwise deep, one is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoints_tools.dit_names import ADDITIONAL_NAMES
from checkpoints_tools.released_fields import DIT_FIELDS
from megatron_video.dit import DiTConfig
from megatron_video.errors import UserError

# Fields that may change, and that weights of the old value can be taken for: field -> whether it may.
GROWING: dict[str, Callable[[DiTConfig, DiTConfig], bool]] = {
    "num_layers": lambda old, new: True,
    "in_channels": lambda old, new: new.in_channels > old.in_channels,
    "use_additional_conditions": lambda old, new: new.use_additional_conditions,
}
# How a block ends: with these at zero it adds nothing, and the gradient still reaches them.
OUTPUT_PROJECTIONS = (
    "self_attention.linear_proj.weight",
    "cross_attention.linear_proj.weight",
    "mlp.linear_fc2.weight",
)
PATCH_WEIGHT = "patch_embedding.weight"
_LAYER = "layers."


def interleave(old: int, new: int) -> list[int]:
    """Every layer is followed by its copies: 0 0 1 1 2 2 (block expansion, LLaMA Pro, arXiv 2401.02415)."""
    return [layer * old // new for layer in range(new)]


def stack(old: int, new: int) -> list[int]:
    """All layers, then again from the first: 0 1 2 0 1 2 (progressive stacking, Gong et al. 2019)."""
    return [layer % old for layer in range(new)]


def blocks(old: int, new: int) -> list[int]:
    """The first layers, then the last, overlapping: 0 1 2 1 2 3 (depth up-scaling, SOLAR, arXiv 2312.15166)."""
    if new > 2 * old:
        raise UserError(f"--depth-schedule blocks reaches {2 * old} layers from {old}, not {new}; use stack")
    first = -(-new // 2)
    return [*range(first), *range(old - (new - first), old)]


def evenly(old: int, new: int) -> list[int]:
    """Fewer layers, the first and the last among them: 0 2 4 of five."""
    return [round(layer * (old - 1) / max(new - 1, 1)) for layer in range(new)]


SCHEDULES = {"interleave": interleave, "stack": stack, "blocks": blocks}


@dataclass(frozen=True)
class Plan:
    """What becomes what."""

    old: DiTConfig
    new: DiTConfig
    layers: tuple[int, ...]
    """Source of every layer."""
    zeroed: frozenset[int] = frozenset()
    """Layers whose output projections are zero, so that they add nothing at first."""

    @property
    def widened_channels(self) -> int:
        """Input channels without a source."""
        return self.new.in_channels - self.old.in_channels

    @property
    def keeps_function(self) -> bool:
        """Whether the new model computes what the old one does, whatever new inputs hold."""
        kept = [source for layer, source in enumerate(self.layers) if layer not in self.zeroed]
        return kept == list(range(self.old.num_layers))

    def source(self, name: str) -> str | None:
        """Our name of the tensor that becomes, or goes into, this one; None: it starts anew."""
        if not name.startswith(_LAYER):
            new = name in ADDITIONAL_NAMES and not self.old.use_additional_conditions
            return None if new else name
        number, rest = name.removeprefix(_LAYER).split(".", 1)
        if int(number) in self.zeroed and rest in OUTPUT_PROJECTIONS:
            return None
        return f"{_LAYER}{self.layers[int(number)]}.{rest}"


def make_plan(
    old: DiTConfig, new: DiTConfig, layers: Sequence[int] | None, schedule: str | None, zero_new: bool
) -> Plan:
    """Plan the way from one model to another.

    Args:
        old: sizes of the source.
        new: sizes of the other.
        layers: source of every new layer; None: by `schedule`, or evenly where there are to be fewer.
        schedule: key of SCHEDULES; None: interleave.
        zero_new: copies add nothing at first.

    Raises:
        UserError: sizes that weights cannot be taken over to, with both values; layers that contradict them.
    """
    _check_sizes(old, new)
    chosen = _layers(old.num_layers, new.num_layers, layers, schedule)
    if chosen == list(range(old.num_layers)) and all(getattr(old, name) == getattr(new, name) for name in GROWING):
        raise UserError("the sizes are those that the model has already: nothing to do (`convert` copies)")
    zeroed = _copies(chosen, old.num_layers) if zero_new else frozenset[int]()
    return Plan(old, new, tuple(chosen), zeroed)


def _check_sizes(old: DiTConfig, new: DiTConfig) -> None:
    there, here = dataclasses.asdict(old), dataclasses.asdict(new)
    changed = [name for name in there if there[name] != here[name] and name not in DIT_FIELDS.unkept]
    wrong = [name for name in changed if name not in GROWING or not GROWING[name](old, new)]
    if wrong:
        listed = "; ".join(f"{name} {there[name]} -> {here[name]}" for name in wrong)
        raise UserError(
            f"weights cannot be taken over to {listed}. What can change: num_layers, in_channels upwards, "
            "use_additional_conditions from false to true"
        )


def _layers(old: int, new: int, layers: Sequence[int] | None, schedule: str | None) -> list[int]:
    if layers is not None:
        if schedule is not None:
            raise UserError(f"--layers says where layers come from; leave --depth-schedule {schedule} out")
        if len(layers) != new:
            raise UserError(f"--layers names {len(layers)} layers, num_layers is {new}")
        unknown = [layer for layer in layers if not 0 <= layer < old]
        if unknown:
            raise UserError(f"--layers {unknown[0]}: the source has layers 0 to {old - 1}")
        return list(layers)
    if new > old:
        return SCHEDULES[schedule or "interleave"](old, new)
    if schedule is not None:
        raise UserError(f"--depth-schedule {schedule} is for copies of layers, but {old} -> {new} copies none")
    return evenly(old, new)


def _copies(layers: Sequence[int], old: int) -> frozenset[int]:
    """Layers whose source has come before; the others must be the whole source in its order."""
    first = [layer for layer, source in enumerate(layers) if source not in layers[:layer]]
    if [layers[layer] for layer in first] != list(range(old)):
        raise UserError(
            f"--zero-new keeps what the model computes, but the layers {','.join(map(str, layers))} leave some of "
            f"0 to {old - 1} out or change their order"
        )
    if len(first) == len(layers):
        raise UserError("--zero-new is for copies of layers, and no layer is copied")
    return frozenset(range(len(layers))) - frozenset(first)
