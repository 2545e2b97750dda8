"""What published files do not say themselves and everybody knows: heads, groups and schedules of Stable Diffusion.

Rombach et al. 2022 and the configurations published with the weights (v1-inference.yaml, v2-inference-v.yaml).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.text.tokenizer import END

SCALING = 0.18215  # of Stable Diffusion's latents: x0 = 0.18215 z
WIDTHS = (320, 640, 1280, 1280)
AUTOENCODER = (128, 256, 512, 512)
# (widths, context) -> the rest of a U-Net
UNETS: dict[tuple[tuple[int, ...], int | None], dict[str, Any]] = {
    (WIDTHS, 768): {"head_dim": None, "num_heads": 8, "norm_groups": 32},
    (WIDTHS, 1024): {"head_dim": 64, "num_heads": None, "norm_groups": 32},
}
# (widths, latent channels) -> the rest of an autoencoder; all published first stages start from 128 channels
AUTOENCODERS: dict[tuple[tuple[int, ...], int], dict[str, Any]] = {
    ((128, 256, 512), 3): {"norm_groups": 32},  # f4
    (AUTOENCODER, 4): {"norm_groups": 32},  # f8, Stable Diffusion's
    ((128, 256, 256, 512), 4): {"norm_groups": 32},  # VQ-f8 (VQ-f4 has f4's sizes)
    ((128, 128, 256, 256, 512), 8): {"norm_groups": 32},  # VQ-f16
    ((128, 128, 256, 256, 512), 256): {"norm_groups": 32},  # VQGAN f16 (Esser et al. 2021)
    ((128, 128, 256, 256, 512), 16): {"norm_groups": 32},  # f16
    ((128, 128, 256, 256, 512, 512), 64): {"norm_groups": 32},  # f32
}
# (width, whether the names are OpenCLIP's) -> the rest of a text encoder
TEXTS: dict[tuple[int, bool], dict[str, Any]] = {
    (768, False): {"heads": 12, "activation": "quick_gelu", "pad": END},
    (1024, True): {"heads": 16, "activation": "gelu", "pad": "!"},
}
TOKENIZER = "openai/clip-vit-large-patch14"  # the words of both, on the hub
VOCABULARY = 49408  # their number
BASE_STEP = 875000  # global_step of Stable Diffusion 2.0's file that predicts eps; the others of its shapes predict v
TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def scheduler_config(prediction: str) -> dict[str, Any]:
    """The scheduler_config.json published with Stable Diffusion 1 and 2 base ("epsilon"), or 2 ("v_prediction")."""
    return {
        "_class_name": "DDIMScheduler" if prediction == "v_prediction" else "PNDMScheduler",
        **TABLE,
        "clip_sample": False,
        "prediction_type": prediction,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "trained_betas": None,
    }


def table(betas: Tensor | None) -> dict[str, Any]:
    """The settings of a noise table that a file carries; {} where it carries none. ConfigError for a table of no kind.

    Stable Diffusion's is scaled_linear (evenly spaced square roots); older latent diffusion files have other ends.
    """
    if betas is None:
        return {}
    if betas.ndim != 1 or not 2 <= len(betas) <= 10**6 or not betas.isfinite().all():
        raise ConfigError(f"the file's own noise table is {tuple(betas.shape)}, or not finite: fetch it again.")
    values = betas.double()
    first, last, steps = float(values[0]), float(values[-1]), len(values)
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    kinds = {
        "scaled_linear": (first**0.5 + (last**0.5 - first**0.5) * ramp) ** 2,
        "linear": first + (last - first) * ramp,
    }
    for kind, made in kinds.items():
        if torch.allclose(values, made, rtol=1e-4, atol=0.0):
            ends = {"beta_start": float(f"{first:.6g}"), "beta_end": float(f"{last:.6g}")}
            return {**ends, "beta_schedule": kind, "num_train_timesteps": steps}
    raise ConfigError(
        f"the file's own noise table ({steps} betas, {first:.4g} to {last:.4g}) is neither linear nor scaled_linear. "
        "Give config=DIR, a diffusers folder whose scheduler says what it is."
    )
