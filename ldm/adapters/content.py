"""What adapters are on disk, whoever wrote them: low-rank updates, new words, and a hypernetwork's small networks.

A model is `unet` (the denoising network, whatever its architecture) and `text_encoder`; layers are named by part and
path as in the base's own state, `unet.mid_block.attentions.0.proj_in` or `text_encoder.text_model.encoder.layers.0...`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ldm.errors import ConfigError


@dataclass
class LowRank:
    """One layer's update, W + alpha/rank up down (Hu et al. 2022, equation 3), by its two small factors.

    magnitude: (out,) of DoRA (Liu et al. 2024, equation 5): the update then turns the rows of W, and these are their
    lengths; None for LoRA.
    """

    down: Tensor  # (rank, in), of a convolution (rank, in, k, k)
    up: Tensor  # (out, rank), of a convolution (out, rank, 1, 1)
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def delta(self) -> Tensor:
        """alpha/rank up down, in the shape of the layer's weight: (out, in) or (out, in, k, k)."""
        return (self.alpha / self.rank) * torch.einsum("or,ri->oi", self.up.flatten(1), self.down.flatten(1)).reshape(
            self.up.shape[0], *self.down.shape[1:]
        )

    def merged(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """The layer's weight with `strength` times the change in it, in float32."""
        updated = weight.float() + self.delta().float().reshape(weight.shape)
        if self.magnitude is not None:
            rows = updated.flatten(1)
            lengths = rows.norm(dim=1, keepdim=True)
            stretch = torch.where(lengths > 0, self.magnitude.float()[:, None] / lengths, 1.0)
            updated = (rows * stretch).reshape(weight.shape)
        return updated if strength == 1 else torch.lerp(weight.float(), updated, strength)


@dataclass
class Embedding:
    """New words (Gal et al. 2023): `vectors` (n, width) stand in the prompt where `token` does, one behind the other.

    token: what is typed in prompts; None where the file does not say and the caller must.
    """

    token: str | None
    vectors: Tensor


@dataclass
class Lora:
    """Low-rank updates by layer, what their file says of itself, and the words that it bundles with them."""

    layers: dict[str, LowRank]
    metadata: dict[str, str] = field(default_factory=dict)
    words: list[Embedding] = field(default_factory=list)  # each has its token

    def check_fits(self, weights: Mapping[str, Tensor], source: str) -> None:
        """ConfigError unless every layer is one of the base's. weights: by layer; the meta device will do."""
        strangers = [name for name in self.layers if name not in weights]
        if strangers:
            raise ConfigError(
                f"{source} changes {len(strangers)} layers that this model does not have (first: {strangers[0]}): it "
                "was made for another architecture. Load the base that it was trained on."
            )
        wrong = []
        for name, update in self.layers.items():
            weight = weights[name]
            if (update.up.shape[0], update.down[0].numel()) != (weight.shape[0], weight[0].numel()):
                wrong.append((name, (update.up.shape[0], *update.down.shape[1:]), tuple(weight.shape)))
        if wrong:
            name, theirs, ours = wrong[0]
            raise ConfigError(
                f"{source} does not fit this model: {len(wrong)} of its {len(self.layers)} layers are of another size "
                f"(first: {name}, {theirs} there, {ours} here). Stable Diffusion 1 reads text of 768 numbers a token, "
                "2 of 1024: load the base that it was trained on."
            )


@dataclass
class HypernetworkTensors:
    """Small networks that change what cross- and self-attention read, as AUTOMATIC1111's web page keeps them.

    networks: width of the context -> (names and tensors of the keys' network, of the values' network); a name is
    `linear.I.weight` or `linear.I.bias`, I the place in the sequence of linear maps, activations, norms and dropouts.
    """

    networks: dict[int, tuple[dict[str, Tensor], dict[str, Tensor]]]
    structure: list[float] = field(default_factory=lambda: [1.0, 2.0, 1.0])  # widths as multiples of the context's
    activation: str = "linear"
    layer_norm: bool = False
    activate_output: bool = True  # an activation (and norm, and dropout) follows the last linear map too
    dropout: list[float] | None = None  # probabilities by layer; None: there are no dropouts
    name: str = ""
    step: int | None = None


Content = Lora | Embedding | HypernetworkTensors
