"""Where ours parts from diffusers' samplers, and why; and its samplers that are not of Stable Diffusion's table."""

import math
import sys
from importlib import import_module
from itertools import pairwise
from types import ModuleType

import diffusers
import numpy as np
import pytest
import torch
from conf_nodes import build
from diffusers_walks import SPACINGS, TABLE, network, ours, relative, theirs
from draws import randn

from ldm.diffusion.exact import Gaussian
from ldm.diffusion.levels import Levels
from ldm.errors import ConfigError
from ldm.formats.schedulers import own_sampler


class TestGrid:
    """DDIM and PNDM of diffusers step by 1000 // n, whatever the next entry of their grid is."""

    @pytest.mark.parametrize("name", ["ddim", "pndm"])
    @pytest.mark.parametrize(("spacing", "n"), [("linspace", 10), ("trailing", 15)])
    def test_off_the_grid_ours_keeps_to_it(self, name, spacing, n):
        """Under a constant eps the exact path is alpha y + sigma eps: ours is on it at every level, theirs is not."""
        cls = {"ddim": diffusers.DDIMScheduler, "pndm": diffusers.PNDMScheduler}[name]
        settings = {"clip_sample": False} if name == "ddim" else {"skip_prk_steps": True}
        published = cls(**TABLE, **settings, timestep_spacing=spacing)
        published.set_timesteps(n)
        solver, scheduler = build("sampler", name), build("scheduler", "scaled_linear")
        levels = solver.levels(scheduler, n, build("grid", spacing))
        assert [lv.timestep for lv in levels][:-1] == [float(t) for t in published.timesteps]
        x, eps = randn(2, 4, 2, 2), randn(2, 4, 2, 2, seed=1)
        y = (x - levels[0].sigma * eps) / levels[0].alpha

        def exact(timestep):
            level = scheduler.level((timestep + 1) / 1000)
            return level.alpha * y + level.sigma * eps

        for step in solver(lambda x_t, lv: (x_t - lv.sigma * eps) / lv.alpha, levels, x, None):
            expected = step.next.alpha * y + step.next.sigma * eps
            torch.testing.assert_close(step.x_next, expected, rtol=1e-12, atol=1e-12)

        first, second = (int(t) for t in published.timesteps[:2])
        reached = published.step(eps.float(), first, x.float()).prev_sample.double()
        assert relative(reached, exact(first - 1000 // n)) < 1e-5
        assert relative(reached, exact(second)) > 5e-4

    @pytest.mark.parametrize("name", ["ddim", "pndm"])
    def test_what_it_costs(self, name):
        """Gaussian data on linspace: ours keeps the deviation at any n; theirs is up to 1.28 times too wide at 400."""
        data = Gaussian(torch.zeros(1, 1, 1, 1).double(), torch.full((1, 1, 1, 1), 0.3).double())
        solver, scheduler = build("sampler", name), build("scheduler", "scaled_linear")
        levels = solver.levels(scheduler, 400, build("grid", "linspace"))
        x = randn(64, 1, 1, 1)
        *_, last = solver(data.denoise, levels, x, None)
        exact = data.flow(x, levels[0], levels[-1])
        torch.testing.assert_close(last.x_next.std(), exact.std(), rtol=0.03, atol=0)
        cls = {"ddim": diffusers.DDIMScheduler, "pndm": diffusers.PNDMScheduler}[name]
        settings = {"clip_sample": False} if name == "ddim" else {"skip_prk_steps": True}
        published = cls(**TABLE, **settings, timestep_spacing="linspace")
        published.set_timesteps(400)
        reached = x.float()
        for t in published.timesteps:
            level = scheduler.level((int(t) + 1) / 1000)
            eps = (reached - level.alpha * data.denoise(reached, level)) / level.sigma
            reached = published.step(eps.float(), t, reached).prev_sample
        assert reached.std() / exact.std() > 1.1


class TestThirdOrderSde:
    """DPM-Solver++(3M) SDE: ours is k-diffusion's (Crowson 2022). diffusers takes midpoint weights in the second step,
    weighs the second difference by -1/2 - phi/h instead of 1/2 - phi/h, and lowers the order in runs below 15 steps."""

    @pytest.mark.parametrize("schedule", ["edm", "scaled_linear"])
    @pytest.mark.parametrize("n", [3, 8, 20])
    @pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
    def test_it_is_the_published_algorithm(self, schedule, n, eta):
        """Written out: exponential integration of the quadratic through three calls in lambda = -log sigma."""
        scheduler, solver = build("scheduler", schedule), build("sampler", "dpmpp_3m_sde").with_eta(eta)
        levels = solver.levels(scheduler, n, build("grid", "karras"))
        x, draws = randn(2, 4, 4, 4), [randn(2, 4, 4, 4, seed=i) for i in range(1, n)]
        given = iter(draws)
        denoise = lambda x_t, level: network(x_t, level.timestep)  # noqa: E731
        steps = list(solver(denoise, levels, x, lambda like: next(given)))

        sigmas, y = [level.ratio for level in levels], x / levels[0].alpha  # k-diffusion's x is ours over alpha
        calls, steps_back = [], []  # x0 and the lengths of steps in lambda, newest first
        for i, (sigma, after) in enumerate(pairwise(sigmas[:-1])):
            calls.insert(0, denoise(levels[i].alpha * y, levels[i]))
            h = math.log(sigma / after)
            grown = (1 + eta) * h
            phi_2 = (math.exp(-grown) - 1 + grown) / grown
            phi_3 = phi_2 / grown - 1 / 2
            y = math.exp(-grown) * y + (1 - math.exp(-grown)) * calls[0]
            slopes = [(a - b) / (back / h) for a, b, back in zip(calls, calls[1:], steps_back, strict=False)]
            if len(slopes) == 1:
                y = y + phi_2 * slopes[0]
            elif len(slopes) > 1:
                r = [back / h for back in steps_back[:2]]
                bend = (slopes[0] - slopes[1]) / sum(r)
                y = y + phi_2 * (slopes[0] + r[0] * bend) - phi_3 * bend
            if eta:
                y = y + draws[i] * after * (1 - math.exp(-2 * eta * h)) ** 0.5
            steps_back.insert(0, h)
            assert relative(steps[i].x_next, levels[i + 1].alpha * y) < 1e-6, i
        assert relative(steps[-1].x_next, steps[-1].x0) < 1e-6, "the last step is the jump"

    def test_a_file_that_asks_for_diffusers_is_refused_by_name(self):
        said = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++", "solver_order": 3}
        with pytest.raises(ConfigError, match="sampler=dpmpp_3m_sde"):
            own_sampler(TABLE | said)
        x, told = randn(2, 4, 4, 4).float(), []
        expected = theirs("dpmpp_3m_sde", "karras", 20, "epsilon", x, told)
        path, _ = ours("dpmpp_3m_sde", "karras", 20, "epsilon", x, told)
        apart = [relative(a, b) for a, b in zip(path, expected, strict=True)]
        assert apart[0] < 2e-5 and apart[1] > 1e-3 and apart[-1] > 1e-2, "the first step alone is the same"

    def test_ours_is_of_second_order_and_theirs_of_first(self):
        """x0 = cos(lambda) and no noise: what is left is the integral of 2 exp(-2 (lambda' - lambda)) x0(lambda)."""
        errors = {n: self.errors(n) for n in (80, 160)}
        (ours_80, theirs_80), (ours_160, theirs_160) = errors.values()
        assert 1.7 < math.log2(ours_80 / ours_160) < 2.3, errors
        assert 0.7 < math.log2(theirs_80 / theirs_160) < 1.3, errors
        assert ours_160 < theirs_160 / 10, errors

    @staticmethod
    def errors(n):
        """Of x/sigma, ours and theirs, at the last level above 0."""
        solver, scheduler = build("sampler", "dpmpp_3m_sde"), build("scheduler", "scaled_linear")
        levels = solver.levels(scheduler, n, build("grid", "logsnr"))
        x = torch.zeros(1, 1, 1, 1)
        x0 = lambda level: torch.full_like(x, math.cos(level.log_snr / 2), dtype=torch.float64)  # noqa: E731
        steps = list(solver(lambda x_t, level: x0(level), levels, x, torch.zeros_like))
        path = _walked_by_diffusers(
            n, x, lambda reached, level: x0(level), torch.zeros_like, use_exponential_sigmas=True
        )
        first, last = (level.log_snr / 2 for level in (levels[0], levels[-2]))
        primitive = lambda at: math.exp(2 * (at - last)) * (4 * math.cos(at) + 2 * math.sin(at)) / 5  # noqa: E731
        exact = levels[-2].alpha * (primitive(last) - primitive(first))
        return [abs(r.item() - exact) / levels[-2].sigma for r in (steps[-2].x_next, path[-1])]

    def test_ours_keeps_the_deviation_of_gaussian_data(self):
        """25 steps on Karras' levels, the same noise: diffusers' pictures are 7 to 9 % too wide."""
        data = Gaussian(torch.zeros(1, 4, 1, 1).double(), torch.tensor([0.3, 0.6, 0.9, 1.2]).double().view(1, 4, 1, 1))
        solver, scheduler = build("sampler", "dpmpp_3m_sde"), build("scheduler", "scaled_linear")
        levels = solver.levels(scheduler, 25, build("grid", "karras"))
        x = randn(8192, 4, 1, 1)
        draws = [randn(*x.shape, seed=i) for i in range(1, 25)]
        given, same = iter(draws), iter(draws)
        *_, last = solver(data.denoise, levels, x, lambda like: next(given))
        path = _walked_by_diffusers(25, x, data.denoise, lambda like: next(same), use_karras_sigmas=True)
        wide = {
            "ours": relative_deviation(last.x_t, data, levels[-2]),
            "theirs": relative_deviation(path[-1], data, levels[-2]),
        }
        assert wide["ours"].min() > 0.98 and wide["ours"].max() < 1.03, wide
        assert wide["theirs"].min() > 1.05, wide


class TestLinearMultistepOfAPart:
    """LMS begun within its grid (image to image): diffusers keeps the order's weights and has one slope to weigh."""

    def test_ours_is_on_the_path_and_theirs_is_not(self):
        """Gaussian data, Stable Diffusion's table, strength 0.6 of 25 steps."""
        data = Gaussian(torch.zeros(1, 4, 1, 1).double(), torch.tensor([0.3, 0.6, 0.9, 1.2]).double().view(1, 4, 1, 1))
        solver, scheduler = build("sampler", "lms"), build("scheduler", "scaled_linear")
        levels = solver.levels(scheduler, 25)[10:]
        x = levels[0].alpha * data.std * randn(64, 4, 1, 1) + levels[0].sigma * randn(64, 4, 1, 1, seed=1)
        steps = list(solver(data.denoise, levels, x, None))
        published = diffusers.LMSDiscreteScheduler(**TABLE)
        published.set_timesteps(25)
        published.set_begin_index(10)
        reached, path = x / levels[0].alpha, []
        for t, level in zip(published.timesteps[10:], levels, strict=False):
            published.scale_model_input(reached, t)
            eps = (reached - data.denoise(level.alpha * reached, level)) / level.ratio
            reached = published.step(eps, t, reached).prev_sample
            path.append(reached)
        exact = data.flow(x, levels[0], levels[1])
        first = relative(steps[0].x_next, exact), relative(levels[1].alpha * path[0], exact)
        exact = data.flow(x, levels[0], levels[-1])
        last = relative(steps[-1].x_next, exact), relative(path[-1], exact)
        assert first == pytest.approx((0.0015, 0.133), rel=0.05), "of one step: Euler's error, and theirs"
        assert last == pytest.approx((0.0024, 0.0602), rel=0.05), "of the whole walk"

    def test_a_whole_run_is_the_same(self):
        x, told = randn(2, 4, 4, 4).float(), []
        expected = theirs("lms", "linspace", 25, "epsilon", x, told)
        path, _ = ours("lms", "linspace", 25, "epsilon", x, told)
        assert relative(path[-1], expected[-1]) < 2e-5


def relative_deviation(x, data, level):
    """The deviation of x over the exact one of this level, each channel."""
    return (x.std(0) / (level.alpha**2 * data.std**2 + level.sigma**2) ** 0.5).flatten()


def _walked_by_diffusers(n, x, denoise, noise, **spacing):
    """x after each of diffusers' 3M SDE steps but the one into sigma = 0."""
    published = diffusers.DPMSolverMultistepScheduler(
        **TABLE, algorithm_type="sde-dpmsolver++", solver_order=3, **spacing
    )
    published.set_timesteps(n)
    scheduler, reached, path = build("scheduler", "scaled_linear"), x.float(), []
    for t, sigma in zip(published.timesteps[:-1], published.sigmas, strict=False):
        level = scheduler.level_at(sigma.item())
        eps = (reached - level.alpha * denoise(reached, level)) / level.sigma
        reached = published.step(eps.float(), t, reached, variance_noise=noise(reached)).prev_sample
        path.append(reached)
    return path


@pytest.fixture
def sde_scheduler(monkeypatch):
    """diffusers.DPMSolverSDEScheduler: needs torchsde for its noise alone, which the test replaces."""
    monkeypatch.setitem(sys.modules, "torchsde", ModuleType("torchsde"))
    name = "diffusers.schedulers.scheduling_dpmsolver_sde"
    yield import_module(name).DPMSolverSDEScheduler
    sys.modules.pop(name, None)


@pytest.mark.parametrize("n", [4, 10])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_dpmpp_sde(sde_scheduler, spacing, n, prediction):
    """The same Brownian path: its noise over a whole step is made of ours' two draws as ours makes it."""
    mids, seconds = randn(n, 2, 4, 4, 4).float(), randn(n, 2, 4, 4, 4, seed=1).float()
    published = sde_scheduler(**TABLE, **SPACINGS[spacing], prediction_type=prediction)
    published.set_timesteps(n)
    calls = []

    def path_noise(sigma, to):
        i, whole = divmod(len(calls), 2)
        calls.append(to)
        shared = (sigma - calls[-2]) / (sigma - to) if whole else 1.0
        return shared**0.5 * mids[i] + (1 - shared) ** 0.5 * seconds[i]

    x, told = randn(2, 4, 4, 4).float(), []
    published.noise_sampler = path_noise
    sample, path = x * published.init_noise_sigma, []
    for t in published.timesteps:
        told.append(float(t))
        out = network(published.scale_model_input(sample, t), float(t))
        sample = published.step(out, t, sample).prev_sample
        sigma = published.sigmas[published.step_index].item()
        path.append(sample / (1 + sigma**2) ** 0.5)
    draws = iter(torch.stack([mids, seconds], dim=1).flatten(0, 1))
    reached, seen = ours("dpmpp_sde", spacing, n, prediction, x, told, noise=lambda like: next(draws))
    assert seen == pytest.approx(told, abs=2e-3)
    expected = [*path[1:-1:2], path[-1]]  # two calls a step, one into sigma = 0
    assert max(relative(a, b) for a, b in zip(reached, expected, strict=True)) < 2e-5


FLOWS = [("euler", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")]


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "cls"), FLOWS)
def test_rectified_flow(name, cls, shift):
    """On diffusers' own levels: with a shift their last sigma is shifted twice, and is on no grid of ours."""
    published = getattr(diffusers, cls)(shift=shift)
    published.set_timesteps(10)
    sigmas = list(dict.fromkeys(published.sigmas.tolist()))  # Heun's stand twice
    scheduler, solver = build("scheduler", "flow", shift=shift), build("sampler", name)
    levels = Levels([scheduler.level_at_position(s) for s in sigmas], 1.0, "sigma", scheduler)
    if shift == 1:
        spaced = [lv.sigma for lv in solver.levels(scheduler, 10, build("grid", "linspace"))]
        assert spaced == pytest.approx(sigmas, abs=1e-6)
    _same_flow(solver, levels, published)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_rectified_flow_on_the_pipelines_sigmas(shift):
    """Flow pipelines hand over linspace(1, 1/n, n): our trailing grid, shifted."""
    published = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    published.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12))
    scheduler, solver = build("scheduler", "flow", shift=shift), build("sampler", "euler")
    levels = solver.levels(scheduler, 12, build("grid", "trailing"))
    assert [lv.sigma for lv in levels] == pytest.approx(published.sigmas.tolist(), abs=1e-6)
    _same_flow(solver, levels, published)


