"""LoRA as kohya's scripts write it, and as peft and diffusers do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from ldm.adapters.content import Lora
from ldm.errors import ConfigError
from ldm.formats.adapters.embedding import pack_bundled
from ldm.formats.adapters.layer_names import PREFIXES
from ldm.formats.adapters.peft_settings import KEY, described

Packed = tuple[dict[str, Tensor], dict[str, str]]
_BASES = {768: "sd_v1", 1024: "sd_v2"}  # width of the text -> kohya's name of the base


def kohya(content: Lora, path: Path) -> Packed:
    """kohya's tensors and metadata; DoRA's lengths as LyCORIS keeps them, one for each output.

    Where alphas differ by layer, or for DoRA, diffusers 0.42 reads this layout wrongly: write peft's for it.
    """
    _check(content, "kohya")
    tensors: dict[str, Tensor] = {}
    names: dict[str, str] = {}
    for layer, update in content.layers.items():
        part, inner = layer.split(".", 1)
        name = PREFIXES[part] + inner.replace(".", "_")
        if names.setdefault(name, layer) != layer:
            raise ConfigError(f"format=kohya would call both {names[name]} and {layer} {name}. Use format=peft.")
        tensors[f"{name}.lora_down.weight"] = update.down
        tensors[f"{name}.lora_up.weight"] = update.up
        tensors[f"{name}.alpha"] = _number(update.alpha)
        if update.magnitude is not None:
            tensors[f"{name}.dora_scale"] = update.magnitude.reshape(-1, *[1] * (update.down.ndim - 1))
    tensors |= pack_bundled(content.words)
    said = {"ss_output_name": path.stem, "modelspec.title": path.stem} | _base(content) | content.metadata
    return tensors, said | _kohya_network(content)


def peft(content: Lora, path: Path) -> Packed:
    """peft's tensors in diffusers' names, and the alphas as diffusers keeps them: a JSON text in the metadata."""
    _check(content, "peft")
    if content.words:
        words = ", ".join(str(word.token) for word in content.words)
        raise ConfigError(
            f"format=peft cannot carry the embeddings that this LoRA bundles ({words}). Use format=kohya, which can."
        )
    tensors: dict[str, Tensor] = {}
    settings: dict[str, object] = {}
    for part in PREFIXES:
        layers = {k.removeprefix(f"{part}."): v for k, v in content.layers.items() if k.startswith(f"{part}.")}
        if not layers:
            continue
        if len({update.magnitude is None for update in layers.values()}) > 1:
            raise ConfigError(f"format=peft cannot carry a {part} of which some layers are DoRA. Use format=kohya.")
        settings |= {f"{part}.{k}": v for k, v in described(layers).items()}
        for inner, update in layers.items():
            tensors[f"{part}.{inner}.lora_A.weight"] = update.down
            tensors[f"{part}.{inner}.lora_B.weight"] = update.up
            if update.magnitude is not None:
                length = update.magnitude.reshape(1, -1, 1, 1) if update.down.ndim == 4 else update.magnitude
                # peft itself leaves the last word out; transformers, which loads the text encoder's, wants it there
                tensors[f"{part}.{inner}.lora_magnitude_vector.weight"] = length
    metadata = {"modelspec.title": path.stem} | _base(content) | content.metadata
    return tensors, metadata | {KEY: json.dumps(settings, indent=2, sort_keys=True)}


def _check(content: Lora, format: str) -> None:
    if not content.layers and not content.words:
        raise ConfigError("a LoRA without layers is not written: nothing would be in its file.")
    strange = [layer for layer in content.layers if layer.split(".", 1)[0] not in PREFIXES]
    if strange:
        raise ConfigError(f"format={format} knows unet and text_encoder only, and this LoRA changes {strange[0]}.")


def _number(alpha: float) -> Tensor:
    """A single number as a tensor: in float32 as kohya's scripts have it, unless that would change it."""
    tensor = torch.tensor(alpha, dtype=torch.float32)
    return tensor if tensor.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _base(content: Lora) -> dict[str, str]:
    """The base's name, from the width of the text that cross-attention reads or the text encoder works on."""
    for layer, update in content.layers.items():
        if layer.endswith((".attn2.to_k", ".attn2.to_v", ".self_attn.q_proj")) and update.down.shape[1] in _BASES:
            return {"ss_base_model_version": _BASES[update.down.shape[1]]}
    return {}


def _kohya_network(content: Lora) -> dict[str, str]:
    """How kohya's scripts say which network this is: ranks and alphas, "Dynamic" where they differ by layer."""
    updates = content.layers.values()
    kernels = [u for u in updates if u.down.shape[2:].numel() > 1]
    plain = [u for u in updates if u.down.shape[2:].numel() == 1] or kernels
    arguments: dict[str, str] = {}
    if kernels:
        arguments |= {"conv_dim": _one(u.rank for u in kernels), "conv_alpha": _one(u.alpha for u in kernels)}
    if any(u.magnitude is not None for u in updates):
        arguments |= {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
    said = {
        "ss_network_module": "lycoris.kohya" if "algo" in arguments else "networks.lora",
        "ss_network_dim": _one(u.rank for u in plain),
        "ss_network_alpha": _one(u.alpha for u in plain),
    }
    return said | ({"ss_network_args": json.dumps(arguments)} if arguments else {})


def _one(values: Iterable[float]) -> str:
    found = set(values)
    return str(found.pop()) if len(found) == 1 else "Dynamic"
