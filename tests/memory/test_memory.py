"""Memory of fine-tuning: frozen parts in half precision, 8-bit optimizer state, and what task=plan says beforehand."""

import contextlib
import json
import sys
import types

import pytest
import torch
from tiny_training import Killed, Spy, config, fingerprint, make_data, train_watched
from torch import nn

from ldm.build import build
from ldm.checkpoints.folder import all_folders, find, load_parts
from ldm.checkpoints.load import load_any
from ldm.cost.disk import checkpoints_of
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.memory.meta_step import GPUKernels, LiveBytes, backward
from ldm.memory.plan import optimizer_bytes, plan
from ldm.models.unet import UNet

pytestmark = pytest.mark.slow

FEW = ["callbacks.validation=null", "callbacks.jump_to_x0=null", "callbacks.samples.every_n_steps=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(shards, a run that was trained on them): what a run starts from it with, its averages, is no file of its own."""
    folder = tmp_path_factory.mktemp("base")
    shards, autoencoder, _ = make_data(folder)
    settings = config(f"shards={shards}", f"checkpoint={autoencoder}", "max_steps=3", "optimizer.lr=1e-2", *FEW)
    with pytest.MonkeyPatch.context() as patch:
        train_watched(settings, folder / "run", patch, Spy())
    return shards, folder / "run"


class Types(Spy):
    """Also keeps what was in memory at the first step: (trained, type) of every tensor."""

    def on_train_start(self, trainer, pl_module):
        self.types = {n: (p.requires_grad, p.dtype) for n, p in pl_module.named_parameters()}
        self.buffers = {b.dtype for b in pl_module.autoencoder.latents.buffers()}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        assert all(p.grad is None for p in pl_module.parameters())  # nothing of the last step waits for the next


def run(directory, base, monkeypatch, spy, *overrides):
    shards, start = base
    given = [f"shards={shards}", f"checkpoint={start}", "adapter=[lora]", "adapter.lora.lr=1e-2", "max_steps=4"]
    given += ["callbacks.checkpoints.every_n_steps=2", *FEW]
    train_watched(config(*given, *overrides), directory, monkeypatch, spy)
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def test_frozen_parts_in_bfloat16(base, tmp_path, monkeypatch):
    """Half the memory, nearly the same losses; checkpoints hold the base as it was; a killed run goes on exactly."""
    spy, half = Types(), "frozen_dtype=bfloat16"
    full = run(tmp_path / "full", base, monkeypatch, Spy())
    whole = run(tmp_path / "half", base, monkeypatch, spy, half)
    assert {kind for kind in spy.types.values()} == {(True, torch.float32), (False, torch.bfloat16)}
    assert all(trained == name.startswith("adapters.") for name, (trained, _) in spy.types.items())
    assert spy.buffers == {torch.float32}  # the latents' units are no weights
    assert len(whole) == 4 and whole != full
    assert whole == pytest.approx(full, rel=0.02)
    # The averaged base bit for bit, in the first checkpoint and in those linked from it.
    expected = load_parts(find(base[1]), "ema")
    for folder in all_folders(tmp_path / "half"):
        states = load_parts(folder, "raw")
        for part in ("unet", "vae", "text_encoder"):
            assert states[part].keys() == expected[part].keys()
            for name, tensor in states[part].items():
                assert tensor.dtype == expected[part][name].dtype
                assert torch.equal(tensor.nan_to_num(), expected[part][name].nan_to_num())
        assert {t.dtype for t in states["lora"].values()} == {torch.float32}
    # Loaded for sampling it is an ordinary model and its adapter.
    parts = load_any(tmp_path / "half")
    assert {p.dtype for p in parts.denoiser.model.parameters()} == {torch.float32}
    # Killed before its first checkpoint, and after it.
    for step in (1, 3):
        with pytest.raises(Killed):
            run(tmp_path / "killed", base, monkeypatch, Spy(die_at=("backward", step)), half)
    assert run(tmp_path / "killed", base, monkeypatch, Spy(), half) == whole
    ends = [fingerprint(all_folders(tmp_path / name)[-1]) for name in ("half", "killed")]
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["frozen_dtype=int8"], "choose one of float32"),
        (["frozen_dtype=bfloat16", "module=autoencoder"], "nothing"),
    ],
)
def test_types_that_cannot_be_are_refused(overrides, message, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=message):
        train_watched(config("shards=/nowhere", *overrides), tmp_path / "run", monkeypatch, Spy())
    assert not (tmp_path / "run").exists()


