"""Weights in the checkpoints of DeepSpeed: ZeRO 1, 2 and 3, each rank's part of flat fp32 buffers, and stage 0.

DeepSpeed's own zero_to_fp32 unpickles whatever the files ask for and, for stages 1 and 2, holds the whole model; here
the partitions are read where a tensor lies in them. Where that is, is as in deepspeed/utils/zero_to_fp32.py, 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.torch_files import HARMLESS, Inert
from checkpoints_tools.torch_pickles import StoredTensor, Unpicklable, read_structure
from megatron_video.errors import UserError

Values = Literal["fp32", "module"]
"""The optimizer's fp32 weights, or the module's in the precision it computed in."""

LATEST = "latest"
# Classes in DeepSpeed's files beyond tensors and plain values; what they hold is not needed, or is a number.
DEEPSPEED_HARMLESS: tuple[Unpicklable, ...] = (
    *HARMLESS,
    (int, "deepspeed.runtime.zero.config.ZeroStageEnum"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.LossScaler"),
    (Inert, "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (Inert, "deepspeed.utils.tensor_fragment.fragment_address"),
    (Inert, "deepspeed.checkpoint.universal_checkpoint.SubparamShape"),
)
_OPTIMIZER_FILE = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL_FILE = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_(\d+)_model_states\.pt")
# stage -> key of the fp32 buffers, key of the optimizer's own state
_BUFFERS = {
    1: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    2: ("single_partition_of_fp32_groups", "base_optimizer_state"),
    3: ("fp32_flat_groups", "optimizer_state_dict"),
}


@dataclass(frozen=True)
class Run:
    """Elements `start` to `stop` of one rank's flat buffer."""

    buffer: StoredTensor
    start: int
    stop: int


