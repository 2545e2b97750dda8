"""Networks that pictures are measured by: published layouts, equal weights each time, one line where there are none."""

import pytest
import torch
from transformers import CLIPModel
from vision import small_clip, small_dinov2

from ldm.errors import ConfigError
from ldm.features.cache import FeatureCache, fingerprint
from ldm.features.inception import Inception, _Network
from ldm.features.network import digest_of, scaled_as_tensorflow
from ldm.features.trained import TrainedFeatures
from ldm.features.vision_features import CLIP, DINOv2
from ldm.pictures import in_256, to_unit

PICTURES = to_unit(torch.randint(0, 256, (24, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8))


def captioned(most: int):
    """Bright pictures and dark ones, as their captions say."""
    bright = PICTURES * 0.2 + 0.6
    pairs = [(bright, ["a bright one"] * 24), (PICTURES * 0.2 - 0.6, ["a dark one"] * 24)]
    return iter([(images[:most], captions[:most]) for images, captions in pairs])


def test_tensorflows_scaling_starts_at_whole_pixels():
    images = torch.tensor([[0.0, 3.0], [6.0, 9.0]]).view(1, 1, 2, 2)
    wide = scaled_as_tensorflow(images, 4)[0, 0]
    expected = [0.0, 1.5, 3.0, 3.0]  # at 0, 0.5, 1 and 1.5, which lies beyond the last pixel
    assert wide[0].tolist() == expected and wide[:, 0].tolist() == [0.0, 3.0, 6.0, 6.0]


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.manual_seed(0)
    torch.save(_Network().state_dict(), path)
    return path


def test_inception_has_the_published_layout(inception):
    """Values beside torch-fidelity's network on shared weights: experiments/015_metrics."""
    state = torch.load(inception)
    convolutions = [k for k in state if k.endswith("conv.weight")]
    weights = sum(v.numel() for k, v in state.items() if k.endswith(("conv.weight", "bn.weight", "bn.bias")))
    assert len(convolutions) == 94 and weights == 21_785_568 and len(state) == 566
    assert state["Mixed_7c.branch3x3dbl_3b.conv.weight"].shape == (384, 384, 3, 1)
    network = Inception(str(inception))
    network.start(captioned)
    features = network(PICTURES[:2])
    assert features.shape == (2, 2048) and network.logits(features).shape == (2, 1008)
    assert network.card()["resize"] == "299 pixels, tensorflow's bilinear"
    other = Inception(str(inception), resize="pillow")
    other.start(captioned)
    assert digest_of(other) == digest_of(network)
    assert not torch.allclose(other(PICTURES[:2]), features)


def test_what_is_no_inception_is_one_line(tmp_path):
    torch.save({"conv.weight": torch.zeros(1)}, tmp_path / "wrong.pth")
    for make, said in (
        (lambda: Inception(), "metric.fid.features.weights is not given"),
        (lambda: Inception(str(tmp_path / "none.pth")), "there is no such file"),
        (lambda: Inception(str(tmp_path / "wrong.pth"), resize="nearest"), "resize=nearest: choose"),
        (lambda: Inception(str(tmp_path / "wrong.pth")).start(captioned), "is not FID's Inception"),
        (lambda: DINOv2(str(tmp_path / "nowhere")), "transformers finds no model there"),
        (lambda: CLIP(small_dinov2(tmp_path / "dino")), "is a dinov2, not a CLIP"),
    ):
        with pytest.raises(ConfigError, match=said):
            make()


def test_the_class_token_and_clips_embeddings(tmp_path):
    dino = DINOv2(small_dinov2(tmp_path / "dino"), size=28)
    dino.start(captioned)
    assert dino(PICTURES[:2]).shape == (2, 24) and dino.width == 24
    clip = CLIP(small_clip(tmp_path / "clip"))
    clip.start(captioned)
    seen, told = clip(PICTURES[:3]), clip.texts(["a red star", "b", "a long caption that is cut after sixteen letters"])
    assert seen.shape == told.shape == (3, 12)
    assert torch.allclose(seen.norm(dim=1), torch.ones(3)) and torch.allclose(told.norm(dim=1), torch.ones(3))
    alone = clip.texts(["b"])  # padding beside longer ones changes nothing
    assert torch.allclose(alone[0], told[1], atol=1e-5)
    assert clip.card()["network_weights"] == digest_of(CLIPModel.from_pretrained(str(tmp_path / "clip")))


def test_trained_features_see_what_captions_say_and_are_the_same_each_time(tmp_path):
    networks = [TrainedFeatures(width=8, steps=30) for _ in range(2)]
    for network in networks:
        network.start(captioned)
    assert networks[0].words == ["bright", "dark"]  # "a" and "one" stand in all captions
    assert digest_of(networks[0]) == digest_of(networks[1]) != digest_of(TrainedFeatures(width=8))
    bright, dark = (networks[0](images) for images, _ in captioned(24))
    between = (bright.mean(0) - dark.mean(0)).norm()
    assert between > 4 * torch.cat([bright - bright.mean(0), dark - dark.mean(0)]).std()
    assert networks[0](torch.zeros(2, 3, 100, 80)).shape == (2, 8)
    for damaged in (False, True):  # kept, read again, and made again where the file is none any more
        again = TrainedFeatures(width=8, steps=30)
        again.start(captioned, tmp_path)
        (file,) = tmp_path.iterdir()
        assert digest_of(again) == digest_of(networks[0])
        if damaged:
            file.write_bytes(b"")
            other = TrainedFeatures(width=8, steps=30)
            other.start(captioned, tmp_path)
            assert digest_of(other) == digest_of(again) and file.stat().st_size
    with pytest.raises(ConfigError, match="learns to see words, and of 24 training captions no two words"):
        TrainedFeatures().start(lambda most: iter([(PICTURES, [""] * 24)]))


def test_known_features_are_read_and_damaged_ones_made_again(tmp_path):
    network = TrainedFeatures(width=8, steps=2)
    network.start(captioned)
    asked = []

    def pictures():
        asked.append(1)
        return iter(PICTURES.split(10))

    cache = FeatureCache(tmp_path)
    found, content = cache.features(network, pictures, "cpu")
    assert len(asked) == 2 and content == str(fingerprint([PICTURES]))
    (file,) = tmp_path.iterdir()
    again, _ = cache.features(network, pictures, "cpu")
    assert len(asked) == 3 and torch.equal(found, again)
    file.write_bytes(file.read_bytes()[:40])
    assert torch.equal(cache.features(network, pictures, "cpu")[0], found)
    other = torch.cat([PICTURES[:-1], PICTURES[:1]])
    assert cache.features(network, lambda: [other], "cpu")[1] != content and len(list(tmp_path.iterdir())) == 2
    assert in_256(PICTURES).unique().numel() == 256
