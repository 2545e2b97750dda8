"""LoRA files of kohya's scripts (LoCon too), peft and diffusers, old and new: which tensors are which layer's."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

import torch
from torch import Tensor

from ldm.adapters.content import Lora, LowRank
from ldm.errors import ConfigError
from ldm.formats.adapters.embedding import BUNDLED, read_bundled
from ldm.formats.adapters.layer_names import LayerNames
from ldm.formats.adapters.peft_settings import KEY, LARGEST_ALPHA, PeftSettings
from ldm.formats.adapters.tensors import read_weights
from ldm.formats.files.open import Opened

# A layer's name, then what of it this is: kohya's, peft's (with the adapter's name, if any) or diffusers' own spelling.
_ENTRY = re.compile(
    r"(?P<layer>.+?)(?:"
    r"\.lora_(?P<kohya>down|up|mid)\.weight"
    r"|\.lora_(?P<peft>A|B)(?:\.\w+)?\.weight"
    r"|[._]lora(?:_linear_layer)?\.(?P<old>down|up)\.weight"
    r"|(?:_lora)?\.(?P<alpha>alpha)"
    r"|\.(?P<scale>dora_scale)"
    r"|\.lora_(?P<magnitude>magnitude)_vector(?:\.\w+){0,2}"
    r")"
)
_PEFT = {"A": "down", "B": "up"}


def read(opened: Opened, names: Collection[str] | None, file: Path) -> Lora:
    """A LoRA file's layers in our names. ConfigError if anything in it stays unused, or is not of this base."""
    settings = PeftSettings.of(opened.metadata, file)
    layer_names = LayerNames(names)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown, elsewhere = [], []
    for key in opened.names:
        if key.startswith(BUNDLED):
            continue
        entry = _ENTRY.fullmatch(key)
        if entry is None:
            unknown += [key] if key in opened.tensors else []
            continue
        if key not in opened.tensors:
            raise ConfigError(f"{file}: {key} is no tensor, as it is in every LoRA. Fetch the file again.")
        layer = layer_names.ours(entry["layer"])
        if layer is None:
            elsewhere.append(entry["layer"])
            continue
        last = entry[entry.lastgroup or ""]
        role = _PEFT.get(last, last)
        if role in parts.setdefault(layer, {}):
            raise ConfigError(f"{file} has the {role} of {layer} twice, in two spellings: which holds cannot be told.")
        parts[layer][role] = opened.tensors[key]
    if unknown:
        count, some = _some(unknown, "entry", "entries")
        raise ConfigError(f"{file} has {count} that no LoRA read here has: {some}. It is damaged, or of another kind.")
    if elsewhere:
        count, some = _some(list(dict.fromkeys(elsewhere)), "layer", "layers")
        raise ConfigError(
            f"{file} changes {count} that this base does not have: {some}. It belongs to a model of another kind: give "
            "the checkpoint that it was trained on."
        )
    found = {layer: _low_rank(tensors, settings, layer, file) for layer, tensors in parts.items()}
    metadata = {k: v for k, v in opened.metadata.items() if k not in (KEY, "format")}
    return Lora(found, metadata, read_bundled(opened.tensors, file))


def _low_rank(found: dict[str, Tensor], settings: PeftSettings, layer: str, file: Path) -> LowRank:
    missing = [role for role in ("down", "up") if role not in found]
    if missing:
        raise ConfigError(
            f"{file} has of {layer} only {' and '.join(found)}, and no {' and no '.join(missing)}: it was cut short or "
            "edited. Fetch it again."
        )
    where = f"{file}: the update of {layer}"
    tensors = {role: read_weights(tensor, f"{where} ({role})") for role, tensor in found.items() if role != "alpha"}
    down, up = tensors["down"], tensors["up"]
    shapes = f"down {tuple(down.shape)}, up {tuple(up.shape)}"
    if any(t.ndim not in (2, 4) for t in (down, up)) or 0 in (*down.shape, *up.shape):
        raise ConfigError(f"{where} is neither a linear layer's nor a convolution's ({shapes}). Fetch the file again.")
    if "mid" in tensors:
        down = _through(tensors["mid"], down, where)
    if up.ndim == 4 and up.shape[2:] != (1, 1):
        raise ConfigError(f"{where} has kernels in its second factor ({shapes}): only the first may have them.")
    if up.shape[1] != down.shape[0]:
        raise ConfigError(f"{where} has ranks that differ ({shapes}): the file is damaged. Fetch it again.")
    if down.ndim == 4 and up.ndim == 2:
        up = up[..., None, None]
    if up.ndim == 4 and down.ndim == 2:
        down = down[..., None, None]
    rank = down.shape[0]
    alpha = _alpha(found["alpha"], where) if "alpha" in found else settings.alpha(layer, rank)
    return LowRank(down, up, alpha, _magnitude(tensors, up.shape[0], where))


def _through(mid: Tensor, down: Tensor, where: str) -> Tensor:
    """LoCon's first factor with the kernel between its two 1x1 convolutions (its Tucker form) multiplied in."""
    if mid.ndim != 4 or mid.shape[1] != down.shape[0]:
        raise ConfigError(
            f"{where} has a middle of {tuple(mid.shape)} for a down of {tuple(down.shape)}: fetch it again."
        )
    return torch.einsum("rskl,si->rikl", mid, down.flatten(1))


def _alpha(tensor: Tensor, where: str) -> float:
    if tensor.numel() != 1 or tensor.is_complex() or not abs(tensor.item()) < LARGEST_ALPHA:
        raise ConfigError(
            f"{where} has an alpha that is not one number below {LARGEST_ALPHA:g}: the file is damaged. Fetch it again."
        )
    return float(tensor.item())


def _magnitude(tensors: dict[str, Tensor], out: int, where: str) -> Tensor | None:
    """DoRA's lengths by output: peft's (out,) or (1, out, 1, 1), LyCORIS' (out, 1) or (out, 1, 1, 1)."""
    found = tensors.get("magnitude", tensors.get("dora_scale"))
    if found is None:
        return None
    if found.numel() == out and ("magnitude" in tensors or found.shape[0] == out):
        return found.flatten()
    raise ConfigError(
        f"{where} is a DoRA whose lengths are {tuple(found.shape)} for {out} outputs: lengths of inputs (LyCORIS' "
        "dora_wd without wd_on_output) are not read. Merge it with the program that made it, and load the result."
    )


def _some(items: list[str], one: str, many: str) -> tuple[str, str]:
    """How many, in words, and the first three."""
    return f"{len(items)} {one if len(items) == 1 else many}", ", ".join(items[:3])
