"""Metrics of whole sets: what they say of known sets, on which card, and what they need."""

from dataclasses import replace

import pytest
import torch
from vision import small_clip

from ldm.analysis.scores import differing
from ldm.errors import ConfigError
from ldm.evaluation.cards import cards
from ldm.evaluation.scoring import check_count, scores
from ldm.features.network import PictureFeatures
from ldm.features.vision_features import CLIP
from ldm.metrics.distances.frechet import frechet
from ldm.metrics.distribution import Distribution
from ldm.metrics.evaluation import Drawn, Evaluation
from ldm.metrics.perceptual import PerceptualDiversity
from ldm.metrics.text_agreement import TextAgreement
from ldm.pictures import to_unit

GENERATOR = torch.Generator().manual_seed(0)
REAL = torch.randint(0, 256, (60, 3, 8, 8), generator=GENERATOR).to(torch.uint8)
DRAWN = torch.randint(40, 256, (50, 3, 8, 8), generator=GENERATOR).to(torch.uint8)
ASKED = {"eval_images": 50, "seed": 0, "weights": "ema", "num_steps": 10, "guidance": 2.0}


class Means(PictureFeatures):
    """The mean of each channel above and below."""

    name, width, resize = "means", 6, "none"

    def start(self, captioned, kept=None):
        pass

    def forward(self, images):
        return torch.cat([images[:, :, :4].mean(dim=(2, 3)), images[:, :, 4:].mean(dim=(2, 3))], dim=1)


def evaluation(**changes) -> Evaluation:
    given = Evaluation(
        splits=["train", "val"],
        real=lambda split, limit: iter(to_unit(REAL).split(16)),
        reconstruct=lambda images: images,
        drawn={"val": Drawn(DRAWN, ["a star"] * 25 + ["a ring"] * 25)},
        count=50,
    )
    return replace(given, **changes)


ALL = ["frechet", "kernel", "gaussian_kernel", "precision_recall", "density_coverage"]


def test_a_distribution_says_its_distances_and_shares_join_to_the_whole():
    network, metric = Means(), Distribution(Means(), ALL)
    found = scores({"m": metric}, evaluation())
    expected = frechet(network(to_unit(DRAWN)), network(to_unit(REAL)))
    assert found["val/fd_means"] == pytest.approx(expected.value)
    assert found["val/fd_means_infinity"] == pytest.approx(max(0, expected.unlimited))
    assert set(found) == {n for n in metric.scores if n.startswith("val/")}
    assert all(found[f"val/{n}_means/high"] <= 1 for n in ("precision", "recall", "coverage"))

    shares = []  # what two processes look at, one after the other
    for rank in range(2):
        part = Drawn(DRAWN[25 * rank : 25 * rank + 25], ["a"] * 25)
        alone = Distribution(Means(), ALL)
        alone._held["train"] = network(to_unit(REAL)), "x"
        for batch in part.batches():
            alone.update(batch)
        shares.append(alone)
    both = Distribution(Means(), ALL)
    both.ours = [share.ours[0] for share in shares]
    assert both.compute(network(to_unit(REAL))) == pytest.approx(
        {k.removeprefix("val/"): v for k, v in found.items()}, rel=1e-6
    )


def test_an_autoencoder_alone_is_measured_by_its_reconstructions():
    found = scores({"m": Distribution(Means(), ["frechet", "kernel"])}, evaluation(drawn={}))
    assert found["reconstruction/fd_means"] == pytest.approx(0, abs=1e-8)
    assert all(k.startswith("reconstruction/") for k in found)


