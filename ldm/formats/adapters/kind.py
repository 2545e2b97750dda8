"""What an adapter's file is, from what is in it; and what files are that are no adapters, or none that is read here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ldm.errors import ConfigError
from ldm.formats import kinds
from ldm.formats.files import hub
from ldm.formats.files.open import Opened, load
from ldm.untrusted import place as what_is_at

AdapterKind = Literal["lora", "textual_inversion", "hypernetwork"]

# The weights in the folders that peft and diffusers write.
_IN_FOLDERS = [
    f"{name}.{end}"
    for name in ("adapter_model", "pytorch_lora_weights", "learned_embeds")
    for end in ("safetensors", "bin")
]
_READ = "LoRA, textual inversion and hypernetworks are"
_MERGE = f"which is not read here ({_READ}): merge it with the program that made it, and load the merged checkpoint."
_XL = "ldm's models have one text encoder. Take the version for Stable Diffusion 1 or 2."
# Entries of adapters that are not read -> the sentence that refuses them.
_UNREAD = [
    (r".*hada_[wt]\d.*", f"a LoHa (LyCORIS' Hadamard products), {_MERGE}"),
    (r".*lokr_[wt]\d.*", f"a LoKr (LyCORIS' Kronecker products), {_MERGE}"),
    (r".*(oft_blocks|oft_diag|oft_R|boft_)\b.*", f"an OFT (orthogonal fine-tuning), {_MERGE}"),
    (r".*(\.on_input|\.ia3_l(\.\w+)?)", f"an (IA)3 (scales of activations), {_MERGE}"),
    (r"lora_.*\.[ab][12]\.weight", f"a GLoRA, {_MERGE}"),
    (r".*\.(diff|diff_b|[wb]_norm)", f"an adapter with whole differences of weights, {_MERGE}"),
    (r".*\.lora_B(\.\w+)?\.bias", f"a LoRA with biases, {_MERGE}"),
    (r"lora_controlnet", f"a Control-LoRA, {_MERGE}"),
    (
        r"lora_te[123]_.*|text_encoder_[23]\..*lora.*",
        f"a LoRA for Stable Diffusion XL or another model of several text encoders: {_XL}",
    ),
    (r"bundle_emb\..*\.(clip_g|t5.*)", f"a LoRA with embeddings for Stable Diffusion XL or another model: {_XL}"),
    (r"clip_[lg]", f"an embedding for Stable Diffusion XL: {_XL}"),
    (
        r"(?=.*lora)(lora_unet_|lora_|diffusion_model\.)?(transformer[_.](?!blocks_)|(double|single|joint)_blocks[_.]).*",
        "a LoRA for a transformer (Stable Diffusion 3, Flux or their like). Stable Diffusion 1's and 2's are read.",
    ),
    (
        r"lora_te_.*resblocks_.*|.*\bresblocks\.\d+\..*lora.*",
        "a LoRA in OpenCLIP's names, which is not read: save it from a trainer that names the text encoder's layers as "
        "transformers does (kohya's and diffusers' do).",
    ),
]
_WHOLE: dict[str, str] = {
    "ldm": "a run or checkpoint of ldm's",
    "diffusers": "a whole pipeline (diffusers' folder)",
    "compvis": "a whole checkpoint",
    "vae": "an autoencoder",
    "unet": "a U-Net (diffusers' folder)",
    "text_encoder": "a text encoder (transformers' folder)",
}


def located(path: str | Path) -> Path:
    """The file with an adapter's tensors: the path itself, or in a folder or under a hub id; else ConfigError."""
    place = Path(path).expanduser()
    there = what_is_at(place)
    if there == "file":
        return place
    if there == "nothing" and not place.suffix and str(path).count("/") == 1 and not place.is_absolute():
        place = hub.fetch(str(path), "adapter", [*_IN_FOLDERS, "adapter_config.json"], "Give a file or a folder")
    if what_is_at(place) == "nothing":
        raise ConfigError(f"{path}: there is nothing at this path. Give an adapter's .safetensors, .pt or .bin file.")
    files = [place / name for name in _IN_FOLDERS if (place / name).is_file()]
    if files:
        return files[0]
    try:
        whole = _WHOLE[kinds.of_path(place)]
    except ConfigError:
        raise ConfigError(f"{path} holds no adapter: it has none of {', '.join(_IN_FOLDERS[::2])}.") from None
    raise ConfigError(f"{path} is {whole}, not an adapter: give it as checkpoint=PATH.")


def opened_as(file: Path) -> tuple[AdapterKind, Opened]:
    """The kind of an adapter's file, and what is in it. ConfigError that says what other files are."""
    opened = load(file)
    if not opened.names:
        raise ConfigError(f"{file} holds nothing at all: its training may have failed. Fetch or make it again.")
    for pattern, sentence in _UNREAD:
        if any(re.fullmatch(pattern, name) for name in opened.names):
            raise ConfigError(f"{file} is {sentence}")
    kind, refusal = kinds.of_names(opened.names)
    if kind == "lora" or kind == "textual_inversion" or kind == "hypernetwork":
        return kind, opened
    if kind in _WHOLE:
        raise ConfigError(f"{file} is {_WHOLE[kind]}, not an adapter: give it as checkpoint=PATH.")
    if refusal.startswith("of no known kind") and _one_word(opened):
        return "textual_inversion", opened
    what = re.split(r"[.:] (?=[A-Z]|it |give |only )|, whose", refusal)[0]
    raise ConfigError(f"{file} is {what}, and no adapter that is read here: {_READ}.")


def _one_word(opened: Opened) -> bool:
    """Whether a file's only entry is one word's vectors: diffusers' embeddings may be called anything."""
    if len(opened.names) != 1 or len(opened.tensors) != 1:
        return False
    [(name, tensor)] = opened.tensors.items()
    return tensor.ndim in (1, 2) and not name.endswith((".weight", ".bias", ".alpha"))
