"""What is known of a run's layout when it is judged, and the layouts near it.

A layout's facts have the names of the configuration's fields (`parallel.tensor_model_parallel_size`), so that one
table of rules can speak of them, and a search can vary them, whatever they are.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import math
import os
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from megatron_video.parallel import ParallelConfig

if TYPE_CHECKING:
    from megatron_video.dit.config import DiTConfig

Precision = Literal["fp32", "bf16"]
Balance = Literal["auto", "cost", "none"]
Change = Mapping[str, Any]
"""New values by the name of the fact."""

_GROUPS = ("parallel", "model", "fp8", "hardware")
# A user chooses these to fit the others; the model's sizes and the machine are what they are.
_VARIED_GROUPS = ("parallel", "fp8")
_SUGGESTIONS = 3
# Nearest values of each of two facts that are tried together.
_PAIRED = 24


@dataclass(frozen=True)
class Hardware:
    """What this machine offers."""

    cuda: bool = False
    """Whether torch sees a CUDA device."""
    compute_capability: tuple[int, int] | None = None
    """Of this process's device: (8, 0) A100, (9, 0) H100 / H800 / H200, (10, 0) B200."""
    transformer_engine: str | None = None
    """Version of the installed package; None without it."""
    cuda_version: tuple[int, int] | None = None
    """CUDA version that torch was built for."""

    @staticmethod
    def detect() -> Hardware:
        """Of this machine; starts nothing on the device."""
        try:
            engine: str | None = importlib.metadata.version("transformer-engine")
        except importlib.metadata.PackageNotFoundError:
            engine = None
        if not torch.cuda.is_available():
            return Hardware(transformer_engine=engine)
        device = int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
        major, minor = str(torch.version.cuda).split(".")[:2]
        return Hardware(True, torch.cuda.get_device_capability(device), engine, (int(major), int(minor)))


