"""Loss terms: what they are given, what they add; representation alignment, which has tensors of its own."""

import json

import pytest
import torch
import torch.nn.functional as F
from commands import here
from tiny_training import config, make_data
from torch import nn
from transformers import Dinov2Model
from vision import small_dinov2

from ldm.checkpoints.folder import find, load_parts
from ldm.errors import ConfigError
from ldm.training.losses.representation_alignment import RepresentationAlignment
from ldm.training.losses.term import LossTerm, hidden_states
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.fit import train_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("losses"))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    return small_dinov2(tmp_path_factory.mktemp("encoder") / "dinov2", layers=2)


def aligned(data, encoder, *overrides):
    shards, autoencoder, _ = data
    given = [f"module.losses.alignment.{k}" for k in (f"encoder={encoder}", "width=64", "projector_width=16")]
    base = [f"shards={shards}", f"checkpoint={autoencoder}", "loss=[representation_alignment]", *given]
    return config(*base, *overrides)


def batch_of(n):
    images = torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"image": images, "caption": ["a star"] * n}


class Seen(LossTerm):
    """Keeps what it was given; counts twice."""

    weight, layers = 2.0, ("mid_block",)

    def forward(self, step):
        self.step = step
        return step.prediction.output.flatten(1).mean(dim=1)


def test_a_term_sees_the_step_and_is_added_with_its_weight(data):
    """x_t, output and the jump belong to each other by the scheduler's and the target's equations."""
    shards, _, _ = data
    values = config(f"shards={shards}", "noises_per_image=2", "text_encoder=none", "model.cross_attention_dim=null")
    torch.manual_seed(0)
    module = build_module(values, build_parts(values))
    module.autoencoder.latents.mean.zero_()
    module.autoencoder.latents.scale.fill_(1)
    term, batch = Seen(), batch_of(2)
    with torch.no_grad():
        alone = module.training_step(batch, 0)
        module.losses["seen"] = term
        module.count([*module.totals.names, "train/instance_loss", "train/seen_loss"])
        both = module.training_step(batch, 0)
    made = term.step.prediction
    assert term.step.batch is batch and term.step.class_prediction is None and len(made.x_t) == 4
    alpha, sigma = (v.float().view(-1, 1, 1, 1) for v in (made.level.alpha, made.level.sigma))
    torch.testing.assert_close(made.x_t, alpha * made.x0 + sigma * made.eps)
    torch.testing.assert_close(made.jump, alpha * made.x_t - sigma * made.output)  # v-prediction
    assert term.step.hidden["mid_block"].shape[0] == 4 and term.step.hidden["mid_block"].ndim == 4
    torch.testing.assert_close(both, alone + 2 * made.output.mean())
    module.totals.reduce()
    assert module.totals.means()["train/seen_loss"] == pytest.approx(made.output.mean().item(), abs=1e-6)


def test_hidden_states_are_those_of_the_layers_and_the_hooks_go():
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    with hidden_states(network, ["1"]) as hidden:
        network(x)
    assert torch.equal(hidden["1"], network[0](x).relu())
    hidden.clear()
    network(x)
    assert not hidden


