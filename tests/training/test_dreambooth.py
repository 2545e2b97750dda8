"""DreamBooth: the loss is instance + weight * class, class pictures are drawn once, and all of it resumes exactly."""

import hashlib
import json
from pathlib import Path

import few
import numpy as np
import pytest
import torch
from commands import metrics
from PIL import Image
from tiny_training import Killed, Spy, config, fingerprint, train_watched

from ldm import Pipeline
from ldm.checkpoints.components import build_components, load_states
from ldm.checkpoints.folder import all_folders, find, load_parts
from ldm.checkpoints.stages import to_native
from ldm.data.samples import sequential
from ldm.data.shards.splits import open_split
from ldm.errors import ConfigError
from ldm.tasks.work.prior import draw_class_pictures
from ldm.training.masks import RandomMasks
from ldm.training.randomness import Draws, normal, seed_of, uniform
from ldm.training.run.build import build_module
from ldm.training.run.class_images import ClassImages, read_class_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return few.make_pictures(tmp_path_factory.mktemp("pictures"), 3)


def module_of(small_base: Path, prior: ClassImages | None, **changes):
    """The LightningModule on the base's weights, as a run would have it."""
    latents = small_base.parent / "latents"
    settings = config(f"shards={latents}", "times=uniform") | {"instance_prompt": "sks star"} | changes
    folder = find(small_base)
    settings["text_encoder"] = json.loads(json.dumps(Pipeline.load(small_base).config["text_encoder"]))
    parts = build_components(settings, folder / "tokenizer")
    load_states(parts, load_parts(folder, "ema"), folder)
    return build_module(settings, parts, prior)


def latents_of(small_base: Path, n: int) -> torch.Tensor:
    shards = open_split(small_base.parent / "latents", "train")
    return next(sequential(shards, 32, n))[0]["latent"]


def test_the_loss_is_instance_plus_weight_times_class(small_base):
    """Against the two losses by hand, each with a forward pass of its own; class draws have purposes of their own."""
    moments = latents_of(small_base, 8)
    names = ["a star", "a circle", "a square", "a cross", "a triangle"]  # each class picture has its own caption
    prior = ClassImages(moments[3:], names)
    module = module_of(
        small_base, prior, caption_dropout=0.4, noises_per_image=2, batch_size=3, seed=5, prior_weight=0.7
    )
    batch = {"latent": moments[:3], "caption": ["", "", ""]}

    def by_hand(latent, captions, prefix):
        positions, pairs = [0, 1, 2], list(range(6))
        posterior = module.autoencoder.posterior(latent)
        z = posterior.sample(normal(posterior.mean.shape[1:], 5, f"{prefix}posterior", 0, positions))
        x0 = module.autoencoder.latents.standardise(z).repeat_interleave(2, dim=0)
        dropped = (uniform(5, f"{prefix}caption_dropout", 0, positions) < 0.4).tolist()
        cond = module.condition(["" if d else c for c, d in zip(captions, dropped, strict=True)]).repeat_interleave(2)
        times = uniform(5, f"{prefix}times", 0, pairs)
        prediction = module.predict(x0, cond, times, normal(x0.shape[1:], 5, f"{prefix}noise", 0, pairs))
        return prediction.loss(module.weighting).mean()

    chosen = [seed_of(5, "prior", 0, p) % 5 for p in (0, 1, 2)]
    with torch.no_grad():
        instance = by_hand(batch["latent"], ["sks star"] * 3, "")
        kept = by_hand(prior.moments[chosen], [names[i] for i in chosen], "prior_")
        assert torch.allclose(module.training_step(batch, 0), instance + 0.7 * kept, atol=1e-6, rtol=0)
    module.totals.reduce()
    means = module.totals.means()
    assert means["train/instance_loss"] == pytest.approx(instance.item(), abs=1e-6)
    assert means["train/prior_loss"] == pytest.approx(kept.item(), abs=1e-6)
    assert means["train/loss"] == pytest.approx((instance + 0.7 * kept).item(), abs=1e-6)
    # Without class pictures the step is the instance's loss, on the same draws.
    alone = module_of(small_base, None, caption_dropout=0.4, noises_per_image=2, batch_size=3, seed=5)
    with torch.no_grad():
        assert torch.allclose(alone.training_step(batch, 0), instance, atol=1e-6, rtol=0)
    assert "train/prior_loss" not in alone.totals.names


