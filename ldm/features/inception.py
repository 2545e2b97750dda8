"""The Inception network of 2015 whose features FID, KID and the Inception Score are defined on."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.errors import ConfigError
from ldm.features.network import Captioned, PictureFeatures, scaled_as_pillow, scaled_as_tensorflow
from ldm.formats.files.open import float32, load
from ldm.pictures import in_256

SIZE, CLASSES = 299, 1008
RESIZES = {"tensorflow": scaled_as_tensorflow, "pillow": scaled_as_pillow}
Size = int | tuple[int, int]


class Inception(PictureFeatures):
    """Inception v3 as TensorFlow published it on 5 December 2015 (Szegedy et al. 2016), 2048 features.

    weights: the file that torch-fidelity or pytorch-fid fetches, weights-inception-2015-12-05-6726825d.pth or
        pt_inception-2015-12-05-6726825d.pth. It is read as data; a TorchScript archive would be a program.
    resize: "tensorflow", inside the network of 2015, as in torch-fidelity and ADM; "pillow": clean-fid's.
    """

    name = ""
    width = 2048
    classifies = True

    def __init__(self, weights: str | None = None, resize: str = "tensorflow"):
        super().__init__()
        if resize not in RESIZES:
            raise ConfigError(f"resize={resize}: choose {' or '.join(RESIZES)}.")
        if not weights or not Path(weights).is_file():
            there = f"={weights}: there is no such file" if weights else " is not given"
            raise ConfigError(
                f"metric.fid.features.weights{there}. FID's network is not part of this package: give the "
                "file of torch-fidelity or pytorch-fid (pt_inception-2015-12-05-6726825d.pth), or measure with "
                "metric=trained, a network that is trained on your data."
            )
        self.weights, self._scale = weights, RESIZES[resize]
        self.resize = f"{SIZE} pixels, {resize}'s {'bilinear' if resize == 'tensorflow' else 'antialiased bicubic'}"
        self.network: _Network | None = None

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.network is None:
            self.network = _Network()
            self.network.load_state_dict(_checked(self.weights, self.network))
            self.network.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        assert self.network is not None, "start() opens the weights"
        return self.network((self._scale(in_256(images), SIZE) - 128) / 128)

    def logits(self, features: Tensor) -> Tensor:
        """Without the bias, as the Inception Score's authors had them."""
        assert self.network is not None
        return features.to(self.network.fc.weight) @ self.network.fc.weight.T


def _checked(file: str, network: nn.Module) -> dict[str, Tensor]:
    tensors, wanted = load(Path(file)).tensors, network.state_dict()
    wrong = [k for k, v in wanted.items() if k not in tensors or tensors[k].shape != v.shape]
    if [k for k in wrong if not k.endswith("num_batches_tracked")]:
        raise ConfigError(
            f"metric.fid.features.weights={file} is not FID's Inception ({wrong[0]} is not there or of another size)."
        )
    return {k: float32(tensors[k]) if k in tensors else v for k, v in wanted.items()}


