"""How many of a codebook's codes a batch uses, and the entropies that make it use more of them with more certainty."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ldm.devices import without_autocast
from ldm.errors import ConfigError

MOST_CODES = 2**18  # of which frequencies are counted, and one entropy is taken over all of them together
LARGEST_TABLE = 2**24  # numbers at once, pixels times codes: 64 MiB whatever the image
TINY = 1e-20  # in a logarithm: where a probability is 0 its slope is finite, and the entropy as it was


def check_weight(name: str, value: float) -> None:
    """ConfigError for what cannot weigh a term of a loss."""
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(
            f"autoencoder.{name}={value} weighs a term of the loss, so it is a number of 0 or more: {name}=0.25."
        )


def check_temperature(value: float) -> None:
    """ConfigError for what distances cannot be divided by."""
    if not (math.isfinite(value) and value > 0):
        raise ConfigError(
            f"autoencoder.entropy_temperature={value} divides squared distances, so it is a number above 0: "
            "entropy_temperature=1, or 0.01 for codes that lie close."
        )


def shares(indices: Tensor, size: int) -> Tensor:  # (B,h,w) in [0, size) -> (size,), of sum 1
    """The codes' frequencies."""
    codes = indices.flatten()
    counts = torch.zeros(size, device=codes.device)  # bincount asks a GPU for one
    return counts.index_add_(0, codes, torch.ones_like(codes, dtype=counts.dtype)) / codes.numel()


def perplexity(frequencies: Tensor) -> Tensor:  # (K,) -> () in [1, K]
    """exp of their entropy: how many codes are in use, were they used equally."""
    return torch.special.entr(frequencies).sum().exp()


def use(frequencies: Tensor) -> Tensor:  # (K,) -> () in (0, 1]
    """The share of codes that occur at all."""
    return (frequencies > 0).to(frequencies.dtype).mean()


def entropy_of_nearest(z: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Entropies in nats of q(code | z) = softmax(-|z - code|^2 / temperature): (B,) the mean of each image's pixels,
    and () of the mean q of all pixels, which ought to be high (Yu et al. 2023, eq. 5: the first minus the second).

    z (B,C,h,w); codes (K,C). One table at a time lives, in the backward pass too: each is made again there.
    """
    pixels = rearrange(z.float(), "b c h w -> (b h w) c")
    slices = pixels.split(max(1, LARGEST_TABLE // len(codes)))
    found = [
        checkpoint(_nearest, some, codes.float(), temperature, use_reentrant=False, preserve_rng_state=False)
        for some in slices
    ]
    entropies = torch.cat([entropy for entropy, _ in found])
    mean = torch.stack([q for _, q in found]).sum(dim=0) / len(pixels)
    return reduce(entropies, "(b n) -> b", "mean", b=len(z)), _entropy(mean)


def _nearest(pixels: Tensor, codes: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(n,C), (K,C) -> (n,) entropies and (K,) the sum of q."""
    with without_autocast(pixels):
        # |z|^2 is the same for all codes, and softmax does not see it.
        logits = (2 * pixels @ codes.mT - codes.square().sum(dim=1)) / temperature
    log_q = F.log_softmax(logits, dim=1)
    q = log_q.exp()
    return -(q * log_q).sum(dim=1), q.sum(dim=0)


def entropy_of_signs(z: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """`entropy_of_nearest` where the codes are all vectors of -1 and 1 (B,C,h,w), without a table of them.

    Given z its channels are independent, with q(1) = sigmoid(4 z / temperature), so that the first entropy is a sum
    over channels. In the mean over pixels they are not: that is taken over all 2^C codes, as a product of two tables of
    half the channels; beyond 18 channels 18 at a time, which bounds the entropy from above.
    """
    logits = rearrange(z.float(), "b c h w -> (b h w) c") * (4 / temperature)
    # H = log(1 + e^l) - l sigmoid(l), which is 0 and has no slope where l is large.
    each = (F.softplus(logits) - logits * logits.sigmoid()).sum(dim=1)
    at_once = MOST_CODES.bit_length() - 1
    batch = sum((_entropy(_mean_of_signs(some)) for some in logits.split(at_once, dim=1)), logits.new_zeros(()))
    return reduce(each, "(b n) -> b", "mean", b=len(z)), batch


def _mean_of_signs(logits: Tensor) -> Tensor:  # (N,n) -> (2^n,), of sum 1
    """The mean over pixels of the product of the channels' laws."""
    half = logits.shape[1] // 2
    first, second = (_product(some) for some in (logits[:, :half], logits[:, half:]))
    with without_autocast(logits):
        return (first.mT @ second).flatten() / len(logits)


def _product(logits: Tensor) -> Tensor:  # (N,n) -> (N,2^n)
    """The joint law of independent signs; the first channel's is the slowest index."""
    q = logits.new_ones(len(logits), 1)
    for channel in logits.unbind(dim=1):
        # sigmoid(-l), because 1 - sigmoid(l) is 0 long before it.
        both = torch.stack([(-channel).sigmoid(), channel.sigmoid()], dim=1)
        q = (q[:, :, None] * both[:, None]).flatten(1)
    return q


def _entropy(q: Tensor) -> Tensor:  # (K,) -> ()
    return -(q * (q + TINY).log()).sum()
