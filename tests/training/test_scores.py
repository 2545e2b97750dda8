"""Scores while it trains are those of task=evaluate, whatever the number of processes."""

import json

import pytest
from commands import here, metrics
from ranks import command, on_ranks
from tiny_training import make_data

FEW = [
    "model=unet_tiny",
    "text_encoder=small_tiny",
    "autoencoder=kl_tiny",
    "trainer=debug",
    "logger=none",
    "max_steps=4",
]
FEW += ["callbacks.jump_to_x0.num_steps=2", "callbacks.samples.num_steps=2", "data.validation_samples=4", "num_steps=2"]
FEW += [
    "metric=[trained,shapes,nearest,diversity]",
    "metric.trained.features.steps=3",
    "metric.trained.features.width=8",
]
FEW += ["metric.trained.measures=[kernel,precision_recall]", "eval_images=24", "callbacks.scores.every_n_steps=4"]
FEW += ["metric.diversity.num_captions=3", "metric.diversity.num_images=2"]


@pytest.mark.slow
def test_scores_in_training_are_those_of_the_task_for_one_process_and_for_two(tmp_path):
    _, autoencoder, latents = make_data(tmp_path)
    train = [*FEW, f"shards={latents}", f"checkpoint={autoencoder}", "ema.decay=0.5"]

    def trained(name: str, *more: str) -> dict[str, float]:
        run = tmp_path / name
        if more:
            ranks = on_ranks(command(*train, *more, f"name={run}", cwd=tmp_path))
            assert [r.code for r in ranks] == [0, 0], ranks[0].err + ranks[1].err
        else:
            found = here(*train, "batch_size=4", f"name={run}", cwd=tmp_path)
            assert found.returncode == 0, found.stderr
        logged = metrics(run)[4]
        return {k.removeprefix("scores/"): v for k, v in logged.items() if k.startswith("scores/")}

    one = trained("one")
    asked = ["task=evaluate", f"checkpoint={tmp_path / 'one'}", *(o for o in FEW if o.startswith("metric"))]
    found = here(*asked, "eval_images=24", f"outputs={tmp_path / 'cached'}", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    told = json.loads((tmp_path / "one" / "evaluation-ema" / "evaluation.json").read_text())
    assert one == {k: v for k, v in told["metrics"].items() if not k.startswith("reconstruction/")}
    assert {"seen/kd_trained", "seen/all", "unseen/lpips_diversity_random", "seen/nearest/median"} <= one.keys()
    assert told["cards"]["seen/kd_trained"]["weights"] == told["cards"]["seen/all"]["weights"] == "ema"
    two = trained("two", "batch_size=2", "trainer=ddp", "trainer.accelerator=cpu")
    assert two == pytest.approx(one, rel=1e-3, abs=1e-4)
    refused = here(*train, "eval_images=3", f"name={tmp_path / 'three'}", cwd=tmp_path)
    assert refused.returncode == 2 and "metric.trained: kernel on 8 features needs at least 4" in refused.stderr
