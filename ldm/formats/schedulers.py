"""diffusers' scheduler_config.json as our scheduler, parameterization and sampler, and back.

A file names one class; our `sampler=` may be another. As in diffusers' `Scheduler.from_config`, a sampler takes from
the file the keys that its class has there (`KEYS`), and what the file leaves open is the class's own, which our YAMLs
carry; what a sampler's YAML spells is the sampler's. The noise table is that of the file's own class, for all samplers.

Keys of no class, and those of other classes, are passed over, as diffusers does. A value that we do not have is refused
by its key, where the key is used.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from ldm.errors import ConfigError
from ldm.formats.scheduler_keys import KEYS, ONLY, OTHERS, flag, number, one_of, only, word

Node = dict[str, Any]

_PARAMETERIZATIONS = {"epsilon": "Eps", "v_prediction": "V", "sample": "X0"}
_TABLES = {"linear": "Linear", "scaled_linear": "ScaledLinear", "squaredcos_cap_v2": "Cosine"}
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
# Classes whose table is another where the file does not say, and those that know zero terminal SNR.
_CROWSONS = ("HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete", "DPMSolverSDE", "LCM")
_ZERO_SNR = ("DDIM", "DDPM", "EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "UniPCMultistep", "LCM")
# In diffusers' order: of two that are true the first one counts, or (all but the second) none may stand beside another.
_POSITIONS = {
    "use_karras_sigmas": "karras",
    "use_lu_lambdas": "logsnr",
    "use_exponential_sigmas": "exponential",
    "use_beta_sigmas": "beta",
}
_SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")  # classes take the others' for their own default


def nodes(config: Mapping[str, Any]) -> dict[str, Node]:
    """{"scheduler": node, "parameterization": node} of a scheduler_config.json. ConfigError for what we do not have."""
    name = str(config.get("_class_name")).removesuffix("Scheduler")
    if f"{name}Scheduler" not in _SAMPLERS and config.get("beta_schedule") is None:
        raise ConfigError(
            f"the checkpoint's scheduler is {config.get('_class_name')}, without a beta_schedule: ldm reads models of "
            "noise tables. Where this is one, name beta_schedule in its scheduler_config.json (scaled_linear ...)."
        )
    only(config, "trained_betas", (None,))
    only(config, "variance_type", (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"))
    if config.get("prediction_type") == "v_prediction" and name == "EulerDiscrete":
        only(config, "timestep_type", ("discrete",))
    table = one_of(
        _TABLES, config.get("beta_schedule", "scaled_linear" if name == "LCM" else "linear"), "beta_schedule"
    )
    scheduler: Node = {"_target_": f"ldm.diffusion.schedulers.{table}"}
    scheduler["num_train_timesteps"] = number(config, "num_train_timesteps", 1000, 2, 1_000_000, whole=True)
    if table != "Cosine":
        for key, default in zip(("beta_start", "beta_end"), _ends(name), strict=True):
            scheduler[key] = number(config, key, default, 1e-12, 1 - 1e-12)
    if flag(config, "rescale_betas_zero_snr"):
        if f"{name}Scheduler" in _SAMPLERS and name not in _ZERO_SNR:
            raise ConfigError(
                f"the checkpoint's scheduler has rescale_betas_zero_snr=true, which diffusers' {name}Scheduler passes "
                "over: set it to false in its scheduler_config.json, or name a class that has it (DDIMScheduler ...)."
            )
        scheduler["zero_terminal_snr"] = True
    target = one_of(_PARAMETERIZATIONS, config.get("prediction_type", "epsilon"), "prediction_type")
    return {"scheduler": scheduler, "parameterization": {"_target_": f"ldm.diffusion.parameterizations.{target}"}}


def own_sampler(config: Mapping[str, Any]) -> tuple[str, Node]:
    """The file of conf/sampler that is the config's class, and its options for `solve`."""
    name = str(config.get("_class_name"))
    sampler = one_of(_SAMPLERS, name, "_class_name", "Choose a sampler, for example sampler=ddim.")
    if name == "PNDMScheduler":
        return ("pndm" if flag(config, "skip_prk_steps") else "pndm_runge_kutta"), {}
    if name == "DDPMScheduler":
        return "ddpm", {"variance": _variance(config)}
    if name == "LCMScheduler":
        return "lcm", {"scaling": number(config, "timestep_scaling", 10.0, 1e-6, 1e6)}
    if name in ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"):
        return _dpm_solver(config, name == "DPMSolverMultistepScheduler")
    if name == "UniPCMultistepScheduler":
        variant = word(config, "solver_type", "bh2", _SOLVER_TYPES)
        return "unipc", {"order": _order(config), "variant": "bh1" if variant == "bh1" else "bh2"}
    if name == "DEISMultistepScheduler":
        word(config, "algorithm_type", "deis", ("deis", "dpmsolver", "dpmsolver++"))
        word(config, "solver_type", "logrho", _SOLVER_TYPES)
        return "deis", {"order": _order(config)}
    return sampler, {}


