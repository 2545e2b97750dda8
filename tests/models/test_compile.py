"""A compiled network is the eager one, and is compiled once for what it meets, whatever sizes, adapters, guidance."""

import pytest
import torch
from conf_nodes import options
from tiny_training import config
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

from ldm.adapters.hypernetwork import Hypernetwork
from ldm.checkpoints.components import build_components
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.models.attention import SpatialTransformer
from ldm.models.block import blocks_of, compile_network
from ldm.models.resnet import ResnetBlock

pytestmark = pytest.mark.slow
MODELS = [m for m in options("model") if m.endswith("_tiny")]
# As few blocks as have every kind; minutes go into compiling, and a second block of a kind compiles no other code.
FEWER = {
    "unet_tiny": ["model.block_channels=[32]", "model.attention_levels=[true]", "+model.mid_attention=false"],
    "dit_tiny": ["model.depth=1"],
}


@pytest.fixture(autouse=True)
def fresh():
    """Nothing compiled yet. torch's limit of compilations of a function is lower than what the fewer blocks need."""
    torch._dynamo.reset()
    counters.clear()
    # No pool of workers for the C++ compiler: each would import torch.
    with dynamo.patch(recompile_limit=2, fail_on_recompile_limit_hit=True), inductor.patch(compile_threads=1):
        yield
    torch._dynamo.reset()


def compiled() -> int:
    return counters["stats"]["unique_graphs"]


def parts_of(model):
    torch.manual_seed(0)
    parts = build_components(config("shards=x", f"model={model}", *FEWER.get(model, [])))
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


def assert_equal(made, eager):
    """To 1e-5 of their size."""
    for ours, theirs in zip(made, eager, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp_min(1e-3)


class Pair(nn.Module):
    """A U-Net's two kinds of blocks, once each."""

    def __init__(self):
        super().__init__()
        self.resnet = ResnetBlock(8, 16, 4, eps=1e-5, time_width=8)
        self.transformer = SpatialTransformer(16, 2, 8, 1, False, 4)

    def forward(self, x, time, context):
        return self.transformer(self.resnet(x, time), context, None)


def test_it_is_the_eager_network_with_inductor():
    """Outputs and gradients; the generated code is only as much as two blocks', for the C++ compiler's sake."""
    torch.manual_seed(0)
    network = Pair()
    given = torch.randn(2, 8, 8, 8), torch.randn(2, 8), torch.randn(2, 7, 8)
    eager = gradients(network, *given)
    compile_network(network, "blocks")
    for _ in range(2):
        made = gradients(network, *given)
    assert compiled() == len(blocks_of(network)) == 2 and not counters["graph_break"]
    assert_equal(made, eager)


@pytest.mark.parametrize(("model", "how"), [*((m, "blocks") for m in MODELS), ("dit_tiny", "whole")])
def test_nothing_is_compiled_again(model, how):
    """And all of it is the eager network. Each of the first three calls is the first of its kind."""
    network = parts_of(model).network
    sizes = ((2, 8), (6, 8), (4, 16), (8, 20), (2, 24))
    eager = [gradients(network, *inputs(network, *size)) for size in sizes]
    compile_network(network, how, backend="aot_eager" if how == "blocks" else "eager")  # no other gradients
    with torch.no_grad():
        network(*inputs(network, 2, 8))
    gradients(network, *inputs(network, 3, 12))  # training after that: batch and sides are others
    with torch.no_grad():
        network(*inputs(network, 4, 16))
    before = compiled()
    assert before > 0 and not counters["graph_break"]
    for size, theirs in zip(sizes, eager, strict=True):
        made = gradients(network, *inputs(network, *size))
        with torch.no_grad():
            torch.testing.assert_close(network(*inputs(network, *size)), made[0])
        assert_equal(made, theirs)
    assert compiled() == before, counters["stats"]


def test_adapters_are_compiled_in_and_taken_off():
    parts = parts_of("dit_tiny")
    network, given = parts.network, inputs(parts.network, 2, 8)
    with torch.no_grad():
        base = network(*given)
    adapter = Hypernetwork()
    adapter.attach(network, parts.text_encoder)
    for p in adapter.parameters():
        nn.init.normal_(p, std=0.1)
    with torch.no_grad():
        eager = network(*given)
        compile_network(network, "blocks", backend="eager")
        before = 0
        for _ in range(2):
            torch.testing.assert_close(network(*given), eager)
            with adapter.disabled():
                torch.testing.assert_close(network(*given), base)
            before = before or compiled()
    assert compiled() == before and not torch.equal(base, eager)


def test_hooks_and_names_stay():
    network, seen = parts_of("dit_tiny").network, []
    names = list(network.state_dict())
    compile_network(network, "blocks", backend="eager")
    blocks_of(network)[0].register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        network(*inputs(network, 2, 8))
    assert seen == [1] and list(network.state_dict()) == names and compiled() == 1


def test_a_unets_blocks_are_its_resnets_and_transformers():
    network = parts_of("unet_tiny").network
    expected = [m for m in network.modules() if isinstance(m, ResnetBlock | SpatialTransformer)]
    assert len(expected) > 3 and {*map(id, expected)} == {*map(id, blocks_of(network))}


def test_a_network_without_blocks_says_so():
    with pytest.raises(ConfigError, match=r"compile=blocks: Sequential says of no layer"):
        compile_network(nn.Sequential(nn.Linear(2, 2)), "blocks")
