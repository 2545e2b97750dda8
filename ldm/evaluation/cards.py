"""What a number was measured with. Two numbers compare where their cards are equal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.config.root import digest
from ldm.metrics import AROUND
from ldm.metrics.evaluation import Evaluation, Scored


def cards(
    metrics: Mapping[str, Scored],
    found: Mapping[str, float],
    evaluation: Evaluation,
    asked: Mapping[str, Any],
    size: int,
) -> dict[str, dict[str, Any]]:
    """{score: what it was measured with}, for every score that is not itself said of another one.

    Two numbers compare where their cards are equal.
    """
    drawing = {
        "pictures": asked["eval_images"],
        **{k: asked.get(k) for k in ("num_steps", "guidance", "guidance_rescale", "eta")},
        **{k: _named(asked.get(k)) for k in ("sampler", "grid", "guider")},
        "seed": asked["seed"],
    }
    everywhere = {"weights": asked["weights"], "image_size": size, "torch": torch.__version__}
    made: dict[str, dict[str, Any]] = {}
    for name in found:
        half, _, rest = name.partition("/")
        if rest.rsplit("/", 1)[-1] in AROUND:
            continue
        own = next((m for m in metrics.values() if name in getattr(m, "scores", ())), None)
        card = own.card(name) if own is not None and hasattr(own, "card") else {}  # type: ignore[attr-defined]
        if half in evaluation.drawn:
            told = f"{half}, {digest(evaluation.drawn[half].everyone)}"
            made[name] = {"of": "drawn", "captions": told, **drawing, **everywhere, **card}
        else:
            made[name] = {"of": half, **everywhere, **card}
    return made


def _named(node: Any) -> str:
    """A sampler, grid or guider in a word, with what is set of it."""
    if not node:
        return "own"
    if not isinstance(node, Mapping):
        return str(node) if isinstance(node, str) else type(node).__name__
    options = {k: v for k, v in sorted(node.items()) if k != "_target_" and v is not None}
    return " ".join([str(node.get("_target_", "own")).rsplit(".", 1)[-1], *(f"{k}={v}" for k, v in options.items())])