def adjusted(sampler: Node, config: Mapping[str, Any]) -> Node:
    """A sampler's node (a YAML of conf/sampler) as it is on a checkpoint with this scheduler_config.json."""
    node = copy.deepcopy(sampler)
    conventions = node.setdefault("conventions", {"_target_": "ldm.diffusion.grids.Conventions"})
    solve, function = node["solve"], node["solve"]["_target_"].rpartition(".")[2]
    if function == "ddim" and conventions.get("start") == "sigma":
        function = "euler_ancestral"
    said = {k: v for k, v in config.items() if k in KEYS.get(function, OTHERS)}
    for key, values in ONLY.items():
        only(said, key, values, "or choose another sampler, for example sampler=ddim")
    if not node.get("own_grid"):
        node["spacing"] = _spacing(node, conventions, said, function)
        cosine, rounding = config.get("beta_schedule") == "squaredcos_cap_v2", ("use_karras_sigmas", "use_lu_lambdas")
        if cosine and function == "dpmpp_multistep" and any(flag(said, key) for key in rounding):
            conventions["rounded"] = "cut"  # diffusers does not round on this table
    if function == "lcm" and "original_inference_steps" in said:
        node["spacing"] = {**node["spacing"], "steps": number(said, "original_inference_steps", 50, 1, 1e6, whole=True)}
    if "set_alpha_to_one" in KEYS.get(function, ()):
        # diffusers' class PNDM ends at the table's first entry where the file does not say, DDIM at no noise.
        conventions["last"] = "zero" if flag(said, "set_alpha_to_one", function == "ddim") else "entry"
    elif word(said, "final_sigmas_type", "zero", ("zero", "sigma_min")) == "sigma_min":
        conventions["last"] = "entry"
    for key in ("lower_order_final", "euler_at_final"):
        if key in said and key not in solve:
            solve[key] = flag(said, key)
    if "solver_type" in said and "solver_type" not in solve:
        solve["solver_type"] = "heun" if word(said, "solver_type", "midpoint", _SOLVER_TYPES) == "heun" else "midpoint"
        if function == "dpmpp_singlestep" and solve.get("order") == 3:
            only(said, "solver_type", tuple(t for t in _SOLVER_TYPES if t != "heun"), "or choose sampler=dpmpp_2s")
    if function.startswith("pndm") and config.get("prediction_type") == "v_prediction":
        solve["mixed"] = "v"
    limit = _limit(said, function in ("ddim", "ddpm"))
    if limit and function == "ddim":
        solve["limit_x0"] = limit
    return node if limit is None or function == "ddim" else node | {"limit": limit}


# Pipelines of diffusers that mend their scheduler's file when they are made: for what they read, these keys go on with
# these values, as pictures of 2022 need them (their files said nothing of steps_offset, and clip_sample was true).
_PIPELINES = ("", "Img2Img", "PAG", "PAGImg2Img")
_REPAINTING = ("Inpaint", "DiffEdit")
_MENDED: dict[str, Node] = {
    **{f"StableDiffusion{kind}Pipeline": {"steps_offset": 1, "clip_sample": False} for kind in _PIPELINES},
    "StableDiffusionPAGInpaintPipeline": {"steps_offset": 1, "clip_sample": False},
    **{f"StableDiffusion{kind}Pipeline": {"steps_offset": 1, "skip_prk_steps": True} for kind in _REPAINTING},
}


def of_pipeline(config: dict[str, Any], pipeline: str) -> dict[str, Any]:
    """A scheduler_config.json as diffusers' pipeline of this class goes on with it; a warning says what it changes.

    A scheduler's file alone means what it says.
    """
    name = str(config.get("_class_name"))
    defaults: Node = {} if name not in _SAMPLERS or name == "DPMSolverSinglestepScheduler" else {"steps_offset": 0}
    defaults |= {"clip_sample": True} if name in ("DDIMScheduler", "DDPMScheduler") else {}
    defaults |= {"skip_prk_steps": False} if name == "PNDMScheduler" else {}
    found = defaults | config
    # What is no value at all, such as "false" in quotes, stays and is refused by its key where it is read.
    wrong = {k: v for k, v in _MENDED.get(pipeline, {}).items() if k in found and found[k] != v}
    mended = {k: v for k, v in wrong.items() if found[k] is None or type(found[k]) is type(v)}
    for key, value in mended.items():
        said = f"{key}={json.dumps(config[key])}" if key in config else f"no {key}"
        warnings.warn(
            f"scheduler_config.json has {said}: going on with {json.dumps(value)}, as diffusers' {pipeline} does. "
            f"Write {key} into the file to silence this.",
            stacklevel=2,
        )
    # Their classes without the key are given it for our other samplers: latents have no range to be clipped to.
    latents = {"clip_sample": False} if "clip_sample" in _MENDED.get(pipeline, {}) else {}
    return latents | config | mended


