"""The U-Net is Stable Diffusion's: same weights, same numbers; and its cheaper ways of computing change nothing."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.models.attention import LONGEST_SCORES, attention, softmax_attention
from ldm.models.embeddings import sinusoids
from ldm.models.resnet import Conv1x1
from ldm.models.unet import UNet

CONF = Path(__file__).parents[2] / "conf"

# name: (ours, diffusers'); diffusers calls the number of heads attention_head_dim
ARCHITECTURES = {
    "sd1": (
        dict(block_channels=(32, 64), attention_levels=(True, False), cross_attention_dim=24, num_heads=4),
        dict(block_out_channels=(32, 64), cross_attention_dim=24, attention_head_dim=4),
    ),
    "sd2": (
        dict(
            block_channels=(32, 64, 64),
            attention_levels=(True, True, False),
            cross_attention_dim=24,
            head_dim=16,
            num_heads=None,
            linear_projection=True,
        ),
        dict(
            block_out_channels=(32, 64, 64),
            cross_attention_dim=24,
            attention_head_dim=(2, 4, 4),
            use_linear_projection=True,
        ),
    ),
    "inpainting_deep": (
        dict(
            in_channels=9,
            block_channels=(16, 32),
            layers_per_block=1,
            attention_levels=(False, True),
            cross_attention_dim=24,
            num_heads=2,
            transformer_depth=2,
            norm_groups=8,
        ),
        dict(
            in_channels=9,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=24,
            attention_head_dim=2,
            transformer_layers_per_block=2,
            norm_num_groups=8,
        ),
    ),
    "no_context": (
        dict(block_channels=(32, 64), attention_levels=(True, False), cross_attention_dim=None, num_heads=4),
        dict(block_out_channels=(32, 64), cross_attention_dim=24, attention_head_dim=4),
    ),
    "no_mid_attention": (
        dict(
            block_channels=(32, 64),
            attention_levels=(True, False),
            mid_attention=False,
            cross_attention_dim=24,
            num_heads=4,
        ),
        dict(
            block_out_channels=(32, 64),
            cross_attention_dim=24,
            attention_head_dim=4,
            mid_block_type="UNetMidBlock2D",
        ),
    ),
}


def diffusers_unet(ours: dict, theirs: dict) -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    flags = ours["attention_levels"]
    torch.manual_seed(0)
    reference = diffusers.UNet2DConditionModel(
        down_block_types=tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in flags),
        up_block_types=tuple("CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(flags)),
        **theirs,
    ).eval()
    if ours["cross_attention_dim"] is None:  # the library knows such blocks, its U-Net's constructor does not
        for block in reference.modules():
            if hasattr(block, "attn2"):
                block.norm2 = block.attn2 = None
    return reference


def inputs(unet: UNet, height: int, width: int, batch: int = 2) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, unet.in_channels, height, width, generator=generator)
    timestep = torch.linspace(0.0, 998.7, batch)  # fractional
    if unet.cross_attention_dim is None:
        return x_t, timestep, Condition()
    return x_t, timestep, Condition(torch.randn(batch, 5, unet.cross_attention_dim, generator=generator))


def awaken(model: nn.Module) -> nn.Module:
    """Random weights everywhere, the zero-initialised ones included: a silent branch hides its errors."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def tiny(**changes) -> UNet:
    torch.manual_seed(0)
    node = OmegaConf.to_container(OmegaConf.load(CONF / "model" / "unet_tiny.yaml"))
    return UNet(**{k: v for k, v in (node | changes).items() if not k.startswith("_")})


# -- parity


@pytest.mark.parametrize("height, width", [(8, 8), (9, 13)])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_diffusers(name: str, height: int, width: int) -> None:
    ours, theirs = ARCHITECTURES[name]
    reference = diffusers_unet(ours, theirs)
    unet = UNet(**ours)
    unet.load_state_dict(reference.state_dict(), strict=True)
    x_t, timestep, cond = inputs(unet, height, width)
    with torch.no_grad():
        expected = reference(x_t, timestep, cond.context).sample
        torch.testing.assert_close(unet(x_t, timestep, cond), expected, atol=1e-4, rtol=0)


def test_mask_hides_tokens() -> None:
    """A masked token is an absent token, and diffusers agrees."""
    ours, theirs = ARCHITECTURES["sd1"]
    reference = diffusers_unet(ours, theirs)
    unet = UNet(**ours)
    unet.load_state_dict(reference.state_dict(), strict=True)
    x_t, timestep, cond = inputs(unet, 8, 8)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    with torch.no_grad():
        masked = unet(x_t, timestep, Condition(cond.context, mask))
        torch.testing.assert_close(masked, unet(x_t, timestep, Condition(cond.context[:, :3])), atol=1e-5, rtol=0)
        expected = reference(x_t, timestep, cond.context, encoder_attention_mask=mask).sample
        torch.testing.assert_close(masked, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "changes, parameters",
    [
        (dict(), 859_520_964),
        (dict(in_channels=9), 859_535_364),
        (dict(cross_attention_dim=1024, head_dim=64, num_heads=None, linear_projection=True), 865_910_724),
    ],
)
def test_published_sizes_build_without_memory(changes: dict, parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(**changes).parameters()) == parameters


