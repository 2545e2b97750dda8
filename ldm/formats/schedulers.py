"""diffusers' scheduler_config.json as our scheduler, parameterization and sampler, and back.

A file names one class; our `sampler=` may be another. What the file says of the table and of the grid holds for all of
them, as in diffusers' `Scheduler.from_config`; what the file leaves open is the class's own, which our YAMLs carry.
"""

from __future__ import annotations

import copy
import json
import math
import textwrap
from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError

Node = dict[str, Any]

_PARAMETERIZATIONS = {"epsilon": "Eps", "v_prediction": "V", "sample": "X0"}
_TABLES = {"linear": "Linear", "scaled_linear": "ScaledLinear", "squaredcos_cap_v2": "Cosine"}
_POSITIONS = {
    "use_karras_sigmas": "karras",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
    "use_lu_lambdas": "logsnr",
}
# diffusers' class -> file of conf/sampler; the DPM-Solvers and PNDM are told apart by their options below.
_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "PNDMScheduler": "pndm",
    "LMSDiscreteScheduler": "lms",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "dpm2",
    "KDPM2AncestralDiscreteScheduler": "dpm2_ancestral",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2s",
    "DPMSolverSDEScheduler": "dpmpp_sde",
    "UniPCMultistepScheduler": "unipc",
    "DEISMultistepScheduler": "deis",
    "LCMScheduler": "lcm",
}
# Options of which we have these values only.
_ONLY: dict[str, tuple[Any, ...]] = {
    "trained_betas": (None,),
    "use_flow_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "interpolation_type": ("linear",),
    "timestep_type": ("discrete",),
    "sigma_min": (None,),
    "sigma_max": (None,),
    "lambda_min_clipped": (-math.inf, None),
    "predict_x0": (True,),
    "solver_p": (None,),
    "disable_corrector": ([], None),
    "variance_type": (None, "fixed_small", "fixed_small_log", "fixed_large"),
    "sample_max_value": (1, 1.0),
}


def nodes(config: Mapping[str, Any]) -> dict[str, Node]:
    """{"scheduler": node, "parameterization": node} of a scheduler_config.json. ConfigError for what we do not have."""
    for key, values in _ONLY.items():
        if key in config and config[key] not in values:
            given = textwrap.shorten(str(config[key]), 60, placeholder=" ...")  # trained_betas are a thousand
            raise ConfigError(
                f"the checkpoint's scheduler has {key}={given}, which ldm does not have. Where the model works "
                f"without it, set {key} to {json.dumps(values[0])} in its scheduler_config.json."
            )
    table = _one_of(_TABLES, config.get("beta_schedule", "linear"), "beta_schedule")
    scheduler: Node = {"_target_": f"ldm.diffusion.schedulers.{table}"}
    scheduler["num_train_timesteps"] = config.get("num_train_timesteps", 1000)
    if table != "Cosine":
        scheduler |= {k: config[k] for k in ("beta_start", "beta_end") if k in config}
    if config.get("rescale_betas_zero_snr"):
        scheduler["zero_terminal_snr"] = True
    target = _one_of(_PARAMETERIZATIONS, config.get("prediction_type", "epsilon"), "prediction_type")
    return {"scheduler": scheduler, "parameterization": {"_target_": f"ldm.diffusion.parameterizations.{target}"}}


def own_sampler(config: Mapping[str, Any]) -> tuple[str, Node]:
    """The file of conf/sampler that is the config's class, and its options for `solve`."""
    name = str(config.get("_class_name"))
    sampler = _one_of(_SAMPLERS, name, "_class_name", "Choose a sampler, for example sampler=ddim.")
    order = config.get("solver_order", 2)
    if name == "PNDMScheduler":
        return ("pndm" if config.get("skip_prk_steps", False) else "pndm_runge_kutta"), {}
    if name == "DDPMScheduler":
        return "ddpm", {"variance": "large" if config.get("variance_type") == "fixed_large" else "small"}
    if name == "LCMScheduler":
        return "lcm", {"scaling": config.get("timestep_scaling", 10.0)}
    if name.startswith("DPMSolver") and name != "DPMSolverSDEScheduler":
        algorithm = config.get("algorithm_type", "dpmsolver++")
        multistep = name == "DPMSolverMultistepScheduler"
        stochastic = algorithm == "sde-dpmsolver++"
        known = algorithm == "dpmsolver++" or (stochastic and multistep)
        if not known or config.get("solver_type", "midpoint") != "midpoint":
            raise ConfigError(
                f"the checkpoint's scheduler is {name} with algorithm_type={algorithm}, solver_type="
                f"{config.get('solver_type', 'midpoint')}: ldm has dpmsolver++ and, multistep, sde-dpmsolver++, with "
                "midpoint. Choose a sampler, for example sampler=dpmpp_2m."
            )
        eta = {"eta": 1.0 if stochastic else 0.0} if multistep else {}
        return ("dpmpp_2m" if multistep else "dpmpp_2s"), {"order": order, **eta}
    if name == "UniPCMultistepScheduler":
        variant = config.get("solver_type", "bh2")
        return "unipc", {"order": order, "variant": variant if variant in ("bh1", "bh2") else "bh2"}
    return sampler, {"order": order} if name == "DEISMultistepScheduler" else {}