class _Convolution(nn.Module):
    def __init__(self, channels: int, out: int, kernel: Size = 1, stride: int = 1, padding: Size = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


# A layer: the end of its name, channels out, kernel, stride, padding. A tuple of layers branches once more.
Layer = tuple[str, int, Size, int, Size]
Steps = list[Layer | tuple[Layer, Layer]]
_ROW: tuple[Size, Size] = ((1, 7), (0, 3))
_COLUMN: tuple[Size, Size] = ((7, 1), (3, 0))


def _same(name: str, out: int, kernel: Size = 1, padding: Size = 0) -> Layer:
    return name, out, kernel, 1, padding


class _Mixed(nn.Module):
    """Paths beside each other, and a pooling with a 1x1 convolution; channels of all are joined.

    Names are those of the published files.
    """

    def __init__(self, channels: int, paths: list[Steps], pool: str, pooled: int = 0):
        super().__init__()
        self.pool, self.paths = pool, []
        for path in paths:
            names: list[tuple[str, ...]] = []
            width = channels
            for step in path:
                layers: tuple[Layer, ...] = (step,) if isinstance(step[0], str) else step  # type: ignore[assignment]
                for name, out, kernel, stride, padding in layers:
                    self.add_module(f"branch{name}", _Convolution(width, out, kernel, stride, padding))
                names.append(tuple(f"branch{layer[0]}" for layer in layers))
                width = layers[0][1]
            self.paths.append(names)
        if pooled:
            self.branch_pool = _Convolution(channels, pooled)

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for path in self.paths:
            y = x
            for names in path:
                y = torch.cat([self.get_submodule(name)(y) for name in names], dim=1)
            found.append(y)
        if self.pool == "stride":
            return torch.cat([*found, F.max_pool2d(x, 3, stride=2)], dim=1)
        if self.pool == "average":  # TensorFlow does not count the border
            x = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
        else:
            x = F.max_pool2d(x, 3, stride=1, padding=1)
        return torch.cat([*found, self.branch_pool(x)], dim=1)


def _narrow(channels: int, pooled: int) -> _Mixed:
    wide = [_same("5x5_1", 48), _same("5x5_2", 64, 5, 2)]
    double = [_same("3x3dbl_1", 64), _same("3x3dbl_2", 96, 3, 1), _same("3x3dbl_3", 96, 3, 1)]
    return _Mixed(channels, [[_same("1x1", 64)], [*wide], [*double]], "average", pooled)


def _middle(inner: int) -> _Mixed:
    short = [_same("7x7_1", inner), _same("7x7_2", inner, *_ROW), _same("7x7_3", 192, *_COLUMN)]
    double = [_same("7x7dbl_1", inner), _same("7x7dbl_2", inner, *_COLUMN), _same("7x7dbl_3", inner, *_ROW)]
    double += [_same("7x7dbl_4", inner, *_COLUMN), _same("7x7dbl_5", 192, *_ROW)]
    return _Mixed(768, [[_same("1x1", 192)], [*short], [*double]], "average", 192)


def _last(channels: int, pool: str) -> _Mixed:
    def forked(name: str) -> tuple[Layer, Layer]:
        return _same(f"{name}a", 384, (1, 3), (0, 1)), _same(f"{name}b", 384, (3, 1), (1, 0))

    double: Steps = [_same("3x3dbl_1", 448), _same("3x3dbl_2", 384, 3, 1), forked("3x3dbl_3")]
    return _Mixed(channels, [[_same("1x1", 320)], [_same("3x3_1", 384), forked("3x3_2")], [*double]], pool, 192)


class _Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = _Convolution(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = _Convolution(32, 32, 3)
        self.Conv2d_2b_3x3 = _Convolution(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = _Convolution(64, 80)
        self.Conv2d_4a_3x3 = _Convolution(80, 192, 3)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _narrow(192, 32), _narrow(256, 64), _narrow(288, 64)
        double: Steps = [_same("3x3dbl_1", 64), _same("3x3dbl_2", 96, 3, 1), ("3x3dbl_3", 96, 3, 2, 0)]
        self.Mixed_6a = _Mixed(288, [[("3x3", 384, 3, 2, 0)], [*double]], "stride")
        self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (_middle(n) for n in (128, 160, 160, 192))
        long = [_same("7x7x3_1", 192), _same("7x7x3_2", 192, *_ROW), _same("7x7x3_3", 192, *_COLUMN)]
        short: Steps = [_same("3x3_1", 192), ("3x3_2", 320, 3, 2, 0)]
        self.Mixed_7a = _Mixed(768, [[*short], [*long, ("7x7x3_4", 192, 3, 2, 0)]], "stride")
        self.Mixed_7b, self.Mixed_7c = _last(1280, "average"), _last(2048, "max")  # the max is of 2015's graph
        self.fc = nn.Linear(2048, CLASSES)

    def forward(self, x: Tensor) -> Tensor:  # (B,3,299,299) in [-1, 1) -> (B,2048)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, stride=2)))
        x = F.max_pool2d(x, 3, stride=2)
        for name, block in self.named_children():
            x = block(x) if name.startswith("Mixed") else x
        return x.mean(dim=(2, 3))
