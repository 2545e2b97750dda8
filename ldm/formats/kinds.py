"""What a file or folder is, from what is in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from ldm.errors import ConfigError
from ldm.formats.files.open import load
from ldm.formats.keys.plain_names import plain_names
from ldm.untrusted import read_json

Kind = Literal[
    "ldm",  # a run or a checkpoint folder of ours
    "diffusers",  # a pipeline's folder
    "compvis",  # a single file
    "vae",  # an autoencoder: a file in either spelling, or diffusers' folder
    "unet",  # diffusers' folder of a U-Net
    "text_encoder",  # transformers' folder of a CLIP
    "lora",
    "textual_inversion",
    "hypernetwork",
    "other",  # recognised, and not read here: `refusal` says what it is
]
_FOLDERS: dict[str, Kind] = {
    "AutoencoderKL": "vae",
    "AutoencoderDC": "vae",
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder",
    "CLIPModel": "text_encoder",
}
_LORA = re.compile(
    r".*\.(lora_down|lora_up|lora_mid|lora_A|lora_B|down|up)\.(\w+\.)?weight|.*\.(hada_w1_a|lokr_w1|dora_scale)"
)
_ADAPTER = (
    "is an adapter, not a checkpoint: give the checkpoint that it belongs to, and this file as an adapter of it "
    "(adapters=[PATH:0.8], or pipe.load_adapter(PATH) in Python)."
)
# What names are tried for, in this order, and why such a file is not read as a checkpoint ("": it is).
_SIGNS: list[tuple[Callable[[str], object], Kind, str]] = [
    (
        lambda k: (_LORA.fullmatch(k) and "lora" in k) or re.search(r"hada_w1|lokr_w1|^bundle_emb\.", k),
        "lora",
        f"a LoRA: it {_ADAPTER}",
    ),
    (
        re.compile(r"string_to_param|em[bp]_params|clip_[lg]$|<[^>]+>$").match,
        "textual_inversion",
        f"an embedding: it {_ADAPTER}",
    ),
    (re.compile(r"\d{1,4}$").match, "hypernetwork", f"a hypernetwork: it {_ADAPTER}"),
    (
        re.compile(r"control_model\.|controlnet_|input_hint_block\.").match,
        "other",
        "a ControlNet: it steers a checkpoint and is none itself. ControlNets are not supported.",
    ),
    (
        re.compile(r"conditioner\.embedders\.").match,
        "other",
        "Stable Diffusion XL: it has two text encoders, which ldm's models do not. Stable Diffusion 1 and 2 are read.",
    ),
    (
        re.compile(r"model\.diffusion_model\.label_emb\.").match,
        "other",
        "Stable Diffusion XL, or another model that reads a vector beside its text. Stable Diffusion 1 and 2 are read.",
    ),
    (
        re.compile(r"(model\.diffusion_model\.)?(joint_blocks|double_blocks|transformer_blocks)\.").match,
        "other",
        "a transformer (Stable Diffusion 3, Flux or their like), not a U-Net. Stable Diffusion 1 and 2 are read.",
    ),
    (re.compile(r"model\.diffusion_model\.|model_ema\.diffusion_model|cond_stage_model\.").match, "compvis", ""),
    (
        re.compile(r"(encoder|decoder)\.((down|up)_blocks\.\d+\.\d+|stages\.\d+|project_in)\.").match,
        "other",
        "a deep compression autoencoder's weights alone: give diffusers' folder of it, with its config.json.",
    ),
    (re.compile(r"(first_stage_model\.)?(encoder|decoder)\.(conv_in|mid|down|up)").match, "vae", ""),
    (
        re.compile(r"(unet\.(down_blocks|mid_block|up_blocks)|vae\.(encoder|decoder))\.").match,
        "other",
        "a pipeline in diffusers' names in one file, which does not say its settings: give the folder that it is from.",
    ),
    (
        re.compile(r"(down_blocks|mid_block|up_blocks)\.").match,
        "other",
        "a U-Net's weights alone, whose settings stand in the config.json beside it: give the folder.",
    ),
    (
        re.compile(r"(text_model\.)?(embeddings|encoder\.layers)\.").match,
        "other",
        "a text encoder's weights alone, whose settings stand in the config.json beside it: give the folder.",
    ),
]


def of_names(names: Iterable[str]) -> tuple[Kind, str]:
    """The kind of a file with these entries, and the sentence that refuses it as a checkpoint ("" for those read)."""
    found = list(plain_names(names).values())
    for sign, kind, refusal in _SIGNS:
        if any(sign(name) for name in found):
            return kind, refusal
    some = ", ".join(found[:3])
    return "other", f"of no known kind: its entries are called {some or 'nothing at all'}. Give a checkpoint."


def part_of(config: Mapping[str, Any]) -> Kind | None:
    """Which part a config.json of diffusers or transformers describes; of a whole CLIP the text half is read."""
    said = config.get("architectures")
    names = [config.get("_class_name"), *(said if isinstance(said, list) else [])]
    return next((_FOLDERS[name] for name in names if isinstance(name, str) and name in _FOLDERS), None)


def is_ours(path: Path) -> bool:
    """Whether a path is a run or checkpoint folder of ours."""
    return (path / "manifest.json").is_file() or (path / "checkpoints").is_dir()


def of_path(path: Path) -> Kind:
    """The kind of an existing file or folder. ConfigError for a folder that is none, and for damaged files."""
    if path.is_file():
        return of_names(load(path).names)[0]
    if (path / "model_index.json").is_file():
        return "diffusers"
    if is_ours(path):
        return "ldm"
    if (path / "config.json").is_file():
        part = part_of(read_json(path / "config.json"))
        if part is not None:
            return part
    raise ConfigError(
        f"{path} is no checkpoint: it has no model_index.json (a diffusers pipeline), no checkpoints/ (a run of ours) "
        "and no config.json of a part. Give such a folder, or a .safetensors or .ckpt file."
    )