@dataclass(frozen=True)
class Layout:
    """A model on ranks. What is not known is None, and is not judged."""

    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the model is cut."""
    model: DiTConfig | None = None
    """What is cut."""
    precision: Precision | None = None
    """Type of weights and activations."""
    fp8: Any = None
    """Its FP8 settings (megatron_video.fp8.Fp8Config)."""
    world_size: int | None = None
    """Ranks of the whole job."""
    micro_batches: int | None = None
    """Micro-batches of one step over all replicas."""
    micro_batch_size: int = 1
    """Samples of one micro-batch."""
    samples_per_draw: int = 1
    """The global batch grows in steps of so many samples."""
    balance: Balance | None = None
    """How micro-batches are shared out to replicas."""
    images_per_video: float | None = None
    """Images that come on top of the micro-batches, for every video."""
    pack_tokens: int | None = None
    """Micro-batches are joined into sequences of at most so many video tokens."""
    cpu_offload: bool | None = None
    """Whether the optimizer's moments lie and are updated in host memory."""
    buckets: list[str] | None = None
    """Sizes of the samples, such as 17x48x64."""
    hardware: Hardware | None = None
    """The machine it is to run on."""

    @property
    def global_batch_size(self) -> int | None:
        """Samples of one step over all replicas."""
        return None if self.micro_batches is None else self.micro_batches * self.micro_batch_size

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model; needs `world_size`."""
        assert self.world_size is not None
        return self.world_size // self.parallel.model_parallel_size

    @property
    def micro_batches_per_replica(self) -> int:
        """Micro-batches of one step on one replica, rounded down; needs `world_size` and `micro_batches`."""
        assert self.micro_batches is not None
        return self.micro_batches // self.data_parallel_size

    @property
    def micro_batches_left_over(self) -> int:
        """Micro-batches of a step that cannot be shared evenly; needs `world_size` and `micro_batches`."""
        assert self.micro_batches is not None
        return self.micro_batches % self.data_parallel_size

    @property
    def why_equally_many(self) -> str:
        """Why every replica needs equally many micro-batches; empty where it does not."""
        if self.parallel.use_megatron_fsdp:
            return "Megatron-FSDP gathers weights from all replicas in every micro-batch"
        if self.parallel.virtual_pipeline_model_parallel_size is not None:
            return "interleaved stages take micro-batches in rounds of as many as there are stages"
        if self.fp8 is not None and self.fp8.recipe == "delayed":
            return "delayed scaling exchanges magnitudes between all replicas in every micro-batch"
        return ""

    @property
    def and_why_equally_many(self) -> str:
        """The same behind a colon, for messages."""
        return f": {self.why_equally_many}" if self.why_equally_many else ""

    @property
    def balances_cost(self) -> bool:
        """Whether micro-batches are shared out by cost, so that replicas may have different numbers of them."""
        return self.balance == "cost" or (self.balance == "auto" and not self.why_equally_many)

    @property
    def stages(self) -> int:
        """Pieces into which the layers are cut: pipeline stages x chunks of each."""
        chunks = self.parallel.virtual_pipeline_model_parallel_size or 1
        return self.parallel.pipeline_model_parallel_size * chunks

    @property
    def heads_per_rank(self) -> int:
        """Attention heads of one tensor-parallel rank; needs `model`."""
        assert self.model is not None
        return self.model.num_attention_heads // self.parallel.tensor_model_parallel_size

    @property
    def all_to_all_size(self) -> int:
        """Ranks that exchange tokens for heads; 1 where none do."""
        kind, ranks = self.parallel.cp_comm_type, self.parallel.context_parallel_size
        if kind == "a2a+p2p":
            sizes = self.parallel.hierarchical_context_parallel_sizes
            return sizes[0] if sizes and ranks > 1 else 1
        return ranks if kind == "a2a" else 1

    @property
    def token_unit(self) -> int:
        """Video tokens are padded to a multiple of it: equally many for every rank, and as its kernels need."""
        parallel = self.parallel
        ranks = parallel.context_parallel_size * (
            parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1
        )
        fp8 = self.fp8.needs.multiple if self.fp8 is not None and self.fp8.needs is not None else 1
        return ranks * math.lcm(fp8, 2 if "p2p" in parallel.cp_comm_type else 1)

    @property
    def padded_buckets(self) -> str:
        """Buckets whose samples need padding to that, with their video tokens; needs `buckets` and `model`."""
        from megatron_video.buckets import parse_bucket

        assert self.buckets is not None
        assert self.model is not None
        patch = self.model.patch_size**2
        tokens = {name: parse_bucket(name).latent_shape.tokens // patch for name in self.buckets}
        return ", ".join(f"{name} has {count}" for name, count in tokens.items() if count % self.token_unit)

    def __getitem__(self, name: str) -> Any:
        """The value called `group.field` in the configuration, or `world_size`; None if it is not known."""
        group, _, item = name.rpartition(".")
        if group in _GROUPS:
            holder = getattr(self, group)
            return None if holder is None else getattr(holder, item)
        return getattr(self, item)

    def knows(self, name: str) -> bool:
        """Whether there is anything to judge: an option that is null can be, a machine nobody looked at cannot."""
        group, _, _ = name.rpartition(".")
        return getattr(self, group) is not None if group in _GROUPS else self[name] is not None

    def changed(self, change: Change) -> Layout:
        """The same layout with other values of some facts; a group that was unknown starts from its defaults."""
        values: dict[str, Any] = {}
        for group in _GROUPS:
            items = {name.partition(".")[2]: value for name, value in change.items() if name.startswith(f"{group}.")}
            if items:
                if "attention_head_dim" in items:  # channels are split anew over frame, row and column
                    items = {"rope_channel_split": None, **items}
                values[group] = replace(getattr(self, group) or _defaults(group), **items)
        for name, value in change.items():
            item = name.rpartition(".")[2]
            if item == "global_batch_size":
                values["micro_batches"] = value // self.micro_batch_size
            elif name.partition(".")[0] not in _GROUPS:
                values[item] = value
        return replace(self, **values)


@dataclass(frozen=True)
class Rule:
    """One kind of layout that cannot work. It is asked only where all of its fields are known."""

    name: str
    """Of the kind, for tests and tables."""
    fields: tuple[str, ...]
    """The facts it is about, as the configuration names them."""
    refuses: Callable[[Layout], bool]
    """Whether a layout is of this kind; may rely on the sizes being at least 1."""
    reason: str
    """Why it cannot work; `{layout...}` stands for a value derived from the layout."""
    example: Change
    """The smallest change of an empty layout that is of this kind."""

    def applies(self, layout: Layout) -> bool:
        """Whether this rule refuses the layout."""
        return all(layout.knows(name) for name in self.fields) and self.refuses(layout)


def nearest(layout: Layout, names: Iterable[str], works: Callable[[Layout], bool]) -> list[Change]:
    """Up to three new values of each of the named facts with which the layout works, nearest first.

    Where no change of one fact is enough, changes of two.
    """
    varied = [name for name in names if _alternatives(layout, name)]
    for count in (1, 2):
        found: list[Change] = []
        for chosen in itertools.combinations(varied, count):
            working = (change for change in _changes(layout, chosen) if works(layout.changed(change)))
            found += itertools.islice(working, _SUGGESTIONS)
        if found:
            return found if count == 1 else found[:_SUGGESTIONS]
    return []


def _changes(layout: Layout, names: tuple[str, ...]) -> Iterator[Change]:
    """New values of all of `names` at once, nearest first."""
    values = [_alternatives(layout, name) for name in names]
    if len(names) == 1:
        yield from ({names[0]: value} for value in values[0])
        return
    # The sum of the places in the two orders: what is near in both comes first.
    places = itertools.product(*(range(min(len(each), _PAIRED)) for each in values))
    for place in sorted(places, key=sum):
        yield {name: each[at] for name, each, at in zip(names, values, place, strict=True)}


def _alternatives(layout: Layout, name: str) -> list[Any]:
    """Other values of a fact that one could set, nearest first; none for what is not for the user to choose."""
    group, _, item = name.rpartition(".")
    if not layout.knows(name):
        return []
    value = layout[name]
    if name == "data.global_batch_size":
        unit = max(layout.samples_per_draw, layout.micro_batch_size)
        values: Iterable[Any] = range(unit, 2 * value + 17 * unit, unit)
    elif name == "parallel.hierarchical_context_parallel_sizes":
        values = [None, *_factors(layout.parallel.context_parallel_size)]
    elif group in _VARIED_GROUPS:
        values = _values_of_type(get_type_hints(type(getattr(layout, group)))[item], value)
    elif name == "training.precision":
        values = _values_of_type(Precision, value)
    elif name == "data.balance":
        values = _values_of_type(Balance, value)
    elif name in ("data.images_per_video", "data.pack_tokens"):
        values = [None]
    elif name == "optimizer.cpu_offload":
        values = _values_of_type(bool, value)
    elif name == "world_size":
        values = _values_of_type(int, value)
    else:
        return []
    others = [other for other in values if other != value and _can_be(name, other)]
    return sorted(others, key=lambda other: _distance(value, other))


def _can_be(name: str, value: Any) -> bool:
    """Whether a rule may be asked about this value: they divide by sizes."""
    return not (name.endswith("_size") and value is not None and value < 1)


def _values_of_type(hint: Any, value: Any) -> list[Any]:
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is bool:
        return [False, True]
    if hint is int:
        return list(range(2 * max(value or 0, 0) + 17))
    if hint is type(None):
        return [None]
    if origin is Literal:
        return list(arguments)
    if origin in (Union, types.UnionType):
        return [each for argument in arguments for each in _values_of_type(argument, value)]
    # A list of choices: each alone, and all of them.
    if origin is list and get_origin(arguments[0]) is Literal:
        return [*([each] for each in get_args(arguments[0])), list(get_args(arguments[0]))]
    return []


def _factors(number: int) -> list[list[int]]:
    pairs = [[first, number // first] for first in range(1, number + 1) if number % first == 0]
    # With 1 as a factor there are not two levels; better than nothing where the number is prime.
    return [pair for pair in pairs if min(pair) > 1] or pairs


def _distance(value: Any, other: Any) -> tuple[float, int]:
    numbers = isinstance(value, int) and isinstance(other, int)
    # Of two equally near numbers the smaller first: it asks for less.
    return (abs(other - value), other) if numbers else (1, 0)


def _defaults(group: str) -> Any:
    from megatron_video.dit.config import DiTConfig

    if group == "model":
        return DiTConfig()
    if group == "fp8":
        from megatron_video.fp8 import Fp8Config

        return Fp8Config()
    return Hardware()
