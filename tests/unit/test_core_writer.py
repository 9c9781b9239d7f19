"""Checkpoints written tensor by tensor: cut in any way, loaded by megatron-core, torch and our own readers."""

from __future__ import annotations

import io
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints_tools.core_contents import CoreContents
from checkpoints_tools.core_writer import Beside, Cut, write_core
from checkpoints_tools.models import KINDS
from checkpoints_tools.transfer import verify_digests
from checkpoints_tools.verify import verify
from checkpoints_tools.weights import Model, digest
from megatron_video.dit import DiTConfig, build_dit
from megatron_video.errors import UserError
from megatron_video.parallel import one_process
from training.checkpoint import load_model_weights, read_state

SIZES = DiTConfig(num_layers=2, num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4)


@pytest.fixture(scope="module")
def model() -> Model:
    return KINDS["dit"].build(SIZES)


@pytest.fixture(scope="module")
def weights(model: Model) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in model.shapes.items()}


def templates_of(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in weights.items()}


def cut(tensor: Tensor, axis: int, parts: int) -> list[Cut]:
    """Equal parts along one axis, each in the file of its number."""
    size = tensor.shape[axis] // parts
    sizes = (*tensor.shape[:axis], size, *tensor.shape[axis + 1 :])
    return [((0,) * axis + (i * size,) + (0,) * (tensor.dim() - axis - 1), sizes, i) for i in range(parts)]


def test_cut_weights_load_into_the_model_and_are_whole_to_every_reader(
    model: Model, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    cuts = {
        name: cut(tensor, axis, 4)
        for name, tensor in weights.items()
        for axis in [1 if "linear_proj" in name or "fc2" in name else 0]
        if name.startswith("layers.") and tensor.shape[axis] % 4 == 0
    }
    assert len(cuts) > 20
    folder = tmp_path / "cut"
    digests = write_core(folder, model, templates_of(weights), weights.__getitem__, cuts=cuts)
    assert sorted(path.name for path in folder.glob("*.distcp")) == [f"__{i}_0.distcp" for i in range(4)]
    assert digests == {name: digest(tensor) for name, tensor in weights.items()}
    assert verify(folder).faults == []
    contents = CoreContents(folder)
    verify_digests(contents.tensor, digests, list(folder.glob("*.distcp")))
    assert len(contents.entries["layers.0.mlp.linear_fc2.weight"].chunks) == 4
    with one_process() as parallel:
        chunks = build_dit(SIZES, parallel, torch.bfloat16, device=torch.device("cpu"), init_seed=9)
        load_model_weights(folder, list(chunks))
    assert all(torch.equal(parameter, weights[name]) for name, parameter in chunks[0].named_parameters())
    plain = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}
    dcp.load(plain, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    assert all(torch.equal(plain[name], tensor) for name, tensor in weights.items())


def test_what_lies_beside_the_tensors_is_kept(model: Model, tmp_path: Path) -> None:
    # As torch saves an object; a plain reader gives back what is in it.
    stream = io.BytesIO()
    torch.save({"scale": 2.0}, stream)
    settings = stream.getvalue()
    beside = Beside(
        config={"model": {}, "optimizer": {"lr": 1e-4}},
        state={"step": 12},
        common={"optimizer updates": 11},
        objects={"layers.0.fp8/shard_0_1": settings},
    )
    name = "optimizer.state.exp_avg.head.projection.bias"
    values = torch.arange(6.0)
    write_core(tmp_path / "out", model, {name: values.to("meta")}, lambda _: values, beside=beside)
    contents = CoreContents(tmp_path / "out")
    assert torch.equal(contents.tensor(name), values)
    assert contents.object_bytes("layers.0.fp8/shard_0_1") == settings
    assert contents.common == {"optimizer updates": 11}
    assert read_state(tmp_path / "out").step == 12
    state: dict[str, dict[str, float]] = {"layers.0.fp8/shard_0_1": {}}
    dcp.load(state, storage_reader=dcp.FileSystemReader(tmp_path / "out"), no_dist=True)
    assert state["layers.0.fp8/shard_0_1"] == {"scale": 2.0}


def test_two_tensors_are_in_memory_at_most(model: Model, tmp_path: Path) -> None:
    templates = {f"tensor{index}": torch.empty(50 + index, device="meta") for index in range(8)}
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    def tensor_of(name: str) -> Tensor:
        alive.append(sum(tensor() is not None for tensor in made))
        tensor = torch.full(templates[name].shape, float(len(made)))
        made.append(weakref.ref(tensor))
        return tensor

    write_core(tmp_path / "out", model, templates, tensor_of)
    assert len(alive) == 8
    assert max(alive) <= 1  # and the new one


def test_cuts_with_a_gap_and_damage_are_found(model: Model, weights: dict[str, Tensor], tmp_path: Path) -> None:
    name = "layers.0.mlp.linear_fc1.weight"
    for wrong in (cut(weights[name], 0, 4)[:3], [((1, 0), tuple(weights[name].shape), 0)]):
        with pytest.raises(ValueError, match=r"linear_fc1\.weight: the cuts hold"):
            write_core(tmp_path / "gap", model, templates_of(weights), weights.__getitem__, cuts={name: wrong})
    folder = tmp_path / "damaged"
    digests = write_core(folder, model, templates_of(weights), weights.__getitem__)
    path = folder / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    place = CoreContents(folder).entries[name].chunks[0]
    content[place.start + place.length // 2] ^= 1
    path.write_bytes(content)
    assert "changed since" in verify(folder).faults[0]
    with pytest.raises(UserError, match=r"linear_fc1\.weight"):
        verify_digests(CoreContents(folder).tensor, digests, [path])
