"""Training ends where theory says: at the exact denoiser of Gaussian data, whatever is predicted."""

import pytest
import torch
from conf_nodes import build, options
from tiny_training import config, make_data
from torch import nn

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.loss import predict
from ldm.errors import ConfigError
from ldm.training.run.fit import train_run

CASES = [(p, s) for s in ("cosine", "flow", "edm") for p in options("parameterization") if (p, s) != ("eps", "flow")]


class AffineInX(nn.Module):
    """out = a(timestep) x + b(timestep): for Gaussian data the best output is of this form."""

    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.net = nn.Sequential(nn.Linear(9, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, timestep, cond):
        tau = (timestep * self.scale)[:, None]
        waves = torch.arange(1, 5) * torch.pi * tau
        a, b = self.net(torch.cat([tau, waves.sin(), waves.cos()], dim=1)).split(1, dim=1)
        return a[..., None, None] * x + b[..., None, None]


@pytest.mark.parametrize(("parameterization", "scheduler"), CASES)
def test_training_converges_to_the_exact_denoiser(parameterization, scheduler):
    """The excess over the irreducible loss, by level, after 400 steps: a few percent of what there is to learn."""
    torch.manual_seed(0)
    scheduler, p = build("scheduler", scheduler), build("parameterization", parameterization)
    network = AffineInX(1 if scheduler.sigma_data else 1e-3)
    denoiser, weighting = Denoiser(network, scheduler, p), build("weighting", "min_snr")
    times = build("times", "lognormal" if scheduler.sigma_data else "uniform", stratified=True)
    law = Gaussian(torch.full((1, 1, 1, 1), 0.5), torch.full((1, 1, 1, 1), 0.6))
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    draws = torch.Generator().manual_seed(1)
    for _ in range(400):
        x0, eps = law.sample(512, draws), torch.randn(512, 1, 1, 1, generator=draws)
        u = (torch.arange(512) + torch.rand(512, generator=draws)) / 512
        predict(denoiser, x0, Condition(), times(u, scheduler), eps).loss(weighting).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    for ratio in (0.1, 0.5, 1.0, 3.0):
        level = scheduler.level_at(ratio)
        x_t = level.alpha * law.sample(4096, draws) + level.sigma * torch.randn(4096, 1, 1, 1, generator=draws)
        with torch.no_grad():
            excess = (denoiser(x_t, level, Condition()) - law.denoise(x_t, level)).square().mean()
        assert excess < 0.05 * law.irreducible_loss(level).item(), ratio


def test_the_gaussian_line_of_a_validation_is_the_loss_of_the_best_linear_denoiser(tmp_path):
    """On a cosine table with v it is 1: unit-variance latents and noise say nothing about v."""
    _, _, latents = make_data(tmp_path)
    settings = config(f"shards={latents}", "max_steps=1", "callbacks.validation.every_n_steps=1", "optimizer.lr=1e-9")
    metrics = train_run(settings, lambda digest: tmp_path / "run").metrics

    scheduler = build("scheduler", "cosine")
    expected = []
    for i in range(10):
        level = scheduler.level(scheduler.snap((i + 0.5) / 10))
        # E[v x_t] = alpha sigma - sigma alpha = 0 for unit-variance data: nothing can be said about v.
        expected.append(level.alpha**2 + level.sigma**2)
    assert metrics["val/gaussian_loss"] == pytest.approx(sum(expected) / 10, rel=1e-6)


def test_refused_pairs_are_refused():
    with pytest.raises(ConfigError):
        build("parameterization", "eps").check(build("scheduler", "flow"))