def sample_size(unet: Mapping[str, Any], pipeline: str) -> Any:
    """A U-Net's own size in latent pixels: these pipelines take less than 64 of before diffusers 0.9 for a mistake."""
    side, version = unet.get("sample_size"), re.match(r"(\d+)\.(\d+)", str(unet.get("_diffusers_version")))
    early = version is not None and (int(version[1]), int(version[2])) < (0, 9)
    return 64 if pipeline in _MENDED and early and isinstance(side, int) and side < 64 else side


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


def _dpm_solver(config: Mapping[str, Any], multistep: bool) -> tuple[str, Node]:
    known = ("dpmsolver++", "sde-dpmsolver++", "deis") if multistep else ("dpmsolver++", "deis")
    algorithm, order = config.get("algorithm_type", "dpmsolver++"), _order(config)
    only(config, "algorithm_type", known, "or choose a sampler, for example sampler=dpmpp_2m")
    if algorithm != "sde-dpmsolver++":
        return ("dpmpp_2m", {"order": order, "eta": 0.0}) if multistep else ("dpmpp_2s", {"order": order})
    if order == 3:
        raise ConfigError(
            "the checkpoint's scheduler has algorithm_type=sde-dpmsolver++ with solver_order=3, whose third-order term "
            "diffusers adds with the wrong sign: choose sampler=dpmpp_3m_sde (k-diffusion's), or solver_order=2."
        )
    return "dpmpp_2m", {"order": order, "eta": 1.0}


def _order(config: Mapping[str, Any]) -> int:
    return int(number(config, "solver_order", 2, 1, 3, whole=True))


def _variance(config: Mapping[str, Any]) -> str:
    """Of DDPM. With fixed_large diffusers adds noise in the last step, too, unless that starts from entry 0."""
    only(config, "variance_type", ("fixed_small", "fixed_small_log", "fixed_large", None), "or choose sampler=ddpm")
    if config.get("variance_type", "fixed_small") != "fixed_large":
        return "small"
    spacing = config.get("timestep_spacing", "leading")
    if spacing == "trailing" or (spacing == "leading" and config.get("steps_offset", 0) != 0):
        raise ConfigError(
            f"the checkpoint's scheduler has variance_type=fixed_large with timestep_spacing={spacing}, which in "
            "diffusers leaves noise in the picture: choose sampler=ddpm, or variance_type=fixed_small."
        )
    return "large"


def _spacing(node: Node, conventions: Node, said: Mapping[str, Any], function: str) -> Node:
    """The grid that the file asks for; the start that goes with it is set in `conventions`."""
    found = node.get("spacing") or _grid("leading")  # the classes whose YAML names none have leading as their default
    spacing = None
    if "timestep_spacing" in said or "spacing" not in node:
        spacing = word(said, "timestep_spacing", "leading", ("linspace", "leading", "trailing"))
        offset = {"offset": number(said, "steps_offset", 0, 0, 1e6, whole=True)} if spacing == "leading" else {}
        found = _grid(spacing) | offset
        if spacing == "leading" and conventions.get("start") == "sigma":
            conventions["start"] = "one"
    chosen = [grid for key, grid in _POSITIONS.items() if flag(said, key)]
    if not chosen:
        return found
    if len(chosen) > 1 and not (len(chosen) == 2 and "logsnr" in chosen):
        raise ConfigError(
            f"the checkpoint's scheduler asks for two grids, {' and '.join(chosen)}: choose one with grid=."
        )
    for key in ("sigma_min", "sigma_max"):
        only(said, key, (None,), "or choose a grid, for example grid=karras")
    # The DPM-Solver family (extra_point) goes over the whole table, Euler's between its spacing's ends.
    whole = spacing in (None, "linspace") or conventions.get("extra_point")
    return _grid(chosen[0]) | ({} if whole else {"ends": found})


def _limit(said: Mapping[str, Any], clips: bool) -> Node | None:
    """What x0 goes through. clips: whether the class does so where the file does not say."""
    if flag(said, "thresholding"):
        quantile = number(said, "dynamic_thresholding_ratio", 0.995, 0, 1)
        largest = number(said, "sample_max_value", 1.0, 1e-6, 1e6)
        name, options = "dynamic", {"quantile": quantile, "largest": largest}
    elif flag(said, "clip_sample", clips):
        name, options = "clip", {"limit": number(said, "clip_sample_range", 1.0, 1e-6, 1e6)}
    else:
        return None
    return {"_target_": f"ldm.diffusion.thresholding.{name}", "_partial_": True, **options}


def _ends(name: str) -> tuple[float, float]:
    return (0.00085, 0.012) if name in _CROWSONS else (1e-4, 0.02)


def _grid(name: str) -> Node:
    return {"_target_": f"ldm.diffusion.grids.{name}", "_partial_": True}