def pairs(device):
    """A convolution in the layout that models are trained in, and a vector: (name, parameter) as the trainer gives."""
    convolution = nn.Conv2d(8, 8, 3, device=device).to(memory_format=torch.channels_last)
    return list(convolution.named_parameters())


def test_8bit_adamw_is_bitsandbytes_with_our_keys(monkeypatch):
    """A stand-in takes the place of bitsandbytes, and the meta device that of a GPU."""
    library, optim = types.ModuleType("bitsandbytes"), types.ModuleType("bitsandbytes.optim")
    given = {}

    class AdamW8bit(torch.optim.SGD):
        def __init__(self, params, lr, betas, weight_decay, eps):
            given.update(lr=lr, betas=betas, weight_decay=weight_decay, eps=eps)
            super().__init__(params, lr=lr)

    optim.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", library)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", optim)
    make = build(config("optimizer=adamw8bit", "optimizer.lr=3e-4")["optimizer"], "optimizer")
    named = pairs("meta")
    optimizer = make(named)
    assert isinstance(optimizer, AdamW8bit)
    assert given == {"lr": 3e-4, "betas": (0.9, 0.999), "weight_decay": 0.01, "eps": 1e-8}
    (group,) = optimizer.param_groups
    assert all(ours is theirs for (_, ours), theirs in zip(named, group["params"], strict=True))
    assert all(p.is_contiguous() for p in group["params"])  # its kernels would change the layout at the first step
    with pytest.raises(ConfigError, match="works on a GPU"):
        make(pairs("cpu"))


def test_8bit_adamw_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # what Python keeps where an import is to fail
    with pytest.raises(ConfigError, match=r"pip install \"ldm\[8bit\]\", or choose optimizer=adamw"):
        build(config("optimizer=adamw8bit")["optimizer"], "optimizer")(pairs("meta"))


def test_live_bytes_are_those_of_the_tensors_that_live():
    with LiveBytes() as live:
        a = torch.empty(1000, device="meta")
        b = a + 1
        view = b.view(10, 100)[2:]  # no bytes of its own
        assert live.now == 8000
        del a, b
        assert live.now == 4000 and view.shape == (8, 100)  # the view holds the whole storage
        view.add_(1)
        del view
    assert (live.now, live.peak) == (0, 8000)


def step(module, device, kernels):
    """Live bytes of a loss and its gradients: at the end of the forward pass, and at the backward pass' peak."""
    torch.manual_seed(0)
    with LiveBytes(device) as live, kernels:
        x = torch.zeros(2, 4, 32, 32, device=device)
        cond = Condition(torch.zeros(2, 7, 64, device=device))
        loss = module(x, torch.zeros(2, device=device), cond).square().mean()
    forward, live.peak = live.now, live.now
    with live, kernels:
        backward(loss)
    return forward, live.peak


@pytest.mark.parametrize("policy", ["none", "norms", "blocks"])
def test_the_simulated_step_keeps_what_a_real_one_does(policy):
    """The same network with numbers on the CPU: what autograd is seen to keep, and what lives at the peak."""
    sizes = dict(block_channels=[32, 64], attention_levels=[True, True], layers_per_block=1, checkpoint=policy)
    sizes |= dict(cross_attention_dim=64, head_dim=32, num_heads=None, norm_groups=8)
    with torch.device("meta"):
        simulated = step(UNet(**sizes), "meta", GPUKernels(None))
    real = step(UNet(**sizes), "cpu", contextlib.nullcontext())
    assert simulated == pytest.approx(real, rel=0.03)
    kept: dict[int, torch.Tensor] = {}
    unet = UNet(**sizes)
    weights = {p.untyped_storage().data_ptr() for p in unet.parameters()}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        unet(torch.zeros(2, 4, 32, 32), torch.zeros(2), Condition(torch.zeros(2, 7, 64)))
    assert simulated[0] == pytest.approx(sum(t.untyped_storage().nbytes() for t in kept.values()), rel=0.03)


