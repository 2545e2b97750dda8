"""The denoising loss, of a run's own pictures and of class pictures beside them."""

from __future__ import annotations

from torch import Tensor

from ldm.errors import ConfigError
from ldm.training.losses.term import LossTerm, Step


class Denoising(LossTerm):
    """The weighted squared error of the network's output (Ho et al. 2020, Equation 14, of any weighting)."""

    def forward(self, step: Step) -> Tensor:
        return step.prediction.loss(step.weighting)


class PriorPreservation(LossTerm):
    """The same of pictures that the model drew of the class before training (Ruiz et al. 2023, Equation 2)."""

    needs_class_images = True

    def __init__(self, weight: float = 1.0):
        super().__init__()
        if not weight >= 0:
            raise ConfigError(f"prior_weight={weight}: must be at least 0; 1 is usual.")
        self.weight = weight

    def forward(self, step: Step) -> Tensor:
        assert step.class_prediction is not None
        return step.class_prediction.loss(step.weighting)