def test_forward_on_meta() -> None:
    with torch.device("meta"):
        unet = tiny()
        out = unet(torch.empty(2, 4, 8, 8), torch.empty(2), Condition(torch.empty(2, 3, 64)))
    assert out.shape == (2, 4, 8, 8)


# -- attention


@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("dtype, atol", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_attention_kernels_agree(dtype: torch.dtype, atol: float, with_mask: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, n, 16, generator=generator, dtype=torch.float64) for n in (7, 5, 5))
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]]) if with_mask else None
    keep = None if mask is None else mask[:, None, None, :]
    exact = softmax_attention(q, k, v, keep)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    for out in (attention(q, k, v, mask), softmax_attention(q, k, v, keep)):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, atol=atol, rtol=0)


def test_long_bfloat16_attention_keeps_no_score_matrix() -> None:
    length = math.isqrt(LONGEST_SCORES) + 1
    q = torch.randn(1, 1, length, 8, dtype=torch.bfloat16, requires_grad=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attention(q, q, q)
    assert max(saved) < LONGEST_SCORES


def test_conv1x1_is_a_convolution() -> None:
    torch.manual_seed(0)
    conv, x = Conv1x1(6, 10), torch.randn(2, 6, 3, 5)
    torch.testing.assert_close(conv(x), nn.functional.conv2d(x, conv.weight, conv.bias))


def test_sinusoids_tell_neighbouring_times_apart() -> None:
    t = torch.tensor([0.0, 1e-2, 998.99, 999.0], dtype=torch.float64)
    waves = sinusoids(t, 8)
    assert waves.dtype == torch.float32 and torch.pdist(waves).min() > 1e-3
    torch.testing.assert_close(waves[0], torch.tensor([1.0] * 4 + [0.0] * 4))


# -- training


def test_untrained_answers_zero_yet_learns() -> None:
    """Zero output at first, and a step later every parameter has a gradient."""
    unet = tiny()
    x_t, timestep, cond = inputs(unet, 8, 8)
    optimizer = torch.optim.SGD(unet.parameters(), lr=0.1)
    assert not unet(x_t, timestep, cond).any()
    for _ in range(2):  # conv_out wakes first, then what feeds it
        optimizer.zero_grad()
        (unet(x_t, timestep, cond) - x_t).square().mean().backward()
        optimizer.step()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("policy", ["norms", "blocks"])
def test_recomputing_changes_memory_and_nothing_else(policy: str, dtype: torch.dtype) -> None:
    def run(checkpoint: str) -> tuple[list[Tensor], int]:
        unet = awaken(tiny(checkpoint=checkpoint))
        sizes: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x_t, timestep, cond = inputs(unet, 6, 6)
        autocast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype is torch.bfloat16)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast:
            loss = unet(x_t, timestep, cond).float().square().mean()
        kept = sum(sizes.values())
        loss.backward()
        return [loss.detach(), *(p.grad for p in unet.parameters() if p.grad is not None)], kept

    (plain, kept_plain), (recomputed, kept) = run("none"), run(policy)
    assert all(torch.isfinite(g).all() for g in plain) and kept < kept_plain
    torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)


def test_bfloat16_is_near_float32() -> None:
    unet = awaken(tiny())
    x_t, timestep, cond = inputs(unet, 8, 8)
    with torch.no_grad():
        exact = unet(x_t, timestep, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = unet(x_t, timestep, cond)
        cast = unet.bfloat16()(x_t, timestep, cond)
    for out in (rough, cast):
        assert out.dtype == torch.bfloat16
        assert (out.float() - exact).norm() < 0.02 * exact.norm()


def test_channels_last_changes_nothing() -> None:
    unet = awaken(tiny())
    x_t, timestep, cond = inputs(unet, 7, 8)
    with torch.no_grad():
        plain = unet(x_t, timestep, cond)
        torch.testing.assert_close(
            unet.to(memory_format=torch.channels_last)(x_t, timestep, cond), plain, atol=1e-5, rtol=0
        )


# -- refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(attention_levels=[True]), "attention_levels=[true,false]"),
        (dict(norm_groups=24), "norm_groups=32"),
        (dict(head_dim=24), "head_dim"),
        (dict(head_dim=None, num_heads=5), "num_heads=5"),
        (dict(num_heads=8), "set the other to null"),
        (dict(head_dim=None), "set the other to null"),
        (dict(checkpoint="norm"), "none, norms, blocks"),
    ],
)
def test_impossible_sizes_are_refused_with_a_way_out(changes: dict, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        tiny(**changes)
    assert words in str(error.value)


def test_impossible_inputs_are_refused_with_a_way_out() -> None:
    unet = tiny()
    x_t, timestep, cond = inputs(unet, 8, 8)
    with pytest.raises(ConfigError, match=r"model\.in_channels=9"):
        unet(torch.randn(2, 9, 8, 8), timestep, cond)
    with pytest.raises(ConfigError, match=r"model\.cross_attention_dim=null"):
        unet(x_t, timestep, Condition())
    with pytest.raises(ConfigError, match=r"model\.cross_attention_dim=7"):
        unet(x_t, timestep, Condition(torch.randn(2, 3, 7)))


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("unet_*.yaml")), ids=lambda f: f.stem)
def test_parameter_counts_in_the_yaml_comments(file: Path) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in instantiate(OmegaConf.load(file)).parameters())
    assert f" {count:,} parameters" in file.read_text().splitlines()[0]
