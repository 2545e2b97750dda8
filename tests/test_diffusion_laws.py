"""Laws that every scheduler, parameterization, weighting and sampler obeys, parametrised over conf/."""

import math
from itertools import pairwise

import pytest
import torch
from conf_nodes import build, options

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.grids import linspace
from ldm.diffusion.guidance import ClassifierFree, Guided
from ldm.diffusion.levels import Level
from ldm.diffusion.loss import diffusion_loss
from ldm.diffusion.samplers.own import own_solver
from ldm.diffusion.schedulers import ScaledLinear
from ldm.errors import ConfigError

SCHEDULERS = options("scheduler")
PARAMETERIZATIONS = options("parameterization")
SAMPLERS = [s for s in options("sampler") if s != "own"]
SPACINGS = [s for s in options("grid") if s != "own"]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def data():
    """Gaussian data with four channels of different mean and spread, as latents have."""
    mean = torch.tensor([0.5, -0.3, 0.0, 0.1], dtype=torch.float64).view(1, 4, 1, 1)
    std = torch.tensor([0.3, 0.6, 0.9, 1.2], dtype=torch.float64).view(1, 4, 1, 1)
    return Gaussian(mean, std)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_grows_with_time(name):
    scheduler = build("scheduler", name)
    levels = [scheduler.level(t) for t in torch.linspace(0, 1, 333, dtype=torch.float64).tolist()]
    assert levels[0].sigma == 0 and levels[0].alpha == 1
    for a, b in pairwise(levels):
        assert b.sigma > a.sigma and b.alpha < a.alpha and b.timestep >= a.timestep
    tensors = scheduler.level(torch.linspace(0, 1, 333, dtype=torch.float64))
    torch.testing.assert_close(tensors.sigma, torch.tensor([lv.sigma for lv in levels], dtype=torch.float64))


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
@pytest.mark.parametrize("n", [1000, 700])
def test_tables_keep_the_variance_and_invert_at_entries(name, n):
    scheduler = build("scheduler", name, num_train_timesteps=n)
    level = scheduler.level(torch.arange(1, n + 1, dtype=torch.float64) / n)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(n, dtype=torch.float64))
    assert torch.equal(level.timestep, torch.arange(n, dtype=torch.float64))
    back = scheduler.level_at(level.sigma / level.alpha)
    torch.testing.assert_close(back.timestep, level.timestep, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.t, level.t, atol=1e-9, rtol=0)


def test_scaled_linear_is_stable_diffusions_table():
    scheduler = build("scheduler", "scaled_linear")
    top, bottom = scheduler.level(1.0), scheduler.level(1 / 1000)
    assert top.sigma / top.alpha == pytest.approx(14.6146, abs=5e-5)
    assert bottom.sigma / bottom.alpha == pytest.approx(0.0292, abs=5e-5)


def test_fifteen_linspace_levels_reproduce_the_published_list():
    """Requirements A8: timesteps and sigmas of 15 LMS steps on Stable Diffusion's table."""
    scheduler = build("scheduler", "scaled_linear")
    levels = build("sampler", "euler").levels(scheduler, 15, linspace)
    timesteps = [999.0, 927.6429, 856.2857, 784.9286, 713.5714, 642.2143, 570.8571, 499.5]
    timesteps += [428.1429, 356.7857, 285.4286, 214.0714, 142.7143, 71.3571, 0.0]
    sigmas = [14.6146, 9.6826, 6.6780, 4.7746, 3.5221, 2.6666, 2.0606, 1.6156, 1.2768, 1.0097]
    sigmas += [0.7913, 0.6056, 0.4397, 0.2780, 0.0292, 0.0]
    assert [lv.timestep for lv in levels[:-1]] == pytest.approx(timesteps, abs=5.1e-5)
    assert [lv.sigma / lv.alpha for lv in levels] == pytest.approx(sigmas, abs=5.1e-5)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_target_and_jump_to_x0_are_inverse(scheduler, parameterization):
    scheduler, p = build("scheduler", scheduler), build("parameterization", parameterization)
    level = scheduler.level(torch.tensor([0.001, 0.2, 0.5, 0.9, 0.999], dtype=torch.float64))
    x0, eps = randn(5, 4, 3, 3), randn(5, 4, 3, 3, seed=1)
    alpha, sigma = level.alpha.view(-1, 1, 1, 1), level.sigma.view(-1, 1, 1, 1)
    x_t = alpha * x0 + sigma * eps
    torch.testing.assert_close(p.x0(x_t, p.target(x0, eps, level), level), x0, atol=1e-8, rtol=0)
    # The weight is the squared slope of the jump: an output off by d moves x0 by sqrt(weight) d.
    moved = p.x0(x_t, p.target(x0, eps, level) + 1e-3, level) - x0
    expected = 1e-3 * p.weight_of_x0_error(level.alpha, level.sigma).sqrt()
    torch.testing.assert_close(moved.abs().amax(dim=(1, 2, 3)), expected, atol=1e-8, rtol=1e-6)


