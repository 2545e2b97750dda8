"""Does a picture fit its caption, as CLIP sees it?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.features.vision_features import CLIP
from ldm.metrics.distances.interval import mean_of
from ldm.metrics.evaluation import Evaluation
from ldm.metrics.shapes import wilson

CANDIDATES = 100  # captions that a picture's own one is looked for among
AT_ONCE = 64


class TextAgreement(Metric):
    """CLIP score (Hessel et al. 2021): 100 max(cosine, 0), the mean over pictures; and R-precision, the share of
    pictures whose own caption is the nearest of 100 (Park et al. 2021).

    The candidates of a picture are the first 100 different captions that were drawn, its own in the place of one where
    it is not among them.
    """

    full_state_update = False
    scores = tuple(
        f"{half}/{name}"
        for half in ("seen", "unseen", "val")
        for name in (
            *("clip_score", "clip_score/low", "clip_score/high", "clip_score/n"),
            *("retrieval", "retrieval/low", "retrieval/high", "retrieval/chance"),
        )
    )
    values: list[Tensor]

    def __init__(self, features: CLIP):
        super().__init__()
        self.features = features
        self.add_state("values", [], dist_reduce_fx="cat")
        self._candidates: list[str] = []

    def update(self, images: Tensor, captions: Sequence[str]) -> None:
        """(B,3,H,W) in [-1, 1], one caption each."""
        seen = self.features(images)
        own = (seen * self.features.texts(captions)).sum(dim=1)
        rivals = seen @ self.features.texts(self._candidates).T
        same = torch.tensor([[c == k for k in self._candidates] for c in captions], device=own.device)
        if len(self._candidates) == CANDIDATES:  # a caption from beyond them takes the last one's place
            same[~same.any(dim=1), -1] = True
        first = own > rivals.masked_fill(same, -torch.inf).max(dim=1).values
        self.values.append(torch.stack([100 * own.clamp_min(0), first.to(own)], dim=1))

    def compute(self) -> dict[str, float]:
        values = dim_zero_cat(self.values).double().cpu()
        n = len(values)
        right = int(values[:, 1].sum())
        low, high = wilson(right, n)
        return {
            **mean_of(values[:, 0]).named("clip_score"),
            "clip_score/n": float(n),
            "retrieval": right / n,
            "retrieval/low": low,
            "retrieval/high": high,
            "retrieval/chance": 1 / max(1, len(self._candidates)),
        }

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of each half of what was drawn: val/clip_score and so on."""
        found: dict[str, float] = {}
        if evaluation.drawn:
            self.features.start(lambda most: evaluation.captioned("train", most), evaluation.cache.folder)
            self.features.to(evaluation.device)
        for half, drawn in evaluation.drawn.items():
            self.reset()
            self._candidates = list(dict.fromkeys(drawn.everyone))[:CANDIDATES]
            for images, captions in drawn.captioned(AT_ONCE):
                self.update(images.to(evaluation.device), captions)
            found |= {f"{half}/{k}": v for k, v in self.compute().items()}
        return found

    def card(self, name: str) -> dict[str, Any]:
        """What a score was measured with, but for how the pictures were drawn."""
        kind = {"candidates": len(self._candidates)} if "retrieval" in name else {}
        return {**self.features.card(), **kind, "interval": "over pictures, 95 %"}
