"""`megatron-video doctor`: what is installed, which backends work, and what to do about what is missing.

Exit code 0 when everything that the CPU path needs works, 1 when something of it does not. What concerns only GPUs or
optional tools is reported and never fails. The ranges come from the installed package, so setup.py is their one place.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from megatron_video import __version__
from megatron_video.cli import run_command

Status = Literal["ok", "note", "warning", "failed"]
GIB = 1 << 30
MIN_PYTHON = (3, 11)
MIN_FREE_DISK_GIB = 5
MIN_MEMORY_GIB = 8
SELF_TEST_SECONDS = 120

# distribution -> (module to import, what it is for)
PACKAGES: dict[str, tuple[str, str]] = {
    "torch": ("torch", "tensors, autograd, torch.distributed"),
    "megatron-core": ("megatron.core", "parallel layers, schedules, optimizer, checkpoints"),
    "numpy": ("numpy", "arrays, counter-based random numbers"),
    "packaging": ("packaging", "version ranges"),
    "psutil": ("psutil", "asynchronous checkpoints of megatron-core hang without it"),
    "einops": ("einops", "hierarchical context parallelism of megatron-core"),
    "safetensors": ("safetensors", "released weights, shards"),
    "xxhash": ("xxhash", "checksums of shards"),
    "isal": ("isal", "checksums of samples, fast"),
    "pydantic": ("pydantic", "checked configuration"),
    "PyYAML": ("yaml", "presets and overrides"),
    "webdataset": ("webdataset", "shard format"),
    "pyarrow": ("pyarrow", "manifests (Parquet)"),
    "av": ("av", "reads and writes video, brings its own codecs"),
    "scenedetect-headless": ("scenedetect", "cuts"),
    "opencv-python-headless": ("cv2", "optical flow, captions of contact sheets"),
    "pillow": ("PIL", "still images"),
    "transformers": ("transformers", "BertModel of the CLIP text encoder"),
    "sentencepiece": ("sentencepiece", "tokenizer of Step-LLM"),
    "tokenizers": ("tokenizers", "WordPiece tokenizer of the CLIP text encoder"),
    "tensorboard": ("tensorboard", "metrics, images, videos"),
    "tqdm": ("tqdm", "progress"),
    "rich": ("rich", "the panel of `watch`"),
    "waitress": ("waitress", "server of the page of `dpo rate`"),
    "werkzeug": ("werkzeug", "requests and answers of that page"),
    "nltk": ("nltk", "agreement of raters"),
    "choix": ("choix", "Bradley-Terry strengths of people's votes"),
    "matplotlib": ("matplotlib", "plots of reports"),
    "httpx": ("httpx", "captions from an endpoint"),
    "ImageHash": ("imagehash", "perceptual hash of a clip"),
    "transformer-engine": ("transformer_engine", "FP8, fused kernels, CP attention on CUDA; else the `local` spec"),
    "nvidia-dali-cuda130": ("nvidia.dali", "decoding on the GPU (NVDEC); else PyAV on the CPU"),
    "apex": ("apex.optimizers", "fused Adam and norms; else megatron-core's own"),
    "faiss-cpu": ("faiss", "clusters of `data balance`"),
    "ray": ("ray.data", "`--engine ray` of the data stages"),
    "rapidocr": ("rapidocr", "the OCR tag of `data tag --models`"),
    "pillow-heif": ("pillow_heif", "HEIC pictures; AVIF needs Pillow only"),
    "nvidia-resiliency-ext": (
        "nvidia_resiliency_ext.fault_tolerance",
        "ft_launcher, which ends and restarts hung jobs from outside; else torchrun and the run's own watchdog",
    ),
    "deepspeed": ("deepspeed", "ZeRO data parallelism for the Video-VAE"),
}
# tool -> (what it is for, what to do where it is wanted)
TOOLS: dict[str, tuple[str, str]] = {
    "git": ("the revision saved with every run", "apt-get install git"),
    "make": ("make demo, make test", "apt-get install make"),
    "g++": ("compiles DeepSpeed's and Transformer Engine's extensions", "apt-get install g++"),
    "ffmpeg": ("never needed, handy for looking at files", "apt-get install ffmpeg"),
    "nvidia-smi": ("comes with the NVIDIA driver", "install the NVIDIA driver on GPU machines"),
    "sbatch": ("submits SLURM jobs", "run on a SLURM login node"),
}
IMPORT_SCRIPT = """
import importlib, sys
for name in sys.argv[1:]:
    print("try", name, flush=True)
    try:
        importlib.import_module(name)
        print("ok", name, flush=True)
    except Exception as error:
        print("error", name, f"{type(error).__name__}: {error}".replace(chr(10), " ")[:300], flush=True)
