"""The units of latents, as other programs keep them: one scaling factor, the rest folded into the 1x1 convolutions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.formats.content import State
from ldm.untrusted import number


def checked(scaling: Any, where: str) -> float:
    """A scaling factor that latents can be divided by. ConfigError, opened by `where`, for anything else."""
    return number(scaling, "scaling_factor", where, 1e-6, 1e6)


def units(wanted: State, scaling: float | None, shift: float | None) -> State:
    """`latents.*` of a published autoencoder: x0 = scaling (z - shift). None: unknown, NaN until it is measured.

    wanted: the expected names and shapes; the linear preview is NaN, as nobody publishes one.
    """
    values = {
        "latents.mean": torch.nan if scaling is None else shift or 0.0,
        "latents.scale": torch.nan if scaling is None else 1 / scaling,
    }
    names = [k for k in wanted if k.startswith("latents.")]
    return {k: torch.full(wanted[k].shape, values.get(k, torch.nan)) for k in names}


def scaling_factor(vae: State) -> float | None:
    """diffusers' scaling_factor, if that alone says the latents' units (mean 0, one scale); None if it cannot.

    The shortest decimal that gives the same float32 scale again, so that 0.18215 stays 0.18215.
    """
    mean, scale = vae["latents.mean"], vae["latents.scale"]
    if not (torch.isfinite(mean).all() and torch.isfinite(scale).all()):
        raise ConfigError(
            "the autoencoder's latents have no mean and scale yet, which other programs need: write it after its "
            "training, or set mean 0 and scale 1/0.18215 for Stable Diffusion's."
        )
    if bool((mean != 0).any()) or bool((scale != scale[0]).any()):
        return None
    exact = 1 / float(scale[0])
    shorter = (float(f"{exact:.{digits}g}") for digits in range(1, 17))
    return next((f for f in shorter if torch.tensor(1 / f, dtype=torch.float32) == scale[0]), exact)


def folded(vae: State, scaling: float) -> State:
    """The same autoencoder with mean 0 and scale 1/scaling: standardised latents, encoder and decoder are unchanged.

    z' = (z - m) / (k s): quant_conv's mean' = (mean - m) / (k s), logvar' = logvar - 2 log(k s); post_quant_conv's
    W' = W diag(k s), b' = b + W m; k = scaling. A codebook follows z: with one scale for all
    channels, as VQModel has it, the nearest code stays the nearest. In float64, so that each number is rounded once.
    """
    mean, scale = vae["latents.mean"].double(), vae["latents.scale"].double() * scaling
    channels = len(mean)
    weight, bias = vae["quant_conv.weight"].double().clone(), vae["quant_conv.bias"].double().clone()
    weight[:channels] /= _rows(scale)
    bias[:channels] = (bias[:channels] - mean) / scale
    if len(bias) > channels:  # a KL autoencoder's log-variances
        bias[channels:] -= 2 * scale.log()
    back = vae["post_quant_conv.weight"].double()
    changed = {
        "quant_conv.weight": weight,
        "quant_conv.bias": bias,
        "post_quant_conv.weight": back * scale[None, :, None, None],
        "post_quant_conv.bias": vae["post_quant_conv.bias"].double() + back[:, :, 0, 0] @ mean,
        "latents.mean": torch.zeros_like(mean),
        "latents.scale": torch.full_like(mean, 1 / scaling),
    }
    if "quantize.embedding.weight" in vae:
        changed["quantize.embedding.weight"] = (vae["quantize.embedding.weight"].double() - mean) / scale
    return vae | {k: v.to(torch.float32) for k, v in changed.items()}


def _rows(values: Tensor) -> Tensor:  # (C,) -> (C,1,1,1)
    return values[:, None, None, None]
