"""What the meta device cannot say: on a GPU steps wait for nothing, and give what the CPU's give."""

import pytest
import torch
from commands import metrics
from tiny_training import Spy, config, train_watched

from ldm.checkpoints.folder import all_folders
from ldm.sampling import Request, Sampler
from ldm.training.run.fit import train_run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def train(latents, path, *overrides):
    asked = [f"shards={latents}", "max_steps=12", "callbacks.losses.every_n_steps=4", "trainer.deterministic=warn"]
    return train_run(config(*asked, *overrides), lambda digest: path).path


def test_it_trains_as_on_a_cpu(latents, tmp_path):
    cpu = train(latents, tmp_path / "cpu")
    gpu = train(latents, tmp_path / "gpu", "trainer.accelerator=gpu")
    for step, row in metrics(cpu).items():
        assert metrics(gpu)[step] == pytest.approx(row, rel=2e-2, abs=2e-3), step


@pytest.mark.parametrize("model", ["unet_tiny", "dit_tiny", "mmdit_tiny"])
def test_a_step_waits_for_nothing(latents, tmp_path, monkeypatch, model):
    """cudaStreamSynchronize and blocking copies raise while the step is made."""
    seen = []

    class Strict(Spy):
        decides = False

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step in (2, 5):  # neither the first, which allocates, nor one whose losses are read
                torch.cuda.set_sync_debug_mode("error")
                seen.append(trainer.global_step)

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            torch.cuda.set_sync_debug_mode("default")

    asked = [f"shards={latents}", "max_steps=8", "trainer.accelerator=gpu", f"model={model}"]
    try:
        train_watched(config(*asked, "callbacks.losses.every_n_steps=4"), tmp_path / "run", monkeypatch, Strict())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert seen == [2, 5] and all_folders(tmp_path / "run")


def test_neither_does_sampling(latents, tmp_path):
    from ldm import Pipeline

    pipe = Pipeline.load(train(latents, tmp_path / "run", "trainer.accelerator=gpu")).to("cuda")
    sampler: Sampler = pipe.sampler
    request = Request(["a", "b"], 32, 32, num_steps=6, seeds=[0, 1])
    steps = sampler.steps(request)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rest = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(rest) == 5


def test_bf16_compiled_and_with_graphs(latents, tmp_path):
    from ldm import Pipeline

    run = train(latents, tmp_path / "run", "trainer.accelerator=gpu", "trainer.precision=bf16-mixed", "compile=blocks")
    eager = Pipeline.load(run).to("cuda").sample(["a", "b"], num_steps=4, seed=[0, 1])
    for how in ("blocks", "whole", "graphs"):
        made = Pipeline.load(run).to("cuda").compile(how).sample(["a", "b"], num_steps=4, seed=[0, 1])
        assert (made - eager).abs().mean() < 1e-2, how
