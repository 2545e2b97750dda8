"""A compiled network is the eager one, and is compiled once for what it meets, whatever sizes, adapters, guidance."""

import pytest
import torch
from conf_nodes import options
from tiny_training import config
from torch import nn
from torch._dynamo.utils import counters

from ldm.adapters.hypernetwork import Hypernetwork
from ldm.checkpoints.components import build_components
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.models.block import blocks_of, compile_network
from ldm.models.unet import UNet

pytestmark = pytest.mark.slow
MODELS = [m for m in options("model") if m.endswith("_tiny")]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled() -> int:
    return counters["stats"]["unique_graphs"]


def parts_of(model, *overrides):
    torch.manual_seed(0)
    parts = build_components(config("shards=x", f"model={model}", *overrides))
    for p in parts.network.parameters():
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.1)
    return parts


def inputs(network, batch, side, seed=0):
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(batch, 7, network.cross_attention_dim, generator=g) if network.cross_attention_dim else None
    pooled = torch.randn(batch, network.pooled_dim, generator=g) if network.pooled_dim else None
    x = torch.randn(batch, 4, side, side, generator=g)
    return x, torch.rand(batch, generator=g) * 999, Condition(context=context, pooled=pooled)


def gradients(network, *given):
    network.zero_grad()
    out = network(*given)
    out.square().mean().backward()
    return [out.detach(), *(p.grad.clone() for p in network.parameters() if p.grad is not None)]


def test_it_is_the_eager_network_with_inductor():
    """Outputs and gradients to 1e-5 of their size; the generated code is only as much as one small U-Net's."""
    torch.manual_seed(0)
    network = UNet(
        block_channels=[16],
        attention_levels=[True],
        layers_per_block=1,
        cross_attention_dim=8,
        norm_groups=4,
        num_heads=2,
        mid_attention=False,
    )
    nn.init.normal_(network.conv_out.weight, std=0.1)
    given = inputs(network, 2, 8)
    eager = gradients(network, *given)
    compile_network(network, "blocks")
    for _ in range(3):
        made = gradients(network, *given)
    assert 0 < compiled() <= len(blocks_of(network)) and not counters["graph_break"]
    for ours, theirs in zip(made, eager, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1e-3)


@pytest.mark.parametrize(("model", "how"), [*((m, "blocks") for m in MODELS), ("dit_tiny", "whole")])
def test_nothing_is_compiled_again(model, how):
    parts = parts_of(model)
    network = parts.network
    compile_network(network, how, backend="aot_eager")
    gradients(network, *inputs(network, 2, 8))
    with torch.no_grad():
        network(*inputs(network, 2, 8))
        network(*inputs(network, 4, 8))  # guidance: twice the batch
        network(*inputs(network, 4, 12))
    gradients(network, *inputs(network, 3, 16))
    before = compiled()
    assert before > 0 and not counters["graph_break"]
    for batch, side in ((2, 8), (6, 8), (4, 16), (8, 20), (2, 24)):
        gradients(network, *inputs(network, batch, side))
        with torch.no_grad():
            network(*inputs(network, batch, side))
    assert compiled() == before, counters["stats"]


def test_adapters_are_compiled_in_and_taken_off():
    parts = parts_of("unet_tiny")
    network, given = parts.network, inputs(parts.network, 2, 8)
    with torch.no_grad():
        base = network(*given)
    adapter = Hypernetwork()
    adapter.attach(network, parts.text_encoder)
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        eager = network(*given)
        compile_network(network, "blocks", backend="aot_eager")
        before = 0
        for _ in range(2):
            torch.testing.assert_close(network(*given), eager)
            with adapter.disabled():
                torch.testing.assert_close(network(*given), base)
            before = before or compiled()
    assert compiled() == before and not torch.equal(base, eager)


def test_hooks_and_names_stay():
    network, seen = parts_of("unet_tiny").network, []
    names = list(network.state_dict())
    compile_network(network, "blocks", backend="aot_eager")
    blocks_of(network)[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        network(*inputs(network, 2, 8))
    assert seen == [1] and list(network.state_dict()) == names and len(blocks_of(network)) > 3


def test_a_network_without_blocks_says_so():
    with pytest.raises(ConfigError, match=r"compile=blocks: Sequential says of no layer"):
        compile_network(nn.Sequential(nn.Linear(2, 2)), "blocks")
