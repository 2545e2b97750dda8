"""Tiles change nothing for what is local, and come to the rescue of what does not fit into memory."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm import sampling
from ldm.autoencoders.kl import AutoencoderKL
from ldm.autoencoders.latents import LatentSpace, Posterior
from ldm.autoencoders.tiling import _starts, tiled
from ldm.sampling import Noise, Sampler

SIZES = [(5, 7), (8, 8), (9, 8), (16, 20), (21, 13), (40, 31)]  # below, at and above one tile of 8, most no multiples


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_a_pointwise_function_is_the_same_in_tiles(size, overlap):
    """So the weights of every pixel sum to one, and every tile lies where it belongs."""
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    whole = torch.cat([x.sin(), x[:, :1].exp()], dim=1)  # another number of channels
    got = tiled(lambda t: torch.cat([t.sin(), t[:, :1].exp()], dim=1), x, Fraction(1), tile=8, overlap=overlap)
    torch.testing.assert_close(got, whole, atol=1e-12, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_decoding_and_encoding_scale(size):
    """Eight pixels for one latent and back: the tiles' places and ramps scale with them."""
    x = torch.randn(1, 4, *size, dtype=torch.float64)

    def up(t):
        return F.interpolate(t, scale_factor=8, mode="nearest")

    picture = tiled(up, x, Fraction(8), tile=8, overlap=3)
    torch.testing.assert_close(picture, up(x), atol=1e-12, rtol=0)
    back = tiled(lambda t: F.avg_pool2d(t, 8), picture, Fraction(1, 8), tile=64, overlap=24)
    torch.testing.assert_close(back, x, atol=1e-12, rtol=0)


def test_a_convolution_differs_only_where_a_tile_is_cut():
    """A 3x3 convolution misses its neighbours on the outermost pixels of a tile, which weigh least of all there."""
    torch.manual_seed(0)
    x, tile, overlap = torch.randn(1, 2, 21, 30, dtype=torch.float64), 10, 4
    convolve = nn.Conv2d(2, 3, 3, padding=1, dtype=torch.float64)
    with torch.no_grad():
        whole, got = convolve(x), tiled(convolve, x, Fraction(1), tile, overlap)
    cut = torch.zeros(21, 30, dtype=torch.bool)
    for top in _starts(21, tile, overlap):
        cut[[r for r in (top, top + tile - 1) if 0 < r < 20]] = True
    for left in _starts(30, tile, overlap):
        cut[:, [c for c in (left, left + tile - 1) if 0 < c < 29]] = True
    difference = (got - whole).abs().amax(dim=(0, 1))
    assert 0.3 < cut.double().mean() < 0.7
    assert difference[~cut].max() < 1e-12 < difference[cut].max()


@pytest.mark.parametrize("across", [2, 3])
def test_tiles_that_disagree_are_blended_linearly(across):
    """Each tile is painted in one colour of its own: no seam is steeper than one tile's ramp and its neighbour's."""
    x = torch.zeros(1, 1, 40, 40, dtype=torch.float64)
    colours = x + torch.arange(40.0).reshape((1, 1, 40, 1) if across == 2 else (1, 1, 1, 40))
    got = tiled(lambda t: t.mean().expand_as(t), colours, Fraction(1), tile=16, overlap=8)
    steps = got.diff(dim=across)
    assert steps.min() >= -1e-12 and got.diff(dim=5 - across).abs().max() < 1e-12
    # Colours 8 apart, ramps of 1/9 a pixel; where one tile begins and another ends two of them add up.
    assert 0.8 < steps.max() < 2 * 8 / 9 + 1e-9


@pytest.mark.parametrize(("size", "overlap"), [(8, 3), (9, 3), (64, 16), (65, 16), (100, 0), (1000, 63)])
def test_tiles_cover_everything_and_overlap_as_asked(size, overlap):
    tile = 8 if size < 64 else 64
    starts = _starts(size, tile, overlap)
    assert starts[0] == 0 and starts[-1] + tile == max(size, tile)
    assert all(a < b <= a + tile - overlap for a, b in pairwise(starts))


