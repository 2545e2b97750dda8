"""One file with every part, in CompVis' names: what the programs around Stable Diffusion exchange.

Such a file says neither heads nor schedule nor words. Published sizes are known by their shapes (`published.py`); for
others config= names a diffusers folder or a run. Files written here say it all themselves (`single_metadata.py`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.autoencoders.vq import begun
from ldm.errors import ConfigError
from ldm.formats import fold, published
from ldm.formats.content import PARTS, Node, State, Stored, meaning
from ldm.formats.diffusers.folder import Described
from ldm.formats.files.open import Opened
from ldm.formats.keys import text as text_keys
from ldm.formats.keys import unet as unet_keys
from ldm.formats.keys import vae as vae_keys
from ldm.formats.match import TARGETS, VQ, expected, filled, match, settings
from ldm.formats.single import sizes

# What training leaves in such files: schedules (computed anew here), averages (read by name), a first stage's loss.
# Of the text encoder, what compares texts with pictures.
_HARMLESS = re.compile(
    r"betas|alphas\w*|sqrt_\w+|posterior_\w+|log_one_minus_\w+|logvar|lvlb_weights|scale_factor"
    r"|model_ema\..*|(first_stage_model\.)?(loss|model_ema)\..*|denoiser\.sigmas|embedding_manager\..*|.*\.position_ids"
    r"|cond_stage_model\.(logit_scale|text_projection(\.weight)?)|(global_)?step|epoch"
)


def read(opened: Opened, source: Path, given: Described | None, weights: str) -> Stored:
    """A single file's parts; `given`: what the file or config= says of what shapes do not say."""
    names = {k: v for k, v in opened.tensors.items() if not _HARMLESS.fullmatch(k)}
    theirs = _unet_tensors(opened.tensors, source, weights)
    vae = _under(names, vae_keys.PREFIX)
    clip, openclip = _under(names, text_keys.CLIP), _under(names, text_keys.OPENCLIP)
    prefixes = (unet_keys.PREFIX, vae_keys.PREFIX, text_keys.CLIP, text_keys.OPENCLIP)
    strays = {k: v for k, v in names.items() if not k.startswith(prefixes)}
    match(strays, {}, str(source))
    checkpoint = Stored({}, {})
    if theirs:
        _read_unet(checkpoint, theirs, source, given)
    if clip or openclip:
        text = text_keys.from_openclip(openclip) if openclip else text_keys.from_transformers(clip)
        _read_text(checkpoint, text, bool(openclip), source, given)
    if vae:
        add_vae(checkpoint, vae, source, given, opened.tensors.get("scale_factor"))
    _settle_rest(checkpoint, opened, source, given)
    return checkpoint


def read_vae(opened: Opened, source: Path, given: Described | None) -> Stored:
    """A file with an autoencoder alone, in CompVis' names, with or without the prefix, or in diffusers'."""
    names = {k: v for k, v in opened.tensors.items() if not _HARMLESS.fullmatch(k)}
    checkpoint = Stored({}, {})
    state = {k.removeprefix(vae_keys.PREFIX): v for k, v in names.items()}
    add_vae(checkpoint, state, source, given, opened.tensors.get("scale_factor"))
    if given is None and bool(checkpoint.states["vae"]["latents.scale"].isfinite().all()):
        warnings.warn(
            f"{source} does not say its latents' scaling factor: {published.SCALING}, Stable Diffusion's, is taken. "
            "config=DIR, a diffusers folder of the same autoencoder, says another.",
            stacklevel=3,
        )
    return checkpoint


def add_vae(
    checkpoint: Stored, state: State, source: Path, given: Described | None, scale_factor: Tensor | None
) -> None:
    """Reads an autoencoder's tensors, without prefix, into the checkpoint."""
    ours = vae_keys.from_compvis(state) if vae_keys.is_compvis(state) else vae_keys.from_diffusers(state)
    found = sizes.autoencoder(ours)
    key = (tuple(found["block_channels"]), found["latent_channels"])
    node = _complete(found, published.AUTOENCODERS.get(key), given, "vae", source)
    wanted = expected(node, f"{source}")
    stable_diffusion = key == (published.AUTOENCODER, 4) and node["_target_"] != VQ
    scaling, shift = (given.scaling, given.shift) if given else (published.SCALING if stable_diffusion else None, None)
    if scale_factor is not None:
        if scale_factor.numel() != 1:
            raise ConfigError(f"{source}: its scale_factor is {tuple(scale_factor.shape)}, not one number.")
        scaling = fold.checked(float(scale_factor), f"{source}")
    state = begun(ours, wanted) | fold.units(wanted, scaling, shift)
    checkpoint.states["vae"] = filled(state, wanted, f"{source} (autoencoder)")
    checkpoint.config["autoencoder"] = node


