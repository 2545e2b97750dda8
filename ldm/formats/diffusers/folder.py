"""diffusers' folders: model_index.json and a folder a part, each with config.json and weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.formats import fold
from ldm.formats.content import PARTS, Node, State, Stored
from ldm.formats.diffusers import config as vocabulary
from ldm.formats.diffusers.autoencoder import autoencoder_node, scaling
from ldm.formats.files.open import load
from ldm.formats.files.store import save_tensors
from ldm.formats.keys import text as text_keys
from ldm.formats.keys import vae as vae_keys
from ldm.formats.keys.plain_names import unwrapped
from ldm.formats.kinds import part_of
from ldm.formats.match import expected, filled, settings
from ldm.formats.published import SCALING
from ldm.formats.schedulers import of_pipeline, sample_size
from ldm.models.inputs import inpainting_channels
from ldm.text.tokenizer import load_tokenizer, save_tokenizer
from ldm.untrusted import number, read_json, shown, whole

_CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
}
_NODES = {"unet": vocabulary.unet_node, "vae": autoencoder_node, "text_encoder": vocabulary.text_node}
_IMAGE_SIZE = 512  # where a folder names none


@dataclass(frozen=True)
class Described:
    """What a folder's small files say: a checkpoint without tensors, and the units of its latents."""

    checkpoint: Stored
    scaling: float | None = None
    shift: float | None = None


def describe(folder: Path) -> Described:
    """Everything but the weights, of a pipeline's folder or one part's."""
    index = folder / "model_index.json"
    if not index.is_file():
        part: str = part_of(read_json(folder / "config.json")) or "text_encoder"
        return _described({part: folder}, None, None)
    found = read_json(index)
    surplus = sorted(k for k, v in found.items() if _is_model(v) and k not in (*_CLASSES, *_PASSED_OVER))
    for part, classes in _CLASSES.items():
        kind = found[part][1] if _is_model(found.get(part)) else None
        if kind not in classes or surplus:
            other = shown(", ".join(surplus) or f"{part}={shown(kind)}")
            raise ConfigError(
                f"{folder} is a {shown(found.get('_class_name'))} with {other}: ldm reads "
                "pipelines of one U-Net, one KL autoencoder and one CLIP text encoder (Stable Diffusion 1 and 2)."
            )
    file, words = folder / "scheduler/scheduler_config.json", folder / "tokenizer"
    pipeline = str(found.get("_class_name"))
    schedule = of_pipeline(read_json(file, infinite=True), pipeline) if file.is_file() else None
    return _described({part: folder / part for part in _CLASSES}, schedule, words if words.is_dir() else None, pipeline)


_PASSED_OVER = ("scheduler", "tokenizer", "safety_checker", "feature_extractor", "image_encoder")


def _is_model(entry: Any) -> bool:
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _described(
    folders: dict[str, Path], schedule: dict[str, Any] | None, words: Path | None, pipeline: str = ""
) -> Described:
    configs = {part: read_json(folder / "config.json") for part, folder in folders.items()}
    where = {part: f"{folder / 'config.json'}" for part, folder in folders.items()}
    nodes: dict[str, Any] = {PARTS[p]: _NODES[p](c, where[p]) for p, c in configs.items()}
    vae = configs.get("vae", {})
    if "unet" in configs and "vae" in configs:
        pixels = 2 ** (len(nodes["autoencoder"]["block_channels"]) - 1)
        side = sample_size(configs["unet"], pipeline)
        said = [] if side is None else side if isinstance(side, list) else [side]
        sides = {whole(n, "sample_size", where["unet"], most=2048) for n in said}
        nodes["image_size"] = pixels * sides.pop() if len(sides) == 1 else _IMAGE_SIZE
    shift = vae.get("shift_factor")
    if shift is not None:
        number(shift, "shift_factor", where["vae"], -1e6, 1e6)
    units = scaling(vae, where["vae"]) if vae else None
    return Described(Stored(nodes, {}, schedule, words), units, shift)


def read(folder: Path, weights: str) -> Stored:
    """A pipeline's folder, or one part's. weights="raw" takes non_ema files where there are some."""
    described = describe(folder)
    checkpoint = described.checkpoint
    for part, key in PARTS.items():
        if key in checkpoint.config:
            inside = folder / part if (folder / "model_index.json").is_file() else folder
            tensors = load_part(inside, part, weights)
            checkpoint.states[part] = fit(part, tensors, checkpoint.config[key], described, str(inside))
    return checkpoint


def fit(part: str, tensors: State, node: Node, described: Described, source: str) -> State:
    """diffusers' and transformers' tensors of a part -> the state that fills the node, checked against it."""
    wanted = expected(node, f"{source}/config.json")
    if part == "text_encoder":
        tensors = text_keys.from_transformers(tensors)
    if part == "vae":
        tensors = vae_keys.from_diffusers(tensors) | fold.units(wanted, described.scaling, described.shift)
    return filled(tensors, wanted, source)


