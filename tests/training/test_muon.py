"""Muon: what its updates are, which weights it leaves to AdamW, and that its state survives."""

import copy

import pytest
import torch
from conf_nodes import build
from tiny_training import config
from torch import nn

from ldm.errors import ConfigError
from ldm.training.muon import Muon, orthogonal


@pytest.mark.parametrize("shape", [(3, 8, 40), (2, 40, 8), (1, 16, 24)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    u, _, vt = torch.linalg.svd(matrices, full_matrices=False)
    inner = u.mT @ orthogonal(matrices) @ vt.mT  # diagonal: the same singular vectors
    values = inner.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(inner, torch.diag_embed(values), atol=2e-5, rtol=0)
    assert values.min() > 0.65 and values.max() < 1.25


def test_orthogonal_agrees_with_the_iteration_on_whole_matrices():
    torch.manual_seed(1)
    x = torch.randn(1, 24, 216, dtype=torch.float64)
    expected = x / x.norm()
    for _ in range(5):
        gram = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * gram + 2.0315 * gram @ gram) @ expected
    torch.testing.assert_close(orthogonal(x), expected, atol=1e-5, rtol=0)
    assert torch.equal(orthogonal(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv_in": nn.Conv2d(3, 8, 3),
            "hidden": nn.Conv2d(8, 8, 3),
            "norm": nn.GroupNorm(2, 8),
            "top": nn.Linear(8, 4),
        }
    )


def _step(network: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = network["norm"](network["hidden"](network["conv_in"](torch.randn(4, 3, 8, 8, generator=generator))).relu())
    network["top"](x.mean((2, 3))).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def test_first_and_last_layers_and_vectors_are_adamws_bit_for_bit():
    ours, theirs = _network(), _network()
    muon = Muon(ours.named_parameters(), lr=1e-2, weight_decay=0.1, adamw=["conv_in", "top"])
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    before = ours["hidden"].weight.detach().clone()
    _step(ours, muon, 0)
    _step(theirs, adamw, 0)
    for name, p in theirs.named_parameters():
        assert torch.equal(ours.get_parameter(name), p) == (name != "hidden.weight"), name
    # The hidden matrix: decay, then a step whose root mean square is near 0.2 lr, as AdamW's are in training.
    step = (ours["hidden"].weight.detach() - before * (1 - 1e-3)).square().mean().sqrt()
    assert 0.12e-2 < step < 0.24e-2


def test_state_survives_a_save():
    straight, resumed = _network(), _network()
    first, second = (Muon(n.named_parameters(), lr=1e-2, adamw=["conv_in"]) for n in (straight, resumed))
    for seed in range(3):
        _step(straight, first, seed)
        _step(resumed, second, seed)
    other = _network()
    other.load_state_dict(resumed.state_dict())
    third = Muon(other.named_parameters(), lr=1.0, adamw=["conv_in"])
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    for seed in range(3, 6):
        _step(straight, first, seed)
        _step(other, third, seed)
    for p, q in zip(straight.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)


def test_every_direction_moves_alike_however_small_its_gradient():
    torch.manual_seed(0)
    u, v = torch.linalg.qr(torch.randn(16, 16))[0], torch.linalg.qr(torch.randn(48, 48))[0][:16]
    gradient = u * torch.logspace(0, -2, 16) @ v

    def moved(make):
        layer = nn.Linear(48, 16, bias=False)
        before = layer.weight.detach().clone()
        layer.weight.grad = gradient.clone()
        make(layer.named_parameters()).step()
        along = (u.T @ (before - layer.weight.detach()) @ v.T).diagonal()
        return along.min() / along.max()

    assert moved(lambda p: Muon(p, lr=1e-2)) > 0.5
    assert moved(lambda p: torch.optim.AdamW(p, lr=1e-2)) < 0.2


def test_a_momentum_of_one_is_refused():
    with pytest.raises(ConfigError, match="momentum"):
        Muon(_network().named_parameters(), momentum=1.0)


def test_tables_are_adamws():
    """Rows of an embedding are no directions of a map: without being named they are left alone."""
    torch.manual_seed(0)
    networks = [nn.ModuleDict({"words": nn.ModuleDict({"embedding": nn.Embedding(6, 4)})}) for _ in range(2)]
    networks[1].load_state_dict(networks[0].state_dict())
    muon = Muon(networks[0].named_parameters(), lr=1e-2)
    adamw = torch.optim.AdamW(networks[1].parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    for network, optimizer in zip(networks, (muon, adamw), strict=True):
        network["words"]["embedding"](torch.tensor([1, 4])).square().sum().backward()
        optimizer.step()
    weights = [network["words"]["embedding"].weight for network in networks]
    assert torch.equal(*weights)


def test_the_dit_experiment_leaves_modulations_and_ends_to_adamw():
    settings = config("experiment=dit_flow", "model=dit_tiny")
    with torch.device("meta"):
        network = build("model", "dit_tiny")
    excluded = settings["stages"]["diffusion"]["optimizer"]["adamw"]
    optimizer = Muon(network.named_parameters(), adamw=excluded)
    matrices = {p for group in optimizer.param_groups if group["orthogonal"] for p in group["params"]}
    left = {name for name, p in network.named_parameters() if p.ndim > 1 and p not in matrices}
    blocks = {f"transformer_blocks.{i}.norm1.linear.weight" for i in range(2)}
    assert left == {"pos_embed.proj.weight", "norm_out.linear.weight", "proj_out.weight", *blocks}
