"""LPIPS: the published distance, a fixed one without weights, and what it says of files that are something else."""

import pytest
import torch
import torchmetrics.functional.image.lpips as published
from safetensors.torch import save_file
from torch import nn

from ldm.errors import ConfigError
from ldm.features.vgg import LPIPS, VGG16, bundled_heads, weights_file

LAYOUT = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]


class Published(nn.Module):
    """What the published code takes VGG16's maps from, with torchvision's layers in a list."""

    def __init__(self, pretrained=False, requires_grad=False):
        super().__init__()
        layers, channels = [], 3
        for width in LAYOUT:
            layers += [nn.MaxPool2d(2)] if width == "M" else [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = channels if width == "M" else width
        self.features = nn.Sequential(*layers)

    def forward(self, x):
        return [self.features[:end](x) for end in (4, 9, 16, 23, 30)]


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(published, "Vgg16", Published)
        return published._LPIPS(net="vgg", pnet_rand=True).eval()


@pytest.fixture(scope="module")
def file(reference, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "model.safetensors"
    save_file(reference.net.state_dict() | {"head.fc.weight": torch.zeros(2, 2)}, path)
    return path


def pictures(n=2, size=35):
    return torch.rand(2, n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_it_is_the_published_distance(reference, file):
    a, b = pictures()
    with torch.no_grad():
        wanted = reference(a, b).flatten()
        torch.testing.assert_close(LPIPS(str(file))(a, b), wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(LPIPS(str(file), str(bundled_heads()))(a, b), wanted, atol=1e-5, rtol=1e-5)


def test_the_random_one_is_fixed_and_sees_what_pixels_do_not():
    """Of two pictures with one squared error the one that lost its texture is further away than the brighter one."""
    a, b = pictures()
    state = torch.random.get_rng_state()
    one, two = LPIPS(), LPIPS()
    assert torch.equal(torch.random.get_rng_state(), state) and not any(p.requires_grad for p in one.parameters())
    assert one.random and torch.equal(one(a, b), two(a, b)) and torch.equal(one(a, a), torch.zeros(2))
    checks = ((torch.arange(32)[:, None] + torch.arange(32)) // 2 % 2 * 0.8 - 0.4).expand(1, 3, 32, 32)
    blurred, brighter = checks * 0.0, checks + 0.4
    torch.testing.assert_close((blurred - checks).square().mean(), (brighter - checks).square().mean())
    assert one(blurred, checks) > 2 * one(brighter, checks)


def test_its_gradient_is_finite_where_maps_are_nothing():
    distance = LPIPS()
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)
    for layer in distance.network.features:
        if isinstance(layer, nn.Conv2d):
            layer.bias.data.fill_(-100.0)  # dead everywhere
    distance(black, torch.ones(1, 3, 16, 16)).sum().backward()
    assert black.grad.isfinite().all()


def test_keys_are_torchvision_s():
    wanted = {f"features.{i}.{n}" for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28) for n in ("weight", "bias")}
    assert set(VGG16().state_dict()) == wanted


def test_what_is_no_vgg_is_refused_in_a_line(file, tmp_path, monkeypatch):
    save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, tmp_path / "half.safetensors")
    with pytest.raises(ConfigError, match=r"features\.0\.bias.*features=random"):
        LPIPS(str(tmp_path / "half.safetensors"))
    with pytest.raises(ConfigError, match="lin0"):
        LPIPS(str(file), str(file))
    with pytest.raises(ConfigError, match="no such file; null takes"):
        LPIPS(str(file), "nowhere.pth")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError, match=r"vgg16\.pth.*features=random"):
        weights_file("timm/vgg16.tv_in1k", "features")
    with pytest.raises(ConfigError, match="16 pixels"):
        LPIPS()(*pictures(size=15))
