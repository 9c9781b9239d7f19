"""`megatron-video text build`: small text encoders with tokenizers trained on captions, in the released folder form.

The released encoders weigh 40 GB. For small runs this builds ones of the same architecture whose random weights keep
each token's identity visible in its output state, so a DiT can learn what the words mean.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_video.cli import run_command
from megatron_video.config_io import config_dataclass, config_to_dict, load_config
from megatron_video.errors import UserError
from megatron_video.manifest import kept_rows, read_manifest
from megatron_video.text import TextEncoders
from megatron_video.text.build import build_clip_folder, build_step_llm_folder

PRESETS = Path(__file__).parent / "configs" / "text"
_RECORD = "build.json"
# Part of the record: another way of building is another result under the same settings.
_SCHEME = 1


@config_dataclass
class TextBuildConfig:
    """Sizes of the two encoders and of their vocabularies."""

    llm_vocabulary: int
    """Most pieces of the sentencepiece model: 3 special ones, 256 bytes, then characters and words."""
    llm_hidden_size: int
    """Width of Step-LLM, the first of the DiT's caption_channels."""
    llm_num_layers: int
    """Decoder layers."""
    llm_num_attention_heads: int
    """Query heads."""
    llm_num_attention_groups: int
    """Key-value heads."""
    llm_ffn_hidden_size: int
    """Feed-forward width; rounded up to a multiple of 256."""
    llm_max_length: int
    """Most tokens of a caption, BOS and EOS included."""
    clip_vocabulary: int
    """Most tokens of the WordPiece vocabulary."""
    clip_hidden_size: int
    """Width of CLIP, the second of the DiT's caption_channels."""
    clip_num_layers: int
    """Encoder layers."""
    clip_num_attention_heads: int
    """Attention heads."""
    clip_intermediate_size: int
    """Feed-forward width."""
    clip_max_length: int
    """Slots of every caption, [CLS], [SEP] and pads included; the DiT attends to all of them."""

    def __post_init__(self) -> None:
        if self.clip_hidden_size % self.clip_num_attention_heads:
            raise ValueError(
                f"clip_num_attention_heads={self.clip_num_attention_heads} does not divide "
                f"clip_hidden_size={self.clip_hidden_size}"
            )
        if self.clip_max_length < 3:
            raise ValueError(f"clip_max_length={self.clip_max_length} leaves no room between [CLS] and [SEP]")


def main(argv: Sequence[str]) -> int:
    """Command line of `megatron-video text`."""
    arguments = _parse(argv)
    config = load_config(TextBuildConfig, _preset_source(arguments.preset), arguments.overrides, PRESETS)
    captions = read_captions(arguments.captions)
    record = _record(config, captions, arguments.seed)
    if not _already_built(arguments.out, record):
        build(config, captions, arguments.seed, arguments.out, record)
    report = describe(arguments.out, captions)
    print(json.dumps(report, ensure_ascii=False) if arguments.json else _as_text(report))
    return 0


def read_captions(path: Path) -> list[str]:
    """Distinct captions of a manifest's kept clips or of a text file with one a line, sorted.

    Raises:
        UserError: the file cannot be read or holds no caption.
    """
    if path.suffix == ".parquet":
        texts = [row["caption"] or "" for row in kept_rows(read_manifest(path))]
    else:
        try:
            texts = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--captions {path} is not readable as a text file: {error}") from None
    # Sorted and distinct, so that the order of a manifest's rows does not make other tokenizers.
    captions = sorted({text.strip() for text in texts} - {""})
    if not captions:
        raise UserError(f"--captions {path} holds no caption")
    return captions


