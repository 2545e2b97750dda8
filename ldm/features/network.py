"""What a network that pictures are measured by says of itself."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# At most so many training pictures, with their captions.
Captioned = Callable[[int], Iterable[tuple[Tensor, list[str]]]]


class PictureFeatures(nn.Module):
    """Pictures (B,3,H,W) in [-1, 1] as vectors (B, width) float32; made without weights, which `start` opens.

    name: how numbers that are made with it are called; "" for Inception's, whose distances are FID and KID.
    resize: the size that it looks at and how pictures get there, in words: half of what makes scores differ.
    """

    name: str
    width: int
    resize: str
    learnt = False  # from the data at hand, in `start`
    classifies = False  # `logits` gives some

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        """Opens the weights, or learns them from the training pictures, unless they were and are in the folder `kept`.

        ConfigError where that cannot be.
        """
        raise NotImplementedError(f"{type(self).__name__} has no weights to open.")

    def logits(self, features: Tensor) -> Tensor | None:
        """(B, width) -> (B, classes) for a classifier, else None."""
        return None

    @property
    def called(self) -> str:
        """What people call the network."""
        return f"{type(self).__name__} {self.name}".strip()

    @cached_property
    def weights_digest(self) -> str:
        """Of the weights, after `start`: once, for they stay as they are and may be large."""
        return digest_of(self)

    def card(self) -> dict[str, str]:
        """What another's number must have in common with ours to be compared; after `start`."""
        return {"network": self.called, "network_weights": self.weights_digest, "resize": self.resize}


def digest_of(network: nn.Module) -> str:
    """A fingerprint of all weights and buffers, whatever file they came from."""
    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]


def scaled_as_pillow(images: Tensor, size: int) -> Tensor:  # (B,3,H,W) in [0, 255] -> (B,3,size,size) in [0, 255]
    """Antialiased bicubic scaling without rounding: PIL's on floats, clean-fid's (Parmar et al. 2022)."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True).clamp(0, 255)


def scaled_as_tensorflow(images: Tensor, size: int) -> Tensor:  # (B,3,H,W) -> (B,3,size,size)
    """TensorFlow 1's bilinear scaling: corners at whole pixels, nothing antialiased; inside the Inception of 2015."""
    down, across = (_bilinear(n, size).to(images) for n in images.shape[-2:])
    return torch.einsum("oh,bchw,pw->bcop", down, images, across)


def _bilinear(n: int, size: int) -> Tensor:  # -> (size,n)
    place = torch.arange(size) * torch.tensor(n / size)
    low = place.long().clamp(max=n - 1)
    share = place - low
    weights = torch.zeros(size, n)
    weights[torch.arange(size), low] += 1 - share
    weights[torch.arange(size), (low + 1).clamp(max=n - 1)] += share
    return weights
