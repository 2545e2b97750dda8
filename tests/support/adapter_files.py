"""Random adapters, and their effect on weights: what the tests of ldm/formats/adapters share."""

from __future__ import annotations

import re

import torch

from ldm.adapters.content import HypernetworkTensors, Lora, LowRank
from ldm.formats.checkpoint import Stored

# Every kind of layer: linear maps, projections that are 1x1 convolutions in Stable Diffusion 1, LoCon's convolutions.
EVERYWHERE = (
    r"unet\.(conv_in|time_embedding\.linear_1|down_blocks\.1\.downsamplers\.0\.conv|up_blocks\.1\.upsamplers\.0\.conv"
    r"|mid_block\.resnets\.1\.(conv1|time_emb_proj)|up_blocks\.2\.resnets\.0\.conv_shortcut|down_blocks\.0\.attentions\.1.*"
    r"|mid_block\.attentions\.0.*)|text_encoder\.text_model\.encoder\.layers\.1\.(self_attn|mlp).*"
)


def weights(checkpoint: Stored) -> dict[str, torch.Tensor]:
    """All of a base's weights by our names."""
    return {f"{part}.{k}": v for part in ("unet", "text_encoder") for k, v in checkpoint.states[part].items()}


def low_rank(weight: torch.Tensor, rank: int, alpha: float, generator: torch.Generator, dora: bool = False) -> LowRank:
    """An update of about the weight's own size."""

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / rank**0.5

    out, *rest = weight.shape
    magnitude = 1 + torch.rand(out, generator=generator) if dora else None
    return LowRank(draw(rank, *rest), draw(out, rank, *[1] * (weight.ndim - 2)), alpha, magnitude)


def random_lora(base: dict[str, torch.Tensor], alphas=(2.0,), ranks=(4, 3), layers=EVERYWHERE, dora=False) -> Lora:
    """An update of all matrices and convolutions whose names fit, ranks and alphas taken in turn."""
    generator = torch.Generator().manual_seed(5)
    found = [n for n, w in base.items() if re.fullmatch(rf"({layers})\.weight", n) and w.ndim > 1]
    assert found
    return Lora(
        {
            name.removesuffix(".weight"): low_rank(
                base[name], ranks[i % len(ranks)], alphas[i % len(alphas)], generator, dora
            )
            for i, name in enumerate(found)
        }
    )


def random_hypernetwork(widths=(32, 64), **settings) -> HypernetworkTensors:
    """A1111's sequence of modules by width, filled at random."""
    made = HypernetworkTensors({}, **settings)
    torch.manual_seed(3)
    made.networks = {w: (sequence(made, w).state_dict(), sequence(made, w).state_dict()) for w in widths}
    return made


def sequence(settings: HypernetworkTensors, width: int) -> torch.nn.Module:
    """The modules in A1111's order: after each linear map an activation, a norm and a dropout, where there are some."""
    modules: list[torch.nn.Module] = []
    steps = list(zip(settings.structure, settings.structure[1:], strict=False))
    for i, (given, made) in enumerate(steps):
        modules.append(torch.nn.Linear(int(width * given), int(width * made)))
        if settings.activation != "linear" and (settings.activate_output or i < len(steps) - 1):
            modules.append({"relu": torch.nn.ReLU, "swish": torch.nn.Hardswish}[settings.activation]())
        if settings.layer_norm:
            modules.append(torch.nn.LayerNorm(int(width * made)))
        if settings.dropout and settings.dropout[i + 1] > 0:
            modules.append(torch.nn.Dropout(settings.dropout[i + 1]))
    module = torch.nn.Module()
    module.linear = torch.nn.Sequential(*modules)
    return module


def assert_same_lora(one: Lora, other: Lora) -> None:
    """Bit for bit; metadata may have grown."""
    assert one.layers.keys() == other.layers.keys()
    for name, update in one.layers.items():
        found = other.layers[name]
        assert torch.equal(update.down, found.down) and torch.equal(update.up, found.up), name
        assert update.alpha == found.alpha and type(found.alpha) is float, name
        assert (update.magnitude is None) == (found.magnitude is None), name
        assert update.magnitude is None or torch.equal(update.magnitude, found.magnitude), name
    assert one.metadata.items() <= other.metadata.items()
