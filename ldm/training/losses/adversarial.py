"""Reconstructions that a discriminator, trained beside the autoencoder, cannot tell from pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ldm.errors import ConfigError
from ldm.training.losses.term import PictureTerm, Reconstructed

LECAM_DECAY = 0.99  # of the moving averages (Tseng et al. 2021, Section 3.2)
R1_EVERY = 16  # steps between penalties, each weighed as many times (Karras et al. 2020, Section 3.1)


class Adversarial(PictureTerm):
    """The adversarial term of an autoencoder and its discriminator's own loss (Esser et al. 2021, Equations 4 to 7).

    Autoencoder and discriminator learn from one backward pass: the term's gradient passes through a discriminator that
    is held fixed, the discriminator's own loss sees the output as a constant. That is the usual pair of steps on one
    batch, and accumulation, clipping, precision and processes need nothing of their own.

    discriminator: (B,3,H,W) -> (B,places) logits, high for pictures.
    kind: hinge (Lim and Ye 2017) or non_saturating (Goodfellow et al. 2014).
    start: step from which on it counts: the published ones begin when pictures are good but for texture.
    adapt: the weight is multiplied by the ratio of gradients at the decoder's last layer (Equation 7).
    r1: weight of the gradient penalty on pictures (Mescheder et al. 2018), taken every 16th step; wants norm=none.
    lecam: weight of the regularisation for little data (Tseng et al. 2021, Equation 5): logits are pulled to moving
        averages of the other side's.
    lr, betas: of the discriminator; lr null: the autoencoder's.
    """

    adversary = True
    anchors: Tensor
    watched: tuple[str, ...] = ("discriminator", "logit_pictures", "logit_outputs")

    def __init__(
        self,
        discriminator: nn.Module,
        kind: Literal["hinge", "non_saturating"] = "hinge",
        weight: float = 0.5,
        start: int = 50_000,
        adapt: bool = True,
        r1: float = 0.0,
        lecam: float = 0.0,
        lr: float | None = None,
        betas: tuple[float, float] = (0.5, 0.9),
    ):
        super().__init__()
        for name, value, usual in (("r1", r1, 10), ("lecam", lecam, 0.001)):
            if not value >= 0:
                raise ConfigError(f"module.losses.adversarial.{name}={value}: at least 0, none; {usual} is usual.")
        if start < 0:
            raise ConfigError(f"module.losses.adversarial.start={start}: at least 0, the first step.")
        self.discriminator = discriminator
        self.kind, self.weight, self.begins, self.r1 = kind, weight, start, r1
        self.adaptive, self.lr, self.betas = "decoder" if adapt else None, lr, (betas[0], betas[1])
        self.watched = (*self.watched, *(["r1"] if r1 else []), *(["lecam"] if lecam else []))
        self.lecam = lecam
        if lecam:
            self.register_buffer("anchors", torch.zeros(2))  # moving averages of logits of pictures and of outputs
            self._sums: Tensor | None = None  # of this step: of both, and how many; no buffer, DDP would exchange it

    def forward(self, made: Reconstructed) -> Tensor:
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        logits = functional_call(self.discriminator, fixed, made.output).float()
        return (-logits if self.kind == "hinge" else F.softplus(-logits)).mean(dim=1)

    def own(self, made: Reconstructed) -> tuple[Tensor, dict[str, Tensor]]:
        penalised = bool(self.r1) and made.step % R1_EVERY == 0
        images = made.images.detach().requires_grad_(penalised)
        of_images = self.discriminator(images).float()
        of_outputs = self.discriminator(made.output.detach()).float()
        if self.kind == "hinge":
            wrong = F.relu(1 - of_images).mean(dim=1) + F.relu(1 + of_outputs).mean(dim=1)
        else:
            wrong = F.softplus(-of_images).mean(dim=1) + F.softplus(of_outputs).mean(dim=1)
        loss = wrong / 2
        seen = {"discriminator": loss, "logit_pictures": of_images.mean(dim=1), "logit_outputs": of_outputs.mean(dim=1)}
        if penalised:
            (slope,) = torch.autograd.grad(of_images.mean(dim=1).sum(), images, create_graph=True)
            seen["r1"] = slope.float().square().flatten(1).sum(dim=1)
            loss = loss + R1_EVERY * self.r1 / 2 * seen["r1"]
        if self.lecam:
            seen["lecam"] = F.relu(of_images - self.anchors[1]).square().mean(dim=1)
            seen["lecam"] = seen["lecam"] + F.relu(self.anchors[0] - of_outputs).square().mean(dim=1)
            loss = loss + self.lecam * seen["lecam"]
            sums = torch.stack([of_images.mean(1).sum(), of_outputs.mean(1).sum(), of_images.new_tensor(len(loss))])
            self._sums = sums.detach() if self._sums is None else self._sums + sums.detach()
        return loss, {name: value.detach() for name, value in seen.items()}

    @torch.no_grad()
    def end_step(self, summed: Callable[[Tensor], None]) -> None:
        if self.lecam and self._sums is not None:
            sums, self._sums = self._sums, None
            summed(sums)
            self.anchors.lerp_(sums[:2] / sums[2], 1 - LECAM_DECAY)

    def options(self) -> dict[str, Any]:
        """AdamW's of its own, also beside Muon, which would make its matrices' steps orthogonal."""
        own = {"betas": self.betas, "orthogonal": False, "weight_decay": 0.0}
        return own if self.lr is None else {**own, "lr": self.lr}