def test_too_few_pictures_and_wrong_choices_are_said_before_anything_is_drawn(tmp_path, capsys):
    few = {"metric.trained": Distribution(Means(), ["frechet"])}
    with pytest.raises(
        ConfigError, match=r"metric.trained: frechet on 6 features needs at least 9 pictures, and 8 are drawn"
    ):
        check_count(few, 8)
    check_count(few, 9)
    assert scores(few, evaluation(real=lambda split, limit: iter([to_unit(REAL[:5])]))) == {}
    assert "frechet is left out: it needs at least 9 pictures, and there are 5 real ones." in capsys.readouterr().out
    for options, said in (
        ({"measures": ["fid"]}, "choose among frechet, kernel"),
        ({"measures": ["inception_score"]}, "needs a classifier, which Means is not"),
        ({"measures": ["precision_recall"], "neighbours": 0}, "neighbours=0: at least 1"),
        ({"measures": ["kernel"], "reference": "stats.npz"}, "measures=\\[frechet\\] alone"),
        ({"measures": ["frechet"], "reference": str(tmp_path / "no.npz")}, "there is no such file"),
    ):
        with pytest.raises(ConfigError, match=said):
            Distribution(Means(), **options)
    with pytest.raises(ConfigError, match="reference=test is no split of these data: choose train, val"):
        scores({"m": Distribution(Means(), ["kernel"], reference="test")}, evaluation())


def test_cards_say_what_decides_a_number_and_where_two_differ():
    metrics = {"m": Distribution(Means(), ["kernel"])}
    made = evaluation()
    found = scores(metrics, made)
    first = cards(metrics, found, made, ASKED, 8)
    assert list(first) == ["val/kd_means"]
    card = first["val/kd_means"]
    assert card["reference"].startswith("train, 60 pictures, ") and card["num_steps"] == 10 and card["weights"]
    assert differing({"a": card, "b": dict(card)}) == {}
    other = cards(metrics, found, made, {**ASKED, "num_steps": 20, "sampler": {"_target_": "x.DDIM", "eta": 1.0}}, 8)
    assert differing({"a": card, "b": other["val/kd_means"]}) == {
        "num_steps": {"a": 10, "b": 20},
        "sampler": {"a": "own", "b": "DDIM eta=1.0"},
    }
    another = scores(metrics, evaluation(real=lambda split, limit: iter([to_unit(REAL[:40])])))  # held from before
    assert another == found


def test_pictures_that_fit_their_captions_find_them(tmp_path):
    clip = CLIP(small_clip(tmp_path / "clip"))
    clip.start(lambda most: [])
    captions = [f"{a} {b}" for a in "abcdefghij" for b in "klmno"]
    vectors = clip.texts(captions)
    metric = TextAgreement(clip)
    metric._candidates = captions
    order = {"first": list(range(50)), "shuffled": [(i + 7) % 50 for i in range(50)]}
    for which, rows in order.items():
        metric.reset()
        clip.forward = lambda images, rows=rows: vectors[rows]  # pictures that say just this
        metric.update(torch.zeros(50, 3, 8, 8), captions)
        said = metric.compute()
        assert said["retrieval/chance"] == 1 / 50
        if which == "first":
            assert said["clip_score"] == pytest.approx(100, rel=1e-5) and said["retrieval"] == 1
        else:
            assert said["clip_score"] < 100 and said["retrieval"] == 0
    metric._candidates = [f"{a} {b}" for a in "abcdefghij" for b in "pqrstuvwxy"]  # 100 others: each gives one up
    clip.forward = lambda images: vectors
    metric.reset()
    metric.update(torch.zeros(50, 3, 8, 8), captions)
    assert metric.compute()["retrieval"] == 1


def test_diversity_is_none_for_one_picture_a_caption():
    def draw(captions, seeds):
        pictures = torch.zeros(len(captions), 3, 16, 16, dtype=torch.uint8)
        for row, (caption, seed) in enumerate(zip(captions, seeds, strict=True)):
            generator = torch.Generator().manual_seed(seed if caption == "a ring" else 0)
            pictures[row] = torch.randint(0, 256, (3, 16, 16), generator=generator)
        return pictures

    metric = PerceptualDiversity(num_images=3)
    found = scores({"m": metric}, evaluation(draw=draw))
    zero, some = metric.values[0], metric.values[1]
    assert float(zero) == 0 and float(some) > 0
    assert (
        found["val/lpips_diversity_random"] == pytest.approx(float(some) / 2)
        and found["val/lpips_diversity_random/n"] == 2
    )
    with pytest.raises(ConfigError, match="differences need at least 2"):
        PerceptualDiversity(num_images=1)
    assert scores({"m": metric}, evaluation(drawn={})) == {}
