"""Laws that every sampler obeys on every scheduler, parametrised over conf/: a new YAML is tested as it stands."""

import math
from functools import cache
from itertools import pairwise

import pytest
import torch
from conf_nodes import build, options
from draws import generator, randn

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.levels import Level, Levels
from ldm.diffusion.samplers.own import own_solver
from ldm.errors import ConfigError

SCHEDULERS = options("scheduler")
PARAMETERIZATIONS = options("parameterization")
SAMPLERS = [s for s in options("sampler") if s != "own"]
SPACINGS = [s for s in options("grid") if s != "own"]
# Standard deviation reached in 100 steps over the exact one: measured, where further off than the rest.
WIDER = {
    ("add_back", "cosine"): (0.42, 1.05),  # 100 steps of 0.9 end at sigma/alpha 0.5 on a table that begins at 20,000
    ("pndm", "sigmoid"): (0.97, 1.2),
    ("heun", "sigmoid"): (0.97, 1.24),  # the first of 100 steps leads from sigma/alpha 1,800 to 18
}
OWN_GRID = ["add_back", "lcm"]
DIVERGES = [("pndm_runge_kutta", "cosine"), ("pndm_runge_kutta", "sigmoid")]  # and says so


def law():
    """Gaussian data with four channels of different mean and spread, as latents have."""
    mean = torch.tensor([0.5, -0.3, 0.0, 0.1], dtype=torch.float64).view(1, 4, 1, 1)
    std = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64).view(1, 4, 1, 1)
    return Gaussian(mean, std)


def white(n=4096):
    """Noise whose sample mean and deviation are exactly 0 and 1: no sampling error of its own."""
    noise = randn(n, 4, 1, 1)
    return (noise - noise.mean(0)) / noise.std(0)


def final(solver, levels, x, denoise=None, seed=7):
    draws = generator(seed)
    noise = lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype)  # noqa: E731
    *_, last = solver(denoise or law().denoise, levels, x, noise)
    return last.x_next


@cache
def stochastic(sampler):
    """Whether the sampler draws noise: found out, not declared."""
    solver, scheduler = build("sampler", sampler), build("scheduler", "scaled_linear")
    levels = solver.levels(scheduler, 4)
    x = randn(2, 4, 1, 1) * levels.start
    return not torch.equal(final(solver, levels, x, seed=1), final(solver, levels, x, seed=2))


NOT_OF_THE_LAW = ["lcm"]  # every step forgets all noise: measured 0.60 to 0.69 of the standard deviation
STOCHASTIC = [name for name in SAMPLERS if stochastic(name) and name not in NOT_OF_THE_LAW]
DETERMINISTIC = [name for name in SAMPLERS if not stochastic(name)]


def refused(sampler, scheduler, spacing=None):
    """What cannot be: samplers with a grid of their own on another, or where their grid does not exist."""
    nowhere = {"add_back": ["flow"], "lcm": ["flow", "edm"]}
    return sampler in OWN_GRID and (spacing is not None or scheduler in nowhere[sampler])


@pytest.mark.parametrize("sampler", OWN_GRID)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("spacing", [None, *SPACINGS])
def test_a_grid_of_ones_own_refuses_others(sampler, scheduler, spacing):
    walk = lambda: build("sampler", sampler).levels(  # noqa: E731
        build("scheduler", scheduler), 5, spacing and build("grid", spacing)
    )
    if refused(sampler, scheduler, spacing):
        with pytest.raises(ConfigError):
            walk()
    else:
        walk()


# Quantiles of sigma/alpha leave too few steps for small ones where the largest is 80 (edm) to 20,000 (cosine).
NARROW = ["scaled_linear", "flow"]


def quick(*case, also=True):
    """The case; among the slow ones unless it is of a table or rectified flow on its own grid."""
    return pytest.param(*case, marks=() if also and case[1] in NARROW else pytest.mark.slow)


CASES = [
    quick(a, b, c, also=c is None)
    for a in SAMPLERS
    for b in SCHEDULERS
    for c in (None, *SPACINGS)
    if a not in NOT_OF_THE_LAW and (a, b) not in DIVERGES and not refused(a, b, c) and (c != "beta" or b in NARROW)
]
PAIRS = [quick(a, b) for a in SAMPLERS for b in SCHEDULERS if (a, b) not in DIVERGES and not refused(a, b)]


