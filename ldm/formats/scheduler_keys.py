"""What diffusers' schedulers are told in scheduler_config.json: the keys of each class, their values checked."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from ldm.diffusion.schedulers import check_number
from ldm.errors import ConfigError
from ldm.untrusted import shown

# The keys by which diffusers' class of each of our solvers is told how to sample.
_TIMES = ("timestep_spacing", "steps_offset")
_SIGMAS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "sigma_min", "sigma_max")
_CLIP = ("clip_sample", "clip_sample_range")
_DYNAMIC = ("thresholding", "dynamic_thresholding_ratio", "sample_max_value")
_DPM = (*_TIMES, *_SIGMAS, *_DYNAMIC, "lower_order_final", "use_flow_sigmas", "use_dynamic_shifting")
KEYS: dict[str, tuple[str, ...]] = {
    "ddim": (*_TIMES, *_CLIP, *_DYNAMIC, "set_alpha_to_one"),
    "ddpm": (*_TIMES, *_CLIP, *_DYNAMIC, "variance_type"),
    "pndm": (*_TIMES, "set_alpha_to_one"),
    "pndm_runge_kutta": (*_TIMES, "set_alpha_to_one"),
    "lms": (*_TIMES, *_SIGMAS),
    "euler": (*_TIMES, *_SIGMAS, "final_sigmas_type", "interpolation_type"),
    "euler_ancestral": _TIMES,
    "heun": (*_TIMES, *_SIGMAS, *_CLIP),
    "dpm2": (*_TIMES, *_SIGMAS),
    "dpmpp_sde": (*_TIMES, *_SIGMAS, "noise_sampler_seed"),
    "dpmpp_multistep": (
        *(*_DPM, "solver_type", "euler_at_final", "final_sigmas_type", "lambda_min_clipped", "use_lu_lambdas"),
    ),
    "dpmpp_singlestep": (
        *(k for k in _DPM if k not in _TIMES),
        *("solver_type", "final_sigmas_type", "lambda_min_clipped"),
    ),
    "unipc": (*_DPM, "final_sigmas_type", "predict_x0", "disable_corrector", "solver_p", "shift_terminal"),
    "deis": _DPM,
    "lcm": (*_CLIP, *_DYNAMIC, "original_inference_steps"),
}
OTHERS = (*_TIMES, *_SIGMAS, "final_sigmas_type")  # of a solver that diffusers does not have
# Options of which we have these values only.
ONLY: dict[str, tuple[Any, ...]] = {
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "lambda_min_clipped": (-math.inf, None),
    "noise_sampler_seed": (None,),
    "predict_x0": (True,),
    "solver_p": (None,),
    "shift_terminal": (None,),
    "disable_corrector": ([], None),
}


_SAY = "Where the model works with one of these, say so in its scheduler_config.json."


def one_of(table: Mapping[str, str], value: Any, key: str, remedy: str = _SAY) -> str:
    if not isinstance(value, str) or value not in table:
        raise ConfigError(
            f"the checkpoint's scheduler has {key}={shown(value)}, which ldm does not have; it knows "
            f"{', '.join(table)}. {remedy}"
        )
    return table[value]


def only(config: Mapping[str, Any], key: str, values: Iterable[Any], remedy: str = "where the model works without it"):
    """ConfigError where the file has this key with another value."""
    values = list(values)
    if key in config and config[key] not in values:
        raise ConfigError(
            f"the checkpoint's scheduler has {key}={shown(config[key])}, which ldm does not have: set {key} to "
            f"{json.dumps(values[0])} in its scheduler_config.json {remedy}."
        )


def word(config: Mapping[str, Any], key: str, default: str, words: Iterable[str]) -> str:
    return one_of({word: word for word in words}, config.get(key, default), key)


def flag(config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if value not in (True, False, None):
        raise ConfigError(f"the checkpoint's scheduler has {key}={shown(value)}: it must be true or false.")
    return bool(value)


def number(config: Mapping[str, Any], key: str, default: float, low: float, high: float, whole: bool = False) -> float:
    value = config.get(key, default)
    check_number(f"the checkpoint's scheduler has {key}", value, low, high, default, whole, _WRITE)
    return value  # type: ignore[no-any-return]


_WRITE = "write the right one into its scheduler_config.json, for example"
