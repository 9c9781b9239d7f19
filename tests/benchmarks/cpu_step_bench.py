"""A training step of our DiT against the same model in plain PyTorch: one process each, on the CPU.

Ours is what `megatron-video pretrain` runs: megatron-core's layers, gradient buffers, schedule and optimizer. The peer
is `plain_torch_dit` with torch's fused AdamW. Both start from the same weights and see the same batches; their losses
must agree. The two processes take turns, step by step, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import report
import torch
from plain_torch_dit import PlainDiT, Sizes
from safetensors.torch import load_file, save_file
from torch import Tensor

CHANNELS, LLM_CHANNELS, CLIP_CHANNELS = 16, 128, 64
LLM_TOKENS, CLIP_TOKENS = 64, 16
LEARNING_RATE, WEIGHT_DECAY, BETAS, EPS, MAX_NORM = 1e-4, 0.01, (0.9, 0.95), 1e-8, 1.0
CHECKED_STEPS = 5
LOSS_TOLERANCE = 1e-5

Step = Callable[[dict[str, Tensor]], float]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write the results file."""
    options = _parser().parse_args(arguments)
    if options.child:
        _serve(options)
        return
    rows = _measure(options)
    summary = _summary(rows, options.warmup)
    report.print_table(
        [{"": name, **values} for name, values in summary.items() if isinstance(values, dict)],
        ["", "ours", "plain", "ratio"],
    )
    print(f"largest relative difference of the losses: {summary['loss_difference']:.2g}")
    settings = {key: value for key, value in vars(options).items() if key not in ("child", "weights", "out")}
    report.write(options.out, settings, rows, summary)
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64, help="a multiple of 8")
    parser.add_argument("--grid", type=int, nargs=3, default=[3, 16, 24], metavar=("T", "H", "W"), help="latent grid")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of each process")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "cpu_step.json")
    parser.add_argument("--child", choices=["ours", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--weights", type=Path, help=argparse.SUPPRESS)
    return parser


def _measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row a step, with the numbers of both processes, after the two have agreed on the losses."""
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "weights.safetensors"
        # Ours writes the weights that the peer reads.
        children = {name: _start(name, options, weights) for name in ("ours", "plain")}
        rows = []
        for step in range(options.warmup + options.steps):
            # Whoever goes second finds the machine's caches full of the other's data: they take turns in that too.
            order = sorted(children, reverse=step % 2 == 1)
            answers = {name: _ask(children[name], step) for name in order}
            if step < CHECKED_STEPS:
                _check_losses(step, answers["ours"]["loss"], answers["plain"]["loss"])
            rows.append({"step": step, **answers})
        for child in children.values():
            child.communicate()
    return rows


def _start(name: str, options: argparse.Namespace, weights: Path) -> subprocess.Popen[str]:
    sizes = {key: getattr(options, key) for key in ("layers", "heads", "head_dim", "batch", "threads")}
    command = [sys.executable, __file__, "--child", name, "--weights", str(weights)]
    command += [part for key, value in sizes.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    command += ["--grid", *map(str, options.grid)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    # It says that it is ready.
    _answer(child)
    return child


def _ask(child: subprocess.Popen[str], step: int) -> dict[str, float]:
    assert child.stdin is not None
    child.stdin.write(f"{step}\n")
    child.stdin.flush()
    return _answer(child)


def _answer(child: subprocess.Popen[str]) -> dict[str, float]:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise RuntimeError(f"{child.args} ended with code {child.wait()}; see its message above")


def _check_losses(step: int, ours: float, plain: float) -> None:
    if abs(ours - plain) > LOSS_TOLERANCE * abs(plain):
        raise RuntimeError(f"step {step}: our loss {ours!r} is not the plain model's {plain!r}; nothing was measured")


def _summary(rows: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """Median and least time, and peak memory, with the ratio of ours to the peer's.

    The median ratio of neighbouring steps is the least disturbed by what else the machine does.
    """
    timed = rows[warmup:]
    summary: dict[str, Any] = {}
    for quantity in ("wall_s", "cpu_s"):
        ours, plain = ([row[name][quantity] for row in timed] for name in ("ours", "plain"))
        ratios = [a / b for a, b in zip(ours, plain, strict=True)]
        summary[f"median {quantity}"] = {
            "ours": statistics.median(ours),
            "plain": statistics.median(plain),
            "ratio": statistics.median(ratios),
        }
        summary[f"least {quantity}"] = _ratio(min(ours), min(plain))
    last = rows[-1]
    for quantity in ("peak_rss_mib", "peak_over_imports_mib"):
        summary[quantity] = _ratio(last["ours"][quantity], last["plain"][quantity])
    differences = [abs(row["ours"]["loss"] / row["plain"]["loss"] - 1) for row in rows]
    summary["loss_difference"] = max(differences)
    return summary


def _ratio(ours: float, plain: float) -> dict[str, float]:
    return {"ours": ours, "plain": plain, "ratio": ours / plain}


def _serve(options: argparse.Namespace) -> None:
    """Be one of the two processes: build the model, then take a step for every line of input."""
    torch.set_num_threads(options.threads)
    build = _build_ours if options.child == "ours" else _build_plain
    train, imported = build(options)
    print("{}", flush=True)
    for line in sys.stdin:
        batch = make_batch(int(line), options.grid, options.batch)
        wall, cpu = time.perf_counter(), time.process_time()
        loss = train(batch)
        answer = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu, "loss": loss}
        peak = _peak_rss_mib()
        print(json.dumps({**answer, "peak_rss_mib": peak, "peak_over_imports_mib": peak - imported}), flush=True)


def make_batch(step: int, grid: Sequence[int], batch: int) -> dict[str, Tensor]:
    """The fields of a training batch of one latent grid (T, h, w), a function of the step."""
    generator = torch.Generator().manual_seed(step)
    t, h, w = grid

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    return {
        "latents": random(t, CHANNELS, h, w),
        "timestep": torch.rand(batch, generator=generator),
        "llm_states": random(LLM_TOKENS, LLM_CHANNELS),
        "clip_states": random(CLIP_TOKENS, CLIP_CHANNELS),
        "text_lengths": torch.full((batch,), CLIP_TOKENS + LLM_TOKENS // 2),
        "target": random(t, CHANNELS, h, w),
    }


def _build_ours(options: argparse.Namespace) -> tuple[Step, float]:
    from checkpoints_tools.dit_names import released_names
    from megatron_video import device
    from megatron_video.dit import DiTConfig, build_dit
    from megatron_video.parallel import ParallelConfig, initialize_parallel
    from training.config import AdamWConfig
    from training.data import Batch
    from training.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
    from training.train_step import train_step

    parallel = ParallelConfig()
    info = device.initialize()
    initialize_parallel(parallel, seed=0, device_info=info)
    _load_libraries()
    imported = _forget_peak_rss_mib()
    config = DiTConfig(
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=options.head_dim,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        caption_channels=[LLM_CHANNELS, CLIP_CHANNELS],
    )
    chunks = build_dit(config, parallel, torch.float32, device=info.device)
    _leave_no_zero(chunks[0])
    names = released_names(config)
    save_file({names[name]: value.detach() for name, value in chunks[0].named_parameters()}, options.weights)
    model = wrap_data_parallel(chunks, parallel)
    settings = AdamWConfig(betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, clip_grad_norm=MAX_NORM)
    optimizer = build_optimizer(model, settings, parallel)
    set_learning_rate(optimizer, LEARNING_RATE, WEIGHT_DECAY)
    return lambda batch: train_step(model, optimizer, [Batch(**batch)]).loss, imported


def _build_plain(options: argparse.Namespace) -> tuple[Step, float]:
    _load_libraries()
    imported = _forget_peak_rss_mib()
    hidden = options.heads * options.head_dim
    sizes = Sizes(
        options.layers, options.heads, options.head_dim, hidden, 4 * hidden, CHANNELS, LLM_CHANNELS, CLIP_CHANNELS
    )
    model = PlainDiT(sizes)
    model.load_state_dict(load_file(options.weights))
    parameters = dict(model.named_parameters())
    decayed = [value for name, value in parameters.items() if value.dim() > 1 and "scale_shift" not in name]
    others = [value for name, value in parameters.items() if value.dim() <= 1 or "scale_shift" in name]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)

    def train(batch: dict[str, Tensor]) -> float:
        target = batch.pop("target")
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(*batch.values()), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        return loss.item()

    return train, imported


@torch.no_grad()
def _leave_no_zero(model: torch.nn.Module) -> None:
    """A new model has gates and a head of zeros, through which most gradients would be zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)


def _load_libraries() -> None:
    """Let torch import and load what it loads at first use, so that it does not count as the model's memory."""
    layer = torch.nn.Linear(8, 8)
    layer(torch.randn(4, 8)).square().mean().backward()
    torch.optim.AdamW(layer.parameters(), fused=True).step()


def _forget_peak_rss_mib() -> float:
    """Resident memory now, in MiB; the kernel's high-water mark starts anew where it lets us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return _peak_rss_mib()
    return _status_mib("VmRSS")


def _peak_rss_mib() -> float:
    # ru_maxrss would also count what was used before the mark was reset.
    if Path("/proc/self/status").exists():
        return _status_mib("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status_mib(field: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{field}:"))


if __name__ == "__main__":
    main()
