"""What samplers take beside their levels: churn, limits on the jump, orders, fresh noise."""

from dataclasses import replace

import pytest
import torch
from conf_nodes import build
from draws import generator, randn

from ldm.diffusion.exact import Gaussian
from ldm.diffusion.thresholding import clip, dynamic

CHURN = "ldm.diffusion.samplers.churn.Churn"
DATA = Gaussian(torch.full((1, 4, 1, 1), 0.2).double(), torch.tensor([0.3, 0.6, 0.9, 1.2]).double().view(1, 4, 1, 1))


def walk(solver, scheduler, n, x, denoise=DATA.denoise, spacing="karras", seed=3):
    levels = solver.levels(scheduler, n, spacing and build("grid", spacing))
    draws = generator(seed)
    noise = lambda like: torch.randn(like.shape, generator=draws, dtype=like.dtype)  # noqa: E731
    return list(solver(denoise, levels, x * levels.start, noise))


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("scheduler", ["scaled_linear", "edm", "flow"])
def test_churn_keeps_the_law_and_raises_the_level(name, scheduler):
    """Karras et al. 2022, Algorithm 2: the network is called at the raised sigma, outside the range nothing happens."""
    scheduler, x = build("scheduler", scheduler), randn(4096, 4, 1, 1)
    plain = build("sampler", name)
    churned = build("sampler", name, solve={"churn": {"_target_": CHURN, "amount": 20.0, "low": 0.05, "high": 10.0}})
    spacing = None if scheduler.coordinate == "sigma" else "karras"
    before, after = (walk(s, scheduler, 60, x, spacing=spacing) for s in (plain, churned))
    for a, b in zip(before, after, strict=True):
        gamma = 20 / 60 if 0.05 <= a.level.ratio <= 10 else 0.0
        assert b.level.ratio == pytest.approx(a.level.ratio * (1 + gamma), rel=1e-9)
    assert not torch.allclose(before[-1].x_next, after[-1].x_next)
    reached = after[-1].x_next
    assert (reached.mean(0) - DATA.mean[0]).abs().max() < 0.06
    ratio = reached.std(0).flatten() / DATA.std.flatten()
    low, high = (0.85, 1.1) if name == "euler" else (0.93, 1.07)  # Euler's narrowness is that of ancestral steps
    assert low < ratio.min() and ratio.max() < high, ratio
    none = build("sampler", name, solve={"churn": {"_target_": CHURN, "amount": 0.0}})
    torch.testing.assert_close(walk(none, scheduler, 60, x, spacing=spacing)[-1].x_next, before[-1].x_next)


def test_limits_act_on_every_jump():
    scheduler, x = build("scheduler", "scaled_linear"), randn(8, 4, 4, 4)
    seen = []

    def limit(x0):
        seen.append(x0)
        return clip(x0, 0.5)

    solver = build("sampler", "heun")
    steps = walk(replace(solver, limit=limit), scheduler, 6, x)
    assert len(seen) == 11  # both calls of a step
    assert all(s.x0.abs().max() <= 0.5 for s in steps) and steps[-1].x_next.abs().max() <= 0.5


def test_dynamic_thresholding_is_imagens():
    """Saharia et al. 2022: s is the quantile, at least 1; within it nothing changes."""
    quiet = 0.9 * torch.rand(2, 3, 8, 8) - 0.45
    assert torch.equal(dynamic(quiet, 0.99), quiet)
    loud = torch.cat([quiet, 6 * torch.rand(1, 3, 8, 8) - 3])
    out = dynamic(loud, quantile=0.9, largest=10.0)
    assert torch.equal(out[:2], quiet)
    s = loud[2].flatten().abs().sort().values[int(0.9 * 191)]
    assert out[2].abs().max() == 1 and (loud[2].abs() <= s).float().mean() > 0.88
    inside = loud[2].abs() <= s
    torch.testing.assert_close(out[2][inside], (loud[2] / torch.quantile(loud[2].abs(), 0.9))[inside])
    assert dynamic(loud, 0.9, largest=1.0)[2].abs().max() == 1  # then it is clipping to [-1, 1]
    torch.testing.assert_close(dynamic(loud, 0.9, largest=1.0), clip(loud))


@pytest.mark.parametrize("name", ["ddim", "dpm2", "dpmpp_2m", "dpmpp_sde"])
def test_eta_goes_from_the_ode_to_the_sde(name):
    """eta 0 draws nothing that shows; eta 1 is the named stochastic sampler; s_noise 0 has no noise at all."""
    scheduler, x = build("scheduler", "scaled_linear"), randn(64, 4, 1, 1)
    solver = build("sampler", name)
    still = [walk(solver.with_eta(0.0), scheduler, 8, x, seed=s)[-1].x_next for s in (1, 2)]
    torch.testing.assert_close(still[0], still[1])
    moved = [walk(solver.with_eta(1.0), scheduler, 8, x, seed=s)[-1].x_next for s in (1, 2)]
    assert not torch.allclose(moved[0], moved[1])
    silent = build("sampler", name, solve={"eta": 1.0, "s_noise": 0.0})
    quiet = [walk(silent, scheduler, 8, x, seed=s)[-1].x_next for s in (1, 2)]
    torch.testing.assert_close(quiet[0], quiet[1])
    named = {"dpm2": "dpm2_ancestral", "dpmpp_2m": "dpmpp_2m_sde", "dpmpp_sde": "dpmpp_sde"}.get(name)
    if named:
        torch.testing.assert_close(walk(build("sampler", named), scheduler, 8, x, seed=1)[-1].x_next, moved[0])
