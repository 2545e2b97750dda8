"""Laws that every scheduler, parameterization, weighting and time distribution obeys, parametrised over conf/."""

import math
from itertools import pairwise

import pytest
import torch
from conf_nodes import build, options
from draws import generator, randn

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian, GaussianMixture
from ldm.diffusion.grids import leading, linspace
from ldm.diffusion.levels import Level
from ldm.diffusion.loss import predict
from ldm.diffusion.schedulers import EDM, Flow, ScaledLinear, Sigmoid
from ldm.errors import ConfigError

SCHEDULERS = options("scheduler")
PARAMETERIZATIONS = options("parameterization")
TABLES = ["linear", "scaled_linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_grows_with_time(name):
    scheduler = build("scheduler", name)
    clean = scheduler.level_at(0.0)
    assert clean.sigma == 0 and clean.alpha == 1
    levels = [scheduler.level(t) for t in torch.linspace(0, 1, 333, dtype=torch.float64).tolist()]
    for a, b in pairwise(levels):
        assert b.sigma * a.alpha > a.sigma * b.alpha and b.alpha <= a.alpha and b.timestep >= a.timestep
    tensors = scheduler.level(torch.linspace(0, 1, 333, dtype=torch.float64))
    torch.testing.assert_close(tensors.sigma, torch.tensor([lv.sigma for lv in levels], dtype=torch.float64))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_level_at_is_the_inverse(name):
    """Of level(t) at the entries of tables, everywhere for formulas; the ratio asked for is kept to the last bit."""
    scheduler = build("scheduler", name)
    for t in (scheduler.first_time, 0.01, 0.25, 0.5, 0.999):
        level = scheduler.level(t)
        again = scheduler.level_at_position(level.position(scheduler.coordinate))
        assert again.position(scheduler.coordinate) == pytest.approx(level.position(scheduler.coordinate), rel=1e-12)
        assert again.t == pytest.approx(t, abs=1e-9) and again.timestep == pytest.approx(level.timestep, abs=1e-6)
        assert scheduler.level_at(3.3).sigma / scheduler.level_at(3.3).alpha == pytest.approx(3.3, rel=1e-12)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("n", [1000, 700])
def test_tables_keep_the_variance_and_invert_at_entries(name, n):
    scheduler = build("scheduler", name, num_train_timesteps=n)
    level = scheduler.level(torch.arange(1, n + 1, dtype=torch.float64) / n)
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones(n, dtype=torch.float64))
    assert torch.equal(level.timestep, torch.arange(n, dtype=torch.float64))
    back = scheduler.level_at(level.sigma / level.alpha)
    torch.testing.assert_close(back.timestep, level.timestep, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.t, level.t, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", TABLES)
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first_entry(name):
    plain, scheduler = build("scheduler", name), build("scheduler", name, zero_terminal_snr=True)
    top = scheduler.level(1.0)
    assert top.alpha == 0 and top.sigma == 1 and top.timestep == 999
    assert scheduler.level(1 / 1000).alpha == pytest.approx(plain.level(1 / 1000).alpha, rel=1e-9)
    times = torch.linspace(0.001, 1, 5000, dtype=torch.float64)
    level = scheduler.level(times)  # also between the last two entries
    assert level.alpha.isfinite().all() and (level.alpha.diff() <= 0).all() and (level.sigma.diff() >= 0).all()
    torch.testing.assert_close(level.alpha**2 + level.sigma**2, torch.ones_like(times))
    assert scheduler.level_at(math.inf).timestep == 999 and 990 < scheduler.level_at(4000.0).timestep < 999
    for parameterization in PARAMETERIZATIONS:
        p = build("parameterization", parameterization)
        if parameterization == "eps":
            with pytest.raises(ConfigError, match="alpha = 0"):
                p.check(scheduler)
            continue
        for weighting in options("weighting"):
            alpha, sigma = torch.tensor([0.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
            assert build("weighting", weighting)(alpha, sigma, p).isfinite().all(), (parameterization, weighting)
    with pytest.warns(UserWarning, match="weighting=simple"):
        build("weighting", "min_snr").check(scheduler)


def test_flow_shift_is_the_published_map():
    plain, shifted = build("scheduler", "flow"), build("scheduler", "flow", shift=3.0)
    for t in (0.0, 0.25, 0.5, 1.0):
        assert shifted.level(t).sigma == pytest.approx(3 * t / (1 + 2 * t))
        assert shifted.level(t).timestep == pytest.approx(1000 * shifted.level(t).sigma)
    assert plain.level(0.3).sigma == 0.3


def test_edm_is_karras_map():
    scheduler = build("scheduler", "edm")
    expected = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    assert [scheduler.level(1 - i / 17).sigma for i in range(18)] == pytest.approx(expected)
    assert scheduler.level(0.4).timestep == pytest.approx(math.log(scheduler.level(0.4).sigma) / 4)
    assert scheduler.level_at(0.0).timestep == scheduler.level(0.0).timestep


def test_scaled_linear_is_stable_diffusions_table():
    scheduler = build("scheduler", "scaled_linear")
    top, bottom = scheduler.level(1.0), scheduler.level(1 / 1000)
    assert top.sigma / top.alpha == pytest.approx(14.6146, abs=5e-5)
    assert bottom.sigma / bottom.alpha == pytest.approx(0.0292, abs=5e-5)


def test_fifteen_linspace_levels_reproduce_the_published_list():
    """Requirements A8: timesteps and sigmas of 15 LMS steps on Stable Diffusion's table."""
    scheduler = build("scheduler", "scaled_linear")
    levels = build("sampler", "lms").levels(scheduler, 15, build("grid", "linspace"))
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
    # x0_uniform is the squared slope of the jump: an output off by d moves x0 by sqrt(weight) d.
    moved = p.x0(x_t, p.target(x0, eps, level) + 1e-3, level) - x0
    expected = 1e-3 * build("weighting", "x0_uniform")(level.alpha, level.sigma, p).sqrt()
    torch.testing.assert_close(moved.abs().amax(dim=(1, 2, 3)), expected, atol=1e-8, rtol=1e-6)


def test_jump_to_x0_in_karras_coordinates():
    """x0 = x - sigma eps with x = x_t/alpha and sigma = sigma(t)/alpha(t): the developer's text's formula."""
    level, p = build("scheduler", "scaled_linear").level(0.6), build("parameterization", "eps")
    x_t, eps = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
    expected = x_t / level.alpha - level.sigma / level.alpha * eps
    torch.testing.assert_close(p.x0(x_t, eps, level), expected)


PUBLISHED = {  # weights on the error of eps and of v, SNR s
    "simple": {"eps": lambda s: torch.ones_like(s), "v": lambda s: torch.ones_like(s)},
    "x0_uniform": {"eps": lambda s: 1 / s, "v": lambda s: 1 / (s + 1), "x0": lambda s: torch.ones_like(s)},
    "snr": {"eps": lambda s: torch.ones_like(s), "v": lambda s: s / (s + 1), "x0": lambda s: s},
    "min_snr": {
        "eps": lambda s: s.clamp(max=5) / s,
        "v": lambda s: s.clamp(max=5) / (s + 1),
        "x0": lambda s: s.clamp(max=5),
    },
    "p2": {"eps": lambda s: 1 / (1 + s), "v": lambda s: s / (1 + s) ** 2},
    "debiased": {"eps": lambda s: s**-0.5, "v": lambda s: s**0.5 / (s + 1)},
    # Karras' lambda with alpha^2 = SNR sigma^2 put in, on the unit circle.
    "velocity": {
        "velocity": lambda s: torch.ones_like(s),
        "x0": lambda s: (1 + s**0.5) ** 2,
        "v": lambda s: 1 + 2 * s**0.5 / (1 + s),
    },
    "edm": {"eps": lambda s: (1 + s) / s, "v": lambda s: torch.ones_like(s), "edm": lambda s: torch.ones_like(s)},
}


@pytest.mark.parametrize("name", options("weighting"))
def test_weightings_have_their_published_forms(name):
    weighting = build("weighting", name)
    level = build("scheduler", "scaled_linear").level(torch.linspace(0.001, 1, 50, dtype=torch.float64))
    snr = (level.alpha / level.sigma) ** 2
    for parameterization, expected in PUBLISHED[name].items():
        weight = weighting(level.alpha, level.sigma, build("parameterization", parameterization))
        torch.testing.assert_close(weight, expected(snr))


def test_edm_preconditioning_is_karras_table_one():
    p, sigma_data = build("parameterization", "edm", sigma_data=0.5), 0.5
    for sigma in (0.01, 0.5, 3.0, 80.0):
        level = build("scheduler", "edm").level_at(sigma)
        x_t, out = randn(2, 4, 3, 3), randn(2, 4, 3, 3, seed=1)
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5
        torch.testing.assert_close(p.x0(x_t, out, level), c_skip * x_t + c_out * out)


@pytest.mark.parametrize("scheduler", ["edm", "cosine"])
@pytest.mark.parametrize("parameterization", ["edm", "v"])
def test_the_network_sees_unit_variance_where_edm_is_chosen(scheduler, parameterization):
    """Inputs are divided once by (alpha^2 sigma_data^2 + sigma^2)^0.5; concatenated channels stay as they are."""
    seen = []
    model = lambda x, t, c: seen.append(x) or x[:, :4]  # noqa: E731
    denoiser = Denoiser(model, build("scheduler", scheduler), build("parameterization", parameterization))
    level = denoiser.scheduler.level(0.9)
    x_t, concat = randn(2, 4, 3, 3), randn(2, 5, 3, 3, seed=1)
    denoiser.output(x_t, level, Condition(concat=concat))
    spread = (level.alpha**2 + level.sigma**2) ** 0.5  # 1 on tables
    scaled = "edm" in (scheduler, parameterization)
    torch.testing.assert_close(seen[0][:, :4], x_t / spread if scaled else x_t)
    assert torch.equal(seen[0][:, 4:], concat)


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
        loss = predict(denoiser, x0, Condition(), level, eps).loss(weight)
        torch.testing.assert_close(loss, expected * weight(level.alpha, level.sigma, p), atol=1e-12, rtol=1e-6)
        assert loss.isfinite().all()


@pytest.mark.parametrize("name", ["uniform", "stratified"])
def test_training_times_cover_every_entry_equally(name):
    times, scheduler = build("times", name), build("scheduler", "scaled_linear", num_train_timesteps=10)
    level = times((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000, scheduler)
    assert torch.equal(level.timestep.long().bincount(), torch.full((10,), 100))


@pytest.mark.parametrize("name", options("times"))
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_training_times_are_levels_of_the_scheduler(name, scheduler):
    scheduler, u = build("scheduler", scheduler), (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    level = build("times", name)(u, scheduler)
    assert (level.sigma.diff() >= 0).all() and level.t.min() >= scheduler.first_time - 1e-9 and level.t.max() <= 1
    torch.testing.assert_close(level.sigma / level.alpha, _ratio_of(scheduler.level(level.t)), rtol=2e-2, atol=1e-9)


def _ratio_of(level):
    return level.sigma / level.alpha


def test_logit_normal_and_lognormal_have_their_moments():
    u = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    t = build("times", "logit_normal", mean=0.5, std=0.7)(u, build("scheduler", "flow")).t
    logit = torch.logit(t)
    assert logit.mean() == pytest.approx(0.5, abs=1e-3) and logit.std() == pytest.approx(0.7, abs=1e-2)
    log_sigma = build("times", "lognormal", mean=-1.2, std=1.2)(u, build("scheduler", "edm")).sigma.log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=1e-3) and log_sigma.std() == pytest.approx(1.2, abs=1e-2)


def test_mixture_of_one_is_the_gaussian_and_of_points_is_bayes():
    level = build("scheduler", "cosine").level(0.6)
    x_t, mean = randn(3, 2, 2, 2), randn(1, 2, 2, 2, seed=1)
    one = GaussianMixture(mean, [0.7])
    gaussian = Gaussian(mean, torch.tensor(0.7, dtype=torch.float64))
    torch.testing.assert_close(one.denoise(x_t, level), gaussian.denoise(x_t, level))
    points = randn(5, 2, 2, 2, seed=2)
    squares = (x_t[:, None] - level.alpha * points).square().flatten(2).sum(2)
    share = (-squares / (2 * level.sigma**2)).softmax(1)
    expected = torch.einsum("bk,kchw->bchw", share, points)
    torch.testing.assert_close(GaussianMixture(points, [0.0] * 5).denoise(x_t, level), expected)
    batch = scheduler_batch(level, 3)
    torch.testing.assert_close(one.denoise(x_t, batch), one.denoise(x_t, level))


def scheduler_batch(level, n):
    return Level(*(torch.full((n,), v, dtype=torch.float64) for v in level))


def test_no_denoiser_beats_the_irreducible_loss():
    mixture = GaussianMixture(randn(3, 2, 1, 1), [0.2, 0.4, 0.6], [1.0, 2.0, 3.0])
    level = build("scheduler", "flow").level(0.4)
    draws = generator(5)
    x0 = mixture.sample(20000, draws)
    x_t = level.alpha * x0 + level.sigma * torch.randn(x0.shape, generator=draws, dtype=x0.dtype)
    ideal = (mixture.denoise(x_t, level) - x0).square().mean()
    assert ideal == pytest.approx(mixture.irreducible_loss(level, 20000, generator(6)).mean().item(), rel=0.05)
    inputs = torch.cat([x_t.flatten(1), torch.ones(20000, 1, dtype=torch.float64)], 1)
    linear = inputs @ torch.linalg.lstsq(inputs, x0.flatten(1)).solution
    worse = (linear - x0.flatten(1)).square().mean()
    assert ideal < worse
    # The mean of x0 given x_t: no multiple of the answer is closer.
    for factor in (0.95, 1.05):
        assert (factor * mixture.denoise(x_t, level) - x0).square().mean() > ideal


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: build("parameterization", "eps").check(build("scheduler", "flow")), "parameterization=v"),
        (lambda: build("sampler", "ddim").levels(build("scheduler", "cosine"), 0), "num_steps=0"),
        (lambda: build("sampler", "ddim").levels(build("scheduler", "cosine"), 1001), "num_steps=1000"),
        (lambda: build("sampler", "euler").with_eta(0.5), "sampler=ddim"),
        (lambda: build("sampler", "add_back").levels(build("scheduler", "flow"), 5), "sampler=euler"),
        (lambda: build("sampler", "add_back").levels(build("scheduler", "cosine"), 5, linspace), "leave grid= out"),
        (lambda: build("sampler", "ddim").levels(build("scheduler", "cosine"), 1000, leading), "use num_steps=999"),
        (lambda: leading(build("scheduler", "cosine"), 10, -1), "grid.offset=-1.*0 or 1"),
        (lambda: Sigmoid(temperature=0.0), "temperature"),
        (lambda: Flow(shift=0.0), "shift"),
        (lambda: EDM(sigma_min=0.0), "sigma_min"),
        (lambda: ScaledLinear(beta_end=1.5), "beta_end"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(act, words):
    with pytest.raises(ConfigError, match=words):
        act()
