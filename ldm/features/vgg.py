"""VGG16's feature maps, and LPIPS, the perceptual distance on them."""

from __future__ import annotations

import math
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.formats.files import hub
from ldm.formats.files.open import float32, load

WIDTHS = (64, 128, 256, 512, 512)  # of the five blocks
DEPTHS = (2, 2, 3, 3, 3)  # convolutions in each
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]
RANDOM = "random"
SMALLEST = 16  # pixels a side: four halvings


class VGG16(nn.Module):
    """The last activation of each of the five blocks (Simonyan and Zisserman 2015); keys are torchvision's.

    width: multiplies all channels.
    """

    def __init__(self, width: float = 1.0):
        super().__init__()
        layers: list[nn.Module] = []
        self.ends, channels = [], 3
        for block, depth in enumerate(DEPTHS):
            for _ in range(depth):
                layers += [nn.Conv2d(channels, int(WIDTHS[block] * width), 3, padding=1), nn.ReLU()]
                channels = int(WIDTHS[block] * width)
            self.ends.append(len(layers) - 1)
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])

    def forward(self, images: Tensor) -> list[Tensor]:  # (B,3,H,W) standardised -> five of (B,C_i,H/2^i,W/2^i)
        found = []
        for i, layer in enumerate(self.features):
            images = layer(images)
            if i in self.ends:
                found.append(images)
        return found


class LPIPS(nn.Module):
    """The perceptual distance of two pictures (Zhang et al. 2018, Equation 1), version 0.1 on VGG16.

    Feature vectors of unit length are compared place by place; the squared differences are weighed by a head a layer,
    averaged over places and summed over layers.

    features: VGG16's weights in torchvision's layout, a file or a hub id with `model.safetensors`; "random": a fixed
        random network of a quarter of the width and heads that average. Such features are no judge of what people see,
        but they see edges and textures that a mean over pixels does not (Ulyanov et al. 2018; Zhang et al. 2018,
        Figure 4); their numbers compare with nobody else's.
    heads: the published linear heads, a file; None: those that torchmetrics brings along.
    key: what the two stand under in a configuration, for errors.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, features: str = RANDOM, heads: str | None = None, key: str = "features"):
        super().__init__()
        self.random, self.key = features == RANDOM, key
        with torch.random.fork_rng(devices=[]):  # nobody's other weights depend on it
            self.network = VGG16(0.25 if self.random else 1.0)
        self.heads = nn.ParameterList([nn.Parameter(torch.full((int(w),), 1 / w)) for w in self._widths])
        for name, values in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()
        if self.random:
            self._draw()
        elif not self.heads[0].is_meta:  # there its size is all
            self._read(weights_file(features, key), heads)

    @property
    def _widths(self) -> list[int]:
        return [self.network.features[end - 1].out_channels for end in self.network.ends]  # type: ignore[misc]

    def _draw(self) -> None:
        generator = torch.Generator().manual_seed(0)
        for layer in self.network.features:
            if isinstance(layer, nn.Conv2d):
                std = math.sqrt(2 / (9 * layer.in_channels))
                layer.weight.data = torch.randn(layer.weight.shape, generator=generator) * std
                layer.bias.data.zero_()  # type: ignore[union-attr]

    def _read(self, features: Path, heads: str | None) -> None:
        state = {k: float32(v) for k, v in load(features).tensors.items() if k.startswith("features.")}
        wrong = [k for k, v in self.network.state_dict().items() if k not in state or state[k].shape != v.shape]
        if wrong:
            raise ConfigError(
                f"{self.key}={features} is not VGG16 in torchvision's layout ({wrong[0]} is not there or of another "
                f"size): give its file, or {self.key}={RANDOM}."
            )
        self.network.load_state_dict({k: state[k] for k in self.network.state_dict()})
        path = Path(heads) if heads else bundled_heads()
        if not path.is_file():
            raise ConfigError(f"heads={path}: there is no such file; null takes the published ones of torchmetrics.")
        tensors = load(path).tensors
        for i, head in enumerate(self.heads):
            values = tensors.get(f"lin{i}.model.1.weight")
            if values is None or values.numel() != head.numel():
                raise ConfigError(f"heads={path} holds no lin{i}.model.1.weight of {head.numel()} numbers: not LPIPS'.")
            head.data = float32(values).flatten()

    def forward(self, output: Tensor, images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] each -> (B,)
        if min(images.shape[-2:]) < SMALLEST:
            raise ConfigError(
                f"a perceptual term needs pictures of at least {SMALLEST} pixels a side, not "
                f"{images.shape[-2]}x{images.shape[-1]}: leave it out, or set image_size={SMALLEST} or more."
            )
        both = torch.cat([output, images])
        ours = [unit(maps).chunk(2) for maps in self.network((both.float() / 2 + 0.5 - self.mean) / self.std)]
        distances = [
            torch.einsum("bchw,c->bhw", (a - b).square(), head).flatten(1).mean(dim=1)
            for (a, b), head in zip(ours, self.heads, strict=True)
        ]
        return torch.stack(distances).sum(dim=0)


def unit(maps: Tensor) -> Tensor:  # (B,C,H,W) -> the same, every place's vector of length 1, in float32
    maps = maps.float()
    return maps / (maps.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()


def weights_file(name: str, key: str) -> Path:
    """A file, or that of a hub id. ConfigError where neither can be had."""
    if Path(name).is_file():
        return Path(name)
    remedy = (
        f"Give VGG16's weights as a file: {key}=vgg16.pth (torchvision's), or {key}={RANDOM}, a fixed random network"
    )
    found = hub.fetch(name, key, ["model.safetensors"], remedy) / "model.safetensors"
    if not found.is_file():
        raise ConfigError(f"{key}={name} holds no model.safetensors. {remedy}.")
    return found


def bundled_heads() -> Path:
    """LPIPS' linear heads for VGG16, which are part of torchmetrics."""
    spec = find_spec("torchmetrics")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "functional/image/lpips_models/vgg.pth"
