"""The folder that the public Step-Video-T2V inference code loads as a whole: what lies where, and what must fit.

model_index.json, scheduler/scheduler_config.json    read by diffusers' StepVideoPipeline.from_pretrained
transformer/                                         config.json and diffusion_pytorch_model*.safetensors
vae/vae_v2.safetensors                               opened by this name; its sizes are in the code
hunyuan_clip/{clip_text_encoder,tokenizer}/          BertModel and BertTokenizer.from_pretrained
step_llm/                                            Step1Model.from_pretrained, step1_chat_tokenizer.model
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints_tools.models import KINDS
from checkpoints_tools.released import CLIP_MODEL_FOLDER, PIPELINE_FILE
from checkpoints_tools.released_config import config_text
from checkpoints_tools.released_fields import VAE_FIELDS
from checkpoints_tools.weights import Model
from megatron_video.config_io import config_to_dict
from megatron_video.errors import UserError
from megatron_video.files import file_sha256
from megatron_video.text.tokenizers import CLIP_VOCABULARY_FILE, STEP_TOKENIZER_FILE, ClipTokenizer, StepTokenizer

# Part -> its folder. The parts are called as the command line's options.
FOLDERS = {
    "transformer": "transformer",
    "vae": "vae",
    "clip": f"hunyuan_clip/{CLIP_MODEL_FOLDER}",
    "llm": "step_llm",
}
PART_KINDS = {"transformer": "dit", "vae": "vae", "clip": "clip", "llm": "llm"}
CLIP_TOKENIZER_FOLDER = "hunyuan_clip/tokenizer"
# Of a pipeline that was taken apart: a megatron-core checkpoint holds no files but its own.
LLM_TOKENIZER_FOLDER = "step_llm_tokenizer"
# All that BertTokenizer may read; the first must be there.
CLIP_TOKENIZER_FILES = (
    CLIP_VOCABULARY_FILE,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.json",
)
_DIFFUSERS = {"_diffusers_version": "0.31.0"}
# As released: diffusers imports these modules, which are the public code's.
CONFIGS: dict[str, Mapping[str, Any]] = {
    PIPELINE_FILE: {
        "_class_name": "StepVideoPipeline",
        "scheduler": ["stepvideo.diffusion.scheduler", "FlowMatchDiscreteScheduler"],
        "transformer": ["stepvideo.modules.model", "StepVideoModel"],
        **_DIFFUSERS,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchDiscreteScheduler",
        "device": None,
        "num_train_timesteps": 1000,
        "reverse": False,
        "solver": "euler",
        **_DIFFUSERS,
    },
}
# Sizes that are written into the public code and not read from any file.
CODED_SIZES: dict[str, tuple[str, ...]] = {
    "transformer": ("attention_head_dim",),
    "vae": VAE_FIELDS.shared,
    "clip": ("caption_max_length",),
    "llm": ("caption_max_length",),
}


@dataclass(frozen=True)
class Tokenizers:
    """Files of the two tokenizers."""

    clip: Path
    """Folder with vocab.txt."""
    llm: Path
    """The sentencepiece model."""

    def files(self, llm_folder: str) -> dict[str, Path]:
        """Place in the folder of all models -> file; `llm_folder`: where Step-LLM's goes."""
        clip = {name: self.clip / name for name in CLIP_TOKENIZER_FILES if (self.clip / name).is_file()}
        places = {f"{CLIP_TOKENIZER_FOLDER}/{name}": path for name, path in clip.items()}
        return places | {f"{llm_folder}/{STEP_TOKENIZER_FILE}": self.llm}

    def check(self, models: Mapping[str, Model]) -> None:
        """Refuse tokenizers of other models.

        Raises:
            UserError: a file is missing, damaged, or has not the tokens that the weights have.
        """
        clip, llm = models["clip"].config, models["llm"].config
        ClipTokenizer.load(self.clip, clip.vocab_size, clip.caption_max_length)
        StepTokenizer.load(self.llm, llm.padded_vocab_size, llm.caption_max_length)


def find_tokenizers(sources: Mapping[str, Path], clip: Path | None, llm: Path | None) -> Tokenizers:
    """The given tokenizers, or those that lie beside the weights.

    Args:
        sources: part -> where its weights come from.
        clip: folder with vocab.txt, or None.
        llm: sentencepiece model, or None.

    Raises:
        UserError: there are none.
    """
    weights = sources["clip"]
    places = [weights, weights / "tokenizer", weights.parent / "tokenizer"]
    clip = clip or next((place for place in places if (place / CLIP_VOCABULARY_FILE).is_file()), None)
    if clip is None:
        looked = ", ".join(map(str, places))
        raise UserError(f"no {CLIP_VOCABULARY_FILE} in {looked}: give the folder that has it with --clip-tokenizer")
    weights = sources["llm"]
    files = [weights / STEP_TOKENIZER_FILE, weights.parent / LLM_TOKENIZER_FOLDER / STEP_TOKENIZER_FILE]
    llm = llm or next((file for file in files if file.is_file()), None)
    if llm is None or not llm.is_file():
        looked = ", ".join(map(str, [llm] if llm else files))
        raise UserError(f"no tokenizer of Step-LLM: looked for {looked}; give the file with --llm-tokenizer")
    return Tokenizers(clip, llm)


def copy_files(files: Mapping[str, Path], folder: Path) -> dict[str, str]:
    """Copy files to their places below `folder`; returns place -> sha256, compared with the copy.

    Raises:
        UserError: a copy differs.
    """
    digests = {}
    for place, path in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        digests[place] = file_sha256(path)
        if file_sha256(target) != digests[place]:
            raise UserError(f"{target} differs from {path} after it was copied; it was not kept")
    return digests


def write_configs(folder: Path) -> None:
    """Write the files by which diffusers finds the parts."""
    for name, values in CONFIGS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(config_text(values), encoding="utf-8")


def check_fit(models: Mapping[str, Model]) -> None:
    """Refuse parts that cannot work together.

    Raises:
        UserError: naming both sizes.
    """
    dit, vae = models["transformer"].config, models["vae"].config
    llm, clip = models["llm"].config.hidden_size, models["clip"].config.hidden_size
    fits = (
        ("in_channels", dit.in_channels, "--vae", "latent_channels", vae.latent_channels),
        ("out_channels", dit.out_channels, "--vae", "latent_channels", vae.latent_channels),
        ("caption_channels[0]", dit.llm_channels, "--llm", "hidden_size", llm),
        ("caption_channels[1]", dit.clip_channels, "--clip", "hidden_size", clip),
    )
    wrong = [
        f"{name}={value} of --transformer and {field}={other} of {option}"
        for name, value, option, field, other in fits
        if value != other
    ]
    if wrong:
        raise UserError(f"these parts do not belong together: {'; '.join(wrong)}")


def unloadable(models: Mapping[str, Model]) -> list[str]:
    """Sizes with which the public code would not load or run the folder; empty: it does."""
    found = []
    for part, names in CODED_SIZES.items():
        ours = config_to_dict(models[part].config)
        released = config_to_dict(KINDS[PART_KINDS[part]].config())
        found += [
            f"{part}: {name}={ours[name]}, not {released[name]}" for name in names if ours[name] != released[name]
        ]
    longest, needed = models["clip"].config.max_position_embeddings, KINDS["clip"].config().caption_max_length
    if longest < needed:
        found.append(f"clip: max_position_embeddings={longest}, below {needed}")
    return found