def build(config: TextBuildConfig, captions: list[str], seed: int, out: Path, record: dict[str, Any]) -> None:
    """Write `out`/clip and `out`/step_llm; the folder appears complete or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        _build_folders(config, captions, seed, temporary)
        (temporary / _RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        temporary.chmod(0o755)  # mkdtemp makes it private
        # Works on an absent or empty folder only, which `_already_built` has made sure of.
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def describe(out: Path, captions: list[str]) -> dict[str, Any]:
    """What the built encoders are and how they see the captions; loading them is the check that they work."""
    # Through the same door as every user of the folder.
    encoders = TextEncoders.load(out / "clip", out / "step_llm", "cpu", torch.float32)
    llm_tokens = [encoders.llm_tokenizer.tokenize(caption) for caption in captions]
    clip_tokens = [encoders.clip_tokenizer.tokenize(caption) for caption in captions]
    unknown = encoders.clip_tokenizer.tokenizer.token_to_id("[UNK]")
    return {
        "folder": str(out),
        "captions": len(captions),
        "caption_channels": list(encoders.widths),
        "llm_parameters": sum(p.numel() for p in encoders.llm.parameters()),
        "clip_parameters": sum(p.numel() for p in encoders.clip.parameters()),
        "llm_pieces": encoders.llm_tokenizer.processor.get_piece_size(),
        "clip_tokens": encoders.clip_tokenizer.tokenizer.get_vocab_size(),
        "llm_longest_caption": max(tokens.full_length for tokens in llm_tokens),
        "llm_max_length": encoders.llm_tokenizer.max_length,
        "llm_captions_cut": sum(tokens.truncated for tokens in llm_tokens),
        "clip_longest_caption": max(tokens.full_length for tokens in clip_tokens),
        "clip_max_length": encoders.clip_tokenizer.max_length,
        "clip_captions_cut": sum(tokens.truncated for tokens in clip_tokens),
        "clip_captions_with_unknown": sum(unknown in tokens.ids for tokens in clip_tokens),
    }


def _build_folders(config: TextBuildConfig, captions: list[str], seed: int, folder: Path) -> None:
    build_step_llm_folder(
        folder / "step_llm",
        captions,
        vocabulary_size=config.llm_vocabulary,
        sizes={
            "hidden_size": config.llm_hidden_size,
            "num_layers": config.llm_num_layers,
            "num_attention_heads": config.llm_num_attention_heads,
            "num_attention_groups": config.llm_num_attention_groups,
            "ffn_hidden_size": config.llm_ffn_hidden_size,
            "caption_max_length": config.llm_max_length,
        },
        seed=seed,
    )
    build_clip_folder(
        folder / "clip",
        captions,
        vocabulary_size=config.clip_vocabulary,
        sizes={
            "hidden_size": config.clip_hidden_size,
            "num_hidden_layers": config.clip_num_layers,
            "num_attention_heads": config.clip_num_attention_heads,
            "intermediate_size": config.clip_intermediate_size,
            "caption_max_length": config.clip_max_length,
        },
        seed=seed,
    )


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="megatron-video text", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    build_parser = commands.add_parser("build", help="train tokenizers on captions, initialise small encoders")
    build_parser.add_argument("--captions", type=Path, required=True, help="manifest (.parquet) or text, one a line")
    build_parser.add_argument("--out", type=Path, required=True, help="folder to write: clip/ and step_llm/ in it")
    build_parser.add_argument("--preset", default="demo", help="sizes: a preset or a YAML file (default: %(default)s)")
    build_parser.add_argument("--seed", type=int, default=0, help="of the initial weights (default: %(default)s)")
    build_parser.add_argument("--json", action="store_true", help="print the report as JSON")
    build_parser.add_argument("overrides", nargs="*", metavar="field=value", help="change single sizes of the preset")
    return parser.parse_args(argv)


def _preset_source(preset: str) -> str:
    return preset if preset.endswith((".yaml", ".yml")) else f"text_{preset}"


def _record(config: TextBuildConfig, captions: list[str], seed: int) -> dict[str, Any]:
    digest = hashlib.blake2b("\n".join(captions).encode(), digest_size=16).hexdigest()
    return {"scheme": _SCHEME, "seed": seed, "captions": digest, "config": config_to_dict(config)}


def _already_built(out: Path, record: dict[str, Any]) -> bool:
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / _RECORD
    if not path.is_file():
        raise UserError(f"--out {out} exists and was not made by `megatron-video text build`; give another folder")
    built = json.loads(path.read_text(encoding="utf-8"))
    different = [key for key in record if built.get(key) != record[key]]
    if different:
        raise UserError(
            f"--out {out} was built with other settings ({', '.join(different)} differ); "
            "give another folder, or delete this one if no shards were encoded with it"
        )
    return True


def _as_text(report: dict[str, Any]) -> str:
    width = max(map(len, report))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in report.items())


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
