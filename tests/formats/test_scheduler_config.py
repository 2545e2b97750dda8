"""diffusers' scheduler_config.json is a scheduler, a parameterization and a sampler of ours, or refused by name."""

from __future__ import annotations

import json

import pytest
import yaml
from scheduler_nodes import sampler_node

from ldm.build import build
from ldm.config.root import conf_dir
from ldm.diffusion.samplers.solver import Solver
from ldm.errors import ConfigError
from ldm.formats.schedulers import _SAMPLERS, adjusted, nodes, scheduler_config

TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)
TRAINED_HERE = "ldm.diffusion."


@pytest.mark.parametrize("name", _SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", None])
def test_every_class_builds_a_sampler_that_walks_its_table(name, spacing):
    config = TABLE | {"_class_name": name, "prediction_type": "epsilon"}
    config |= {"timestep_spacing": spacing, "steps_offset": 1} if spacing else {}
    made = nodes(config)
    scheduler = build(made["scheduler"], "scheduler")
    assert type(build(made["parameterization"], "parameterization")).__name__ == "Eps"
    solver = build(sampler_node(config), "sampler")
    assert isinstance(solver, Solver)
    levels = solver.levels(scheduler, 10)
    ratios = [float(level.ratio) for level in levels]
    assert ratios == sorted(ratios, reverse=True) and len(levels) in (11, 12)  # PNDM visits its second point twice
    top = float(levels[0].timestep)
    expected = {"linspace": 999, "leading": 901, "trailing": 999}  # diffusers' first timestep of ten
    if name == "LCMScheduler":
        assert top == 999
    elif spacing in expected and name != "DPMSolverSinglestepScheduler":
        assert abs(top - expected[spacing]) < 10
        if spacing == "linspace" or name in ("DDIMScheduler", "EulerDiscreteScheduler"):
            assert top == expected[spacing]


def test_options_of_the_classes_reach_the_solver():
    for config, function, options in [
        ({"_class_name": "PNDMScheduler", "skip_prk_steps": True}, "pndm", {}),
        ({"_class_name": "PNDMScheduler"}, "pndm_runge_kutta", {}),
        ({"_class_name": "DDPMScheduler", "variance_type": "fixed_large"}, "ddpm", {"variance": "large"}),
        ({"_class_name": "DDPMScheduler"}, "ddpm", {"variance": "small"}),
        ({"_class_name": "LCMScheduler", "timestep_scaling": 5.0}, "lcm", {"scaling": 5.0}),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "solver_order": 3},
            "dpmpp_multistep",
            {"order": 3, "eta": 0.0},
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"},
            "dpmpp_multistep",
            {"order": 2, "eta": 1.0},
        ),
        ({"_class_name": "DPMSolverSinglestepScheduler", "solver_order": 3}, "dpmpp_singlestep", {"order": 3}),
        (
            {"_class_name": "UniPCMultistepScheduler", "solver_type": "bh1", "solver_order": 3},
            "unipc",
            {"variant": "bh1", "order": 3},
        ),
        ({"_class_name": "DEISMultistepScheduler", "solver_order": 3}, "deis", {"order": 3}),
        ({"_class_name": "EulerAncestralDiscreteScheduler"}, "ddim", {"eta": 1.0}),
        ({"_class_name": "KDPM2AncestralDiscreteScheduler"}, "dpm2", {"eta": 1.0}),
        (
            {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "prediction_type": "v_prediction"},
            "pndm",
            {"mixed": "v"},
        ),
    ]:
        solve = sampler_node(TABLE | config)["solve"]
        assert solve["_target_"].rpartition(".")[2] == function, config
        assert options.items() <= solve.items(), (config, solve)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_euler_starts_from_sigma_eps_but_on_leading_grids_from_eps(spacing):
    """Also where the leading grid reaches the noisiest entry (diffusers' init_noise_sigma)."""
    config = TABLE | {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": spacing, "steps_offset": 0}
    levels = build(sampler_node(config), "sampler").levels(build(nodes(config)["scheduler"], "scheduler"), 1000)
    assert levels[0].timestep == 999 and levels[0].sigma < 0.999
    assert levels.start == (1.0 if spacing == "leading" else levels[0].sigma)


def test_what_the_file_says_of_the_grid_holds_for_every_sampler():
    said = TABLE | {"_class_name": "PNDMScheduler", "timestep_spacing": "trailing", "clip_sample": True}
    assert sampler_node(said, "euler")["spacing"]["_target_"].endswith("trailing")
    assert "limit" not in sampler_node(said, "euler"), "diffusers' Euler knows no clipping"
    clipped = sampler_node(said | {"clip_sample_range": 2.0}, "ddim")["solve"]["limit_x0"]
    assert (clipped["_target_"], clipped["limit"]) == ("ldm.diffusion.thresholding.clip", 2.0)
    dynamic = sampler_node(said | {"thresholding": True, "dynamic_thresholding_ratio": 0.9}, "ddpm")["limit"]
    assert (dynamic["_target_"], dynamic["quantile"]) == ("ldm.diffusion.thresholding.dynamic", 0.9)
    karras = TABLE | {"_class_name": "DPMSolverMultistepScheduler", "use_karras_sigmas": True}
    assert sampler_node(karras)["spacing"]["_target_"].endswith("karras")
    assert "karras" not in str(sampler_node(karras, "ddim")), "diffusers' DDIM has no grids in sigma"
    assert sampler_node(TABLE | {"_class_name": "DDIMScheduler", "set_alpha_to_one": False})["conventions"] == {
        "_target_": "ldm.diffusion.grids.Conventions",
        "last": "entry",
    }
    own = yaml.safe_load((conf_dir() / "sampler/add_back.yaml").read_text())
    assert adjusted(own, said)["spacing"] == own["spacing"], "a sampler with its own grid keeps it"


@pytest.mark.parametrize("table", ["Linear", "ScaledLinear", "Cosine"])
@pytest.mark.parametrize("target", ["Eps", "V", "X0"])
@pytest.mark.parametrize("zero", [False, True])
def test_a_model_of_ours_leaves_and_comes_back(table, target, zero):
    options = {} if table == "Cosine" else {"beta_start": 0.001, "beta_end": 0.013}
    scheduler = {"_target_": f"{TRAINED_HERE}schedulers.{table}", "num_train_timesteps": 700, **options}
    scheduler |= {"zero_terminal_snr": True} if zero else {}
    parameterization = {"_target_": f"{TRAINED_HERE}parameterizations.{target}"}
    config = scheduler_config(scheduler, parameterization)
    assert config is not None
    config = json.loads(json.dumps(config))
    assert nodes(config) == {"scheduler": scheduler, "parameterization": parameterization}
    solver = build(sampler_node(config), "sampler")
    ours, theirs = build(scheduler, "scheduler"), build(nodes(config)["scheduler"], "scheduler")
    from ldm.diffusion.samplers.own import own_solver

    assert list(own_solver(ours).levels(ours, 9)) == list(solver.levels(theirs, 9)), "DDIM on trailing entries"


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "cosine"])
def test_defaults_that_a_node_does_not_spell_are_spelled_outside(name):
    node = yaml.safe_load((conf_dir() / "scheduler" / f"{name}.yaml").read_text())
    bare = {"_target_": node["_target_"]}
    config = scheduler_config(bare, {"_target_": f"{TRAINED_HERE}parameterizations.V"})
    ours, theirs = build(bare, "scheduler"), build(nodes(config)["scheduler"], "scheduler")
    assert [ours.level(t) for t in (0.01, 0.5, 1.0)] == [theirs.level(t) for t in (0.01, 0.5, 1.0)]