class Pooling(nn.Module):
    """An autoencoder that is local: encoding averages 8x8 pixels, decoding repeats them."""

    factor = 8

    def __init__(self):
        super().__init__()
        self.latents = LatentSpace(3)
        self.latents.set(torch.tensor([0.1, 0.0, -0.2]), torch.tensor([0.5, 1.0, 2.0]))
        self.anything = nn.Parameter(torch.zeros(1))
        self.decoded = []  # sizes

    def posterior(self, moments):
        return Posterior.from_moments(moments)

    def encode(self, images):
        mean = F.avg_pool2d(images, 8)
        return Posterior(mean, mean - 2)

    def decode(self, z):
        self.decoded.append(tuple(z.shape))
        return F.interpolate(z, scale_factor=8, mode="nearest")


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(sampling, "TILE", 8)
    monkeypatch.setattr(sampling, "OVERLAP", 4)


def test_a_picture_is_encoded_in_tiles_with_the_same_noise(small_tiles):
    sampler = Sampler(None, Pooling(), None)
    image = torch.rand(2, 3, 88, 168) * 2 - 1
    whole, got = (sampler._encode(image, Noise([3, 4]), tiling) for tiling in (False, True))
    torch.testing.assert_close(got, whole, atol=1e-5, rtol=1e-5)
    assert whole.std() > 0.1 and whole.shape == (2, 3, 11, 21)


def test_batches_are_decoded_in_slices(monkeypatch):
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_channels=[8, 16], layers_per_block=1, norm_groups=4).eval()
    autoencoder.latents.set(0.3, 2.0)
    sampler, x0 = Sampler(None, autoencoder, None), torch.randn(5, 4, 6, 8)
    whole = sampler.decode(x0)  # other batch sizes add in another order: 1.3e-6 apart, measured with AVX512
    decode, sizes = autoencoder.decode, []
    monkeypatch.setattr(autoencoder, "decode", lambda z: sizes.append(len(z)) or decode(z))
    monkeypatch.setattr(sampling, "DECODED_AT_ONCE", 2 * 12 * 16)
    torch.testing.assert_close(sampler.decode(x0), whole, atol=1e-5, rtol=0)
    monkeypatch.setattr(sampling, "DECODED_AT_ONCE", 1)  # less than one picture
    torch.testing.assert_close(sampler.decode(x0), whole, atol=1e-5, rtol=0)
    assert sizes == [2, 2, 1] + 5 * [1]
    torch.testing.assert_close(whole, decode(x0 * 2.0 + 0.3).clamp(-1, 1).detach(), atol=1e-5, rtol=0)


def test_out_of_memory_ends_in_tiles_and_a_warning(monkeypatch, small_tiles, recwarn):
    autoencoder = Pooling()
    decode = autoencoder.decode

    def short_of_memory(z):
        if z.shape[-1] * z.shape[-2] > 64:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z)

    sampler, x0 = Sampler(None, autoencoder, None), torch.randn(2, 3, 12, 20) / 4
    whole = sampler.decode(x0)
    monkeypatch.setattr(autoencoder, "decode", short_of_memory)
    autoencoder.decoded.clear()
    with pytest.warns(UserWarning, match="out of memory while decoding: decoding in tiles.*tiling=true"):
        rescued = sampler.decode(x0)
    torch.testing.assert_close(rescued, whole, atol=1e-6, rtol=0)
    assert set(autoencoder.decoded) == {(1, 3, 8, 8)}  # a picture at a time
    recwarn.clear()
    torch.testing.assert_close(sampler.decode(x0, tiling=True), whole, atol=1e-6, rtol=0)
    assert not recwarn.list, "what was asked for needs no warning"


def test_a_real_decoder_s_tiles_come_close_as_they_grow(monkeypatch):
    """GroupNorm and attention see their tile only: it gives nearly the same picture where it has enough to see."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(block_channels=[8, 16, 16], layers_per_block=1, norm_groups=4).eval()
    autoencoder.latents.set(0.0, 1.0)
    sampler, x0 = Sampler(None, autoencoder, None), torch.randn(1, 4, 40, 56)
    whole, errors = sampler.decode(x0), []
    for tile, overlap in ((8, 4), (16, 8), (24, 8), (56, 8)):
        monkeypatch.setattr(sampling, "TILE", tile)
        monkeypatch.setattr(sampling, "OVERLAP", overlap)
        got = sampler.decode(x0, tiling=True)
        assert got.shape == whole.shape == (1, 3, 160, 224)
        errors.append(float((got - whole).abs().mean() / whole.std()))
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.2 and errors[3] < 1e-6, errors
