"""Differences of runs, their speed, objectives, film strips and trajectories: figures of known inputs."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conf_nodes import composed
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from written_runs import MakeRun

from ldm.analysis import (
    Run,
    diff,
    film_strip,
    plot_loss,
    plot_objective,
    plot_throughput,
    plot_trajectories,
    runs,
    scores,
    throughput,
    trajectories,
)
from ldm.config.root import plain
from ldm.errors import ConfigError
from ldm.training.run.logging import RunLogger


def scored(run: Run, **metrics: float) -> Run:
    (run.path / "evaluation-ema").mkdir()
    (run.path / "evaluation-ema/evaluation.json").write_text(json.dumps({"metrics": metrics}))
    return run


def test_a_run_does_not_differ_from_itself(make: MakeRun) -> None:
    run = scored(make(), **{"a/all": 0.5, "a/all/low": 0.4, "a/all/high": 0.6, "b": math.nan})
    RunLogger(run.path).log_metrics({"odd": math.nan}, 3)
    assert diff(run, run).empty and diff(run.path, str(run.path)).empty


def wilson(name: str, hits: int, n: int) -> dict[str, float]:
    share, z = hits / n, 1.959964
    middle, half = share + z**2 / 2 / n, z * math.sqrt(share * (1 - share) / n + z**2 / 4 / n**2)
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return {name: share, f"{name}/low": low, f"{name}/high": high}


def test_diff_names_what_differs_with_newcombes_interval(make: MakeRun) -> None:
    """56/70 and 48/80: Newcombe 1998, table II, method 10, 0.0524 to 0.3339."""
    shares = [{**wilson("s", *counts), "same": 1.0} for counts in ((48, 80), (56, 70))]
    a, b = scored(make("a"), **shares[0]), scored(make("b", {"seed": 3}), **shares[1])
    RunLogger(b.path).log_metrics({"val/loss": 0.3}, 3)
    table = diff(a, b).set_index("key")
    assert table["part"].to_dict() == {"seed": "configuration", "val/loss": "metric", "s": "score"}
    assert table.loc["seed", ["a", "b", "change"]].tolist() == [0, 3, 3]
    assert table.loc["val/loss", "change"] == pytest.approx(0.2) and math.isnan(table.loc["val/loss", "low"])
    assert table.loc["s", ["change", "low", "high"]].tolist() == pytest.approx([0.2, 0.0524, 0.3339], abs=1e-4)


def test_numbers_of_other_cards_stand_in_columns_of_their_own(make: MakeRun) -> None:
    card = {"network": "inception", "num_steps": 10}

    def evaluated(name: str, value: float, **changes: int) -> Run:
        run = make(name)
        folder = run.path / "evaluation-ema"
        folder.mkdir()
        metrics = {"val/fid": value, "val/fid/low": value - 1, "val/fid/high": value + 1, "val/kid": 0.5}
        cards = {"val/fid": {**card, **changes}, "val/kid": card}
        (folder / "evaluation.json").write_text(json.dumps({"metrics": metrics, "cards": cards}))
        return run

    a, b = evaluated("a", 20.0), evaluated("b", 30.0)
    pattern = str(a.path.parent / "*")
    assert scores(pattern)["val/fid"].tolist() == [20.0, 30.0]
    assert "card" not in set(diff(a, b)["part"])
    c = evaluated("c", 25.0, num_steps=50)
    table = scores(pattern)
    assert list(table) == ["val/fid [num_steps=10]", "val/kid", "val/fid [num_steps=50]"]
    assert table["val/fid [num_steps=10]"].dropna().tolist() == [20.0, 30.0] and len(table["val/kid"].dropna()) == 3
    assert {"val/fid [num_steps=10]", "val/fid [num_steps=50]"} <= set(runs(pattern))
    (said,) = diff(a, c).query("part == 'card'").itertuples(index=False)
    assert tuple(said)[1:4] == ("val/fid: num_steps", 10, 50)
    with pytest.raises(ConfigError, match="has an evaluation"):
        scores(make("none").path)


def test_runs_that_cannot_be_read_are_rows_with_their_reason(make: MakeRun) -> None:
    good, bad, odd = make("good"), make("bad"), make("odd")
    (bad.path / "config.yaml").write_text("a: [1")
    (odd.path / "status.json").write_text('{"state": 5, "step": "x", "time": []}')
    table = runs(good.path.parent / "*").set_index("name")
    assert table["state"].to_dict() == {"good": "finished", "odd": 5, "bad": "unreadable"}
    assert "bad/config.yaml is not plain YAML" in table.loc["bad", "message"] and table.loc["odd", "step"] == 3


def timed(run: Run, records: list[tuple[int, float]], events: list[tuple[float, str]]) -> Run:
    lines = [{"step": s, "images": 10 * s, "time": t, "train/loss": 1.0} for s, t in records]
    (run.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [{"time": t, "event": e} for t, e in events]
    (run.path / "events.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_throughput_is_images_by_time_and_unknown_over_a_restart(make: MakeRun) -> None:
    run = timed(
        make(),
        [(1, 1002.0), (2, 1004.0), (3, 1054.0), (5, 1055.0)],
        [(1000.0, "start"), (1005.0, "stop"), (1050.0, "resume")],
    )
    rate = throughput(run)
    assert rate["achieved"].iloc[[1, 3]].tolist() == [5.0, 20.0] and rate["achieved"].iloc[[0, 2]].isna().all()
    assert (rate["hours"] * 3600).tolist() == pytest.approx([2, 4, 54, 55])
    lines = {line.get_label(): line for line in plot_throughput(run).axes[0].lines}
    assert [lines[k].get_xdata()[0] * 60 for k in ("_stop", "_resume")] == pytest.approx([5, 50])
    (run.path / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="speed"):
        plot_throughput(run)


def test_a_name_with_dollars_is_no_formula(make: MakeRun) -> None:
    figure = plot_loss(make("a$x_{$"))
    figure.canvas.draw()
    assert r"a\$x_{\$, training" in [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


def test_the_objective_of_a_run_is_drawn_as_its_task_draws_it(make: MakeRun) -> None:
    config = plain(composed("experiment=quickstart", "scheduler=flow", "parameterization=velocity"))
    run = make()
    (run.path / "config.yaml").write_text(yaml.safe_dump(config))
    for source in (run, config):
        figure = plot_objective(source)
        alpha, sigma = figure.axes[0].lines[:2]
        assert np.allclose(alpha.get_ydata(), 1 - alpha.get_xdata()) and np.allclose(
            sigma.get_ydata(), sigma.get_xdata()
        )
        shares = sum(patch.get_height() for patch in figure.axes[2].patches)
        assert 0.99 < shares <= 1
        assert figure.get_suptitle() == "Flow / Velocity / Simple / Uniform"
    with pytest.raises(ConfigError, match="has no parameterization"):
        plot_objective(make("b"))


STEPS = [
    SimpleNamespace(
        level=SimpleNamespace(ratio=14.6 / (i + 1)),
        x_t=torch.full((2, 3, 4, 4), -1.0),
        x0=torch.full((2, 3, 4, 4), i / 10 - 1),
    )
    for i in range(20)
]


def test_a_film_strip_has_a_jump_below_every_latent(make: MakeRun) -> None:
    panels = np.array(film_strip(iter(STEPS), lambda x: x).axes).reshape(4, 12)
    pixels = np.array([[panel.images[0].get_array().max() for panel in row] for row in panels])
    assert (pixels[[0, 2]] == 0).all() and (pixels[1] == pixels[3]).all()
    assert (np.diff(pixels[1].astype(int)) > 0).all() and pixels[1][0] == 0
    assert "step 1\n" in panels[0, 0].get_title() and "14.6" in panels[0, 0].get_title()
    assert "step 20\n" in panels[0, -1].get_title()
    with pytest.raises(ConfigError, match=r"pipe\.decode"):
        film_strip(STEPS)
    run, picture = make(), Image.effect_noise((60, 40), 50).convert("RGB")
    with pytest.raises(ConfigError, match="jump_to_x0"):
        film_strip(run)
    RunLogger(run.path).log_picture("jump_to_x0", picture, 3)
    figure = film_strip(str(run.path))
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    assert (np.asarray(canvas.buffer_rgba())[..., :3] == np.asarray(picture)).all()


def test_trajectories_of_a_line_and_of_a_half_circle() -> None:
    angle = np.linspace(0, np.pi, 1001)
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)[None]
    line = torch.linspace(0, 3, 7)[None, :, None] * torch.tensor([0.6, 0.8])
    table = trajectories({"circle": circle, "line": line}).set_index("name")
    assert table.loc["line", ["length", "distance", "straightness"]].tolist() == pytest.approx([3, 3, 1])
    assert table.loc["circle", ["length", "straightness"]].tolist() == pytest.approx([np.pi, 2 / np.pi], abs=1e-5)
    axes = plot_trajectories({"circle": circle, "line": line}, data=torch.zeros(5, 2)).axes[0]
    assert any(np.allclose(c.get_xydata(), circle[0]) for c in axes.lines if len(c.get_xdata()) == 1001)


def test_latents_in_a_plane_are_shown_in_it() -> None:
    """Paths that lie in a plane of many dimensions keep their lengths when they are projected."""
    draws = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(48, 2, generator=draws, dtype=torch.float64))[0]
    flat = torch.randn(5, 9, 2, generator=draws, dtype=torch.float64)
    latents = (flat @ directions.T).reshape(5, 9, 3, 4, 4)
    drawn = [c.get_xydata() for c in plot_trajectories({"x": latents}).axes[0].lines if len(c.get_xdata()) == 9]
    lengths = [np.linalg.norm(np.diff(path, axis=0), axis=1).sum() for path in drawn]
    assert lengths == pytest.approx(trajectories({"x": latents})["length"].tolist())


@pytest.mark.parametrize(
    "paths",
    [
        {},
        [1, 2],
        {"a": np.zeros((2, 3))},
        {"a": np.zeros((2, 1, 2))},
        {"a": np.full((1, 2, 2), np.nan)},
        {"a": np.zeros((1, 2, 2)), "b": np.zeros((1, 2, 3))},
        {"a": np.zeros((1, 2, 1))},
    ],
)
def test_what_is_no_path_is_refused_in_a_line(paths: dict) -> None:
    with pytest.raises(ConfigError) as error:
        plot_trajectories(paths)
    assert "\n" not in str(error.value)
