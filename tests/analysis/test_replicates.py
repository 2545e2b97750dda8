"""Settings of a sweep over seeds: intervals, paired differences, and how seldom they see what is not there."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ldm.analysis import read_results, settings
from ldm.analysis.replicates import default_metric, interval, student_t
from ldm.errors import ConfigError
from ldm.sweep.arms import Arm, record
from ldm.sweep.end import verdict


def table_of(values: np.ndarray, states=None) -> pd.DataFrame:
    """values: (settings, seeds)."""
    rows = [
        {"lr": f"{i}", "seed": s, "state": "finished" if math.isfinite(v) else "failed", "val/loss": v}
        for i, of_seeds in enumerate(values)
        for s, v in enumerate(of_seeds)
    ]
    return pd.DataFrame(rows).assign(message="", directory="")


def simulated(rng, n_settings, n_seeds, effect=0.0, of_seed=1.0, rest=0.3) -> np.ndarray:
    """What a seed does to all settings, what else chance does, and what the last setting does."""
    values = of_seed * rng.normal(size=n_seeds) + rest * rng.normal(size=(n_settings, n_seeds))
    values[-1] += effect
    return values


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 9, 30])
def test_student_t_is_scipys(degrees):
    for share in (0.5, 0.95, 0.99, 1 - 0.05 / 20):
        assert student_t(share, degrees) == pytest.approx(stats.t.ppf((1 + share) / 2, degrees), rel=1e-10)


def test_an_interval_is_scipys():
    values = [1.0, 2.5, 2.0, 4.0]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert interval(values) == pytest.approx((np.mean(values), low, high))
    assert interval([2.0])[0] == 2.0 and all(math.isnan(v) for v in interval([2.0])[1:])


@pytest.mark.parametrize(("n_settings", "n_seeds"), [(3, 3), (5, 5)])
def test_of_200_tables_in_which_nothing_differs_at_most_5_percent_name_any(n_settings, n_seeds):
    rng = np.random.default_rng(0)
    false = sum(settings(table_of(simulated(rng, n_settings, n_seeds)), "val/loss").distinct.any() for _ in range(200))
    assert false <= 10


def test_a_difference_that_is_there_is_found_by_pairs_where_means_alone_would_not():
    rng = np.random.default_rng(0)
    found = [settings(table_of(simulated(rng, 3, 5, effect=1.5)), "val/loss").iloc[-1] for _ in range(50)]
    assert sum(row.distinct for row in found) >= 35
    overlap = [row.low < 1.5 + row["mean"] - row.difference < row.high for row in found]
    assert sum(overlap) > 35, "the seeds differ more than the settings"


def test_a_setting_is_compared_over_the_seeds_that_both_have():
    values = np.array([[1.0, 2.0, 3.0], [1.5, math.nan, 3.7], [math.nan] * 3])
    table = settings(table_of(values), "val/loss")
    assert list(table.setting) == ["lr=0", "lr=1", "lr=2"] and list(table.lr) == ["0", "1", "2"]
    assert (
        list(table.n) == [3, 2, 0] and list(table.failed) == [0, 1, 3] and list(table.baseline) == [True, False, False]
    )
    assert table.difference[1] == pytest.approx(0.6) and math.isnan(table.difference[2])
    half = stats.t.ppf(0.975, 1) * np.std([0.5, 0.7], ddof=1) / math.sqrt(2)  # one comparison is left
    assert table["difference/high"][1] == pytest.approx(0.6 + half)
    other = settings(table_of(values), "val/loss", baseline="lr=1")
    assert other.difference[0] == pytest.approx(-0.6) and other.baseline[1]
    with pytest.raises(ConfigError, match="'lr=1'"):
        settings(table_of(values), "val/loss", baseline="lr=11")
    with pytest.raises(ConfigError, match="'val/loss'"):
        settings(table_of(values), "val/los")


def test_the_verdict_says_when_it_does_not_know():
    def said(values):
        return verdict(settings(table_of(np.array(values)), "val/loss"), "val/loss")

    assert "lr=1; from the baseline, lr=0: -1 [" in said([[2.0, 3.0, 4.01], [1.0, 2.01, 3.0]])
    assert "not distinguishable from the baseline" in said([[2.0, 3.0], [1.0, 2.9]])
    assert "takes two seeds" in said([[2.0], [1.0]])
    assert "lr=0, the baseline; 0 of the other 1" in said([[1.0, 2.0], [3.0, 2.1]])
    assert said([[math.nan], [math.nan]]) == "no setting has a value of val/loss"


def test_results_are_read_as_they_were_written(tmp_path):
    for n, (state, metrics) in enumerate([("finished", {"val/loss": 0.5, "train/loss": 1.0}), ("failed", {})]):
        overrides = ["experiment=x", f"optimizer.lr=1e-{n + 1}", "ema=null"]
        record(Arm(tmp_path, overrides, ["experiment"], n), state, metrics, "a reason,\n with a comma", seed=3)
    for path in (tmp_path, tmp_path / "results.csv"):
        table = read_results(path)
        assert list(table.columns[:4]) == ["experiment", "optimizer.lr", "ema", "seed"]
        assert list(table["optimizer.lr"]) == [0.1, 0.01] and list(table["ema"]) == ["null"] * 2
        assert list(table["seed"]) == [3, 3] and table["val/loss"][0] == 0.5 and math.isnan(table["val/loss"][1])
        assert default_metric(table) == "val/loss"
    assert list(settings(read_results(tmp_path), "val/loss").setting) == ["lr=0.1", "lr=0.01"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not there"),
        ("", "no table"),
        ("a,b\n1,2\n", "no table"),
        ("seed,state,message,directory\n1,fin", "line 2"),
    ],
)
def test_a_table_that_is_none_is_refused_in_one_line(text, words, tmp_path):
    if text is not None:
        (tmp_path / "results.csv").write_text(text)
    with pytest.raises(ConfigError, match=words) as refused:
        read_results(tmp_path / "results.csv")
    assert "\n" not in str(refused.value)