def test_both_halves_are_one_forward_pass_and_ranks_are_micro_batches(small_base):
    """Two halves of the global batch, by accumulation or by ranks, have the gradient of the whole in the mean."""
    moments = latents_of(small_base, 10)
    prior, batch = ClassImages(moments[4:], ["a star"] * 6), {"latent": moments[:4], "caption": [""] * 4}
    whole = module_of(
        small_base, prior, batch_size=4, times={"_target_": "ldm.diffusion.times.Uniform", "stratified": True}
    )
    seen = []
    whole.model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    with torch.no_grad():
        loss = whole.training_step(batch, 0)
        assert seen == [8]
        halves = [{k: v[s] for k, v in batch.items()} for s in (slice(0, 2), slice(2, 4))]
        whole.draws = Draws(2, accumulate=2, seed=whole.draws.seed)
        accumulated = [whole.training_step(half, i) for i, half in enumerate(halves)]
        ranks = []
        for rank, half in enumerate(halves):
            whole.draws = Draws(2, rank=rank, world_size=2, seed=whole.draws.seed)
            ranks.append(whole.training_step(half, 0))
    assert torch.equal(torch.stack(accumulated), torch.stack(ranks))
    assert torch.stack(ranks).mean() == pytest.approx(loss.item(), abs=1e-6)


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*"))}


def test_class_pictures_are_drawn_once_and_an_interrupted_set_is_completed(small_base, tmp_path, monkeypatch, capsys):
    asked = few.composed("dreambooth", f"outputs={tmp_path}/outputs", "class_prompt=a red star", "num_class_images=5")
    values = {**asked, "checkpoint": str(to_native({**asked, "checkpoint": str(small_base)}))}
    folder = draw_class_pictures(values)
    made = digests(folder)
    assert list(made) == [f"class-{i:05d}.png" for i in range(5)] and len(set(made.values())) == 5
    # Picture i is what the base draws from seed i.
    pipe = Pipeline.load(small_base)
    drawn = pipe("a red star", seed=3, num_steps=2, guidance=1.5, height=32, width=32)[0]
    there = Image.open(folder / "class-00003.png")
    assert np.abs(np.array(drawn, np.int16) - np.array(there, np.int16)).max() <= 1
    # A second run draws none.
    capsys.readouterr()
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pytest.fail("nothing is missing"))
    assert draw_class_pictures(values) == folder and digests(folder) == made
    assert "class pictures: 5 in" in capsys.readouterr().out
    monkeypatch.undo()
    # What is missing is drawn again, as it was, and what is there is left alone.
    for i in (1, 4):
        (folder / f"class-{i:05d}.png").unlink()
    kept = digests(folder)
    times = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    draw_class_pictures(values)
    again = digests(folder)
    assert list(again) == list(made) and kept.items() <= again.items()
    assert {n: (folder / n).stat().st_mtime_ns for n in kept} == times
    # Interrupted in its second batch: the first is whole, nothing is half, and the next call goes on.
    calls, draw = [], Pipeline.__call__

    def killed(self, prompts, **options):
        calls.append(options["seed"])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, prompts, **options)

    monkeypatch.setattr(Pipeline, "__call__", killed)
    values["class_images"] = str(tmp_path / "theirs")
    with pytest.raises(KeyboardInterrupt):
        draw_class_pictures(values)
    assert list(digests(tmp_path / "theirs")) == ["class-00000.png", "class-00001.png"]
    draw_class_pictures(values)
    assert calls == [[0, 1], [2, 3], [2, 3], [4]] and len(digests(tmp_path / "theirs")) == 5
    # Pictures of one's own count; another prompt has a folder of its own.
    own = tmp_path / "own"
    few.make_pictures(own / "sub", 4)
    before = digests(own / "sub")
    draw_class_pictures({**values, "class_images": str(own)})
    assert calls[4:] == [[0]] and digests(own / "sub") == before
    assert draw_class_pictures({**values, "class_images": None, "class_prompt": "a circle"}) != folder


