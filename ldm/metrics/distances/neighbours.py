"""Whether pictures lie where real ones do, and real ones where pictures do: precision, recall, density, coverage."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.metrics.distances.interval import GROUPS, Estimate, groups_of, left_out

CHUNK = 1024
SPARE = 24  # nearest vectors kept beyond the k-th, for when a group of them is left out


def precision_recall(ours: Tensor, real: Tensor, k: int = 3) -> dict[str, Estimate]:
    """The share of `ours` (N,D) within some ball of `real` (M,D) that reaches to its k-th neighbour, and of `real`
    within the balls of `ours` (Kynkäänniemi et al. 2019, Equation 2)."""
    return {"precision": _within(ours, real, k).inside, "recall": _within(real, ours, k).inside}


def density_coverage(ours: Tensor, real: Tensor, k: int = 5) -> dict[str, Estimate]:
    """How many balls of `real` a picture lies in, over k, and the share of the balls that hold one (Naeem et al. 2020,
    Equations 4 and 5)."""
    found = _within(ours, real, k)
    return {"density": found.density, "coverage": found.coverage}


@dataclass(frozen=True)
class _Found:
    inside: Estimate
    density: Estimate
    coverage: Estimate


def _within(points: Tensor, centres: Tensor, k: int) -> _Found:
    """points (N,D) in the balls of centres (M,D), with each group of either left out once."""
    points, centres = points.double(), centres.double()
    n, m = len(points), len(centres)
    group_n, group_m = groups_of(n).to(points.device), groups_of(m).to(points.device)
    radii = _radii(centres, group_m, k)  # (1+G,M): of all; without each group, whose own balls are gone
    inside, count = [], []
    nearest = points.new_full((GROUPS, m), torch.inf)  # of each centre, the nearest point of each group
    for first in range(0, n, CHUNK):
        distance = _distances(points[first : first + CHUNK], centres)
        held = torch.stack([distance < r for r in radii])  # (1+G,B,M)
        inside.append(held.any(dim=2))
        count.append(held.sum(dim=2))
        for g in range(GROUPS):
            mine = distance[group_n[first : first + CHUNK] == g]
            if len(mine):
                nearest[g] = torch.minimum(nearest[g], mine.min(dim=0).values)
    any_, counts = torch.cat(inside, dim=1).double(), torch.cat(count, dim=1).double() / k  # (1+G,N)
    centre_of = torch.stack([group_m != g for g in range(GROUPS)])
    others = torch.stack([torch.cat([nearest[:g], nearest[g + 1 :]]).min(dim=0).values for g in range(GROUPS)])
    covered = nearest.min(dim=0).values < radii  # (1+G,M)
    return _Found(
        _estimate(any_, group_n),
        _estimate(counts, group_n),
        left_out(
            float(covered[0].double().mean()),
            (others < radii[0]).double().mean(dim=1).cpu(),
            torch.stack([covered[1 + g][kept].double().mean() for g, kept in enumerate(centre_of)]).cpu(),
        ),
    )


def _estimate(values: Tensor, group: Tensor) -> Estimate:  # (1+G,N): with all centres, without each group of them
    points = torch.stack([values[0, group != g].mean() for g in range(GROUPS)])
    return left_out(float(values[0].mean()), points.cpu(), values[1:].mean(dim=1).cpu())


def _radii(vectors: Tensor, group: Tensor, k: int) -> Tensor:  # (M,D), (M,) -> (1+G,M)
    """The distance of each to its k-th neighbour, among all and without each group; -1 for those of the group."""
    most = min(k + SPARE, len(vectors) - 1)
    radii = []
    for first in range(0, len(vectors), CHUNK):
        distance = _distances(vectors[first : first + CHUNK], vectors)
        here = torch.arange(len(distance), device=distance.device)
        distance[here, first + here] = torch.inf  # nobody is its own neighbour
        near, which = distance.topk(most, dim=1, largest=False)
        each = [near] + [near.masked_fill(group[which] == g, torch.inf) for g in range(GROUPS)]
        radii.append(torch.stack([e.kthvalue(k, dim=1).values for e in each]))
    whole = torch.cat(radii, dim=1)
    for g in range(GROUPS):
        whole[1 + g, group == g] = -1.0
    return whole


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x, y, compute_mode="use_mm_for_euclid_dist")
