"""What peft says beside its tensors: the ranks and alphas by layer, in a JSON text or in adapter_config.json."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from ldm.adapters.content import LowRank
from ldm.errors import ConfigError
from ldm.formats.content import read_json

KEY = "lora_adapter_metadata"  # of the safetensors header, where diffusers keeps it


@dataclass(frozen=True)
class PeftSettings:
    """peft's LoraConfig by part ("unet", "text_encoder"); "" stands for all parts where the file names none."""

    by_part: Mapping[str, Mapping[str, Any]]
    file: Path

    @classmethod
    def of(cls, metadata: Mapping[str, str], file: Path) -> PeftSettings:
        """The settings in a file's header, else those in the folder beside it; none in most files."""
        beside = file.with_name("adapter_config.json")
        if KEY in metadata:
            try:
                found = json.loads(metadata[KEY])
            except ValueError as error:
                raise ConfigError(f"{file}: its {KEY} is not JSON ({error}). Fetch it again.") from error
        else:
            found = read_json(beside) if file.stem == "adapter_model" and beside.is_file() else {}
        if not isinstance(found, dict):
            raise ConfigError(f"{file}: its {KEY} is no JSON object. Fetch it again.")
        parts: dict[str, dict[str, Any]] = {}
        for key, value in found.items():
            part, _, name = key.rpartition(".")
            parts.setdefault(part, {})[name] = value
        return cls(parts, file)

    def alpha(self, layer: str, rank: int) -> float:
        """The alpha of a layer; its rank (a scale of 1) where nothing is said."""
        part, path = layer.split(".", 1)
        said = self.by_part.get(part) or self.by_part.get("") or {}
        pattern = said.get("alpha_pattern") or {}
        alpha = rank if said.get("lora_alpha") is None else said["lora_alpha"]
        try:
            alpha = next((v for k, v in pattern.items() if _fits(k, path)), alpha)
            if not isfinite(alpha):
                raise ValueError("not finite")
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.file}: its settings of alpha cannot be read ({error}). Fetch it again."
            ) from error
        # Kalajdzievski 2023: alpha/sqrt(rank) instead of alpha/rank
        return alpha * sqrt(rank) if said.get("use_rslora") else float(alpha)


def _fits(pattern: str, path: str) -> bool:
    """peft's rule: a pattern fits the whole of a path, or its end from a dot on. Its text paths may lack a level."""
    return any(re.match(rf"(.*\.)?({pattern})$", p) for p in (path, path.removeprefix("text_model.")))


def described(layers: Mapping[str, LowRank]) -> dict[str, Any]:
    """The settings of one part's layers (by path): the commonest rank and alpha, and a pattern for every other."""
    rank, alpha = (
        _commonest(values) for values in ([x.rank for x in layers.values()], [x.alpha for x in layers.values()])
    )
    # Ends of paths, so that transformers' CLIP is found before and after it lost the level `text_model`.
    paths = {path.removeprefix("text_model."): layer for path, layer in layers.items()}
    return {
        "r": rank,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {path: x.rank for path, x in paths.items() if x.rank != rank},
        "alpha_pattern": {path: _whole(x.alpha) for path, x in paths.items() if x.alpha != alpha},
        "target_modules": sorted(paths),
        "use_dora": any(x.magnitude is not None for x in layers.values()),
        "use_rslora": False,
    }


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _whole(alpha: float) -> float | int:
    return int(alpha) if alpha == int(alpha) else alpha