@pytest.mark.parametrize(("sampler", "scheduler_name", "spacing"), CASES)
def test_sampler_reaches_the_exact_gaussian(sampler, scheduler_name, spacing):
    """100 steps from noise with the ideal denoiser: the data's mean and standard deviation, within a tenth."""
    solver, scheduler = build("sampler", sampler), build("scheduler", scheduler_name)
    levels = solver.levels(scheduler, 100, spacing and build("grid", spacing))
    x = white() * levels.start
    reached = final(solver, levels, x)
    # Where the exact ODE carries the same noise; stochastic ones aim at the same law.
    exact = law().flow(x, levels[0], scheduler.level_at(0.0))
    error, ratio = (reached - exact).mean(0), reached.std(0) / exact.std(0)
    assert error.abs().max() < (0.05 if stochastic(sampler) else 0.02), error.flatten()
    low, high = WIDER.get((sampler, scheduler_name), (0.83, 1.08) if stochastic(sampler) else (0.9, 1.1))
    assert low < ratio.min() and ratio.max() < high, ratio.flatten()


@pytest.mark.parametrize(("sampler", "scheduler"), PAIRS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_parameterization_samples_alike(sampler, scheduler, parameterization):
    """A network that gives the exact output in this parameterization takes the same path as the exact x0."""
    solver, scheduler, p = (
        build("sampler", sampler),
        build("scheduler", scheduler),
        build("parameterization", parameterization),
    )
    levels = solver.levels(scheduler, 12)
    if p.name == "eps" and levels[0].alpha == 0:
        with pytest.raises(ConfigError):
            p.check(scheduler)
        return
    scale = lambda level: (level.alpha**2 + level.sigma**2) ** 0.5 if denoiser.sigma_data else 1.0  # noqa: E731

    def denoise(x, level):
        def network(x_in, timestep, cond):
            x_t = x_in * scale(level)
            x0 = law().denoise(x_t, level)
            return p.target(x0, (x_t - level.alpha * x0) / level.sigma, level)

        denoiser.model = network
        return denoiser(x, level, Condition())

    denoiser = Denoiser(None, scheduler, p)
    x = randn(8, 4, 2, 2) * levels.start
    torch.testing.assert_close(final(solver, levels, x, denoise), final(solver, levels, x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("sampler", [s for s in DETERMINISTIC if s not in OWN_GRID])
def test_every_sampler_is_of_the_first_order_at_least(sampler):
    """Error against the exact ODE on geometric sigmas 10 to 0.05, 80 to 160 steps. Each one: test_sampler_orders.py."""
    scheduler, solver = build("scheduler", "scaled_linear"), build("sampler", sampler)
    errors = []
    for n in (80, 160):
        ratios = [10 * (0.05 / 10) ** (i / n) for i in range(n + 1)]
        levels = Levels([scheduler.level_at(r) for r in ratios], 1.0, "ratio", scheduler)
        x = randn(64, 4, 1, 1) * levels[0].sigma
        exact = law().flow(x, levels[0], levels[-1])
        errors.append(((final(solver, levels, x) - exact) / levels[-1].alpha).abs().max().item())
    assert math.log2(errors[0] / errors[1]) > 0.8


@pytest.mark.parametrize(("sampler", "scheduler"), [quick(a, b) for a in STOCHASTIC for b in SCHEDULERS])
def test_stochastic_samplers_keep_the_law(sampler, scheduler):
    """400 steps: the published bias of the ancestral family (0.96 to 1.00) and no more."""
    solver, scheduler = build("sampler", sampler), build("scheduler", scheduler)
    levels = solver.levels(scheduler, 400)
    reached = final(solver, levels, white() * levels.start)
    ratio = reached.std(0).flatten() / law().std.flatten()
    assert ratio.min() > 0.93 and ratio.max() < 1.06, ratio
    assert (reached.mean(0) - law().mean[0]).abs().max() < 0.06


@pytest.mark.parametrize(("sampler", "scheduler"), PAIRS)
def test_every_solver_is_finite_from_its_first_level(scheduler, sampler):
    """Also from pure noise: rectified flow's t = 1, and tables stretched to zero terminal SNR."""
    variants = [{}, {"zero_terminal_snr": True}] if scheduler not in ("flow", "edm") else [{}]
    variants = variants[:1] if sampler == "pndm_runge_kutta" else variants  # it refuses: below
    for options_ in variants:
        built, solver = build("scheduler", scheduler, **options_), build("sampler", sampler)
        for n in (1, 2, 3, 20):
            levels = solver.levels(built, n)
            steps = list(solver(law().denoise, levels, randn(2, 4, 2, 2) * levels.start, randn_like))
            assert len(steps) == len(levels) - 1 >= n and steps[-1].next.sigma < 0.05
            assert all(s.x_next.isfinite().all() for s in steps)
            assert isinstance(steps[0].level, Level)


@pytest.mark.parametrize("options_", [{"option": "cosine"}, {"option": "scaled_linear", "zero_terminal_snr": True}])
def test_runge_kutta_says_where_it_diverges(options_):
    solver, scheduler = build("sampler", "pndm_runge_kutta"), build("scheduler", **options_)
    with pytest.raises(ConfigError, match="use sampler=pndm"):
        final(solver, solver.levels(scheduler, 10), randn(2, 4, 1, 1))


def randn_like(x):
    return randn(*x.shape, seed=9)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_what_is_the_same_method_gives_the_same_numbers(scheduler):
    """Euler is DDIM, LMS of order 1 is Euler, ancestral Euler and DDPM are DDIM with eta 1, in other coordinates."""
    scheduler = build("scheduler", scheduler)
    levels = own_solver(scheduler).levels(scheduler, 12)
    x = randn(8, 4, 2, 2) * levels.start

    def reached(name, **options_):
        return final(build("sampler", name, **options_), levels, x)

    torch.testing.assert_close(reached("euler"), reached("ddim"))
    torch.testing.assert_close(reached("lms", solve={"order": 1}), reached("euler"))
    ancestral = reached("ddim", solve={"eta": 1.0})
    assert not torch.allclose(ancestral, reached("ddim"))
    torch.testing.assert_close(reached("euler_ancestral"), ancestral)
    torch.testing.assert_close(reached("ddpm"), ancestral)


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_adding_back_a_part_is_euler_on_a_geometric_grid(ratio):
    """Requirements T4: whatever part is added back."""
    scheduler = build("scheduler", "scaled_linear")
    solver = build("sampler", "add_back", solve={"ratio": ratio})
    levels = solver.levels(scheduler, 30)
    ratios = [lv.sigma / lv.alpha for lv in levels]
    assert ratios[:-1] == pytest.approx([ratios[0] * ratio**i for i in range(30)]) and ratios[-1] == 0
    x = randn(8, 4, 2, 2) * levels.start
    torch.testing.assert_close(final(solver, levels, x), final(build("sampler", "euler"), levels, x))


def test_heun_calls_the_network_twice_a_step_but_the_last():
    calls = []
    solver, scheduler = build("sampler", "heun"), build("scheduler", "scaled_linear")
    levels = solver.levels(scheduler, 10)
    final(solver, levels, randn(2, 4, 1, 1), lambda x, level: calls.append(level) or law().denoise(x, level))
    assert len(calls) == 19


def test_the_larger_variance_is_right_for_wide_data_and_the_smaller_for_narrow():
    scheduler, wide = (
        build("scheduler", "scaled_linear"),
        Gaussian(torch.zeros(1, 4, 1, 1).double(), torch.ones(1, 4, 1, 1).double()),
    )
    deviations = {}
    for variance in ("small", "large"):
        solver = build("sampler", "ddpm", solve={"variance": variance})
        levels = solver.levels(scheduler, 50)
        deviations[variance] = final(solver, levels, white(), wide.denoise).std().item()
    assert deviations["large"] == pytest.approx(1.0, abs=0.03) and deviations["small"] < 0.96


def test_consumer_may_replace_x_next():
    for sampler in SAMPLERS:
        solver, scheduler, seen = build("sampler", sampler), build("scheduler", "scaled_linear"), []
        for step in solver(law().denoise, solver.levels(scheduler, 5), randn(2, 4, 2, 2), randn_like):
            seen.append(step.x_t)
            step.x_next = torch.full_like(step.x_next, 3.0)
        assert all(bool((x == 3.0).all()) for x in seen[1:]), sampler


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("n", [2, 7, 40])
def test_grids_fall_from_the_noisiest_level_they_have(spacing, scheduler, n):
    scheduler = build("scheduler", scheduler)
    levels = build("sampler", "ddim").levels(scheduler, n, build("grid", spacing))
    ratios = [lv.sigma / lv.alpha if lv.alpha else math.inf for lv in levels]
    assert len(levels) == n + 1 and all(a > b for a, b in pairwise(ratios)) and ratios[-1] == 0
    if spacing != "leading":
        assert levels[0].t == pytest.approx(1.0)


def test_published_grids():
    """Ten steps on Stable Diffusion's table as diffusers has them (timesteps)."""
    scheduler, ddim = build("scheduler", "scaled_linear"), build("sampler", "ddim")
    told = lambda solver, spacing: [lv.timestep for lv in solver.levels(scheduler, 10, build("grid", spacing))][:-1]  # noqa: E731
    assert told(ddim, "leading") == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert told(ddim, "trailing") == [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]
    karras = told(build("sampler", "euler"), "karras")
    assert karras[:3] == pytest.approx([999, 916.2841, 815.045], abs=1e-3)
    assert karras[-2:] == pytest.approx([6.7324, 0], abs=1e-3)
    assert told(ddim, "karras")[:3] == [999, 916, 815]
    assert told(build("sampler", "euler"), "logsnr")[1] == pytest.approx(874.742, abs=1e-3)
    extra = build("sampler", "ddim", conventions={"_target_": "ldm.diffusion.grids.Conventions", "extra_point": True})
    assert told(extra, "linspace")[:3] == [999, 899, 799] and told(extra, "linspace")[-1] == 100
    assert told(extra, "leading") == [901, 811, 721, 631, 541, 451, 361, 271, 181, 91]
