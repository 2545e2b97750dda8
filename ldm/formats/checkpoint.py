"""Checkpoints of other programs: `read` any layout into our names, `write` ours into any layout, `kind` of a path."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor

from ldm.atomic import atomic_write
from ldm.errors import ConfigError
from ldm.formats import kinds, published, run_config
from ldm.formats.content import PARTS, Stored
from ldm.formats.diffusers import folder as diffusers_folder
from ldm.formats.diffusers.folder import Described
from ldm.formats.files import hub
from ldm.formats.files.open import float32, load
from ldm.formats.files.store import cast, save_tensors
from ldm.formats.keys.plain_names import plain
from ldm.formats.kinds import Kind
from ldm.formats.match import architecture, carries, expected, match, settings
from ldm.formats.single import file as single_file
from ldm.formats.single import metadata as single_metadata
from ldm.untrusted import interpreted
from ldm.untrusted import place as what_is_at

__all__ = ["DTYPES", "FORMATS", "PARTS", "Stored", "check", "kind", "read", "read_stored", "write"]

FORMATS = ("diffusers", "compvis")
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def kind(path: str | Path) -> Kind:
    """What a file, a folder or a hub id is, from what is in it. ConfigError where that cannot be had or is damaged."""
    with interpreted(f"{path}"):
        return kinds.of_path(_located(path))


def read(path: str | Path, config: str | Path | None = None, weights: str = "ema") -> Stored:
    """A checkpoint of another program (or a single file of ours) in our names, float32, complete or refused."""
    checkpoint = read_stored(path, config, weights)
    checkpoint.states = {part: {k: float32(v) for k, v in s.items()} for part, s in checkpoint.states.items()}
    return checkpoint


def read_stored(path: str | Path, config: str | Path | None = None, weights: str = "ema") -> Stored:
    """The same with its tensors as the files hold them: mapped, so that they take memory when they are touched.

    A file, or a part's folder, may hold some parts only: then the others are missing in what is given back.

    path: a diffusers folder, a part's folder, a single file (.safetensors, .ckpt), an autoencoder's file, a hub id.
    config: what says what a single file of unpublished sizes does not: a diffusers folder, or a run (its folder, a
        checkpoint folder of it, or its config.yaml).
    weights: "ema", the averaged ones where there are some, or "raw".
    """
    if weights not in ("ema", "raw"):
        raise ConfigError(f"weights={weights} is not known: choose ema or raw.")
    with interpreted(f"{path}"):
        return _read_stored(path, config, weights)


def _read_stored(path: str | Path, config: str | Path | None, weights: str) -> Stored:
    place = _located(path)
    if place.is_dir():
        if kinds.of_path(place) == "ldm":
            raise ConfigError(f"{path} is a run of ldm's own, not another program's checkpoint: load it as format=ldm.")
        return diffusers_folder.read(place, weights)
    opened = plain(load(place), place)
    found, refusal = kinds.of_names(opened.names)
    if refusal:
        raise ConfigError(f"{path} is {refusal}")
    given = _given(config, single_metadata.unpack(opened.metadata, place))
    if found == "vae":
        return single_file.read_vae(opened, place, given)
    checkpoint = single_file.read(opened, place, given, weights)
    if checkpoint.tokenizer is None and "text_encoder" in checkpoint.config:
        checkpoint.tokenizer = _published_words(checkpoint)
    checkpoint.keep = given.checkpoint.keep if given else []
    return checkpoint


def write(checkpoint: Stored, path: str | Path, format: str, dtype: str = "float32") -> None:
    """Writes a checkpoint as "diffusers" (a folder) or "compvis" (one .safetensors or .ckpt file), whole or not at all.

    What the format cannot carry is refused by name before anything is written, and so is a path that exists.
    """
    path = Path(path)
    if format not in FORMATS:
        raise ConfigError(f"format={format} is not written here: choose one of {', '.join(FORMATS)}.")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype} is not known: choose one of {', '.join(DTYPES)}.")
    if path.exists():
        raise ConfigError(f"output={path} exists already: give another output=, or remove it first.")
    check(checkpoint, format)
    if format == "diffusers":
        with atomic_write(path) as part:
            diffusers_folder.write(checkpoint, part, DTYPES[dtype])
    else:
        _write_compvis(checkpoint, path, DTYPES[dtype])


def _write_compvis(checkpoint: Stored, path: Path, dtype: torch.dtype) -> None:
    if path.suffix not in (".safetensors", ".ckpt"):
        raise ConfigError(f"output={path}: a single file is a .safetensors or a .ckpt, so give it one of these ends.")
    step = _marked_step(checkpoint)
    tensors = single_file.to_compvis(checkpoint)
    if path.suffix == ".ckpt" and not single_file.found_again(checkpoint, tensors, step):
        raise ConfigError(
            f"output={path}: a .ckpt cannot say sizes or a schedule other than Stable Diffusion's, and this model has "
            "others. Give a name that ends in .safetensors, or format=diffusers."
        )
    with atomic_write(path) as part:
        if path.suffix == ".ckpt":
            stored = {k: _alone(cast(v, dtype, k).contiguous()) for k, v in tensors.items()}
            torch.save({"state_dict": stored} | ({} if step is None else {"global_step": step}), part)
        else:
            save_tensors(tensors, part, dtype, single_metadata.pack(checkpoint))


def _alone(tensor: Tensor) -> Tensor:
    """The tensor without the rest of the memory that it is a view of, which torch.save would write too."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def _marked_step(checkpoint: Stored) -> int | None:
    """The one mark by which readers of a .ckpt tell an eps model of Stable Diffusion 2's shape from a v model."""
    model, schedule = checkpoint.config.get("model"), checkpoint.scheduler_config
    if model is None or schedule is None or not settings(model, "unet")["linear_projection"]:
        return None
    return published.BASE_STEP if schedule.get("prediction_type", "epsilon") == "epsilon" else 0