def _unet_tensors(tensors: Mapping[str, Tensor], source: Path, weights: str) -> State:
    """The U-Net's tensors without prefix: of weights="ema" the averages, where there are some. {}: there is none."""
    own, averages = _under(tensors, unet_keys.PREFIX), unet_keys.from_averages(tensors)
    if averages and weights == "ema":
        if own:
            match(averages, own, f"{source} (averaged U-Net)")
        return averages
    if averages and not own:
        raise ConfigError(
            f"{source} has its U-Net as averages alone ({unet_keys.AVERAGES}...), and weights=raw asks for the plain "
            "weights, which are missing: use weights=ema."
        )
    return own


def _read_unet(checkpoint: Stored, theirs: State, source: Path, given: Described | None) -> None:
    found = sizes.unet(theirs)
    key = (tuple(found["block_channels"]), found["cross_attention_dim"])
    node = _complete(found, published.UNETS.get(key), given, "unet", source)
    wanted = expected(node, f"{source}")
    inverse = {name: ours for ours, name in unet_keys.compvis_names(wanted).items()}
    state = {inverse.get(name, unet_keys.PREFIX + name): tensor for name, tensor in theirs.items()}
    checkpoint.states["unet"] = filled(state, wanted, f"{source} (U-Net)")
    checkpoint.config["model"] = node


def _read_text(checkpoint: Stored, state: State, openclip: bool, source: Path, given: Described | None) -> None:
    found = sizes.text_encoder(state)
    rest = None if "feed_forward" in found else published.TEXTS.get((found["width"], openclip))
    node = _complete(found, rest, given, "text_encoder", source)
    if (settings(node, "text_encoder")["activation"] == "gelu") != openclip:
        raise ConfigError(
            f"{source} has {'OpenCLIP' if openclip else 'CLIP'}'s text encoder, but config= is of a model with the "
            "other. Give the diffusers folder of the same model."
        )
    wanted = expected(node, f"{source}")
    checkpoint.states["text_encoder"] = filled(state, wanted, f"{source} (text encoder)")
    checkpoint.config["text_encoder"] = node


# A folder that differs in these is of another model.
_SAME = ("block_channels", "width", "cross_attention_dim", "linear_projection", "codebook_size", "feed_forward")


def _complete(
    found: dict[str, Any], rest: Mapping[str, Any] | None, given: Described | None, part: str, source: Path
) -> Node:
    """The node: sizes from the shapes, the rest from what is given or known of published files."""
    key = PARTS[part]
    node = given.checkpoint.config.get(key) if given else None
    if node is not None:
        said = meaning(settings(node, part))
        for name in _SAME:
            if name in found and found[name] != said.get(name):
                raise ConfigError(
                    f"{source} has {key}.{name}={found[name]}, but config= says {said.get(name)}: it is another "
                    "model's. Give the diffusers folder of the same model."
                )
        return {**node, **found}
    if rest is None:
        raise ConfigError(
            f"{source}: the {key}'s sizes ({_some(found)}) are no published ones, and such a file does not say heads "
            "or groups: give config=DIR, a diffusers folder or a run of the same model."
        )
    return {"_target_": TARGETS[part], **found, **rest}


