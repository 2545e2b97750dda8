"""Runs on disk as frames and figures: what a frame says is what the files say, whatever became of the run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from written_runs import CONFIG, MakeRun

from ldm.analysis import Run, compare, newest, plot_loss, plot_loss_by_t, plot_x0_error, runs
from ldm.errors import ConfigError
from ldm.sweep.arms import Arm, record
from ldm.training.run.directory import write_json
from ldm.training.run.logging import RunLogger


def append(run: Run, text: str) -> None:
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write(text)


def test_records_of_a_step_are_one_row(make: MakeRun) -> None:
    frame = make().metrics
    assert list(frame["step"]) == [1, 2, 3] and list(frame["images"]) == [4, 8, 12]
    assert frame.columns[:3].tolist() == ["step", "images", "time"]
    last = frame.iloc[-1]
    assert last["train/loss"] == 1 / 3 and last["val/loss"] == 0.1  # logged apart
    assert np.isnan(frame["val/loss"].iloc[0])


def test_a_repeated_step_is_what_was_logged_last(make: MakeRun) -> None:
    run = make()
    append(run, json.dumps({"step": 2, "images": 8, "time": 9.0, "train/loss": 7.0}) + "\n")
    frame = run.metrics
    assert list(frame["step"]) == [1, 2, 3]
    assert frame["train/loss"].tolist() == [1.0, 7.0, 1 / 3]
    assert frame["train/loss_by_t/2"].iloc[1] == 0.5  # what was not repeated stays


def test_a_torn_line_is_dropped_wherever_it_stands(make: MakeRun) -> None:
    run = make()
    before = run.metrics
    append(run, '{"step": 4, "images": 16, "train/lo')
    assert run.metrics.equals(before)
    append(run, '\n{"step": 5, "images": 20, "time": 1.0, "train/loss": 0.25}')  # whole, though without its newline
    assert run.metrics["step"].tolist() == [1, 2, 3, 5]


def test_what_a_resume_forgets_is_gone(make: MakeRun) -> None:
    run = make(step=5)
    append(run, '{"step": 6, "imag')
    logger = RunLogger(run.path, images_per_step=4)
    logger.forget_after(3)
    logger.log_metrics({"train/loss": 9.0}, 4)
    assert run.metrics["train/loss"].tolist() == [1.0, 1 / 2, 1 / 3, 9.0]


def test_a_loss_that_is_not_a_number_is_nan(make: MakeRun) -> None:
    run = make()
    RunLogger(run.path).log_metrics({"train/loss": float("inf")}, 3)
    assert np.isnan(run.metrics["train/loss"].iloc[-1])
    assert run.scalars()["train/loss"] == 1 / 2  # the last that is one


def test_a_run_without_any_record_has_an_empty_frame(make: MakeRun) -> None:
    run = make()
    (run.path / "metrics.jsonl").unlink()
    assert list(run.metrics.columns) == ["step", "images", "time"] and run.metrics.empty
    assert run.loss_by_t().empty and run.x0_error().empty and run.pictures().empty and run.events.empty
    assert run.evaluation == {} and run.stages == {} and run.checkpoints == [] and run.scores.empty


def test_loss_by_t_has_a_row_for_every_bin_that_was_seen(make: MakeRun) -> None:
    frame = make(step=12).loss_by_t()
    train, val = (frame[frame["split"] == split] for split in ("train", "val"))
    assert train["step"].tolist() == list(range(1, 13)) and train["bin"].tolist() == [s % 10 for s in range(1, 13)]
    assert val["loss"].tolist() == list(range(10)) and np.allclose(val["t"], np.arange(0.05, 1, 0.1))


def test_x0_error_stands_at_the_levels_of_the_runs_own_scheduler(make: MakeRun) -> None:
    frame = make().x0_error()
    assert np.allclose(frame["sigma"], frame["t"] / (1 - frame["t"]))  # flow
    assert np.allclose(frame["x0_error"], frame["bin"] / 10)


def test_a_run_with_classes_of_ones_own_is_read_and_nothing_of_it_is_built(make: MakeRun) -> None:
    run = make()
    config = yaml.safe_load((run.path / "config.yaml").read_text())
    mine = {"_target_": "mine.Net", "width": 3}
    (run.path / "config.yaml").write_text(yaml.safe_dump({**config, "model": mine}))
    assert Run(run.path).config["model"] == mine and len(Run(run.path).x0_error())
    (run.path / "config.yaml").write_text(yaml.safe_dump({**config, "scheduler": {"_target_": "os.system"}}))
    with pytest.raises(ConfigError, match=r"scheduler names os\.system"):
        Run(run.path).x0_error()


def test_pictures_are_found_by_key_and_step(make: MakeRun) -> None:
    run = make()
    logger = RunLogger(run.path)
    for step, colour in ((1, "red"), (2, "green"), (2, "blue")):
        logger.log_picture("samples", Image.new("RGB", (2, 2), colour), step, "a\u2028b")
    logger.log_picture("jump/strip", Image.new("RGB", (3, 3)), 2)
    assert run.pictures("samples")["step"].tolist() == [1, 2] and len(run.pictures()) == 3
    assert set(run.pictures("samples")["caption"]) == {"a\u2028b"}
    assert run.picture("samples").getpixel((0, 0)) == (0, 0, 255)
    assert run.picture("samples", 1).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(ConfigError, match=r"sampels.*jump/strip, samples"):
        run.picture("sampels")
    with pytest.raises(ConfigError, match=r"steps \[1, 2\], not at 3"):
        run.picture("samples", 3)


def test_a_wrong_path_names_the_runs_near_it(make: MakeRun, tmp_path: Path) -> None:
    run = make("mine")
    for wrong in (tmp_path / "outputs/mien", tmp_path / "outputs", run.path / "checkpoints" / "step-1"):
        with pytest.raises(ConfigError, match=r"outputs/mine"):
            Run(wrong)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="experiment=quickstart"):
        Run(tmp_path / "empty")


CHANGES = [
    ({"scheduler": {"_target_": "ldm.diffusion.schedulers.Cosine"}}, ["scheduler"]),
    ({"optimizer": {**CONFIG["optimizer"], "betas": [0.9, 0.95]}}, ["optimizer.betas"]),
    ({"seed": 1, "data": {**CONFIG["data"], "seed": 1}}, ["seed"]),  # data.seed repeats it
    ({"data": {**CONFIG["data"], "seed": 5}}, ["data.seed"]),
    ({"extra": None}, ["extra"]),  # a key that only one of them has
    ({"optimizer": None, "batch_size": 8}, ["batch_size", "optimizer", "optimizer.lr", "optimizer.betas"]),
    ({}, []),
]


@pytest.mark.parametrize(("changes", "keys"), CHANGES, ids=lambda v: "-".join(v) or "none")
def test_compare_names_exactly_the_changed_keys(make: MakeRun, changes: dict[str, Any], keys: list[str]) -> None:
    assert sorted(compare(make("a"), make("b", changes)).index) == sorted(keys)


def test_compare_shows_both_values(make: MakeRun) -> None:
    table = compare(make("a"), make("b", {"seed": 7}))
    assert table.loc["seed"].to_dict() == {"a": 0, "b": 7}


def test_runs_is_one_row_a_run_with_the_choices_that_differ(make: MakeRun, tmp_path: Path) -> None:
    make("a"), make("b", {"scheduler": {"_target_": "ldm.diffusion.schedulers.Cosine"}}, step=5)
    (tmp_path / "outputs" / "stages").mkdir()
    table = runs(tmp_path / "outputs" / "*").set_index("name")
    assert list(table.index) == ["a", "b"] and list(table["step"]) == [3, 5]
    assert list(table["scheduler"]) == ["Flow", "Cosine"]
    assert list(table["val/loss"]) == [0.1, 0.1] and list(table["train/loss"]) == [1 / 3, 1 / 5]
    assert not {"data.crop", "optimizer.lr", "val/loss_by_t/3"} & set(table.columns)
    assert newest(tmp_path / "nothing*", tmp_path / "outputs" / "*").name == "b"


def test_a_running_run_stands_at_its_last_record(make: MakeRun) -> None:
    run = make(step=4)
    write_json(run.path / "status.json", {"state": "running", "step": 0})
    assert runs(run.path)["step"].tolist() == [4]
    (run.path / "metrics.jsonl").unlink()
    assert runs(run.path)["step"].tolist() == [0]


def test_a_sweep_stands_for_its_arms_refused_ones_with_their_reason(make: MakeRun, tmp_path: Path) -> None:
    make("sweep/flow-v-0001")
    sweep = tmp_path / "outputs" / "sweep"
    good, bad = (Arm(sweep, ["experiment=law", "scheduler=flow", f"parameterization={p}"]) for p in ("v", "eps"))
    record(good, "finished", {"val/loss": 0.1}, "")
    (sweep / "flow-v-0001").rename(good.directory)
    record(bad, "refused", {}, "alpha is 0, at t = 1")
    for pattern in (sweep, tmp_path / "outputs" / "*"):
        table = runs(pattern)
        assert list(table["state"]) == ["finished", "refused"]
        refused = table.iloc[1]
        assert refused["name"] == "parameterization=eps" and refused["message"] == "alpha is 0, at t = 1"
        assert refused["experiment"] == "law" and np.isnan(refused["val/loss"])


def test_no_run_at_all_is_an_error_that_says_where(make: MakeRun, tmp_path: Path) -> None:
    make("a")
    with pytest.raises(ConfigError, match="outputs/a"):
        runs(tmp_path / "outputs" / "zzz*")
    with pytest.raises(ConfigError, match="experiment=quickstart"):
        newest(tmp_path / "zzz*")


def test_plot_loss_draws_the_logged_values_against_images(make: MakeRun) -> None:
    both = [make("a"), make("b", step=5)]
    (axes,) = plot_loss(both).axes
    curves = {line.get_label(): line for line in axes.lines}
    assert curves["a, training"].get_xydata().tolist() == [[4, 1], [8, 1 / 2], [12, 1 / 3]]
    assert len(curves["b, training"].get_xdata()) == 5
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert sorted(labels) == ["a, training", "a, validation", "b, training", "b, validation"]


def test_smoothing_keeps_a_constant_and_the_raw_curve(make: MakeRun) -> None:
    run = make()
    for step in range(1, 4):
        RunLogger(run.path, 4).log_metrics({"train/loss": 2.0}, step)
    (axes,) = plot_loss(run, smooth=3).axes
    raw, smooth = axes.lines[:2]
    assert raw.get_ydata().tolist() == [2.0] * 3 and np.allclose(smooth.get_ydata(), 2.0)


def test_smoothing_does_not_lag(make: MakeRun) -> None:
    """A falling curve stays where it is, from the first point to the last: it bends, and nothing lies above it."""
    run = make(step=40)
    for step in range(1, 41):
        RunLogger(run.path, 4).log_metrics({"train/loss": 5.0 - step / 10 + (step - 40) ** 2 / 100}, step)
    raw, smooth = plot_loss(run, smooth=10).axes[0].lines[:2]
    assert np.allclose(raw.get_ydata(), smooth.get_ydata())


def test_plot_loss_by_t_has_windows_of_training_and_steps_of_validation(make: MakeRun) -> None:
    train, val, bar = plot_loss_by_t(make(step=24)).axes
    assert len(train.lines) == 6 and len(val.lines) == 1
    assert val.lines[0].get_ydata().tolist() == list(range(10)) and bar.get_ylabel() == "step"


def test_plot_x0_error_has_a_curve_a_step_and_the_gaussian_guess(make: MakeRun) -> None:
    run = make()
    RunLogger(run.path).log_metrics({f"val/x0_error_by_t/{i}": 0.5 for i in range(10)}, 7)
    axes = plot_x0_error(run).axes[0]
    first, last, guess = axes.lines
    assert np.allclose(last.get_ydata(), 0.5) and np.allclose(first.get_xdata(), last.get_xdata())
    r = np.asarray(guess.get_xdata())
    assert np.allclose(guess.get_ydata(), r**2 / (1 + r**2))


def test_plots_of_runs_without_the_numbers_say_so(make: MakeRun) -> None:
    run = make()
    (run.path / "metrics.jsonl").unlink()
    for plot in (plot_loss, plot_loss_by_t, plot_x0_error):
        with pytest.raises(ConfigError):
            plot(run)


@pytest.mark.slow
def test_a_real_run_has_all_of_it(tiny_run: Path) -> None:
    run = Run(tiny_run)
    assert run.status["state"] == "finished" and run.events["event"].tolist() == ["start", "finish"]
    assert run.metrics["step"].tolist() == [1, 2, 3] and run.metrics["images"].tolist() == [2, 4, 6]
    assert {"samples", "jump_to_x0", "x0_error"} <= set(run.pictures()["key"])
    assert run.stage("autoencoder").picture("reconstructions").size > (0, 0)  # from another working directory
    assert [c.name for c in run.checkpoints] == ["step-00000003"]
    scores = run.scores.set_index("score")
    assert (scores.loc["seen/all", "low"] <= scores.loc["seen/all", "value"]) and scores.loc["seen/all", "n"] == 4
    assert scores.loc["reconstruction/psnr", "n"] == 8
    assert run.about["digest"] in run.name and newest(tiny_run.parent / "*").path == tiny_run
    assert compare(run, run).empty
    with pytest.raises(ConfigError, match="autoencoder, diffusion"):
        run.stage("encode")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metrics.jsonl", '5\n{}\n{"step": [1]}\n{"step": "a"}\n{"step": 1, "train/loss": "abc"}\n' + "[" * 100_000),
        ("images/images.jsonl", '5\n{}\n{"step": "a", "key": "x", "file": "x", "caption": ""}\n'),
        ("images/images.jsonl", '{"step": 1, "key": "x", "file": "../config.yaml", "caption": ""}\n'),
        ("events.jsonl", "5\n[1]\n"),
        ("stages.json", '{"evaluate": {}, "autoencoder": {"path": 5}, "encode": 5, "prepare": {"path": "a\\u0000"}}'),
        ("evaluation-ema/evaluation.json", '{"metrics": 5}'),
        ("evaluation-ema/evaluation.json", '{"metrics": {"a": 1, "a/se": "x", "b": [1], "c": "text"}}'),
        ("evaluation-ema/evaluation.json", '{"metrics": {"a": null, "a/se": 0.1}}'),
    ],
)
def test_records_of_somebody_elses_run_that_are_none_are_passed_over(make: MakeRun, name: str, text: str) -> None:
    run = make()
    (run.path / name).parent.mkdir(exist_ok=True)
    (run.path / name).write_text(text)
    assert run.pictures().empty and run.events.empty and len(run.scores) <= 1
    assert set(run.scalars()) <= {"train/loss", "val/loss"} | {c for c in run.metrics if "_by_t/" in c}
    assert len(run.x0_error()) in (0, 10)
    with pytest.raises(ConfigError, match="has no run for the stage"):
        run.stage("autoencoder")