"""
GLOO_SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.full((4,), float(dist.get_rank() + 1))
dist.all_reduce(value)
assert value.tolist() == [3.0] * 4, value
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Check:
    """One line of the report; `advice` is empty where there is nothing to do."""

    section: str
    name: str
    status: Status
    detail: str
    advice: str = ""


def main(argv: Sequence[str]) -> int:
    """Print the report; 0 when the CPU path works, else 1."""
    parser = argparse.ArgumentParser(prog="megatron-video doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    checks = examine()
    works = not any(check.status == "failed" for check in checks)
    if arguments.json:
        report = {"version": __version__, "cpu_path_works": works, "checks": [asdict(check) for check in checks]}
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        print(format_checks(checks))
        print("\nThe CPU path works." if works else "\nThe CPU path does not work yet: mend what is marked FAILED.")
    return 0 if works else 1


def examine() -> list[Check]:
    """All checks, in the order of the report."""
    checks = [*check_system(), *check_packages(installed_requirements())]
    # What failed to import in a child process is not imported here either: it may end the interpreter.
    if any(check.name == "torch" and check.status == "ok" for check in checks):
        checks += [*check_torch(), check_gloo()]
    if any(check.name == "av" and check.status == "ok" for check in checks):
        checks.append(check_codecs())
    return [*checks, *check_tools()]


def check_system() -> Iterator[Check]:
    """Python, operating system, processor, memory, disk, temporary folder."""
    python = f"{platform.python_version()} at {sys.executable}"
    new_enough = sys.version_info >= MIN_PYTHON
    yield Check("system", "python", "ok" if new_enough else "failed", python, "" if new_enough else "use 3.11 or newer")
    yield Check("system", "platform", "ok", f"{platform.platform()}, {platform.machine()}")
    yield Check("system", "cores", "ok", f"{available_cores()} usable of {os.cpu_count()}; {_cpu_flags()}")
    memory = memory_bytes() / GIB
    enough = memory >= MIN_MEMORY_GIB
    yield Check(
        "system",
        "memory",
        "ok" if enough else "warning",
        f"{memory:.1f} GiB",
        "" if enough else f"the demo wants {MIN_MEMORY_GIB} GiB",
    )
    yield _check_disk(Path.cwd())
    yield _check_temporary_folder()


def installed_requirements() -> list[str]:
    """The requirement lines of the installed package, as in setup.py; empty where it is not installed."""
    try:
        return importlib.metadata.requires("megatron-video") or []
    except importlib.metadata.PackageNotFoundError:
        return []


def check_packages(requirements: Iterable[str]) -> Iterator[Check]:
    """Every requirement: there, in range, and importable; those of extras other than dev are optional."""
    from packaging.requirements import Requirement

    parsed = [Requirement(line) for line in requirements]
    if not parsed:
        yield Check("packages", "megatron-video", "failed", "not installed", "pip install -e . (or: make setup)")
    # Developer tools come with extras too, but are nobody's concern here; a package may be in several extras.
    wanted = {r.name: r for r in reversed(parsed) if r.name in PACKAGES or r.marker is None}.values()
    present = [r.name for r in wanted if _version(r.name)]
    errors = _import_errors([PACKAGES[name][0] for name in present if name in PACKAGES])
    for requirement in wanted:
        module, role = PACKAGES.get(requirement.name, (requirement.name, ""))
        optional = requirement.marker is not None
        version = _version(requirement.name)
        line = f"{requirement.name}{requirement.specifier}"
        status: Status = "warning" if optional else "failed"
        section = "optional packages" if optional else "packages"
        if version is None:
            # The marker reads: extra == "gpu".
            extra = str(requirement.marker).split('"')[1] if optional else ""
            advice = f'pip install -e ".[{extra}]" in the checkout' if extra else f'pip install "{line}"'
            yield Check(section, requirement.name, "note" if optional else status, f"missing: {role}", advice)
        # torch's CPU builds are local versions (2.13.0+cpu), nightly ones pre-releases: both count.
        elif not requirement.specifier.contains(version, prereleases=True):
            yield Check(
                section, requirement.name, status, f"{version} is out of range: {role}", f'pip install "{line}"'
            )
        elif module in errors:
            advice = f'pip install --force-reinstall "{line}"'
            yield Check(section, requirement.name, status, f"{version}, import fails: {errors[module]}", advice)
        else:
            yield Check(section, requirement.name, "ok", f"{version}: {role}")


def check_torch() -> Iterator[Check]:
    """CUDA, GPUs and communication backends of torch."""
    import torch

    yield Check("backends", "gloo", "ok" if torch.distributed.is_gloo_available() else "failed", "CPU communication")
    if not torch.cuda.is_available():
        build = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
        # A driver without a GPU in torch is a mistake; no driver at all is a machine without GPUs.
        driver = shutil.which("nvidia-smi") is not None
        advice = "install a CUDA build of torch that fits the driver (nvidia-smi shows it)" if driver else ""
        yield Check("backends", "cuda", "warning" if driver else "note", f"no usable GPU; {build}", advice)
        return
    nccl = torch.distributed.is_nccl_available()
    yield Check("backends", "nccl", "ok" if nccl else "warning", "GPU communication")
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        detail = f"{card.name}, {card.total_memory / GIB:.0f} GiB, compute capability {card.major}.{card.minor}"
        yield Check("backends", f"gpu {index}", "ok", detail)


def check_gloo() -> Check:
    """Start two ranks with torchrun as training does, and let them add numbers."""
    # torchrun with the sockets it really uses: an odd host name or a firewall shows here, not in the first training.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        result = subprocess.run(
            [*launch, sys.executable, "-c", GLOO_SCRIPT],
            capture_output=True,
            text=True,
            timeout=SELF_TEST_SECONDS,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        advice = "a firewall or an unresolvable host name may block local connections: check `getent hosts $(hostname)`"
        return Check("backends", "gloo self-test", "failed", f"no answer in {SELF_TEST_SECONDS} s", advice)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        return Check("backends", "gloo self-test", "failed", last[:200], "check `getent hosts $(hostname)`")
    return Check("backends", "gloo self-test", "ok", "2 ranks under torchrun added numbers")


def check_codecs() -> Check:
    """Encoders and decoders inside PyAV."""
    wanted: tuple[tuple[str, Literal["r", "w"]], ...] = (("libx264", "w"), ("h264", "r"), ("vp9", "r"))
    missing = [name for name, mode in wanted if not _has_codec(name, mode)]
    if missing:
        return Check(
            "video", "codecs", "failed", f"PyAV lacks {', '.join(missing)}", "pip install --force-reinstall av"
        )
    return Check("video", "codecs", "ok", "PyAV encodes H.264, decodes H.264 and VP9")


def check_tools() -> Iterator[Check]:
    """Programs that some commands use; none is needed for the CPU path."""
    for name, (role, advice) in TOOLS.items():
        path = shutil.which(name)
        yield Check("tools", name, "ok" if path else "note", path or f"missing: {role}", "" if path else advice)


def format_checks(checks: Sequence[Check]) -> str:
    """The report for people: one line a check, what to do below it."""
    lines = [f"megatron-video {__version__}"]
    marks = {"ok": "ok", "note": "-", "warning": "WARN", "failed": "FAILED"}
    width = max(len(check.name) for check in checks)
    section = ""
    for check in checks:
        if check.section != section:
            section = check.section
            lines += ["", section]
        lines.append(f"  {marks[check.status]:<6} {check.name:<{width}}  {check.detail}")
        if check.advice:
            lines.append(f"  {'':<6} {'':<{width}}  -> {check.advice}")
    return "\n".join(lines)


def available_cores() -> int:
    """Cores that this process may use (affinity mask and container quota)."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # "max 100000" or "200000 100000": microseconds of CPU time per period.
    quota = _read("/sys/fs/cgroup/cpu.max").split()
    if len(quota) == 2 and quota[0].isdigit():
        return max(1, min(affinity, int(quota[0]) // int(quota[1])))
    return affinity


def memory_bytes() -> int:
    """Memory of the machine, or the container's limit where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    return min(total, int(limit)) if limit.isdigit() else total


def _check_disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free / GIB
    enough = free >= MIN_FREE_DISK_GIB
    advice = "" if enough else f"the demo wants {MIN_FREE_DISK_GIB} GiB here"
    return Check("system", "disk", "ok" if enough else "warning", f"{free:.1f} GiB free at {folder}", advice)


def _check_temporary_folder() -> Check:
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x")
            return Check("system", "temporary folder", "ok", f"{tempfile.gettempdir()} is writable")
    except OSError as error:
        return Check("system", "temporary folder", "failed", str(error), "set TMPDIR to a writable folder")


def _cpu_flags() -> str:
    # The ones that decide how fast torch's kernels are.
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "sve")
    flags = set(_read("/proc/cpuinfo").split())
    return " ".join(flag for flag in wanted if flag in flags) or "no vector extensions known"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_errors(modules: Sequence[str]) -> dict[str, str]:
    """module -> error, found in a child process, which may crash without harm; the rest is tried in another child."""
    errors: dict[str, str] = {}
    left = list(modules)
    while left:
        result = subprocess.run([sys.executable, "-c", IMPORT_SCRIPT, *left], capture_output=True, text=True)
        lines = [
            line.split(" ", 2) for line in result.stdout.splitlines() if line.startswith(("try ", "ok ", "error "))
        ]
        errors |= {line[1]: line[2] for line in lines if line[0] == "error"}
        tried = [line[1] for line in lines if line[0] == "try"]
        if result.returncode == 0 or not tried:
            break
        # The child died in its last try: name that module, go on with the ones after it.
        errors[tried[-1]] = f"the interpreter died with code {result.returncode}"
        left = left[left.index(tried[-1]) + 1 :]
    return errors


def _has_codec(name: str, mode: Literal["r", "w"]) -> bool:
    from av.codec import Codec
    from av.codec.codec import UnknownCodecError

    try:
        Codec(name, mode)
        return True
    except UnknownCodecError:
        return False


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
