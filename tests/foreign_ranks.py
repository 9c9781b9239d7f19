"""What two ranks do to write the checkpoints that tests read: DeepSpeed at every stage, and FSDP2."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from foreign_models import NamedModule
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from vae_clips_on_disk import vae_config

from megatron_video.vae import VideoVAE, save_vae
from megatron_video.vae.base import latent_shape
from training.vae_phases import freeze
from training.vae_ranks import Ranks
from training.vae_updater import ZeroUpdater, _import_deepspeed

# name -> (stage, precision, beginning of the names of the parameters that are not frozen)
DIT_RUNS = {
    "zero0": (0, "fp32", ""),
    "zero1": (1, "fp32", "transformer_blocks"),
    # DeepSpeed's BF16_Optimizer, which is neither of its ZeRO optimizers.
    "bf16": (1, "bf16, fp32 gradients", ""),
    "zero2": (2, "bf16", ""),
    "zero3": (3, "fp32", "transformer_blocks"),
    "zero3bf16": (3, "bf16", ""),
}
UNIVERSAL = ("zero2", "zero3bf16")
VAE_STAGES = (1, 2, 3)
# Weights as DeepSpeed or FSDP themselves gather them.
GATHERED = "gathered.safetensors"


def write_all(root: Path, weights: dict[str, Tensor]) -> None:
    """Every checkpoint, in `root`/NAME, with GATHERED in it; those of a DiT begin with `weights`."""
    _write_fsdp(root / "fsdp", weights)
    for name, (stage, precision, trained) in DIT_RUNS.items():
        _write_dit(root / name, weights, stage, precision, trained)
    for stage in VAE_STAGES:
        _write_vae(root / f"vae{stage}", stage)
    if dist.get_rank() == 0:
        for name in UNIVERSAL:
            _write_universal(root / name)


def _write_dit(folder: Path, weights: dict[str, Tensor], stage: int, precision: str, trained: str) -> None:
    """Two steps, and a checkpoint after each."""
    module = NamedModule(weights)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    engine, *_ = _import_deepspeed().initialize(
        model=module,
        optimizer=torch.optim.AdamW(_groups(module), lr=1e-2),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": precision != "fp32"},
            "data_types": {"grad_accum_dtype": "fp32"} if "gradients" in precision else {},
        },
        dist_init_required=False,
    )
    for step in (1.0, 2.0):
        scalar = torch.tensor(step + dist.get_rank(), dtype=torch.float32 if precision == "fp32" else torch.bfloat16)
        engine.backward(engine(scalar))
        engine.step()
        engine.save_checkpoint(str(folder))
    _save_gathered(folder, module, stage)
    engine.destroy()


def _groups(module: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as with weight decay on matrices alone."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [[p for p in trained if p.dim() > 1], [p for p in trained if p.dim() <= 1]]
    return [{"params": group, "weight_decay": 0.1 * (i == 0)} for i, group in enumerate(groups)]


def _write_vae(folder: Path, stage: int) -> None:
    """As train_vae.py saves it, in the phase that trains the dual path alone."""
    config = vae_config(Path("none"), folder, precision="fp32", zero_stage=stage)
    torch.manual_seed(0)
    vae = VideoVAE(config.model)
    freeze(vae, "dual_path", "dual_path")
    if dist.get_rank() == 0:
        save_vae(vae, folder)
    updater = ZeroUpdater(vae, config, Ranks(dist.get_rank(), 2, torch.device("cpu")), stage)
    video = torch.rand(1, 1, 3, 16, 16)
    decoded, _ = updater.code(video, torch.randn(latent_shape(vae, tuple(video.shape))))
    updater.update(decoded.square().mean(), 1e-3)
    updater.save(folder)
    _save_gathered(folder, vae, stage)
    updater.close()


def _save_gathered(folder: Path, module: nn.Module, stage: int) -> None:
    """All weights as calls of DeepSpeed on the live engine give them: fp32 of what is trained, else as it is."""
    from deepspeed.utils import safe_get_full_fp32_param

    found = {}
    for name, parameter in module.named_parameters():
        live = safe_get_full_fp32_param(parameter) if stage and parameter.requires_grad else _whole(parameter)
        found[name] = live.detach().clone().view(getattr(parameter, "ds_shape", parameter.shape))
    if dist.get_rank() == 0:
        save_file(found, folder / GATHERED)


def _whole(parameter: Tensor) -> Tensor:
    if not hasattr(parameter, "ds_id"):
        return parameter
    with _import_deepspeed().zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _write_universal(folder: Path) -> None:
    """By DeepSpeed's own script, from the checkpoint of the second step."""
    from deepspeed.checkpoint import ds_to_universal

    options = {"num_extract_workers": 1, "num_merge_workers": 1, "keep_temp_folder": False, "strict": True}
    step = folder / "global_step2"
    ds_to_universal.main(
        argparse.Namespace(
            input_folder=str(step), output_folder=f"{step}_universal", inject_missing_state=True, **options
        )
    )


def _write_fsdp(folder: Path, begin: dict[str, Tensor]) -> None:
    """Sharded by FSDP2 over two ranks, block by block, saved with its optimizer."""
    module = NamedModule(begin)
    mesh = init_device_mesh("cpu", (2,))
    for block in module.get_submodule("transformer_blocks").children():
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    module(torch.tensor(1.0 + dist.get_rank())).backward()
    optimizer.step()
    weights, state = get_model_state_dict(module), get_optimizer_state_dict(module, optimizer)
    dcp.save({"model": weights, "optim": state}, checkpoint_id=folder)
    whole = {name: weight.full_tensor() for name, weight in weights.items() if isinstance(weight, DTensor)}
    if dist.get_rank() == 0:
        save_file(whole, folder / GATHERED)
