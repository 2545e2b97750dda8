"""trainer=fsdp: a model in shares is the whole one in losses, checkpoints and pictures, and takes less memory."""

import contextlib
import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import here, metrics
from PIL import Image
from ranks import command, on_ranks
from safetensors.torch import load_file
from tiny_training import TINY, config, make_data
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from vision import small_dinov2

from ldm.checkpoints.folder import all_folders, verify
from ldm.devices import is_shared, local
from ldm.diffusion.condition import Condition
from ldm.models.block import compile_network
from ldm.models.unet import UNet
from ldm.training.distributed import processes
from ldm.training.distributed.sharded import cut
from ldm.training.ema import EMA

pytestmark = pytest.mark.slow
QUIET = ["callbacks.validation=null", "callbacks.jump_to_x0=null", "callbacks.samples=null"]
SHORT = ["max_steps=2", "batch_size=1", *QUIET]
BASE = [t for t in TINY if not t.startswith(("trainer", "batch_size"))] + ["trainer.accelerator=cpu"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(image shards, latent shards)"""
    images, _, latents = make_data(tmp_path_factory.mktemp("data"))
    return images, latents


def trained(folder, data, name, world, *overrides):
    """A run of several processes; its directory."""
    said = [*BASE, f"shards={data[1]}", f"outputs={folder}", f"name={name}", *overrides]
    ranks = on_ranks(command(*said, cwd=folder), world)
    assert [r.code for r in ranks] == [0] * world, ranks[0].err[-2000:] + ranks[-1].err[-2000:]
    return folder / name


def assert_same(one, other, least=1e-3):
    """Losses to 1e-6 of their size at every step; what is saved, and what is drawn, as exactly as that lets it be."""
    first, second = metrics(one), metrics(other)
    assert first.keys() == second.keys()
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-6, abs=1e-6 * least), step
    a, b = all_folders(one)[-1], all_folders(other)[-1]
    files = sorted(p.relative_to(a) for p in a.rglob("*.safetensors"))
    assert files == sorted(p.relative_to(b) for p in b.rglob("*.safetensors")) and verify(b) is None
    for file in files:
        x, y = load_file(a / file), load_file(b / file)
        assert x.keys() == y.keys()
        for name in x:
            torch.testing.assert_close(x[name], y[name], rtol=1e-4, atol=2e-6, msg=f"{file}: {name}")
    pictures = sorted((one / "images").glob("*.png"))
    assert [p.name for p in pictures] == sorted(p.name for p in (other / "images").glob("*.png"))
    for picture in pictures:
        x, y = (np.asarray(Image.open(p), dtype=float) for p in (picture, other / "images" / picture.name))
        assert np.abs(x - y).mean() < 0.05, picture.name


def test_shares_train_as_whole_models_do(data, tmp_path):
    """Twenty steps of two micro-batches, with text encoder, validation, pictures and averages."""
    typed = ["max_steps=20", "batch_size=2", "accumulate=2", "callbacks.validation.every_n_steps=10"]
    typed += ["optimizer.lr=1e-3", "lr_scheduler=constant", "callbacks.checkpoints.every_n_steps=20"]
    one, other = (trained(tmp_path, data, name, 2, *typed, f"trainer={name}") for name in ("ddp", "fsdp"))
    assert_same(one, other)
    assert len(metrics(one)) >= 20 and len(list((one / "images").glob("*.png"))) >= 3


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=dit_tiny", "optimizer=muon", "times.stratified=false"],
        ["model=mmdit_tiny", "ema=power", "text_encoder=small_tiny"],
        [
            "model=dit_tiny",
            "text_encoder=none",
            "model.cross_attention_dim=null",
            "trainer.gradient_clip_val=0.01",
        ],
    ],
    ids=["muon", "power", "no text"],
)
def test_of_all_kinds(data, tmp_path, overrides):
    typed = [*overrides, *QUIET, "max_steps=4", "batch_size=2", "callbacks.snapshots.every_n_steps=2"]
    assert_same(*(trained(tmp_path, data, name, 2, *typed, f"trainer={name}") for name in ("ddp", "fsdp")))
    if "ema=power" in overrides:
        a, b = (sorted((tmp_path / name / "averages").glob("*.safetensors")) for name in ("ddp", "fsdp"))
        assert len(a) == len(b) == 4
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(load_file(x), load_file(y), rtol=1e-4, atol=2e-6)


def test_a_loss_term_with_weights_is_cut_too(data, tmp_path):
    """Its input is a hidden state of a block, its weights are trained, saved and averaged."""
    encoder = small_dinov2(tmp_path / "encoder")
    typed = ["loss=[representation_alignment]", f"module.losses.alignment.encoder={encoder}", "max_steps=3"]
    typed += ["module.losses.alignment.width=64", "module.losses.alignment.projector_width=16", "batch_size=2"]
    images = (data[0], data[0])
    autoencoder = f"checkpoint={data[0].parent}/autoencoder"
    runs = [trained(tmp_path, images, n, 2, *typed, autoencoder, *QUIET, f"trainer={n}") for n in ("ddp", "fsdp")]
    assert_same(*runs)
    assert (all_folders(runs[1])[-1] / "loss_alignment.ema.safetensors").is_file()


def test_a_checkpoint_of_four_goes_on_in_two_and_in_one(data, tmp_path):
    """And so does one of whole models in shares: the global batch is the same, so the run is."""
    typed = [*QUIET, "callbacks.checkpoints.every_n_steps=3", "lr_scheduler=constant", "optimizer=muon"]
    for steps, world, batch, how in ((3, 4, 1, "fsdp"), (6, 2, 2, "fsdp"), (9, 1, 2, "debug"), (12, 2, 1, "fsdp")):
        run = [f"max_steps={steps}", f"batch_size={batch}", f"accumulate={4 // world // batch}", f"trainer={how}"]
        if world > 1:
            many = trained(tmp_path, data, "many", world, *typed, *run)
        else:
            said = [t for t in BASE if not t.startswith("trainer")]
            found = here(*said, f"shards={data[1]}", f"outputs={tmp_path}", "name=many", *typed, *run, cwd=tmp_path)
            assert found.returncode == 0, found.stderr
    said = [t for t in BASE if not t.startswith("trainer")] + ["trainer=debug", "batch_size=4", "max_steps=12"]
    found = here(*said, f"shards={data[1]}", f"outputs={tmp_path}", "name=one", *typed, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    events = [json.loads(line)["event"] for line in (many / "events.jsonl").read_text().splitlines()]
    assert events.count("resume") == 3
    first, second = metrics(tmp_path / "one"), metrics(many)
    for step, values in first.items():
        losses = {k: v for k, v in values.items() if k.startswith("train/")}
        assert losses == pytest.approx({k: second[step][k] for k in losses}, rel=2e-5, abs=1e-6), step


def test_a_process_holds_its_share(data, tmp_path, monkeypatch):
    """Of every trained tensor, its gradient, the optimizer's state and the average, each of 4 holds a quarter."""
    import lightning as L

    class Weigh(L.Callback):
        decides = False

        def on_before_zero_grad(self, trainer, pl_module, optimizer):
            if trainer.global_step == 1 and not found:
                trained = list(pl_module.trained_parameters().values())
                moments = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
                for kind, tensors in {"weights": trained, "moments": moments, "average": ema(pl_module)}.items():
                    assert all(is_shared(t) for t in tensors)
                    found[kind] = [sum(local(t).numel() for t in tensors), sum(t.numel() for t in tensors)]

        def on_after_backward(self, trainer, pl_module):
            grads = [p.grad for p in pl_module.trained_parameters().values() if p.grad is not None]
            found_gradients[:] = [sum(local(g).numel() for g in grads), sum(g.numel() for g in grads)]

    found, found_gradients = {}, []

    def ema(module):
        return list(module.ema.shadow.values())

    def train(rank):
        from tiny_training import train_watched

        settings = config("model=dit_tiny", f"shards={data[1]}", "trainer=fsdp", "trainer.accelerator=cpu", *SHORT)
        with processes.together(30):
            train_watched(settings, tmp_path / "run", monkeypatch, Weigh())
        return {**found, "gradients": found_gradients}

    ranks = on_ranks(train, world=4)
    for rank in ranks:
        assert rank.code == 0, rank.err[-2000:]
        assert rank.value.keys() == {"weights", "moments", "average", "gradients"}
        for kind, (mine, all_of_it) in rank.value.items():
            assert mine <= 0.3 * all_of_it, (kind, mine, all_of_it)
    for kind in ("weights", "moments", "average", "gradients"):  # nothing twice, nothing lost
        assert sum(r.value[kind][0] for r in ranks) == ranks[0].value[kind][1], kind


def test_the_plan_is_what_a_step_takes_at_most():
    """torch's own tracker of FSDP's memory: weights, gradients, moments, and what is gathered of a block or two."""
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    from ldm.memory.plan import gathered

    def step(rank):
        dist.init_process_group("gloo")
        torch.manual_seed(0)
        network = UNet(block_channels=[32, 64, 128], attention_levels=[False] * 3, cross_attention_dim=None)
        weights = sum(p.nbytes for p in network.parameters())
        planned = 4 * weights // dist.get_world_size() + gathered(network, "float32")
        cut(network, init_device_mesh("cpu", (dist.get_world_size(),)))
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        tracker = FSDPMemTracker(network, optimizer)
        for tracked in (False, True):
            with tracker if tracked else contextlib.nullcontext():
                network(torch.randn(1, 4, 8, 8), torch.ones(1), Condition()).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        peak = {str(k): v for k, v in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
        return peak["Total"] - next(v for k, v in peak.items() if k.endswith(".ACT")), planned, 4 * weights

    for rank in on_ranks(step, world=4):
        assert rank.code == 0, rank.err[-2000:]
        taken, planned, whole_step = rank.value
        assert 0.7 * planned < taken <= planned < 0.6 * whole_step, rank.value


def test_compiled_blocks_in_shares():
    """Outputs and gradients of compiled blocks are those of eager ones, also with averages in the weights' place."""

    def step(rank):
        dist.init_process_group("gloo")
        found = []
        for compiled in (False, True):
            torch.manual_seed(0)
            network = UNet(block_channels=[32], attention_levels=[False], cross_attention_dim=None)
            nn.init.normal_(network.conv_out.weight, std=0.1)
            if compiled:
                compile_network(network, "blocks", backend="aot_eager")
            cut(network, init_device_mesh("cpu", (dist.get_world_size(),)))
            parameters, average = dict(network.named_parameters()), EMA()
            average.start(parameters)
            x = torch.linspace(-1, 1, 512).view(2, 4, 8, 8) * (rank + 1)
            network(x, torch.ones(2), Condition()).square().mean().backward()
            with torch.no_grad():
                for p in network.parameters():
                    p.mul_(1.5)
                moved = network(x, torch.ones(2), Condition())
                with average.swapped(parameters):
                    before = network(x, torch.ones(2), Condition())
                again = network(x, torch.ones(2), Condition())
            assert torch.equal(moved, again) and not torch.allclose(moved, before)
            found.append([before, moved, *(p.grad.full_tensor() for p in network.parameters())])
        assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))

    for rank in on_ranks(step):
        assert rank.code == 0, rank.err[-2000:]


def test_an_autoencoder_stays_whole(data, tmp_path):
    typed = ["module=autoencoder", f"shards={data[0]}", "max_steps=3", "batch_size=2"]
    assert_same(*(trained(tmp_path, data, name, 2, *typed, f"trainer={name}") for name in ("ddp", "fsdp")))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["trainer.strategy.gather_dtype=bfloat16"], "bfloat16 weights need bf16-mixed"),
        (["trainer.precision=16-mixed"], "losses are not scaled in shares. Use trainer.precision=bf16-mixed"),
        (["adapter=[lora]"], "adapters are small. Use trainer=ddp"),
        (["trainer.strategy.timeout=0"], "seconds, more than 0"),
        (["compile=whole"], "Use compile=blocks"),
        (["optimizer=adamw8bit"], "its state cannot be cut. Use optimizer=adamw"),
    ],
)
def test_what_cannot_be_cut_says_so(data, tmp_path, overrides, said):
    found = here(*BASE, f"shards={data[1]}", "trainer=fsdp", f"outputs={tmp_path}", *SHORT, *overrides, cwd=tmp_path)
    assert found.returncode == 2 and said in found.stderr and found.stderr.count("\n") == 1