def test_attention_scores_are_not_kept_and_autocast_is_cudas():
    q = torch.empty(1, 2, 4096, 32, device="meta", requires_grad=True)
    with LiveBytes() as live, GPUKernels(None):
        out = nn.functional.scaled_dot_product_attention(q, q, q)
    assert live.peak == q.nbytes + 2 * 4096 * 4 and out.shape == q.shape
    layer, norm = nn.Linear(64, 64, device="meta"), nn.GroupNorm(8, 64, device="meta")
    x = torch.empty(4, 64, device="meta")
    with LiveBytes() as live, GPUKernels(torch.bfloat16) as kernels:
        y = layer(layer(x))
        assert y.dtype == torch.bfloat16 and norm(y).dtype == torch.float32
        del y
        copies = live.now
        kernels.forward_is_over()
        assert copies - live.now == 2 * (64 * 64 + 64)  # one bfloat16 copy of what is trained, used twice
        layer.requires_grad_(False)
        layer(x)
        assert live.now == 0  # of what is frozen, none is kept


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_optimizer_state_is_counted_as_it_is(name):
    node = config(f"optimizer={name}")["optimizer"]
    unet = UNet(block_channels=[8, 16], attention_levels=[False, True], layers_per_block=1, cross_attention_dim=8,
                head_dim=8, num_heads=None, norm_groups=4)  # fmt: skip
    named = dict(unet.named_parameters())
    optimizer = build(node, "optimizer")(list(named.items()))
    for p in named.values():
        p.grad = torch.randn_like(p)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for k, v in state.items() if k != "step"]
    assert optimizer_bytes(node, named) == sum(t.nbytes for t in tensors)


def test_8bit_state_is_two_bytes_and_two_scales_a_block():
    large, small = nn.Parameter(torch.empty(300, 100, device="meta")), nn.Parameter(torch.empty(99, device="meta"))
    given = {"large": large, "small": small}
    blocks = 118  # of 256 numbers
    assert optimizer_bytes(config("optimizer=adamw8bit")["optimizer"], given) == 2 * 30000 + 8 * blocks + 8 * 99
    with pytest.raises(ConfigError, match="choose optimizer=adamw"):
        optimizer_bytes({"_target_": "torch.optim.RMSprop"}, given)


def test_a_checkpoint_is_as_large_as_planned(base):
    folder = all_folders(base[1])[-1]
    expected = checkpoints_of(config("max_steps=3"), plan(config("image_size=32")))
    written = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
    assert expected.one + expected.frozen == pytest.approx(written, rel=0.02)
    assert (
        checkpoints_of(
            config("max_steps=3", "callbacks.checkpoints.every_n_steps=1"), plan(config("image_size=32"))
        ).kept
        == 3
    )


@pytest.mark.parametrize(
    "adapter",
    ["lora", *(pytest.param(a, marks=pytest.mark.slow) for a in ("textual_inversion", "hypernetwork"))],
)
def test_frozen_weights_in_bfloat16_are_half_and_save_their_casts(adapter):
    given = ["image_size=64", f"adapter=[{adapter}]", "trainer.precision=bf16-mixed", "callbacks=default"]
    full, half = (plan(config(*given, f"frozen_dtype={t}")) for t in ("float32", "bfloat16"))
    weights = {p.name: p for p in half.parts}
    for part in full.parts:
        frozen = 4 * (part.parameters - part.trained)
        assert part.bytes - weights[part.name].bytes == frozen // 2
    assert weights[adapter].trained == weights[adapter].parameters > 0
    assert full.gradients == half.gradients == 4 * weights[adapter].trained
    # Autocast's copies of frozen weights live as long as the gradient's way back needs them: now there are none.
    steps = [p.phases["loss and its gradients"] for p in (full, half)]
    assert steps[0] - steps[1] > 0.5 * (weights["unet"].bytes if adapter != "textual_inversion" else 1)