def check(checkpoint: Stored, format: str) -> None:
    """ConfigError that names what the format cannot carry, and one that can. Of the tensors it looks at shapes only."""
    for part, key in PARTS.items():
        node = checkpoint.config.get(key)
        if node is None or part not in checkpoint.states:
            continue
        alone = format == "compvis" and set(checkpoint.states) == {"vae"}  # VQ autoencoders are published so
        if not carries(node, part, vq=alone):
            raise ConfigError(
                f"format={format} cannot carry {key}={node.get('_target_')}: it knows {architecture(part)} only. "
                "Use format=ldm."
            )
        match(checkpoint.states[part], expected(node), f"the {part} to be written")
    parts = set(checkpoint.states)
    if parts == {"vae"}:
        return
    missing = [part for part in PARTS if part not in parts]
    if missing:
        raise ConfigError(
            f"format={format} is for whole pipelines, and this checkpoint has no {' and no '.join(missing)} "
            "(other programs have no models without text). Use format=ldm."
        )
    model = settings(checkpoint.config["model"], "unet")
    if model["cross_attention_dim"] is None:
        raise ConfigError(f"format={format} cannot carry a model without cross-attention. Use format=ldm.")
    if checkpoint.scheduler_config is None:
        raise ConfigError(f"format={format} cannot carry this model's schedule or target. Use format=ldm.")
    if format == "diffusers" and checkpoint.tokenizer is None:
        raise ConfigError(
            "format=diffusers needs a tokenizer, and the checkpoint came without one: read it with config=DIR, "
            "a diffusers folder of the same model."
        )
    if format == "compvis":
        _check_compvis(checkpoint, model["mid_attention"])


def _check_compvis(checkpoint: Stored, mid_attention: bool) -> None:
    text = settings(checkpoint.config["text_encoder"], "text_encoder")
    if not mid_attention:
        raise ConfigError("format=compvis cannot carry model.mid_attention=false. Use format=diffusers.")
    if text["activation"] not in ("gelu", "quick_gelu") or (text["activation"] == "gelu" and text["layers"] > 23):
        raise ConfigError(
            f"format=compvis cannot carry text_encoder.activation={text['activation']} with {text['layers']} layers: "
            "it knows CLIP (quick_gelu) and OpenCLIP (gelu, at most 23 layers). Use format=diffusers."
        )


def _located(path: str | Path) -> Path:
    """The path itself, or where the hub's copy of an id lies."""
    place = Path(path).expanduser()
    if what_is_at(place) != "nothing":
        return place
    if place.suffix in (".safetensors", ".ckpt", ".pt", ".bin") or str(path).count("/") != 1 or place.is_absolute():
        raise ConfigError(f"checkpoint={path}: there is nothing at this path.")
    return hub.fetch_pipeline(str(path), "checkpoint")


def _given(config: str | Path | None, said: Described | None) -> Described | None:
    """What config= says, else what the file says of itself; the latents' units are the file's own in any case."""
    if config is None:
        return said
    place = _located(config)
    if (file := run_config.file_of(place)) is not None:
        found = run_config.describe(file)
    elif place.is_dir() and kinds.of_path(place) in ("diffusers", "vae", "unet"):
        found = diffusers_folder.describe(place)
    else:
        raise ConfigError(
            f"config={config} is no diffusers folder and no run of ours: give one of the same model, or of its sizes."
        )
    return Described(found.checkpoint, said.scaling, said.shift) if said else found


def _published_words(checkpoint: Stored) -> Path | None:
    """CLIP's published tokenizer, for files that read captions with it; None where it cannot be had now."""
    if checkpoint.config["text_encoder"]["vocab_size"] != published.VOCABULARY:
        return None
    files = ["vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return hub.fetch(
            published.TOKENIZER, "tokenizer", files, "Give config=DIR, a diffusers folder of the same model"
        )
    except ConfigError as error:
        warnings.warn(f"the checkpoint has no tokenizer: {error}", stacklevel=3)
        return None