def _some(found: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={found[name]}" for name in _SAME[:3] if name in found)


def _settle_rest(checkpoint: Stored, opened: Opened, source: Path, given: Described | None) -> None:
    """Schedule, words and picture size, where they are not in the file."""
    if given is not None:
        checkpoint.scheduler_config = given.checkpoint.scheduler_config
        checkpoint.tokenizer = given.checkpoint.tokenizer
        if "image_size" in given.checkpoint.config:
            checkpoint.config["image_size"] = given.checkpoint.config["image_size"]
    if "model" not in checkpoint.config:
        return
    if checkpoint.scheduler_config is None:
        prediction = _prediction(opened, checkpoint.config["model"], source)
        checkpoint.scheduler_config = published.scheduler_config(prediction)
        checkpoint.scheduler_config |= published.table(opened.tensors.get("betas"))
        checkpoint.config.setdefault("image_size", 768 if prediction == "v_prediction" else 512)


def _prediction(opened: Opened, model: Node, source: Path) -> str:
    said = opened.metadata.get("modelspec.prediction_type")
    if said is not None:
        return "v_prediction" if said.startswith("v") else "epsilon"
    if not model["linear_projection"]:
        return "epsilon"
    prediction = "epsilon" if opened.global_step == published.BASE_STEP else "v_prediction"
    warnings.warn(
        f"{source} does not say what its network predicts: {prediction} is taken, because its global_step is "
        f"{opened.global_step} and files of Stable Diffusion 2 predict v, but for the one of "
        f"{published.BASE_STEP} steps. If the pictures are noise, give config=DIR, a diffusers folder of the same "
        "model.",
        stacklevel=4,
    )
    return prediction


def _under(tensors: Mapping[str, Tensor], prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


# Writing.


def to_compvis(checkpoint: Stored) -> State:
    """All tensors in CompVis' names; an autoencoder alone without the prefix, as such files are published.

    Latents leave in Stable Diffusion's units: these files have no place for others, so all readers take them for those.
    Nobody scales those of VQ autoencoders: they leave in units of 1.
    """
    vae, units = checkpoint.states["vae"], scaling_of(checkpoint)
    if units is not None and fold.scaling_factor(vae) != units:
        vae = fold.folded(vae, units)
    if set(checkpoint.states) == {"vae"}:
        return vae_keys.to_compvis(vae)
    found = {vae_keys.PREFIX + k: v for k, v in vae_keys.to_compvis(vae).items()}
    unet, text = checkpoint.states["unet"], checkpoint.states["text_encoder"]
    names = unet_keys.compvis_names(unet)
    found |= {unet_keys.PREFIX + names[k]: v for k, v in unet.items()}
    if is_openclip(checkpoint):
        return found | {text_keys.OPENCLIP + k: v for k, v in text_keys.to_openclip(text).items()}
    return found | {text_keys.CLIP + k: v for k, v in text.items()}


def scaling_of(checkpoint: Stored) -> float | None:
    """The scaling factor of the latents in a file: Stable Diffusion's; 1 or unmeasured (None) for VQ autoencoders."""
    if checkpoint.config["autoencoder"]["_target_"] != VQ:
        return published.SCALING
    return 1.0 if bool(checkpoint.states["vae"]["latents.scale"].isfinite().all()) else None


def is_openclip(checkpoint: Stored) -> bool:
    """Whether the text encoder leaves in OpenCLIP's names: readers take theirs for gelu, CLIP's for quick_gelu."""
    activation = settings(checkpoint.config["text_encoder"], "text_encoder")["activation"]
    return activation == "gelu"


def found_again(checkpoint: Stored, tensors: State, step: int | None) -> bool:
    """Whether the file's shapes alone would give this model back: then it needs no metadata."""
    opened, alone = Opened(tensors, tuple(tensors), {}, step), set(checkpoint.states) == {"vae"}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            name = Path("the file")
            again = read_vae(opened, name, None) if alone else read(opened, name, None, "raw")
    except ConfigError:
        return False
    for part, key in PARTS.items():
        if part not in checkpoint.states:
            continue
        ours, theirs = (meaning(settings(c.config[key], part)) for c in (checkpoint, again))
        if any(ours[k] != theirs[k] for k in ours if k in theirs):
            return False
    one, other = (c.states["vae"]["latents.scale"].isfinite().all() for c in (checkpoint, again))
    if one != other:  # a first stage whose units nobody knows
        return False
    return alone or _schedule(checkpoint.scheduler_config) == _schedule(again.scheduler_config)


def _schedule(config: Mapping[str, Any] | None) -> list[Any]:
    """What a scheduler's configuration says of the model: its noise table and its target, not how it is sampled."""
    said = {"prediction_type": "epsilon"} | dict(config or {})
    return [said.get(k) for k in (*published.TABLE, "prediction_type")] + [
        bool(said.get(k)) for k in ("trained_betas", "rescale_betas_zero_snr")
    ]
