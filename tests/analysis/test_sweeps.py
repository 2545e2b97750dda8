"""Sweeps as figures: what is drawn of known results is what is in them."""

from itertools import product

import numpy as np
import pandas as pd
import pytest

from ldm.analysis import importance, plot_differences, plot_importance, plot_sweep_parallel
from ldm.errors import ConfigError


def results(value, axes: dict[str, list], failed=()) -> pd.DataFrame:
    """A full grid of arms, whose values are a function of what they were given."""
    rows = []
    for given in product(*axes.values()):
        state = "failed" if given in failed else "finished"
        rows.append([*given, state, np.nan if given in failed else value(*given), "", f"{given}"])
    return pd.DataFrame(rows, columns=[*axes, "state", "val/loss", "message", "directory"])


GRID = {"a": ["x", "y", "z"], "b": [1, 2], "seed": [0, 1, 2]}
A = {"x": 0.0, "y": 1.0, "z": 5.0}


def shares(table: pd.DataFrame) -> dict[str, float]:
    return importance(table).set_index("axis")["share"].to_dict()


def test_the_only_axis_with_an_effect_explains_everything() -> None:
    found = shares(results(lambda a, b, seed: A[a], GRID))
    assert found == pytest.approx({"a": 1, "b": 0, "seed": 0, "interactions and chance": 0}, abs=1e-9)


def test_two_effects_share_and_an_interaction_is_the_rest() -> None:
    found = shares(results(lambda b, seed: b + 2 * (seed - 1), {"b": [-1, 1], "seed": [0, 1, 2]}))
    assert found == pytest.approx({"b": 1 / (1 + 8 / 3), "seed": 8 / 3 / (1 + 8 / 3), "interactions and chance": 0})
    found = shares(results(lambda a, b: a * b, {"a": [-1, 1], "b": [-1, 1]}))
    assert found == pytest.approx({"a": 0, "b": 0, "interactions and chance": 1})


def test_chance_explains_nothing_on_average() -> None:
    """The correction takes away what levels explain of pure noise, which is (k - 1)/(n - 1) of it without."""
    draws = np.random.default_rng(0)
    tables = [results(lambda *_: draws.normal(), {"a": list("uvwxyz"), "seed": list(range(4))}) for _ in range(60)]
    found = np.mean([shares(t)["a"] for t in tables])
    assert found < 0.1 < 5 / 23


def test_numbers_of_many_values_are_cut_at_quartiles() -> None:
    table = importance(results(lambda lr: lr**0.5, {"lr": list(np.linspace(0.001, 0.1, 40))}))
    assert table.loc[0, "levels"] == 4 and table.loc[0, "share"] > 0.8


def test_a_line_an_arm_ends_at_its_value_or_before_it() -> None:
    table = results(lambda a, b, seed: A[a] + seed, GRID, failed=[("x", 1, 0)])
    axes = plot_sweep_parallel(table).axes[0]
    lines = [line for line in axes.lines if line.get_label() != "_axis"]
    assert len(lines) == 18 and sorted(len(line.get_xdata()) for line in lines) == [3] + [4] * 17
    values = table["val/loss"].dropna()
    ends = [line.get_ydata()[-1] for line in lines if len(line.get_xdata()) == 4]
    assert ends == pytest.approx(((values - values.min()) / (values.max() - values.min())).tolist())
    assert [t.get_text() for t in axes.get_xticklabels()] == ["a", "b", "seed", "val/loss"]


def test_differences_are_paired_by_seed() -> None:
    """What seeds do to all settings alike is not in them: here all is, so that intervals have no width."""
    table = results(lambda a, seed: A[a] + 100 * seed, {"a": ["x", "y", "z"], "seed": [0, 1, 2]})
    axes = plot_differences(table, baseline="a=y").axes[0]
    places = {c.get_label(): c.lines[0].get_xdata()[0] for c in axes.containers}
    assert places == pytest.approx({"_0": -1, "_1": 0, "_2": 4}, abs=1e-9)
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels == ["a=x", "a=y (baseline)", "a=z"]


def test_shares_are_drawn() -> None:
    table = results(lambda a, b, seed: A[a], GRID)
    widths = [patch.get_width() for patch in plot_importance(table).axes[0].patches]
    assert widths == pytest.approx(importance(table)["share"].tolist())


@pytest.mark.parametrize("plot", [plot_sweep_parallel, plot_differences, plot_importance, importance])
def test_what_cannot_be_drawn_is_one_line(plot, tmp_path) -> None:
    table = results(lambda a, b, seed: 0.0, GRID)
    for asked in ((table, "val/los"), (table.assign(state="failed"),), (table.head(1),), (tmp_path,)):
        with pytest.raises(ConfigError) as error:
            plot(*asked)
        assert "\n" not in str(error.value)
