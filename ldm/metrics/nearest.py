"""Is the model copying? How far each picture is from the nearest one that was trained on."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.metrics.evaluation import Evaluation

MOST_TRAINING = 50_000  # training pictures that are compared with
QUANTILES = {"min": 0.0, "q05": 0.05, "q25": 0.25, "median": 0.5, "q75": 0.75, "q95": 0.95}


class NearestTraining(Metric):
    """Distance of each picture to its nearest training picture: root mean squared difference of pixels in [0, 1].

    Give it the training pictures with `add_reference`, then `update` with generated ones. A second one, updated with
    held-out pictures, says what distance is usual for pictures that cannot be copies.
    """

    full_state_update = False
    scores = tuple(  # of task=evaluate
        f"{pictures}/nearest/{k}"
        for pictures in ("seen", "unseen", "val", "held_out_val", "held_out_unseen")
        for k in (*QUANTILES, "n")
    )
    distances: list[Tensor]

    def __init__(self, chunk: int = 1024):
        """chunk: how many training pictures are compared at once."""
        super().__init__()
        self.chunk = chunk
        # Not a state: every process holds the same training pictures, and no reset should forget them.
        self._reference: list[Tensor] = []
        self.add_state("distances", [], dist_reduce_fx="cat")

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of what was drawn, seen/nearest/median and so on, and of real pictures that were held out of the training."""
        if not evaluation.drawn:
            return {}
        self._reference = []
        for batch in evaluation.real("train", MOST_TRAINING):
            self.add_reference(batch)
        scores: dict[str, float] = {}
        for half, drawn in evaluation.drawn.items():
            scores |= self._of(f"{half}/nearest", drawn.batches())
        for split in ("val", "unseen"):
            if split in evaluation.splits:
                scores |= self._of(f"held_out_{split}/nearest", evaluation.mine(split, evaluation.count))
        return scores

    def _of(self, name: str, batches: Iterable[Tensor]) -> dict[str, float]:
        self.reset()
        for batch in batches:
            self.update(batch)
        found = self.compute()  # also where this process had none: the others may
        return {f"{name}/{k}": v for k, v in found.items()} if found["n"] else {}

    def add_reference(self, images: Tensor) -> None:
        """Training pictures (N, 3, H, W) in [-1, 1]; kept as uint8 on the CPU."""
        self._reference.append((_unit(images) * 255).round().to(torch.uint8).cpu())

    def update(self, images: Tensor) -> None:
        """Pictures (B, 3, H, W) in [-1, 1]."""
        if not self._reference:
            raise ValueError("there is nothing to compare with: call add_reference(training pictures) first.")
        self.distances.append(nearest_distance(_unit(images), self._reference, self.chunk))

    def compute(self) -> dict[str, float]:
        """{median, q05, q25, q75, q95, min, n} of the distances."""
        if not len(self.distances):
            return dict.fromkeys(QUANTILES, math.nan) | {"n": 0.0}
        distances = dim_zero_cat(self.distances).cpu().double()
        quantiles = torch.tensor(list(QUANTILES.values()), dtype=torch.double)
        values = distances.quantile(quantiles).tolist()
        return dict(zip(QUANTILES, values, strict=True)) | {"n": float(len(distances))}


def nearest_distance(images: Tensor, reference: list[Tensor], chunk: int = 1024) -> Tensor:
    """images (B, ...) in [0, 1], reference: uint8 tensors (N, ...) -> (B,) distance to the nearest, 0 for a copy."""
    query = images.flatten(1).float() - 0.5  # centred: the products below lose fewer digits
    norm = query.square().sum(dim=1)
    best = torch.full((len(query),), torch.inf, device=query.device)
    nearest = torch.zeros_like(query)
    for block in (part for tensor in reference for part in tensor.split(chunk)):
        other = block.to(query.device).flatten(1).float() / 255 - 0.5
        # |a - b|^2 = |a|^2 - 2 a.b + |b|^2, one matrix product for all pairs.
        square, index = (norm[:, None] - 2 * query @ other.T + other.square().sum(dim=1)).min(dim=1)
        better = square < best
        best = torch.where(better, square, best)
        nearest = torch.where(better[:, None], other[index], nearest)
    # The product only finds the nearest; its own value is rounding error where the two are equal.
    return (query - nearest).square().mean(dim=1).sqrt()


def _unit(images: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1]."""
    return ((images + 1) / 2).clamp(0, 1)