def test_what_diffusers_cannot_say_has_no_file():
    def said(scheduler, target="V", **options):
        node = {"_target_": f"{TRAINED_HERE}schedulers.{scheduler}", **options}
        return scheduler_config(node, {"_target_": f"{TRAINED_HERE}parameterizations.{target}"})

    assert said("Flow", "Velocity") is said("EDM", "EDM") is said("Sigmoid") is said("Linear", "Velocity") is None
    assert said("Cosine", offset=0.01) is None and said("Cosine") is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"trained_betas": [0.1] * 1000}, "trained_betas"),
        ({"variance_type": "learned"}, "variance_type=learned"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule=sigmoid.*it knows linear, scaled_linear"),
        ({"prediction_type": "flow_prediction"}, "prediction_type=flow_prediction.*it knows epsilon"),
    ],
)
def test_tables_and_targets_that_we_do_not_have(changes, words):
    with pytest.raises(ConfigError, match=f"the checkpoint's scheduler has {words}") as refusal:
        nodes(TABLE | changes)
    assert len(str(refusal.value)) < 300 and "scheduler_config.json" in str(refusal.value), "short, with the way out"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "_class_name=FlowMatchEuler.*DDIMScheduler.*sampler="),
        ({}, "_class_name=None.*sampler="),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "dpmsolver"},
            "algorithm_type=dpmsolver,.*sampler=dpmpp_2m",
        ),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "algorithm_type": "sde-dpmsolver++"},
            r"algorithm_type=sde-dpmsolver\+\+,.*sampler=",
        ),
        (
            {"_class_name": "DPMSolverSinglestepScheduler", "solver_type": "heun", "solver_order": 3},
            "solver_type=heun.*sampler=dpmpp_2s",
        ),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "wrong sign: choose sampler=dpmpp_3m_sde",
        ),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas=True"),
        ({"_class_name": "UniPCMultistepScheduler", "use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order=4.*from 1 to 3"),
        (
            {"_class_name": "EulerDiscreteScheduler", "interpolation_type": "log_linear"},
            "interpolation_type=log_linear",
        ),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "karras"}, "timestep_spacing=karras.*linspace"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": None}, "timestep_spacing=None"),
        (
            {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": "false"},
            "use_karras_sigmas=false.*true or false",
        ),
        (
            {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True},
            "karras and beta.*grid=",
        ),
        (
            {"_class_name": "LMSDiscreteScheduler", "use_karras_sigmas": True, "sigma_max": 10.0},
            "sigma_max=10.0.*grid=karras",
        ),
        (
            {"_class_name": "DDPMScheduler", "variance_type": "fixed_large", "timestep_spacing": "trailing"},
            "fixed_large.*noise in the picture.*sampler=ddpm",
        ),
    ],
)
def test_samplers_that_we_do_not_have(config, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        sampler_node(TABLE | config)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 520
