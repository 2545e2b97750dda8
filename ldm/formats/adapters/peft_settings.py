"""What peft says beside its tensors: the ranks and alphas by layer, in a JSON text or in adapter_config.json."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any

from ldm.adapters.content import LowRank
from ldm.errors import ConfigError
from ldm.untrusted import parse_json, read_json, shown

KEY = "lora_adapter_metadata"  # of the safetensors header, where diffusers keeps it
_PATTERNS = 4096  # a model has a few hundred layers
_QUICK = re.compile(r"[\w.\-|()^$\\]*(\.\*[\w.\-|()^$\\]*)?")  # what matches in time linear or quadratic in the path
LARGEST_ALPHA = 1e9


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
            found = parse_json(metadata[KEY], f"{file}: its {KEY}")
        else:
            found = read_json(beside) if file.stem == "adapter_model" and beside.is_file() else {}
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
            if len(pattern) > _PATTERNS:
                raise ValueError(f"more than {_PATTERNS} patterns")
            alpha = next((v for k, v in pattern.items() if _fits(k, path)), alpha)
            if not abs(alpha) < LARGEST_ALPHA:
                raise ValueError("not below 10^9")
        except (re.error, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.file}: its settings of alpha cannot be read ({shown(error)}). Fetch it again."
            ) from error
        # Kalajdzievski 2023: alpha/sqrt(rank) instead of alpha/rank
        return alpha * sqrt(rank) if said.get("use_rslora") else float(alpha)


def _fits(pattern: str, path: str) -> bool:
    """peft's rule: a pattern fits the whole of a path, or its end from a dot on. Its text paths may lack a level.

    ValueError for patterns with more than one `.*`, which may take for ever to match.
    """
    paths = (path, path.removeprefix("text_model."))
    if re.fullmatch(r"[\w.]+", pattern):
        return any(f".{p}".endswith(f".{pattern}") for p in paths)
    if not _QUICK.fullmatch(pattern) or pattern.count("|") > 8:
        raise ValueError(f"the pattern {shown(pattern)}")
    return any(re.match(rf"(.*\.)?({pattern})$", p) for p in paths)


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
