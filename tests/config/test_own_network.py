"""Networks say what they were built for: one's own goes through all doors, and every kind learns to repaint."""

import pytest
import torch
from few import make_pictures
from few import run as trained
from tiny_training import config, make_data

from ldm import Pipeline
from ldm.checkpoints.components import build_components
from ldm.checkpoints.load import load_any
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.training.run.build import check_builds
from ldm.training.run.fit import train_run

OWN = """
import torch
from torch import nn


class Plain(nn.Module):
    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(4, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 4, 3, padding=1))
        self.time = nn.Linear(1, 1)

    def forward(self, x_t, timestep, cond):
        return self.layers(x_t) * self.time(timestep[:, None] / 1000)[..., None, None]


class Stating(Plain):
    in_channels, out_channels, cross_attention_dim, pooled_dim = 4, 4, None, None


class Wide(Plain):
    in_channels = 7
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "ownnets.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LDM_ALLOW", "ownnets")
    return lambda name: {"_target_": f"ownnets.{name}"}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own")
    return (folder, *make_data(folder))


def test_what_a_network_states_is_compared_and_nothing_else(own):
    with_text, without = config("shards=x"), config("shards=x", "text_encoder=none")
    for name in ("Plain", "Stating"):
        check_builds({**without, "model": own(name)})
    check_builds({**with_text, "model": own("Plain")})  # it says nothing of text
    with pytest.raises(
        ConfigError, match=r"model\.cross_attention_dim=None, but .* wide: choose another text_encoder="
    ):
        check_builds({**with_text, "model": own("Stating")})
    with pytest.raises(ConfigError, match=r"model\.in_channels=7, but .* 4 latent channels: choose another autoenc"):
        check_builds({**without, "model": own("Wide")})
    with pytest.raises(ConfigError, match=r"set model\.cross_attention_dim=null, or choose another text_encoder="):
        check_builds(without)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Plain", "Stating"])
def test_an_own_network_without_text_trains_and_draws(own, made, tmp_path, name):
    settings = config(f"shards={made[-1]}", "max_steps=1", "text_encoder=none") | {"model": own(name)}
    run = train_run(settings, lambda digest: tmp_path / name).path
    assert Pipeline.load(run).sample("", num_steps=2).isfinite().all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["unet_tiny", "dit_tiny", "mmdit_tiny"])
def test_every_network_learns_to_repaint_and_starts_as_its_base(made, tmp_path, model):
    latents = made[-1]
    base = train_run(
        config(f"shards={latents}", "max_steps=1", f"model={model}", "optimizer.lr=0.01"),
        lambda digest: tmp_path / "base",
    ).path
    runs = {}
    for name, lr in (("same", 0.0), ("learns", 1e-2)):
        asked = [f"images={make_pictures(tmp_path / 'pictures', 8)}", "source.min_side=1", f"optimizer.lr={lr}"]
        asked += ["max_steps=2", "callbacks.validation=null"]
        runs[name] = trained("inpaint", base, tmp_path / "outputs", *asked, 'instance_prompt="a thing"', name=name)
    plain, same, learnt = (load_any(p).denoiser for p in (base, runs["same"], runs["learns"]))
    assert plain.model.in_channels == 4 and same.model.in_channels == 9
    draws = torch.Generator().manual_seed(0)
    x, concat = torch.randn(2, 4, 8, 8, generator=draws), torch.randn(2, 5, 8, 8, generator=draws)
    context = torch.randn(2, 16, plain.model.cross_attention_dim, generator=draws)
    level = plain.scheduler.level(0.7)
    with torch.no_grad():
        expected = plain.output(x, level, Condition(context=context))
        assert expected.abs().max() > 0
        torch.testing.assert_close(same.output(x, level, Condition(context=context, concat=concat)), expected)
        other = [learnt.output(x, level, Condition(context=context, concat=c)) for c in (concat, -concat)]
    assert not torch.equal(*other), "the fresh channels are learnt"


@pytest.mark.parametrize("model", ["unet_tiny", "dit_tiny", "mmdit_tiny"])
def test_widening_is_of_fewer_channels_only(model):
    network = build_components(config("shards=x", f"model={model}", "++model.in_channels=9")).network
    state = network.state_dict()
    assert network.widened(state) is state
    name = next(k for k in ("conv_in.weight", "pos_embed.proj.weight") if k in state)
    wide = network.widened({**state, name: state[name][:, :4]})
    assert wide[name].shape == state[name].shape and torch.equal(wide[name][:, :4], state[name][:, :4])
    assert not wide[name][:, 4:].any()
