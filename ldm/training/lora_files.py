"""LoRAs in files, in the layout of peft and diffusers."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from ldm.adapters.content import Lora, LowRank
from ldm.errors import ConfigError
from ldm.formats.store import save_tensors

PARTS = ("unet", "text_encoder")


def read_lora(path: str | Path) -> Lora:
    """A LoRA in the layout of peft and diffusers: `unet.<layer>.lora_A.weight` is down, `lora_B` up."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in load_file(Path(path).expanduser()).items():
        layer, leaf = next(
            ((name.removesuffix(end), leaf) for end, leaf in _LEAVES.items() if name.endswith(end)), ("", "")
        )
        if not layer.startswith(tuple(f"{part}." for part in PARTS)):
            raise ConfigError(f"{path} has an entry {name}, which is no LoRA's in the layout of peft and diffusers.")
        found.setdefault(layer, {})[leaf] = tensor.float()
    layers = {}
    for layer, leaves in found.items():
        if not {"down", "up"} <= leaves.keys():
            raise ConfigError(f"{path} has only a part of {layer}: lora_A.weight and lora_B.weight make a layer.")
        alpha = float(leaves["alpha"]) if "alpha" in leaves else float(len(leaves["down"]))
        layers[layer] = LowRank(leaves["down"], leaves["up"], alpha, leaves.get("magnitude"))
    return Lora(layers)


_LEAVES = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
}


def write_lora(lora: Lora, path: str | Path) -> None:
    """Writes what `read_lora`, peft and diffusers read. alpha/rank, for which the layout has no place, goes into up."""
    tensors = {}
    for layer, update in lora.layers.items():
        tensors[f"{layer}.lora_A.weight"] = update.down
        tensors[f"{layer}.lora_B.weight"] = update.up * (update.alpha / update.rank)
        if update.magnitude is not None:
            tensors[f"{layer}.lora_magnitude_vector.weight"] = update.magnitude
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(target.name + ".part")
        save_tensors(tensors, part, metadata={"format": "pt", **lora.metadata})
        part.rename(target)
    except OSError as error:
        raise ConfigError(f"output={path}: cannot be written ({error.strerror or error}).") from error
