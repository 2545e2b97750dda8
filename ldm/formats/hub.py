"""Folders by their hub ids: from the hub's cache, or from the hub where there is a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

from ldm.errors import ConfigError

# A pipeline's folder without its safety checker, its second copies of the weights, and its single files.
_SETTINGS = ["model_index.json", "*/*.json", "*/*.txt", "config.json"]
_WEIGHTS = [("*/*.safetensors", "*.fp16.*"), ("*/*.bin", "*.fp16.*"), ("*/*.fp16.safetensors", "")]
_NOT_WANTED = ["safety_checker/*", "feature_extractor/*", "*non_ema*", "*.msgpack", "*.onnx"]


def fetch(name: str, key: str, files: Sequence[str], remedy: str) -> Path:
    """The local folder of a hub id, with those of its files (patterns). ConfigError with `remedy` if it cannot be."""
    try:
        return Path(snapshot_download(name, allow_patterns=list(files), ignore_patterns=_NOT_WANTED))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ConfigError(
            f"{key}={name} is not a folder here, and cannot be fetched from the hub ({type(error).__name__}). "
            f"{remedy}, or fetch it once where there is a network (hf download {name})."
        ) from error


def fetch_pipeline(name: str, key: str) -> Path:
    """The local folder of a published pipeline: settings, tokenizer, and its weights in one kind of file."""
    remedy = f"Give a file or a folder: {key}=PATH"
    folder = fetch(name, key, _SETTINGS, remedy)
    for pattern, without in _WEIGHTS:
        folder = fetch(name, key, [*_SETTINGS, pattern], remedy)
        found = [f for f in folder.glob(pattern) if not (without and f.match(without))]
        if found:
            break
    return folder