def load_part(folder: Path, part: str, weights: str = "ema") -> State:
    """All tensors of a part's folder."""
    file = weights_file(folder, part, weights)
    if file is None:
        raise ConfigError(f"{folder} holds no weights (.safetensors or .bin). Fetch the whole folder.")
    tensors = _shards(file) if file.suffix == ".json" else load(file).tensors
    return {unwrapped(name): tensor for name, tensor in tensors.items()}


def weights_file(folder: Path, part: str, weights: str = "ema") -> Path | None:
    """Where a part's weights are: .safetensors before .bin, whole or the index of shards; fp16 if there is no other."""
    variants = ["", ".fp16"] if weights == "ema" else [".non_ema", "", ".fp16"]
    stems = ("model", "pytorch_model") if part == "text_encoder" else ("diffusion_pytorch_model",)
    for variant in variants:
        for end in ("safetensors", "bin"):
            for stem in stems:
                indices = (f"{stem}.{end}.index{variant}.json", f"{stem}{variant}.{end}.index.json")
                for name in (f"{stem}{variant}.{end}", *indices):
                    if (folder / name).is_file():
                        return folder / name
    return None


def _shards(index: Path) -> State:
    said = read_json(index).get("weight_map")
    if not isinstance(said, dict) or not said or not all(isinstance(name, str) for name in said.values()):
        raise ConfigError(f"{index} has no weight_map from tensors to files: it was edited. Fetch it again.")
    names = sorted(set(said.values()))
    tensors: State = {}
    for name in names:
        file = index.parent / name
        if name in ("", ".", "..") or "/" in name or "\\" in name:
            raise ConfigError(f"{index} names {shown(name)}, which is not in its own folder. Do not use it.")
        if not file.is_file():
            raise ConfigError(f"{file} is missing, one of {len(names)} shards. Fetch the whole folder.")
        tensors |= load(file).tensors
    return tensors


def write(checkpoint: Stored, folder: Path, dtype: torch.dtype) -> None:
    """Writes what `StableDiffusionPipeline.from_pretrained` reads; of an autoencoder alone, its folder."""
    folder.mkdir(parents=True)
    size = checkpoint.config.get("image_size") or _IMAGE_SIZE
    vae = checkpoint.states["vae"]
    factor = fold.scaling_factor(vae)
    if factor is None:
        vae, factor = fold.folded(vae, SCALING), SCALING
    alone = set(checkpoint.states) == {"vae"}
    autoencoder = settings(checkpoint.config["autoencoder"], "vae")
    inside = folder if alone else folder / "vae"
    vae = {k: v for k, v in vae.items() if not k.startswith("latents.")}
    _write_part(inside, vocabulary.vae_config(autoencoder, factor, size), vae, "diffusion_pytorch_model", dtype)
    if alone:
        return
    assert checkpoint.tokenizer is not None
    unet = settings(checkpoint.config["model"], "unet")
    text = settings(checkpoint.config["text_encoder"], "text_encoder")
    latent_size = size // 2 ** (len(autoencoder["block_channels"]) - 1)
    _write_part(
        folder / "unet",
        vocabulary.unet_config(unet, latent_size),
        checkpoint.states["unet"],
        "diffusion_pytorch_model",
        dtype,
    )
    words = load_tokenizer(checkpoint.tokenizer)
    if text["pad"] is not None:
        words.pad_token = text["pad"]
    words.model_max_length = text["max_length"]
    save_tokenizer(words, folder / "tokenizer")
    marks = {name: getattr(words, name) for name in vocabulary.MARKS}
    _write_part(
        folder / "text_encoder", vocabulary.text_config(text, marks), checkpoint.states["text_encoder"], "model", dtype
    )
    schedule = checkpoint.scheduler_config
    assert schedule is not None
    _write_json(folder / "scheduler/scheduler_config.json", schedule)
    inpaints = unet["in_channels"] == inpainting_channels(unet["out_channels"])
    _write_json(folder / "model_index.json", _index(inpaints, schedule.get("_class_name", "PNDMScheduler")))


def _index(inpaints: bool, scheduler: str) -> dict[str, Any]:
    return {
        "_class_name": "StableDiffusionInpaintPipeline" if inpaints else "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",  # whose settings these are
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", scheduler],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_part(folder: Path, config: dict[str, Any], state: dict[str, Tensor], stem: str, dtype: torch.dtype) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", config)
    save_tensors(state, folder / f"{stem}.safetensors", dtype, {"format": "pt"}, f"{folder.name}: ")


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
