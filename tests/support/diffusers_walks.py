"""Walks of our samplers and of diffusers' schedulers over one table and one network."""

import math

import diffusers
import torch
from conf_nodes import build

TABLE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


SPACINGS = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
}
TIMES = ["linspace", "leading", "trailing"]


# Our sampler -> diffusers' class, its options, the spacings that it has.
FAMILIES = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}, TIMES),
    "ddpm": ("DDPMScheduler", {"clip_sample": False}, TIMES),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}, TIMES),
    "pndm_runge_kutta": ("PNDMScheduler", {}, TIMES),
    "lms": ("LMSDiscreteScheduler", {}, [*SPACINGS]),
    "euler": ("EulerDiscreteScheduler", {}, [*SPACINGS]),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}, TIMES),
    "heun": ("HeunDiscreteScheduler", {}, [*SPACINGS]),
    "dpm2": ("KDPM2DiscreteScheduler", {}, [*SPACINGS]),
    "dpm2_ancestral": ("KDPM2AncestralDiscreteScheduler", {}, [*SPACINGS]),
    "dpmpp_1m": ("DPMSolverMultistepScheduler", {"solver_order": 1}, [*SPACINGS]),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {"solver_order": 2}, [*SPACINGS]),
    "dpmpp_3m": ("DPMSolverMultistepScheduler", {"solver_order": 3}, [*SPACINGS]),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, [*SPACINGS]),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", {"solver_order": 2}, [None, "karras", "exponential", "beta"]),
    "dpmpp_3s": ("DPMSolverSinglestepScheduler", {"solver_order": 3}, [None, "karras", "exponential", "beta"]),
    "unipc": ("UniPCMultistepScheduler", {}, [*SPACINGS]),
    "unipc 3": ("UniPCMultistepScheduler", {"solver_order": 3}, [*SPACINGS]),
    "deis": ("DEISMultistepScheduler", {}, [*SPACINGS]),
    "deis 3": ("DEISMultistepScheduler", {"solver_order": 3}, [*SPACINGS]),
    "lcm": ("LCMScheduler", {"clip_sample": False}, [None]),
    # No spacings: ours parts from it at the third step (test_diffusers_departures.py).
    "dpmpp_3m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, []),
}


# DDIM and PNDM step by 1000 // n instead of to the next entry of their grid: off it on linspace, and on trailing where
# n does not divide 1000. There ours keeps to the grid (test_diffusers_departures.py).
OFF_GRID = {"ddim": ["linspace"], "pndm": ["linspace"], "pndm_runge_kutta": ["linspace"]}


def network(x_in, timestep):
    """Any smooth function of both: an output of about the size of noise."""
    shifted = torch.roll(x_in, 1, dims=1)
    return 0.8 * torch.tanh(x_in) + 0.3 * torch.sin(shifted) + 0.2 * math.cos(float(timestep) / 300)


def theirs(name, spacing, n, prediction, x, told):
    """x after every step of diffusers' loop on x_t's own scale, and the timesteps that the network was told."""
    cls, settings, _ = FAMILIES[name]
    scheduler = getattr(diffusers, cls)(
        **TABLE, **settings, **(SPACINGS[spacing] if spacing else {}), prediction_type=prediction
    )
    scheduler.set_timesteps(n)
    generator = torch.Generator().manual_seed(5)
    extra = {"generator": generator} if "generator" in scheduler.step.__code__.co_varnames else {}
    on_ratio = hasattr(scheduler, "is_scale_input_called") or cls.startswith(("Heun", "KDPM2"))
    x = x * scheduler.init_noise_sigma
    path = []
    for t in scheduler.timesteps:
        told.append(float(t))
        out = network(scheduler.scale_model_input(x, t), float(t))
        x = scheduler.step(out, t, x, **extra).prev_sample
        sigma = scheduler.sigmas[scheduler.step_index].item() if on_ratio else 0.0
        path.append(x / (1 + sigma**2) ** 0.5)
    return path


def ours(name, spacing, n, prediction, x, told, noise=None, solver=None):
    base, _, order = name.partition(" ")
    options = {"order": int(order)} if order else {}
    if base.startswith("pndm") and prediction == "v_prediction":
        options["mixed"] = "v"
    solver = solver or build("sampler", base, solve=options)
    scheduler = build("scheduler", "scaled_linear")
    parameterization = build("parameterization", "eps" if prediction == "epsilon" else "v")
    levels = solver.levels(scheduler, n, spacing and build("grid", spacing))
    generator = torch.Generator().manual_seed(5)
    given, seen = iter(told), []

    def denoise(x_t, level):
        seen.append(float(level.timestep))
        return parameterization.x0(x_t, network(x_t, next(given)), level)  # float32 timesteps of theirs, for both

    noise = noise or (lambda like: torch.randn(like.shape, generator=generator).to(like))
    path = [step.x_next for step in solver(denoise, levels, x * levels.start, noise)]
    return path, seen


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()
