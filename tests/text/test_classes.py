"""Class-conditional models: captions are class names, known ones only, and guidance works on the vectors alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_training import config, make_data
from torch import Tensor

from ldm.checkpoints.components import build_components
from ldm.checkpoints.load import load_any
from ldm.data.shards.writer import write_dataset
from ldm.data.sources.shapes import SHAPES, ShapesSource
from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.errors import ConfigError
from ldm.sampling import Request, Sampler
from ldm.tasks.work.encode import encode_shards
from ldm.text.classes import ClassTable
from ldm.training.run.fit import train_run

DIT = ["model=dit_tiny", "text_encoder=classes", "text_encoder.width=64"]
TOLD = [*DIT, "model.cross_attention_dim=null", "model.pooled_dim=64"]


def test_each_class_and_the_empty_caption_has_its_own_vector() -> None:
    table = ClassTable(["red star", "blue circle"], width=6)
    cond = table.encode(["blue circle", "", "red star", "blue circle"])
    assert cond.context is None and cond.pooled is not None
    assert torch.equal(cond.pooled, table.embedding.weight[[1, 2, 0, 1]]) and table.pooled_dim == 6
    with pytest.raises(ConfigError, match="Did you mean 'red star'"):
        table.encode(["red stars"])
    for names in (["a", "a"], ["a", ""]):
        with pytest.raises(ConfigError, match="each once and none empty"):
            ClassTable(names)


def test_what_the_network_would_not_be_told_is_refused() -> None:
    """The vectors' width, and a network that takes none."""
    build_components(config(*TOLD), device="meta")
    for changes in (DIT[:2] + ["model.cross_attention_dim=null"], [*TOLD, "model.pooled_dim=10"]):
        with pytest.raises(ConfigError, match=r"model\.pooled_dim="):
            build_components(config(*changes), device="meta")
    with pytest.raises(ConfigError, match=r"model\.pooled_dim=10"):
        build_components(config("model=mmdit_tiny", "model.pooled_dim=10"), device="meta")


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    """The tiny data set, encoded, with the shape's name for a caption."""
    folder = tmp_path_factory.mktemp("data")
    _, autoencoder, _ = make_data(folder)
    source = ShapesSource(count=48, validation=6, unseen=0)
    items = [source.item(split, i) for split, n in (("train", 48), ("val", 6)) for i in range(n)]
    for item in items:
        item.fields["txt"] = json.loads(item.fields["json"])["shape"].encode()
    shards = write_dataset(iter(items), folder / "classes", facts=source.facts, identity={"what": "classes"}).output
    return encode_shards(config(f"shards={shards}", f"checkpoint={autoencoder}"), folder / "class_latents").output


@pytest.mark.slow
def test_captions_that_are_no_classes_are_refused_before_training(latents, tmp_path) -> None:
    settings = config(*TOLD, f"shards={latents}", "text_encoder.classes=[circle,star]")
    with pytest.raises(ConfigError, match=r"captions of the data are none of the 2 classes"):
        train_run(settings, lambda digest: tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_guidance_reaches_models_that_are_told_by_vectors_only(latents, tmp_path) -> None:
    """Classes found in the data, trained, loaded again, sampled: guidance is the formula on the classes' vectors."""
    flow = ["scheduler=flow", "parameterization=velocity"]
    settings = config(*TOLD, *flow, f"shards={latents}", "max_steps=2", "callbacks.validation.every_n_steps=2")
    run = train_run(settings, lambda digest: tmp_path / "run")
    parts = load_any(run.path)
    assert isinstance(parts.text_encoder, ClassTable) and parts.denoiser is not None
    assert parts.text_encoder.classes == sorted(SHAPES)
    heard: list[int] = []

    def network(x: Tensor, timestep: Tensor, cond: Condition) -> Tensor:
        assert cond.pooled is not None
        heard.append(len(x))
        return cond.pooled.mean(1)[:, None, None, None].expand_as(x)

    denoiser = Denoiser(network, parts.denoiser.scheduler, parts.denoiser.parameterization)
    sampler = Sampler(denoiser, parts.autoencoder, parts.text_encoder)
    vectors = parts.text_encoder.embedding.weight.detach().mean(1)
    for scale, expected in ((1.0, vectors[0]), (3.0, vectors[-1] + 3 * (vectors[0] - vectors[-1]))):
        request = Request(sorted(SHAPES)[:1], 32, 32, num_steps=1, guidance=scale)
        (step,) = sampler.steps(request)
        velocity = (step.x_t - step.x0).mean() / step.level.sigma
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=0)
    assert heard == [1, 2]