def test_the_experiment_reuses_what_it_made_and_resumes_exactly(small_base, pictures, tmp_path, monkeypatch, capsys):
    given = [f"images={pictures}", "templates=object", "subject=sks star", "class_prompt=a star", "batch_size=4"]
    given += ["num_class_images=5", "max_steps=4", "optimizer.lr=1e-3", "callbacks.checkpoints.every_n_steps=2"]
    outputs = tmp_path / "outputs"
    whole = few.run("dreambooth", small_base, outputs, *given)
    said = capsys.readouterr().out
    assert "drawing 5 of 'a star'" in said
    (folder,) = outputs.glob("stages/class-*")
    made = digests(folder)
    rows = metrics(whole)
    for step in range(1, 5):
        row = rows[step]
        assert row["train/loss"] == pytest.approx(row["train/instance_loss"] + row["train/prior_loss"], abs=1e-6)
    few.run("dreambooth", small_base, outputs, *given, "prior_weight=0.5", "max_steps=1", name="half")
    said = capsys.readouterr().out
    assert "drawing" not in said and said.count("(already there)") == 3 and digests(folder) == made
    assert metrics(outputs / "half")[1]["train/prior_loss"] == rows[1]["train/prior_loss"]
    # The run as the stages left it, killed in its third step and started again.
    settings = json.loads(json.dumps(few.plain_of(whole)))
    with pytest.raises(Killed):
        train_watched(settings, tmp_path / "run", monkeypatch, Spy(die_at=("backward", 2)))
    train_watched(settings, tmp_path / "run", monkeypatch, Spy())
    assert metrics(tmp_path / "run") == rows
    ends = [fingerprint(all_folders(run)[-1]) for run in (tmp_path / "run", whole)]
    assert ends[0] == ends[1]
    identity = json.loads((whole / "run.json").read_text())["identity"]["prior"]
    assert identity["captions"] == ["a star"] and identity["weight"] == 1.0 and len(identity["fingerprint"]) == 64
    # Fewer class pictures are the first of those that are there: what else lies in the folder changes nothing.
    some = read_class_images({**settings, "num_class_images": 2}, None)
    every = read_class_images(settings, None)
    assert every.captions == ["a star"] * 5 and len(every.moments) == 5 and torch.equal(some.moments, every.moments[:2])
    # The trained model is a model like any other.
    assert Pipeline.load(whole).sample("a photo of sks star", num_steps=2).isfinite().all()
    # Latents of another autoencoder, or of no class, are refused.
    with pytest.raises(ConfigError, match="another autoencoder"):
        read_class_images({**settings, "image_size": 64}, None)
    with pytest.raises(ConfigError, match="say which, class_prompt="):
        read_class_images({**settings, "class_prompt": None}, None)
    with pytest.raises(ConfigError, match="holds images"):
        read_class_images({**settings, "class_shards": str(small_base.parent / "shards")}, None)


def test_a_published_model_draws_its_class_with_its_own_sampler(sd1_folder, tmp_path):
    """From a diffusers folder: the class is what the folder draws, and of the model the U-Net alone has moved."""
    given = [f"images={few.make_pictures(tmp_path / 'p', 2)}", "instance_prompt=a sks cat", "class_prompt=a red cat"]
    given += ["num_class_images=3", "image_size=64", "num_steps=4", "guidance=3.0", "optimizer.lr=1e-3", "max_steps=1"]
    out = few.run("dreambooth", sd1_folder, tmp_path / "outputs", *given)
    pipe = Pipeline.load(sd1_folder)
    assert pipe.scheduler_config["_class_name"] == "PNDMScheduler"
    drawn = pipe(["a red cat"] * 3, seed=[0, 1, 2], num_steps=4, guidance=3.0, height=64, width=64)
    (folder,) = (tmp_path / "outputs/stages").glob("class-*")
    for i, picture in enumerate(drawn):
        there = np.array(Image.open(folder / f"class-{i:05d}.png"), np.int16)
        assert np.abs(np.array(picture, np.int16) - there).max() <= 1
    trained = Pipeline.load(out).sampler
    before, after = ((s.denoiser.model, s.text_encoder, s.autoencoder) for s in (pipe.sampler, trained))
    same = [
        all(torch.equal(v.nan_to_num(), b.state_dict()[k].nan_to_num()) for k, v in a.state_dict().items())
        for a, b in zip(before, after, strict=True)
    ]
    assert same == [False, True, True]


@pytest.mark.parametrize(
    ("experiment", "overrides", "words"),
    [
        ("dreambooth", [], "what is the subject one of"),
        ("dreambooth", ["class_prompt=x", "masking=random"], "not both"),
        ("dreambooth", ["class_prompt=x", "instance_prompt=y"], "nowhere: no such folder"),
        ("dreambooth", ["class_prompt=x", "checkpoint=null", "adopt=false"], "give checkpoint=PATH"),
        ("finetune", ["class_prompt=x"], "experiment=dreambooth"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_drawn(small_base, tmp_path, experiment, overrides, words):
    with pytest.raises(ConfigError, match=words):
        few.run(experiment, small_base, tmp_path / "outputs", "images=nowhere", *overrides)
    assert not (tmp_path / "outputs").exists()


def test_masks_and_class_pictures_exclude_each_other(small_base):
    masking = {"_target_": f"{RandomMasks.__module__}.RandomMasks"}
    with pytest.raises(ConfigError, match="kept as latents"):
        module_of(small_base, ClassImages(torch.zeros(1, 8, 4, 4), ["x"]), masking=masking)
    with pytest.raises(ConfigError, match="no class picture"):
        ClassImages(torch.zeros(0, 8, 4, 4), [])
