"""How sure a classifier is of each picture, and how varied it finds them."""

from __future__ import annotations

import torch
from torch import Tensor

from ldm.metrics.distances.interval import Estimate, T

SPLITS = 10


def inception_score(logits: Tensor) -> Estimate:
    """exp of the mean KL divergence of p(y|x) from p(y), the mean over ten parts of (N,C) (Salimans et al. 2016)."""
    scores = []
    for part in logits.double().tensor_split(SPLITS):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        scores.append((p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp())
    values = torch.stack(scores)
    return Estimate(float(values.mean()), float(values.std() / SPLITS**0.5), quantile=T[SPLITS - 1])