def test_alignment_is_minus_the_mean_cosine_of_tokens_in_their_places(encoder):
    """A hidden state whose projection is the encoder's own tokens gives -1; tokens in other places give more."""
    term = RepresentationAlignment(encoder, "layer", width=24)
    term.projector = nn.Identity()
    images = batch_of(3)["image"]
    tokens = term.features(images, 4, 4)  # (3,16,24)
    assert tokens.shape == (3, 16, 24)
    model = Dinov2Model.from_pretrained(encoder).eval()
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = F.interpolate(images.float() / 255, (28, 28), mode="bicubic", antialias=True).clamp(0, 1)
    with torch.no_grad():
        states = model((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state
    torch.testing.assert_close(tokens, states[:, 1:])

    class Given:
        batch = {"image": images}  # noqa: RUF012
        hidden: dict = {}  # noqa: RUF012

    def of(hidden):
        Given.hidden = {"layer": hidden}
        Given.prediction = type("P", (), {"x0": torch.zeros(6, 4, 4, 4)})
        return term(Given)

    picture = tokens.transpose(1, 2).reshape(3, 24, 4, 4)
    twice = picture.repeat_interleave(2, dim=0)  # two noises an image
    torch.testing.assert_close(of(twice), -torch.ones(6))
    torch.testing.assert_close(of(twice.flatten(2).transpose(1, 2)), -torch.ones(6))  # as a transformer gives it
    assert (of(twice.flip(-1)) > -0.999).all()
    with pytest.raises(ConfigError, match=r"16 places of 20 channels, and width=24: set .*width=20"):
        of(twice[:, :20])


@pytest.mark.slow
def test_a_run_trains_the_projector_saves_it_and_resumes_exactly(data, encoder, tmp_path):
    straight = train_run(aligned(data, encoder, "max_steps=4"), lambda digest: tmp_path / "straight").path
    values = aligned(data, encoder, "max_steps=2", "lr_scheduler=constant")
    four = aligned(data, encoder, "max_steps=4", "lr_scheduler=constant")
    whole = train_run(four, lambda digest: tmp_path / "whole").path
    train_run(values, lambda digest: tmp_path / "halves")
    halves = train_run(four, lambda digest: tmp_path / "halves").path
    one, two = (load_parts(find(run), "raw") for run in (whole, halves))
    assert one.keys() == two.keys() and "loss_alignment" in one
    assert all(torch.equal(one[part][k], two[part][k]) for part in one for k in one[part])
    assert set(one["loss_alignment"]) == {f"projector.{i}.{n}" for i in (0, 2, 4) for n in ("weight", "bias")}
    assert not any("encoder" in k for k in one["loss_alignment"]), "a frozen encoder is nobody's tensor"
    rows = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    seen = [r["train/alignment_loss"] for r in rows if "train/alignment_loss" in r]
    assert len(seen) == 4 and all(-1 <= v <= 1 for v in seen)
    losses = [
        (r["train/loss"], r["train/instance_loss"] + 0.5 * r["train/alignment_loss"]) for r in rows if "train/loss" in r
    ]
    assert all(a == pytest.approx(b, abs=1e-5) for a, b in losses)


@pytest.mark.slow
def test_alignment_falls_where_the_encoder_says_something_of_the_picture(data, encoder, tmp_path):
    run = train_run(aligned(data, encoder, "max_steps=40", "optimizer.lr=3e-3"), lambda digest: tmp_path / "run").path
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = [r["train/alignment_loss"] for r in rows if "train/alignment_loss" in r]
    assert seen[-1] < seen[0] - 0.2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["module.losses.alignment.layer=mid_blok"], "no such layer. Did you mean 'mid_block'"),
        (["module.losses.alignment.encoder=/nowhere"], "transformers finds no model there"),
        (["module.losses.instance=null", "module.losses.alignment=null"], "nothing to minimise"),
    ],
)
def test_what_cannot_be_is_refused_before_training(data, encoder, overrides, message):
    values = aligned(data, encoder, *overrides)
    with pytest.raises(ConfigError, match=message):
        build_module(values, build_parts(values))


def test_latents_have_no_picture(data, encoder):
    term = RepresentationAlignment(encoder, "mid_block", width=24)
    step = type("S", (), {"batch": {"latent": torch.zeros(1, 8, 4, 4)}})
    with pytest.raises(ConfigError, match=r"stages\.encode=false"):
        term(step)


@pytest.mark.slow
def test_the_experiment_runs_whole_and_its_model_is_sampled(encoder, tmp_path):
    """From shards to report; the projector in the checkpoint is nothing to whoever draws with the model."""
    given = ["experiment=quickstart_alignment", f"module.losses.alignment.encoder={encoder}", "debug=fast_dev_run"]
    given += ["loss=[representation_alignment]"]  # which debug leaves out
    done = here(*given, "name=aligned", "logger=none", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    drawn = here(
        "task=sample", "checkpoint=outputs/aligned", "prompt=a star", "num_steps=2", "output=out", cwd=tmp_path
    )
    assert drawn.returncode == 0 and (tmp_path / "out/0000.png").is_file(), drawn.stderr
    latents = here(*given, "stages.encode={}", cwd=tmp_path)
    assert latents.returncode == 2 and "stages.encode=false" in latents.stderr
