"""task=objective: its numbers are the published objectives', its findings say what is wrong and nothing else."""

import csv
import math

import pytest
from commands import here
from conf_nodes import build, options

from ldm.analysis.objective import by_log_snr, findings
from ldm.diffusion.samplers.own import own_solver


def objective(scheduler, parameterization, weighting="simple", times="uniform", **scheduler_options):
    scheduler = build("scheduler", scheduler, **scheduler_options)
    parameterization = build("parameterization", parameterization)
    bins = by_log_snr(scheduler, parameterization, build("weighting", weighting), build("times", times))
    levels = own_solver(scheduler).levels(scheduler, 20)
    return bins, findings(scheduler, bins, levels)


@pytest.mark.parametrize("weighting", options("weighting"))
@pytest.mark.parametrize("scheduler", options("scheduler"))
def test_shares_add_up(scheduler, weighting):
    bins, _ = objective(scheduler, "v", weighting)
    for name in ("share", "emphasis", "on_x0"):
        assert sum(getattr(b, name) for b in bins) == pytest.approx(1.0)


def test_what_is_equivalent_is_the_same_objective():
    """Simple eps, SNR-weighted x0 and SNR-weighted v are one function of log-SNR (Kingma and Gao 2023)."""
    reference = [b.on_x0 for b in objective("cosine", "eps")[0]]
    for parameterization in ("x0", "v"):
        assert [b.on_x0 for b in objective("cosine", parameterization, "snr")[0]] == pytest.approx(reference)
    # Weighted with 1 the edm output is the published lambda: constant over the output.
    assert {round(b.weight, 9) for b in objective("edm", "edm", "edm", "lognormal")[0]} == {1.0}


def test_karras_draws_are_a_normal_in_log_snr():
    bins, _ = objective("edm", "edm", "edm", "lognormal")
    cdf = lambda log_snr: 0.5 * math.erfc((-log_snr / 2 + 0.5) / 1.2 / math.sqrt(2))  # noqa: E731
    for b in bins[1:-1]:
        assert b.share == pytest.approx(cdf(b.high) - cdf(b.low), abs=2e-4)


def test_findings_name_what_is_wrong():
    assert any("0.0683" in f and "zero_terminal_snr" in f for f in objective("scaled_linear", "eps")[1])
    assert objective("scaled_linear", "v", zero_terminal_snr=True)[1] == []
    assert objective("cosine", "v")[1] == [] and objective("flow", "velocity")[1] == []
    starved = objective("scaled_linear", "v", "min_snr", zero_terminal_snr=True)[1]
    assert any("weight 0" in f for f in starved)
    assert any("of the weighted loss" in f for f in objective("cosine", "eps", "x0_uniform")[1])


@pytest.mark.slow
def test_the_command_writes_table_and_figure(tmp_path):
    done = here("task=objective", "scheduler=flow", "parameterization=velocity", "output=here", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is wrong" in done.stdout and (tmp_path / "here/objective.png").stat().st_size > 10_000
    rows = list(csv.DictReader((tmp_path / "here/objective.csv").open()))
    assert sum(float(r["share"]) for r in rows) == pytest.approx(1.0)
    refused = here("task=objective", "scheduler=flow", "parameterization=eps", "output=there", cwd=tmp_path)
    assert refused.returncode == 2 and "parameterization=v" in refused.stderr + refused.stdout
    assert not (tmp_path / "there").exists()