def adjusted(sampler: Node, config: Mapping[str, Any]) -> Node:
    """A sampler's node (a YAML of conf/sampler) as it is on a checkpoint with this scheduler_config.json."""
    node = copy.deepcopy(sampler)
    function = node["solve"]["_target_"].rpartition(".")[2]
    conventions = node.setdefault("conventions", {"_target_": "ldm.diffusion.grids.Conventions"})
    in_time = function in ("ddim", "ddpm", "pndm", "pndm_runge_kutta", "lcm")  # these classes have no sigma grids
    ends_by_choice = function == "ddim" and conventions.get("start") != "sigma"  # DDIM, not Euler ancestral
    if not node.get("own_grid"):
        # The classes whose YAML names no spacing have leading as their default; the singlestep class has one only.
        spacing = config.get("timestep_spacing") or (None if "spacing" in node else "leading")
        spacing = None if function == "dpmpp_singlestep" else spacing
        if spacing is not None:
            offset = {"offset": config.get("steps_offset", 0)} if spacing == "leading" else {}
            node["spacing"] = _grid(spacing) | offset
            if spacing == "leading" and conventions.get("start") == "sigma":
                conventions["start"] = "one"
        for key, grid in _POSITIONS.items():
            if config.get(key) and not in_time:
                # The DPM-Solver family (extra_point) goes over the whole table, Euler's between its spacing's ends.
                whole = spacing in (None, "linspace") or conventions.get("extra_point")
                node["spacing"] = _grid(grid) | ({} if whole else {"ends": node["spacing"]})
    if function.startswith("pndm") or ends_by_choice:
        # diffusers' class PNDM ends at the table's first entry where the file does not say, DDIM at no noise.
        to_one = config.get("set_alpha_to_one", function == "ddim")
        conventions["last"] = "zero" if to_one else "entry"
    elif not in_time and function != "deis" and config.get("final_sigmas_type") == "sigma_min":
        conventions["last"] = "entry"
    if function.startswith("pndm") and config.get("prediction_type") == "v_prediction":
        node["solve"]["mixed"] = "v"
    limit = _limit(config)
    return node | ({"limit": limit} if limit and function in ("ddim", "ddpm", "lcm") else {})


def scheduler_config(scheduler: Mapping[str, Any], parameterization: Mapping[str, Any]) -> dict[str, Any] | None:
    """scheduler_config.json of a model of ours: DDIM on trailing entries, as here. None where diffusers has none."""
    table = scheduler["_target_"].rpartition(".")[2]
    target = parameterization["_target_"].rpartition(".")[2]
    tables, targets = ({v: k for k, v in names.items()} for names in (_TABLES, _PARAMETERIZATIONS))
    cosine = (scheduler.get("offset", 0.008), scheduler.get("max_beta", 0.999)) == (0.008, 0.999)
    if table not in tables or target not in targets or not cosine:
        return None
    defaults = {"Linear": (1e-4, 0.02), "ScaledLinear": (0.00085, 0.012), "Cosine": (1e-4, 0.02)}[table]
    return {
        "_class_name": "DDIMScheduler",
        "beta_schedule": tables[table],
        "beta_start": scheduler.get("beta_start", defaults[0]),
        "beta_end": scheduler.get("beta_end", defaults[1]),
        "num_train_timesteps": scheduler.get("num_train_timesteps", 1000),
        "prediction_type": targets[target],
        "rescale_betas_zero_snr": scheduler.get("zero_terminal_snr", False),
        "timestep_spacing": "trailing",
        "set_alpha_to_one": True,
        "steps_offset": 1,  # trailing entries have none; diffusers' pipelines warn of any other number
        "clip_sample": False,
    }


def _limit(config: Mapping[str, Any]) -> Node | None:
    """Clipping of x0, only where the file asks for it: latents have no range of their own."""
    if config.get("thresholding"):
        name, options = "dynamic", {"quantile": config.get("dynamic_thresholding_ratio", 0.995)}
    elif config.get("clip_sample"):
        name, options = "clip", {"limit": config.get("clip_sample_range", 1.0)}
    else:
        return None
    return {"_target_": f"ldm.diffusion.thresholding.{name}", "_partial_": True, **options}


def _grid(name: str) -> Node:
    return {"_target_": f"ldm.diffusion.grids.{name}", "_partial_": True}


_SAY = "Where the model works with one of these, say so in its scheduler_config.json."


def _one_of(table: Mapping[str, str], value: str, key: str, remedy: str = _SAY) -> str:
    if value not in table:
        raise ConfigError(
            f"the checkpoint's scheduler has {key}={value}, which ldm does not have; it knows {', '.join(table)}. "
            f"{remedy}"
        )
    return table[value]
