"""Folders by their hub ids: from the hub's cache, or from the hub where there is a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ldm.errors import ConfigError

_SETTINGS = ["model_index.json", "*/*.json", "*/*.txt", "config.json"]
# Of a whole pipeline neither the safety checker nor other programs' copies of the weights are wanted.
_NOT_WANTED = ("safety_checker/*", "feature_extractor/*", "*non_ema*", "*.msgpack", "*.onnx")
# Weights' ends in the order in which they are tried, and what is left out along with each.
_ENDS = [("safetensors", "*.fp16*"), ("bin", "*.fp16*"), ("fp16.safetensors", "*.bin"), ("fp16.bin", "*.safetensors")]


def fetch(name: str, key: str, files: Sequence[str], remedy: str, without: Sequence[str] = ()) -> Path:
    """The local folder of a hub id, with those of its files (patterns). ConfigError with `remedy` if it cannot be."""
    ignored = [*_NOT_WANTED, *without]
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=ignored))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{key}={name} is not a folder here, and cannot be fetched from the hub ({type(error).__name__}). "
            f"{remedy}, or fetch it once where there is a network (hf download {name})."
        ) from error


def fetch_pipeline(name: str, key: str) -> Path:
    """The local folder of a published pipeline, or of one part: settings, tokenizer, and weights in one kind of file.

    Single files beside the folders, a second copy of everything, stay where they are.
    """
    remedy = f"Give a file or a folder: {key}=PATH"
    for end, without in _ENDS:
        weights = [f"*/*.{end}", f"diffusion_pytorch_model.{end}", f"model.{end}"]
        folder = fetch(name, key, [*_SETTINGS, *weights], remedy, [without])
        places = [folder / "unet", folder]
        if any(not file.match(without) for place in places for file in place.glob(f"*.{end}")):
            break
    return folder
