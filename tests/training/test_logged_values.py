"""What is logged at a step is what that step was made with."""

import pytest
from commands import metrics
from tiny_training import config

from ldm.analysis import Run
from ldm.training import totals
from ldm.training.learning_rate import constant, cosine
from ldm.training.run.fit import train_run

pytestmark = pytest.mark.slow


def test_the_learning_rate_of_a_step_is_the_one_it_was_made_with(latents, tmp_path):
    asked = [f"shards={latents}", "max_steps=5", "accumulate=2", "optimizer.lr=0.25", "lr_scheduler.warmup_steps=2"]
    rows = metrics(train_run(config(*asked), lambda digest: tmp_path / "cosine").path)
    logged = {step: row["train/learning_rate"] for step, row in rows.items()}
    assert logged == {s: 0.25 * cosine(s - 1, warmup_steps=2, decay_steps=5) for s in range(1, 6)}
    assert logged[1] == 0.125 and logged[2] == logged[3] == 0.25, "the first step is a half of the warm-up"


def test_a_resumed_run_logs_the_same_rates(latents, tmp_path):
    asked = [f"shards={latents}", "lr_scheduler=constant", "optimizer.lr=0.5", "lr_scheduler.warmup_steps=4"]
    for steps in (2, 5):
        run = train_run(config(*asked, f"max_steps={steps}"), lambda digest: tmp_path / "constant").path
    logged = {step: row["train/learning_rate"] for step, row in metrics(run).items()}
    assert logged == {s: 0.5 * constant(s - 1, warmup_steps=4) for s in range(1, 6)}


def test_the_number_of_time_bins_is_free(latents, tmp_path, monkeypatch):
    monkeypatch.setattr(totals, "TIME_BINS", 20)
    path = train_run(config(f"shards={latents}", "max_steps=1"), lambda digest: tmp_path / "bins").path
    run = Run(path)
    error, loss = run.x0_error(), run.loss_by_t()
    assert error["bin"].tolist() == list(range(20)) and error["t"].iloc[-1] == 19.5 / 20
    assert error["sigma"].is_monotonic_increasing and set(loss["split"]) == {"train", "val"}
    assert run.picture("x0_error").size > (0, 0)
