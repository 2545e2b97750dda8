"""What a loss term is: a class with a forward, named in `losses` of conf/module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ldm.autoencoders.kl import Autoencoder
from ldm.diffusion.loss import Prediction
from ldm.diffusion.weightings import Weighting
from ldm.errors import ConfigError, nearest


@dataclass(frozen=True)
class Step:
    """What the terms of a denoising network's loss look at: a micro-batch of N = B x noises_per_image noised latents.

    batch: as the loader gives it, B samples: "caption", and "image" uint8 (B,3,H,W) or "latent".
    prediction: of the batch's own latents: x0, eps, level, x_t, output and `jump`, the estimate of x0, N of each;
        output and jump have gradients.
    class_prediction: the same of class pictures beside them (prior preservation), None without.
    hidden: by name, what the layers gave that terms ask for, N of each.
    """

    batch: dict[str, Any]
    prediction: Prediction
    weighting: Weighting
    class_prediction: Prediction | None
    hidden: dict[str, Tensor]


class LossTerm(nn.Module):
    """One term of a denoising network's loss. What it has of parameters is trained and saved with the network.

    Losses logs it as train/NAME_loss, not yet weighted, NAME being its place in `losses`. Validation has the denoising
    loss alone.
    weight: what it counts beside the others; whoever sums the terms multiplies.
    layers: names of the network's submodules whose outputs it wants in `step.hidden`.
    needs_class_images: without class pictures it is left out.
    """

    weight: float = 1.0
    needs_class_images: ClassVar[bool] = False
    layers: tuple[str, ...] = ()

    def forward(self, step: Step) -> Tensor:  # -> (N,)
        raise NotImplementedError(f"{type(self).__name__} must say what it measures.")

    def start(self) -> None:
        """Called once before the first step: what takes time or memory to open is opened here."""


@dataclass(frozen=True)
class Reconstructed:
    """What the terms of an autoencoder's loss look at: a micro-batch of B pictures and what came back of them.

    images: (B,3,H,W) in [-1, 1], what was to come back. output: (B,3,H,W) float32, in [-1, 1] where real.
    originals: (B,3,H,W), what was encoded, and encoded: (B,C,h,w), the latents that were drawn of it: others than what
        came back and was decoded only where latents are perturbed.
    step: optimizer steps made so far.
    """

    images: Tensor
    output: Tensor
    originals: Tensor
    encoded: Tensor
    step: int


class PictureTerm(nn.Module):
    """One term of an autoencoder's loss, logged as train/NAME, not yet weighted, NAME being its place in `losses`.

    What it has of parameters is trained and saved with the autoencoder.
    weight: what it counts beside the others; whoever sums the terms multiplies.
    likelihood: whether it belongs to the error of the picture, which the learnt variance divides, which adaptive
        weights are measured by, and which validation has.
    adaptive: its weight is multiplied by how much larger the likelihood's gradient is than its own (Esser et al. 2021,
        Equation 7), at the last layer of the "decoder" or the "encoder"; None: not.
    begins: the step from which on it counts; before, its parameters stay as they are.
    of_latents: whether it looks at nothing that the decoder makes.
    adversary: whether its parameters are a network that is trained against the autoencoder: with options of its own in
        the optimizer, clipped by itself, not averaged.
    note: follows its name in logs.
    """

    weight: float = 1.0
    likelihood: bool = False
    adaptive: str | None = None
    begins: int = 0
    of_latents: bool = False
    adversary: bool = False
    note: str = ""
    watched: tuple[str, ...] = ()  # names of what `own` gives to be logged

    def forward(self, made: Reconstructed) -> Tensor:  # -> (B,)
        raise NotImplementedError(f"{type(self).__name__} must say what it measures.")

    def own(self, made: Reconstructed) -> tuple[Tensor, dict[str, Tensor]] | None:
        """(B,) what its own parameters alone learn from, as a discriminator does, and (B,) values to log; or None."""
        return None

    def bind(self, autoencoder: Autoencoder) -> None:
        """Called once when the module is built: what depends on the autoencoder is made here."""

    def start(self) -> None:
        """Called once before the first step: what takes time or memory to open is opened here."""

    def end_step(self, summed: Callable[[Tensor], None]) -> None:
        """Called after each optimizer step, by all processes: what is learnt from sums over its micro-batches.

        summed: adds a tensor on its device over all processes, in place.
        """

    def options(self) -> dict[str, Any]:
        """Of the optimizer for an adversary's parameters; those that it does not know are left out."""
        return {}


def check_layers(network: nn.Module, terms: Mapping[str, LossTerm]) -> None:
    """ConfigError for a layer that the network does not have."""
    names = [name for name, _ in network.named_modules() if name]
    for term, layer in ((n, layer) for n, t in terms.items() for layer in t.layers):
        if layer not in names:
            blocks = [n for n, m in network.named_modules() if "." in n and n.count(".") == 1 and n[-1].isdigit()]
            raise ConfigError(
                f"module.losses.{term}.layer={layer}: {type(network).__name__} has no such layer."
                f"{nearest(layer, names)} There is {', '.join(blocks[:6] or names[:6])} ..."
            )


@contextmanager
def hidden_states(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Within the block, a dictionary of what the named submodules give."""
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for layer in layers:

            def keep(module: nn.Module, inputs: Any, output: Any, layer: str = layer) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output

            stack.callback(network.get_submodule(layer).register_forward_hook(keep).remove)
        yield found