@dataclass(frozen=True)
class Pieces:
    """A tensor in pieces that follow each other in its flattened form."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    runs: tuple[Run, ...]

    def read(self) -> Tensor:
        """The whole tensor."""
        flat = torch.empty(torch.Size(self.shape).numel(), dtype=self.dtype)
        done = 0
        for run in self.runs:
            piece = run.buffer.read_flat(run.start, run.stop)[: flat.numel() - done]
            flat[done : done + piece.numel()] = piece
            done += piece.numel()
        assert done == flat.numel(), (done, self.shape)
        return flat.view(self.shape)


class DeepSpeedCheckpoint:
    """The tensors of one DeepSpeed checkpoint by the module's names."""

    def __init__(self, path: Path, values: Values = "fp32", trust_pickle: bool = False) -> None:
        """Open a checkpoint, or the folder in which `latest` names the newest.

        Args:
            path: folder.
            values: which weights, where the checkpoint holds both.
            trust_pickle: run whatever the files ask for.

        Raises:
            UserError: a rank's file is missing, damaged or of another step; several model-parallel ranks.
        """
        self.origin = tag_folder(path)
        self._models = model_files(self.origin, trust_pickle)
        self._optimizers = [RankFile(file, trust_pickle) for file in _ranked(self.origin, _OPTIMIZER_FILE)]
        self.stage = self._find_stage(values)
        self._refuse_missing_ranks()
        self._refuse_mixed_steps()
        self._stored = self._module() if values == "module" or self.stage == 0 else self._masters()

    @property
    def templates(self) -> Mapping[str, Tensor]:
        """Name in the module -> shape and dtype."""
        return {
            name: torch.empty(stored.shape, dtype=stored.dtype, device="meta") for name, stored in self._stored.items()
        }

    def tensor(self, name: str) -> Tensor:
        """One whole tensor."""
        return self._stored[name].read()

    def _find_stage(self, values: Values) -> int:
        if not self._optimizers:
            # Without ZeRO there is no list of what the optimizer's files hold.
            if self._models[0].find("param_shapes") and values == "fp32":
                raise UserError(
                    f"{self.origin} lacks all ranks' *_optim_states.pt, which hold the fp32 weights; "
                    "--deepspeed-weights module takes the module's"
                )
            return 0
        first = self._optimizers[0]
        # DeepSpeed's BF16_Optimizer cuts as stage 1 does, and does not say so.
        unsaid = 1 if first.find("optimizer_state_dict", _BUFFERS[1][0]) is not None else None
        stage = int(first.find("optimizer_state_dict", "zero_stage") or unsaid or -1)
        if stage not in _BUFFERS:
            raise UserError(f"{first.path} is of ZeRO stage {stage}; read are 0, 1, 2 and 3")
        return stage

    def _refuse_missing_ranks(self) -> None:
        if self.stage == 0:
            return
        counts = self._optimizers[0].get("optimizer_state_dict", "partition_count")
        world = max(counts) if isinstance(counts, list) else int(counts)
        wanted = {"optimizer": (self._optimizers, world), "model": (self._models, world if self.stage == 3 else 1)}
        for opened, count in wanted.values():
            names = {file.path.name for file in opened}
            first = opened[0].path.name
            expected = [re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", first) for rank in range(count)]
            missing, strange = [n for n in expected if n not in names], sorted(names - set(expected))
            if missing:
                raise UserError(f"{self.origin} was written by {world} ranks and lacks {', '.join(missing[:5])}")
            if strange:
                raise UserError(
                    f"{self.origin} was written by {world} ranks; {', '.join(strange[:5])} is left of another save"
                )

    def _refuse_mixed_steps(self) -> None:
        # The two count apart: steps that an overflow skipped, or an optimizer that was started anew.
        for files in (self._models, self._optimizers):
            refuse_mixed_steps(self.origin, {file.path.name: file.step(self.stage) for file in files})

    def _module(self) -> dict[str, StoredTensor | Pieces]:
        found: dict[str, StoredTensor | Pieces] = self._models[0].get("module")
        empty = [name for name, stored in found.items() if torch.Size(stored.shape).numel() == 0]
        if empty:
            raise UserError(
                f"{self.origin} of ZeRO 3 holds no module weights (they were saved without "
                "stage3_gather_16bit_weights_on_model_save); leave out --deepspeed-weights module to read fp32"
            )
        return found

    def _masters(self) -> dict[str, StoredTensor | Pieces]:
        found = untrained(self._models)
        buffers = [file.buffers(self.stage) for file in self._optimizers]
        trained = _by_parameter if self.stage == 3 else _by_partition
        found |= dict(trained(self._models[0], self._optimizers[0], buffers))
        for name, other in (self._models[0].find("shared_params") or {}).items():
            found[name] = found[other]
        return found


class RankFile:
    """One file of a checkpoint."""

    def __init__(self, path: Path, trust_pickle: bool) -> None:
        self.path = path
        self._content = read_structure(path, trust_pickle, DEEPSPEED_HARMLESS)

    def get(self, *keys: str) -> Any:
        """What lies under nested keys.

        Raises:
            UserError: nothing does.
        """
        found = self._content
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                raise UserError(f"{self.path} lacks {' / '.join(keys)}: it is no checkpoint of DeepSpeed 0.9 or later")
            found = found[key]
        return found

    def find(self, *keys: str) -> Any:
        """As `get`, and None if there is nothing."""
        try:
            return self.get(*keys)
        except UserError:
            return None

    def buffers(self, stage: int) -> list[StoredTensor]:
        """This rank's part of the fp32 weights, one buffer a parameter group."""
        found: list[StoredTensor] = self.get("optimizer_state_dict", _BUFFERS[stage][0])
        return found

    def step(self, stage: int) -> int | None:
        """Steps done when this file was written; None if it does not say."""
        if "optimizer_state_dict" not in self._content:
            return self.find("global_steps")
        groups = self.find("optimizer_state_dict", _BUFFERS[stage][1], "state") or {}
        steps = [group["step"] for group in groups.values() if isinstance(group, dict) and "step" in group]
        values = [step.read().item() if isinstance(step, StoredTensor) else step for step in steps]
        return int(max(values)) if values else None


def tag_folder(path: Path, pointer_name: str = LATEST) -> Path:
    """The folder with the ranks' files: `path`, or the one that the file `latest` in it names.

    Raises:
        UserError: `latest` names none.
    """
    pointer = path / pointer_name
    if not pointer.is_file():
        return path
    folder = path / pointer.read_text(encoding="utf-8", errors="replace").strip()
    if not folder.is_dir():
        raise UserError(f"{pointer} names {folder.name}, which is not there; give one of the folders beside it")
    return folder


def refuse_mixed_steps(origin: Path, steps: Mapping[str, int | None]) -> None:
    """All files must be of one step.

    Raises:
        UserError: naming those that are not.
    """
    first = next(iter(steps), "")
    wrong = [f"{name} of step {step}" for name, step in steps.items() if step != steps[first]]
    if wrong:
        raise UserError(f"{origin} mixes steps: {first} is of step {steps[first]}, {', '.join(wrong[:5])}")


def is_deepspeed(path: Path) -> bool:
    """Whether a folder, or the one its `latest` names, has files of DeepSpeed's ranks.

    Raises:
        UserError: `latest` names none.
    """
    folder = tag_folder(path)
    patterns = (_MODEL_FILE, _OPTIMIZER_FILE)
    return folder.is_dir() and any(p.fullmatch(file.name) for file in folder.iterdir() for p in patterns)


def model_files(folder: Path, trust_pickle: bool) -> list[RankFile]:
    """The files with the module's own state: one, or under ZeRO 3 one of every rank.

    Raises:
        UserError: there is none.
    """
    found = [RankFile(file, trust_pickle) for file in _ranked(folder, _MODEL_FILE)]
    if not found:
        raise UserError(
            f"{folder} lacks the module's file, mp_rank_00_model_states.pt or zero_pp_rank_0_mp_rank_00_..."
        )
    return found


def _ranked(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The files of a kind in the order of their ranks."""
    files = folder.iterdir() if folder.is_dir() else []
    found = sorted((match[2], int(match[1] or 0), file) for file in files if (match := pattern.fullmatch(file.name)))
    parallel = sorted({rank for rank, _, _ in found})
    if len(parallel) > 1:
        raise UserError(
            f"{folder} is of a model cut over {len(parallel)} model-parallel ranks, which only its own framework can "
            "put together; convert it there with deepspeed/checkpoint/ds_to_universal.py, and give the result"
        )
    return [file for _, _, file in found]


def untrained(models: Sequence[RankFile]) -> dict[str, StoredTensor | Pieces]:
    """What the module's files hold whole: buffers, frozen parameters, and copies of the others in 16 bits."""
    found: dict[str, StoredTensor | Pieces] = {
        name: stored for name, stored in models[0].get("module").items() if 0 not in stored.shape
    }
    shapes = models[0].find("frozen_param_shapes") or {}
    parts = [file.find("frozen_param_fragments") or {} for file in models]
    # Under ZeRO 3 a fragment is a rank's part; under 1 and 2 it is the whole.
    return found | {name: _pieces(shape, [_whole(part[name]) for part in parts]) for name, shape in shapes.items()}


def _by_partition(model: RankFile, optimizer: RankFile, buffers: Sequence[list[StoredTensor]]) -> Iterator[Any]:
    """Stages 1 and 2: the parameters of a group lie behind each other, cut over the ranks at equal lengths."""
    groups: list[dict[str, Sequence[int]]] = model.get("param_shapes")
    paddings = optimizer.find("optimizer_state_dict", "param_alignment_paddings")
    if any(len(rank) != len(groups) for rank in buffers):
        raise UserError(f"{model.path} lists {len(groups)} parameter groups, {optimizer.path} holds {len(buffers[0])}")
    for index, shapes in enumerate(groups):
        line = [_whole(rank[index]) for rank in buffers]
        gaps = paddings[index] if paddings else [0] * len(shapes)
        start = 0
        for (name, shape), gap in zip(shapes.items(), gaps, strict=True):
            stop = start + torch.Size(shape).numel()
            yield name, _pieces(shape, _slice(line, start, stop))
            start = stop + gap
        _refuse_other_length(model.path, start, line, 2 * len(buffers))


def _by_parameter(model: RankFile, optimizer: RankFile, buffers: Sequence[list[StoredTensor]]) -> Iterator[Any]:
    """Stage 3: every parameter is cut over the ranks at equal lengths; a rank has its parts behind each other."""
    shapes = {name: shape for group in model.get("param_shapes") for name, shape in group.items()}
    lines = [[_whole(buffer) for buffer in rank] for rank in buffers]
    start = 0
    for name, shape in shapes.items():
        stop = start + -(-torch.Size(shape).numel() // len(lines))
        yield name, _pieces(shape, [run for line in lines for run in _slice(line, start, stop)])
        start = stop
    for line in lines:
        _refuse_other_length(model.path, start, line, 1)


def _refuse_other_length(path: Path, used: int, line: Sequence[Run], align: int) -> None:
    held = sum(run.stop for run in line)
    # The end of a line is filled up to a multiple.
    if -(-used // align) != -(-held // align):
        raise UserError(f"{path} lists parameters of {used} values, the optimizer's files of all ranks hold {held}")


def _whole(buffer: StoredTensor) -> Run:
    return Run(buffer, 0, buffer.elements)


def _slice(line: Sequence[Run], start: int, stop: int) -> list[Run]:
    """What holds elements `start` to `stop` of the whole buffers in `line`, taken behind each other."""
    ends = accumulate(run.stop for run in line)
    found = []
    for run, end in zip(line, ends, strict=True):
        first = end - run.stop
        low, high = max(start, first), min(stop, end)
        if low < high:
            found.append(Run(run.buffer, low - first, high - first))
    return found


def _pieces(shape: Sequence[int], runs: Sequence[Run]) -> Pieces:
    return Pieces(tuple(shape), runs[0].buffer.dtype if runs else torch.float32, tuple(runs))