def test_jump_to_x0_in_karras_coordinates():
    """x0 = x - sigma eps with x = x_t/alpha and sigma = sigma(t)/alpha(t): the developer's text's formula."""
    level, p = build("scheduler", "scaled_linear").level(0.6), build("parameterization", "eps")
    x_t, eps = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    expected = x_t / level.alpha - level.sigma / level.alpha * eps
    torch.testing.assert_close(p.x0(x_t, eps, level), expected)


def test_min_snr_has_the_published_eps_and_v_forms():
    weighting = build("weighting", "min_snr")
    level = build("scheduler", "scaled_linear").level(torch.linspace(0.001, 1, 50, dtype=torch.float64))
    snr = (level.alpha / level.sigma) ** 2
    forms = {"eps": snr.clamp(max=5) / snr, "v": snr.clamp(max=5) / (snr + 1), "x0": snr.clamp(max=5)}
    for name, expected in forms.items():
        weight = weighting(level.alpha, level.sigma, build("parameterization", name))
        torch.testing.assert_close(weight, expected)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize("weighting", options("weighting"))
def test_loss_of_the_exact_output_is_zero_and_weights_are_finite(scheduler, parameterization, weighting):
    scheduler, p = build("scheduler", scheduler), build("parameterization", parameterization)
    level = scheduler.level(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64))
    x0, eps = randn(3, 4, 2, 2), randn(3, 4, 2, 2, seed=1)
    weight = build("weighting", weighting)
    for offset, expected in ((0.0, 0.0), (0.1, 0.01)):
        denoiser = Denoiser(lambda x, t, c: p.target(x0, eps, level) + offset, scheduler, p)  # noqa: B023
        loss = diffusion_loss(denoiser, weight, x0, Condition(), level, eps)
        torch.testing.assert_close(loss, expected * weight(level.alpha, level.sigma, p), atol=1e-12, rtol=1e-6)
        assert loss.isfinite().all()


