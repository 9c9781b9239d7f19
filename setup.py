"""Package definition: what is installed, which command it gives, and the range of every dependency."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = (ROOT / "megatron_video" / "VERSION").read_text().strip()

# torch first, and below 2.14: on a machine without CUDA `pip install "torch==2.13.0"` (requirements-cpu.txt)
# takes a CPU build, and this range then keeps it.
REQUIRED = [
    "torch>=2.6,<2.14",
    "megatron-core>=0.16.1,<0.17",  # 0.16.1 is the version the device module was audited against
    "numpy>=1.26,<3",
    "packaging>=24.2",
    "psutil>=5.9,<8",  # megatron-core's asynchronous save hangs without it
    "einops>=0.8,<0.9",
    "safetensors>=0.5,<0.8",
    "xxhash>=3.5,<4",  # checksums of shards
    "isal>=1.7,<2",  # the crc32 of every sample that is read, faster than zlib's
    "pydantic>=2.11,<3",
    "PyYAML>=6,<7",
    "webdataset>=1.0,<2",
    "pyarrow>=18,<30",
    "av>=18,<19",
    "scenedetect-headless>=0.7,<0.8",  # the plain package pulls the OpenCV build that needs libGL
    "opencv-python-headless>=5,<6",  # from 5 on it brings a font that writes Chinese captions
    "pillow>=10,<13",
    "ImageHash>=4.3,<5",  # perceptual hash of `data tag`
    "transformers>=4.50,<6",
    "tokenizers>=0.21,<0.24",
    "sentencepiece>=0.2,<0.3",
    "httpx>=0.27,<1",  # captions from an endpoint
    "tensorboard>=2.18,<3",
    "matplotlib>=3.9,<4",
    "tqdm>=4.66,<5",
    "rich>=13,<16",  # `watch`
    # `dpo rate`: the page's server; statistics of votes
    "waitress>=3,<4",
    "werkzeug>=3,<4",
    "nltk>=3.9.2,<4",
    "choix>=0.4,<0.5",
]

EXTRAS = {
    # FP8 and fused kernels on NVIDIA GPUs; the range is the one megatron-core 0.16 declares.
    "gpu": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12", "nvidia-dali-cuda130>=2.0,<3"],
    # Fused Adam and norms where megatron-core finds it. The name `apex` on PyPI is another project.
    "apex": ["apex @ git+https://github.com/NVIDIA/apex.git"],
    # Rank monitor and launcher that end and restart hung jobs from outside (faults.resiliency_ext).
    "faults": ["nvidia-resiliency-ext>=0.4.1,<0.6"],
    # ZeRO data parallelism for training the Video-VAE.
    "vae": ["deepspeed>=0.19,<0.20"],
    # OCR of `data tag --models`; plots of `data filter --report` and `data balance`; clusters of `data balance`.
    "data": [
        "rapidocr>=3.8,<4",
        "onnxruntime>=1.20,<2",
        "faiss-cpu>=1.10,<2",
        "ray[data]>=2.60,<2.64",
        "pillow-heif>=1,<2",
    ],
    "dev": [
        "deepspeed>=0.19,<0.20",
        "rapidocr>=3.8,<4",
        "onnxruntime>=1.20,<2",
        "faiss-cpu>=1.10,<2",
        "duckdb>=1.2,<3",
        "diffusers>=0.31,<0.42",  # loads released folders in tests, as the public code does
        "pillow-heif>=1,<2",
        "peft>=0.17,<0.22",  # its merge is what `ckpt convert --lora` is compared with
        "pytest>=8,<10",
        "pytest-xdist>=3.6,<4",  # the suite in one process a core
        "playwright>=1.50,<2",  # drives the system's chromium; its own browsers are not needed
        "hypothesis>=6,<7",
        "ruff>=0.8,<1",
        "mypy>=1.13,<3",
        "types-PyYAML",
        "types-tqdm",
    ],
}

setup(
    name="megatron-video",
    version=VERSION,
    description="Megatron-style pretraining of large text-to-video diffusion transformers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["megatron_video*", "data_prep*", "training*", "checkpoints_tools*", "slurm*"]),
    package_data={
        "megatron_video": ["VERSION"],
        "training": ["configs/*/*.yaml", "configs/rounds/*.jsonl", "alignment/rating/page/*"],
        "data_prep": ["*.yaml"],
        "slurm": ["*.sh", "*.sbatch", "profiles/*.yaml", "chains/*.yaml"],
    },
    install_requires=REQUIRED,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["megatron-video = megatron_video.cli:main"]},
)
