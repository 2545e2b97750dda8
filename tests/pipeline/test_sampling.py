"""Pipeline and task=sample on a real tiny run: the same seed draws the same picture, however it is asked for."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from commands import here
from PIL import Image

from ldm import Pipeline
from ldm.config.root import conf_dir
from ldm.errors import ConfigError
from ldm.sampling import Noise

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe(tiny_run):
    return Pipeline.load(tiny_run)


def test_noise_is_the_published_stream():
    assert Noise([0]).draw((1, 4, 8, 8)).flatten()[:4].tolist() == pytest.approx(
        [-1.12584, -1.15236, -0.250579, -0.433879], abs=1e-5
    )
    both = Noise([0]).draw((2, 4, 8, 8))
    assert torch.equal(both[:1], Noise([0]).draw((1, 4, 8, 8)))
    assert torch.equal(Noise([3, 0]).draw((2, 4, 8, 8))[1:], Noise([0]).draw((1, 4, 8, 8)))


def test_same_seed_same_picture_alone_or_in_a_batch(pipe):
    alone = pipe.sample("a red star", num_steps=3, seed=5)
    batch = pipe.sample(["a blue circle", "a red star"], num_steps=3, seed=[1, 5])
    torch.testing.assert_close(batch[1:], alone, atol=1e-5, rtol=0)
    assert torch.equal(alone, pipe.sample("a red star", num_steps=3, seed=5))
    assert not torch.allclose(alone, pipe.sample("a red star", num_steps=3, seed=6))


@pytest.mark.parametrize("sampler", sorted(p.stem for p in (conf_dir() / "sampler").glob("*.yaml")))
def test_every_sampler_is_a_name(pipe, sampler):
    assert pipe.sample("a red star", num_steps=4, sampler=None if sampler == "own" else sampler).isfinite().all()


def test_steps_end_in_the_sample(pipe):
    steps = list(pipe.steps("a red star", num_steps=4, seed=0, guidance=2.0))
    torch.testing.assert_close(pipe.decode(steps[-1].x_next), pipe.sample("a red star", num_steps=4, guidance=2.0))
    assert torch.equal(steps[-1].x0, steps[-1].x_next)  # the last step is the jump
    assert all(torch.equal(a.x_next, b.x_t) for a, b in pairwise(steps))


def test_options_reach_the_picture(pipe):
    plain = pipe.sample("a red star", num_steps=3)
    assert pipe.sample("a red star", height=32, width=64, num_steps=2).shape == (1, 3, 32, 64)
    assert len(pipe(["a", "b"], num_images=2, num_steps=2)) == 4
    # The negative prompt is the reference: the prompt itself there is no guidance at all.
    no_guidance = pipe.sample("a red star", num_steps=3, guidance=1.0)
    cancelled = pipe.sample("a red star", negative_prompt="a red star", num_steps=3, guidance=7.5)
    torch.testing.assert_close(cancelled, no_guidance, atol=1e-4, rtol=0)
    for other in ({"sampler": "dpmpp_2m"}, {"eta": 1.0}, {"guidance_rescale": 0.7}, {"negative_prompt": "a blue star"}):
        assert pipe.sample("a red star", num_steps=3, **other).isfinite().all(), other
    assert not torch.allclose(plain, pipe.sample("a red star", num_steps=3, eta=1.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"height": 30}, "height=30 is not divisible by the autoencoder's 4: use 28 or 32"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"sampler": "dimm"}, "Did you mean 'ddim'?"),
        ({"seed": [1, 2, 3]}, "3 seeds for 1 images"),
        ({"sampler": "euler", "eta": 0.5}, "sampler=ddim"),
        ({"num_images": 0}, "num_images=0"),
    ],
)
def test_refusals(pipe, options, words):
    with pytest.raises(ConfigError, match=words.replace("?", r"\?")):
        pipe.sample("a red star", **options)


def test_an_autoencoder_is_no_pipeline(tiny_run):
    stages = json.loads((tiny_run / "stages.json").read_text())
    with pytest.raises(ConfigError, match="latent_diffusion"):
        Pipeline.load(tiny_run / stages["autoencoder"]["path"])


def test_sample_task_draws_what_the_pipeline_draws(tiny_run, pipe, tmp_path):
    prompt = 'a "red" star, 50% = été [x] {y}'
    result = here(
        "task=sample",
        f"checkpoint={tiny_run}",
        f"prompt={prompt}",
        "num_steps=4",
        "guidance=2.0",
        "seed=3",
        "film_strip=true",
        f"output={tmp_path / 'out'}",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    drawn = Image.open(tmp_path / "out/0000.png")
    assert json.loads(drawn.text["ldm"])["prompt"] == prompt
    expected = pipe(prompt, num_steps=4, guidance=2.0, seed=3)[0]
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1
    assert (tmp_path / "out/film_strip.png").is_file() and (tmp_path / "out/grid.png").is_file()
    bad = here("task=sample", f"checkpoint={tiny_run}", "prompt=x", "height=30", cwd=tmp_path)
    assert bad.returncode == 2 and "use 28 or 32" in bad.stderr and "Traceback" not in bad.stderr
