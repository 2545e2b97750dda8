"""Every sampler of ours walks the path of diffusers' scheduler of that name, on Stable Diffusion's table."""

import pytest
from diffusers_walks import FAMILIES, OFF_GRID, SPACINGS, TABLE, ours, relative, theirs
from draws import randn

from ldm.build import build as build_node
from ldm.build import read_node
from ldm.config.root import conf_dir
from ldm.formats.schedulers import adjusted

CASES = [
    pytest.param(name, spacing, n, prediction, marks=pytest.mark.slow if n == 25 else ())
    for name, (_, _, spacings) in FAMILIES.items()
    for spacing in spacings
    for n in (4, 10, 25)
    for prediction in ("epsilon", "v_prediction")
    if spacing not in OFF_GRID.get(name, [])
    and not (prediction == "v_prediction" and spacing in ("exponential", "beta"))
]


@pytest.mark.parametrize(("name", "spacing", "n", "prediction"), CASES)
def test_path(name, spacing, n, prediction):
    x, told = randn(2, 4, 4, 4).float(), []
    expected = theirs(name, spacing, n, prediction, x, told)
    path, seen = ours(name, spacing, n, prediction, x, told)
    assert seen == pytest.approx(told[: len(seen)], abs=2e-3)
    # diffusers interpolates in float32: the third order loses digits at small steps, most where beta crowds them.
    tolerance = {"beta": 2e-3}.get(spacing, 5e-5) if name == "deis 3" else 2e-5
    assert relative(path[-1], expected[-1]) < tolerance
    if len(path) == len(expected):
        assert max(relative(a, b) for a, b in zip(path, expected, strict=True)) < tolerance


@pytest.mark.parametrize("name", ["lms", "euler", "heun", "dpm2"])
@pytest.mark.parametrize("grid", ["karras", "exponential", "beta"])
@pytest.mark.parametrize("times", ["leading", "trailing"])
def test_grids_in_sigma_lie_between_the_ends_of_the_files_spacing(monkeypatch, name, grid, times):
    said = SPACINGS[times] | SPACINGS[grid]
    monkeypatch.setitem(SPACINGS, "said", said)
    x, told = randn(2, 4, 4, 4).float(), []
    expected = theirs(name, "said", 8, "epsilon", x, told)
    node = adjusted(read_node(conf_dir() / "sampler" / f"{name}.yaml"), TABLE | said)
    path, seen = ours(name, None, 8, "epsilon", x, told, solver=build_node(node))
    whole, _ = ours(name, grid, 8, "epsilon", x, told)
    assert seen == pytest.approx(told[: len(seen)], abs=2e-3)
    assert relative(path[-1], expected[-1]) < 2e-5
    assert relative(whole[-1], expected[-1]) > 1e-3, "the whole table's grid would be another"