def _same_flow(solver, levels, published):
    """The same x after every call, and the same times told."""
    velocity = build("parameterization", "velocity")
    sample, told, path, seen = randn(2, 4, 4, 4).float(), [], [], []
    x = sample
    for t in published.timesteps:
        told.append(float(t))
        sample = published.step(network(sample, float(t)), t, sample).prev_sample
        path.append(sample)

    def denoise(x_t, level):
        seen.append(float(level.timestep))
        return velocity.x0(x_t, network(x_t, level.timestep), level)

    *_, last = steps = list(solver(denoise, levels, x, None))
    assert seen == pytest.approx(told, abs=2e-3)
    assert relative(last.x_next, path[-1]) < 2e-5
    if len(path) == len(steps):
        assert max(relative(s.x_next, b) for s, b in zip(steps, path, strict=True)) < 2e-5


def test_edm_euler():
    """EDMEulerScheduler's "epsilon" is the preconditioned network's output; its sigma_data set to ours."""
    published = diffusers.EDMEulerScheduler(sigma_data=1.0)
    published.set_timesteps(18)
    scheduler, edm = build("scheduler", "edm"), build("parameterization", "edm")
    solver = build("sampler", "euler")
    levels = solver.levels(scheduler, 18, build("grid", "karras"))
    x = sample = 80 * randn(2, 4, 4, 4).float()
    told, path, seen = [], [], []
    for t in published.timesteps:
        told.append(float(t))
        out = network(published.scale_model_input(sample, t), 1000 * float(t))
        sample = published.step(out, t, sample).prev_sample
        path.append(sample)

    def denoise(x_t, level):
        seen.append(level.timestep)
        return edm.x0(x_t, network(x_t / (1 + level.sigma**2) ** 0.5, 1000 * level.timestep), level)

    reached = [step.x_next for step in solver(denoise, levels, x, None)]
    assert seen == pytest.approx(told, abs=1e-5)
    assert max(relative(a, b) for a, b in zip(reached, path, strict=True)) < 2e-5
