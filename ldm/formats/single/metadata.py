"""What single files say in their safetensors metadata: everything that shapes do not, so that they need no config=."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ldm.errors import ConfigError
from ldm.formats import fold, published
from ldm.formats.content import PARTS, Stored, portable
from ldm.formats.diffusers.folder import Described
from ldm.formats.match import carries
from ldm.formats.single import file as single_file
from ldm.text.tokenizer import load_tokenizer, save_tokenizer
from ldm.untrusted import parse_json, shown, whole

CONFIG, SCHEDULER, WORDS = "ldm.config", "ldm.scheduler_config", "ldm.tokenizer"
KEYS = (*PARTS.values(), "image_size")
_WORD_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def pack(checkpoint: Stored) -> dict[str, str]:
    """Metadata of the file. The tokenizer travels unless it is CLIP's published one, which everybody has."""
    own = {key: checkpoint.config[key] for key in KEYS if key in checkpoint.config}
    nodes = {key: portable(value) if isinstance(value, dict) else value for key, value in own.items()}
    found = {"format": "pt", CONFIG: json.dumps(nodes)}
    if (scaling := single_file.scaling_of(checkpoint)) is not None:
        found["ldm.scaling_factor"] = str(scaling)
    if checkpoint.scheduler_config is not None:
        found[SCHEDULER] = json.dumps(checkpoint.scheduler_config)
        prediction = checkpoint.scheduler_config.get("prediction_type", "epsilon")
        found["prediction_type"] = prediction
        if prediction in ("epsilon", "v_prediction"):
            found["modelspec.prediction_type"] = prediction.removesuffix("_prediction")
    if checkpoint.tokenizer is not None:
        words = load_tokenizer(checkpoint.tokenizer)
        if len(words) != published.VOCABULARY:
            with TemporaryDirectory() as folder:
                save_tokenizer(words, folder)
                texts = {name: (Path(folder) / name).read_text(encoding="utf-8") for name in _WORD_FILES}
            found[WORDS] = json.dumps(texts)
    return found


def unpack(metadata: Mapping[str, str], source: Path) -> Described | None:
    """What `pack` wrote, None for files of other programs. Only our own classes are accepted from a file."""
    if CONFIG not in metadata:
        return None
    try:
        said, schedule, words = (
            parse_json(metadata[key], f"{source}: its {key}") if key in metadata else None
            for key in (CONFIG, SCHEDULER, WORDS)
        )
        config: dict[str, Any] = {k: v for k, v in (said or {}).items() if k in KEYS}
        scaling = None
        if "ldm.scaling_factor" in metadata:
            scaling = fold.checked(float(metadata["ldm.scaling_factor"]), f"{source}")
        if "image_size" in config:
            whole(config["image_size"], "image_size", f"{source}", most=2**12)
        strange = [key for part, key in PARTS.items() if key in config and not carries(config[key], part, vq=True)]
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source}: its metadata of ldm's cannot be read ({shown(repr(error), 120)}). Fetch the file again."
        ) from error
    if strange:
        raise ConfigError(
            f"{source}: its metadata name {shown(config[strange[0]], 100)}, which no file of ldm's says. Do not use it."
        )
    checkpoint = Stored(config, {}, schedule)
    if words:
        folder = TemporaryDirectory(prefix="ldm-tokenizer-")
        for name in _WORD_FILES:
            (Path(folder.name) / name).write_text(str(words.get(name, "{}")), encoding="utf-8")
        checkpoint.tokenizer, checkpoint.keep = Path(folder.name), [folder]
    return Described(checkpoint, scaling)