@pytest.mark.parametrize("name", options("times"))
def test_training_times_cover_every_entry_equally(name):
    times, scheduler = build("times", name), build("scheduler", "scaled_linear", num_train_timesteps=10)
    level = times((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, scheduler)
    assert torch.equal(level.timestep.long().bincount(), torch.full((10,), 100))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_sampler_reaches_the_exact_gaussian(scheduler, sampler, spacing):
    """100 steps from noise with the ideal denoiser give the data's mean and standard deviation."""
    scheduler, solver, law = build("scheduler", scheduler), build("sampler", sampler), data()
    levels = solver.levels(scheduler, 100, build("grid", spacing))
    noise = randn(4096, 4, 1, 1)
    x = (noise - noise.mean(0)) / noise.std(0) * levels.start  # no sampling error of its own
    *_, last = solver(law.denoise, levels, x, lambda like: randn(*like.shape, seed=7))
    # Compared with where the exact ODE carries the same noise; the first-order ones stay within a tenth in 100 steps.
    exact = law.flow(x, levels[0], scheduler.level(0.0))
    mean, ratio = (last.x_next - exact).mean(0), last.x_next.std(0) / exact.std(0)
    assert mean.abs().max() < 0.02, mean.flatten()
    assert (ratio - 1).abs().max() < (0.1 if sampler != "dpmpp_2m" else 0.06), ratio.flatten()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_ancestral_ddim_keeps_the_law(scheduler):
    """eta = 1 at 400 steps: the published bias of few steps (0.96 to 1.00) and no more."""
    scheduler, solver, law = build("scheduler", scheduler), build("sampler", "ddim").with_eta(1.0), data()
    draws = generator(3)
    levels = solver.levels(scheduler, 400)
    steps = solver(
        law.denoise, levels, randn(4096, 4, 1, 1), lambda x: torch.randn(x.shape, generator=draws, dtype=x.dtype)
    )
    *_, last = steps
    ratio = last.x_next.std(0).flatten() / law.std.flatten()
    assert ratio.min() > 0.93 and ratio.max() < 1.05, ratio


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_more_steps_follow_the_ode_more_closely(sampler):
    solver, law, scheduler = build("sampler", sampler), data(), build("scheduler", "flow")
    errors = []
    for n in (10, 20, 40, 80):
        levels = solver.levels(scheduler, n)
        x = randn(64, 4, 1, 1) * levels.start
        *_, last = solver(law.denoise, levels, x, randn)
        errors.append((last.x_next - law.flow(x, levels[0], levels[-1])).abs().max().item())
    # The last step, into sigma = 0, is of first order in every published solver.
    assert all(math.log2(a / b) > 0.8 for a, b in pairwise(errors)), errors


def test_euler_equals_ddim():
    """Both integrate the same straight line between two levels."""
    law = data()
    for name in SCHEDULERS:
        scheduler = build("scheduler", name)
        results = []
        for sampler in ("ddim", "euler"):
            solver = build("sampler", sampler)
            levels = own_solver(scheduler).levels(scheduler, 12)
            *_, last = solver(law.denoise, levels, randn(8, 4, 2, 2), randn)
            results.append(last.x_next)
        torch.testing.assert_close(*results)


def test_consumer_may_replace_x_next():
    solver, law, scheduler = build("sampler", "ddim"), data(), build("scheduler", "cosine")
    seen = []
    for step in solver(law.denoise, solver.levels(scheduler, 5), randn(2, 4, 2, 2), randn):
        seen.append(step.x_t)
        step.x_next = torch.full_like(step.x_next, 3.0)
    assert all(bool((x == 3.0).all()) for x in seen[1:])


def test_guidance_is_the_published_formula():
    p, scheduler = build("parameterization", "eps"), build("scheduler", "scaled_linear")
    model = lambda x, t, c: c.context.mean(dim=(1, 2)).view(-1, 1, 1, 1) * x  # noqa: E731
    denoiser, level, x_t = Denoiser(model, scheduler, p), scheduler.level(0.5), randn(2, 4, 3, 3)
    cond, reference = Condition(context=randn(2, 5, 6)), Condition(context=randn(2, 5, 6, seed=1))
    positive, negative = denoiser.output(x_t, level, cond), denoiser.output(x_t, level, reference)
    guided = ClassifierFree()(denoiser, cond, reference, 7.5)
    torch.testing.assert_close(guided(x_t, level), p.x0(x_t, negative + 7.5 * (positive - negative), level))
    # Scale 1, or outside the interval: the caption alone.
    for plain in (Guided(denoiser, cond, reference, 1.0), Guided(denoiser, cond, reference, 7.5, interval=(50, 99))):
        torch.testing.assert_close(plain(x_t, level), p.x0(x_t, positive, level))
    # Full rescale: the guided output has the positive output's standard deviation.
    rescaled = ClassifierFree(rescale=1.0)(denoiser, cond, reference, 7.5)(x_t, level)
    output = (x_t - level.alpha * rescaled) / level.sigma
    torch.testing.assert_close(output.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: build("parameterization", "eps").check(build("scheduler", "flow")), "parameterization=v"),
        (lambda: build("sampler", "ddim").levels(build("scheduler", "cosine"), 0), "num_steps=0"),
        (lambda: build("sampler", "ddim").levels(build("scheduler", "cosine"), 1001), "1000 or fewer"),
        (lambda: build("sampler", "euler").with_eta(0.5), "sampler=ddim"),
        (lambda: ScaledLinear(beta_end=1.5), "beta_end"),
        (lambda: ClassifierFree(rescale=2.0), "0.7"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(act, words):
    with pytest.raises(ConfigError, match=words):
        act()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_solver_is_finite_from_its_first_level(scheduler, sampler):
    scheduler, solver, law = build("scheduler", scheduler), build("sampler", sampler), data()
    for n in (1, 2, 3, 20):
        levels = solver.levels(scheduler, n)
        steps = list(solver(law.denoise, levels, randn(2, 4, 2, 2) * levels.start, randn))
        assert len(steps) == n and steps[-1].next.sigma == 0
        assert all(s.x_next.isfinite().all() for s in steps)
        assert isinstance(steps[0].level, Level)
