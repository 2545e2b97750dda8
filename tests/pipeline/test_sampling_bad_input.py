"""What cannot be drawn: one line says what was asked, why not, and what to type, before anything is computed."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from commands import here
from PIL import Image
from safetensors.torch import save_file

from ldm import Pipeline
from ldm.errors import ConfigError

pytestmark = pytest.mark.slow
PICTURE, WHITE = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 255)


@pytest.fixture(scope="module")
def pipe(sd1_folder):
    pipe = Pipeline.load(sd1_folder)
    pipe.sampler.denoiser.model.forward = never  # a refusal comes before the network is asked
    return pipe


def never(*arguments, **options):
    raise AssertionError("the network was called")


REFUSED = [  # options, words of the one line
    ({"prompt": 3}, "prompt must be a text or a list of texts, not int"),
    ({"prompt": ["a", 3]}, "prompt must be a text or a list of texts"),
    ({"prompt": []}, "there is no prompt"),
    ({"negative_prompt": None}, "negative_prompt must be a text or a list of texts, not NoneType"),
    ({"prompt": ["a", "b"], "negative_prompt": ["c"]}, "1 negative prompts for 2 images: give one an image"),
    ({"height": 60}, "height=60 is not divisible by the autoencoder's 8: use 56 or 64"),
    ({"width": 4}, r"width=4 is not divisible by the autoencoder's 8: use 8\."),
    ({"height": 0}, r"height=0 is not divisible by the autoencoder's 8: use 8\."),
    ({"height": 64.0}, "height=64.0: must be a whole number"),
    ({"init_image": PICTURE, "height": 60}, "height=60 is not divisible"),
    ({"init_image": PICTURE, "width": 0}, "width=0: must be at least 8"),
    ({"num_steps": 0}, "num_steps=0 must be a whole number from 1 to 100000: use 30"),
    ({"num_steps": 2.5}, "num_steps=2.5: must be a whole number"),
    ({"num_steps": 1001}, "not find as many different levels on the scheduler's 1000 timesteps: use num_steps=999"),
    ({"num_images": 0}, "num_images=0: must be at least 1"),
    ({"seed": [1, 2]}, "2 seeds for 1 images: give one seed, or one an image"),
    ({"seed": []}, "0 seeds for 1 images"),
    ({"seed": "x"}, "seed='x': must be a whole number below 2.64"),
    ({"seed": 1.5}, "seed=1.5: must be a whole number"),
    ({"seed": 2**64}, "must be a whole number below"),
    ({"guidance_rescale": 2}, r"guidance_rescale=2 is outside \[0, 1\]: published models use 0.7"),
    ({"eta": 0.5}, "eta=0.5: sampler pndm has no eta; leave it out or use sampler=ddim"),
    ({"sampler": "dimm"}, "sampler=dimm: there is no such sampler. Did you mean 'ddim'. There is: add_back, "),
    ({"sampler": "mine.yaml"}, "sampler=mine.yaml: there is no such sampler"),
    ({"sampler": 3}, "sampler must be a name or a YAML of conf/sampler, not int"),
    ({"clip_skip": 9}, "clip_skip=9: the text encoder has 2 layers, and one of them must be left. Use clip_skip=1"),
    ({"clip_skip": -1}, "clip_skip=-1: layers left out are counted from 0"),
    ({"mask": WHITE}, "mask= belongs to a picture: give init_image= too"),
    ({"strength": 0.5}, "strength=0.5 belongs to a picture: give init_image= too"),
    ({"init_image": PICTURE, "strength": 0}, r"strength=0 is outside \(0, 1\]: 0.8 is usual"),
    ({"init_image": PICTURE, "strength": 1.5}, r"strength=1.5 is outside \(0, 1\]"),
    ({"init_image": PICTURE, "mask": WHITE.resize((32, 64))}, "the mask has 32x64 pixels, the picture 64x64"),
    ({"init_image": 3}, "init_image must be a picture, a path or a tensor, not int"),
    ({"init_image": np.zeros((64, 64, 3))}, "init_image must be a picture, a path or a tensor, not ndarray"),
    ({"init_image": []}, r"init_image=\[\] holds no picture"),
    ({"init_image": 3 * [PICTURE]}, "init_image is 3 of 64x64 pixels, the request 1 of 64x64.*give one for all"),
    ({"init_image": torch.zeros(64, 64)}, r"init_image as a tensor must be \(3, height, width\), not \(64, 64\)"),
    ({"init_image": torch.zeros(1, 3, 64, 64)}, r"must be \(3, height, width\), not \(1, 3, 64, 64\)"),
    ({"init_image": torch.zeros(3, 60, 60)}, r"as tensors must be 56x56, not \(3, 60, 60\)"),
    ({"init_image": PICTURE, "mask": torch.zeros(64, 64)}, r"mask as a tensor must be \(1, height, width\)"),
    ({"init_image": PICTURE, "mask": [WHITE]}, "mask must be a picture, a path or a tensor, not list"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda v: " ".join(v) if isinstance(v, dict) else "")
def test_pipeline_refuses(pipe, options, words):
    with pytest.raises(ConfigError, match=words) as refusal:
        pipe.sample(**{"prompt": "a", **options})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("num_steps", [1, 3, 7, 30, 150])
def test_the_strength_that_is_proposed_leaves_a_step(pipe, num_steps):
    with pytest.raises(ConfigError, match="leaves no step: use strength=") as refusal:
        pipe.sample("a", init_image=PICTURE, strength=0.5 / num_steps, num_steps=num_steps)
    proposed = float(str(refusal.value).split("use strength=")[1].split()[0])
    assert int(num_steps * proposed) >= 1 and proposed <= 1


def test_pictures_that_cannot_be_read_are_named(pipe, tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "sound.png")
    sound = bytearray((tmp_path / "sound.png").read_bytes())
    (tmp_path / "cut.png").write_bytes(sound[: len(sound) // 2])
    (tmp_path / "text.png").write_text("<html>404</html>")
    sound[60] ^= 255
    (tmp_path / "flipped.png").write_bytes(sound)
    for name in ("cut.png", "text.png", "flipped.png", "nowhere.png", "."):
        for options in ({"init_image": tmp_path / name}, {"init_image": PICTURE, "mask": str(tmp_path / name)}):
            with pytest.raises(ConfigError, match=r"(init_image|mask)=.*: not a picture that can be read"):
                pipe.sample("a", **options)


def test_pictures_are_read_as_those_of_data_sets(pipe, tmp_path):
    """Upright, and transparency is white; a mask is grey, as a tensor 0 and 1, as a picture black and white."""
    left, exif = Image.new("RGB", (64, 48), "blue"), Image.Exif()
    left.paste("red", (0, 0, 20, 48))
    exif[0x0112] = 6  # to be turned clockwise: the left becomes the top
    left.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = pipe.request("a", init_image=tmp_path / "turned.jpg").init_image[0]
    assert image.shape == (3, 64, 48)
    assert image[0, :16].mean() > 0.8 and image[2, 28:].mean() > 0.8, "red at the top, blue below"
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert pipe.request("a", init_image=clear).init_image.min() == 1
    half = torch.zeros(1, 64, 64)
    half[:, :, 32:] = 1
    painted = Image.new("L", (64, 64))
    painted.paste(255, (32, 0, 64, 64))
    for mask in (half, painted, painted.convert("1"), painted.convert("RGB")):
        assert torch.equal(pipe.request("a", init_image=PICTURE, mask=mask).mask, half[None])


def test_an_inpainting_model_wants_its_mask(sd1_inpaint_folder):
    inpainting = Pipeline.load(sd1_inpaint_folder)
    for options in ({}, {"init_image": PICTURE}):
        with pytest.raises(ConfigError, match="an inpainting model: give init_image= and mask=, an all-white mask"):
            inpainting.sample("a", **options)


def test_a_second_model_must_fit(tmp_path, pipe, sd1_folder):
    from ldm.diffusion.guidance import Autoguidance

    with pytest.raises(ConfigError, match=r"no second model: name a smaller or less trained one, guider\.checkpoint="):
        pipe.sample("a", guider=Autoguidance())
    shutil.copytree(sd1_folder, tmp_path / "other")
    for file, changes, words in [
        ("vae/config.json", {"scaling_factor": 0.5}, "speaks another autoencoder's latents"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "trained on another noise schedule"),
    ]:
        kept = (tmp_path / "other" / file).read_text()
        (tmp_path / "other" / file).write_text(json.dumps(json.loads(kept) | changes))
        with pytest.raises(ConfigError, match=words):
            pipe.sample("a", guider=Autoguidance(str(tmp_path / "other")))
        (tmp_path / "other" / file).write_text(kept)


def test_checkpoints_that_are_none(tmp_path, sd1_folder, tiny_run):
    (tmp_path / "text.safetensors").write_text("not found")
    save_file({"lora_unet_x.lora_down.weight": torch.ones(2, 2)}, tmp_path / "lora.safetensors")
    for path, words in [
        (sd1_folder / "unet", "unet has no autoencoder and no text encoder: it holds U-Net only. Give config=PATH"),
        (sd1_folder / "vae", "is an autoencoder: nothing to sample from.*folder or file of a whole pipeline"),
        (sd1_folder / "text_encoder", "text_encoder has no U-Net and no autoencoder: it holds text encoder only"),
        (tmp_path / "text.safetensors", "holds text, not tensors"),
        (tmp_path / "lora.safetensors", "is a LoRA: it is an adapter.*as an adapter of it"),
        (tmp_path, r"is no checkpoint: it has no model_index\.json"),
        (tmp_path / "nowhere", "there is nothing at this path|is not a folder here"),
    ]:
        with pytest.raises(ConfigError, match=words):
            Pipeline.load(path)
    for path in (tiny_run, sd1_folder):
        with pytest.raises(ConfigError, match="weights=best is not known: choose ema or raw"):
            Pipeline.load(path, weights="best")


def test_a_run_whose_files_are_damaged_is_named(tmp_path, tiny_run):
    run = shutil.copytree(tiny_run, tmp_path / "run", ignore=shutil.ignore_patterns("wandb", "images"))
    folder = sorted((run / "checkpoints").glob("step-*"))[-1]
    for other in set((run / "checkpoints").glob("step-*")) - {folder}:
        shutil.rmtree(other)
    weights = folder / "unet.safetensors"
    sound = weights.read_bytes()
    for damaged, words in ((sound[:-100], f"has {len(sound) - 100} bytes"), (sound[:-1] + b"\x07", "is damaged")):
        weights.write_bytes(damaged)
        for path, advice in ((run, "no usable checkpoint there"), (folder, "Use another step of the run")):
            with pytest.raises(ConfigError, match=rf"unet\.safetensors {words}") as refusal:
                Pipeline.load(path)
            assert advice in str(refusal.value)
    weights.unlink()
    with pytest.raises(ConfigError, match=r"unet\.safetensors is missing"):
        Pipeline.load(run)


def test_a_path_may_begin_at_home(tiny_run, sd1_folder, monkeypatch):
    """Shells leave `checkpoint=~/x` as it is."""
    for path in (tiny_run, sd1_folder):
        monkeypatch.setenv("HOME", str(path.parent))
        assert Pipeline.load(f"~/{path.name}").image_size in (32, 64)


def test_the_sampler_of_a_checkpoint_may_be_one_that_we_do_not_have(tmp_path, sd1_folder):
    folder = shutil.copytree(sd1_folder, tmp_path / "odd")
    file = folder / "scheduler/scheduler_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"_class_name": "CMStochasticIterativeScheduler"}))
    odd = Pipeline.load(folder)
    with pytest.raises(ConfigError, match=r"_class_name=CMStochasticIterativeScheduler.*Choose a sampler"):
        odd.sample("a", num_steps=2)
    expected = Pipeline.load(sd1_folder).sample("a", num_steps=2, sampler="ddim")
    assert torch.equal(odd.sample("a", num_steps=2, sampler="ddim"), expected), "the line's advice works"
    file.write_text(json.dumps(config | {"prediction_type": "flow_prediction"}))
    with pytest.raises(ConfigError, match="prediction_type=flow_prediction"):
        Pipeline.load(folder)


COMMANDS = [  # of task=sample, beside checkpoint= and num_steps=2
    (["prompt=a", "height=60"], "height=60 is not divisible by the autoencoder's 8: use 56 or 64"),
    (["prompt=a", "sampler=dimm"], "sampler=dimm: there is no such option. Did you mean 'ddim'?"),
    (["prompt=a", "seed=x"], "seed='x': must be a whole number"),
    (["prompt=a", "strength=much"], "strength=much: expected float"),
    (["prompt=a", "mask=mask.png"], "mask= belongs to a picture: give init_image= too"),
    (["prompt=a", "init_image=prompts.txt"], "init_image=prompts.txt: not a picture that can be read"),
    (["prompt=a", "output=prompts.txt/x"], "prompts.txt is a file, and pictures need a folder: give another output="),
    (["prompts=binary.txt"], "prompts=binary.txt: not UTF-16 on line 1"),
    (["prompts=nowhere.txt"], "prompts=nowhere.txt: cannot be read"),
    (["prompts=prompts.txt"], "task=sample needs a text"),
    (["prompt=a", "guider=autoguidance"], "name a smaller or less trained one, guider.checkpoint=PATH"),
    (["prompt=a", "num_images=0"], "num_images=0: must be at least 1"),
]


@pytest.mark.parametrize(("arguments", "words"), COMMANDS, ids=lambda v: " ".join(v) if isinstance(v, list) else "")
def test_the_command_line_refuses_in_one_line(tmp_path, sd1_folder, arguments, words):
    (tmp_path / "prompts.txt").write_text("\n \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    before = sorted(tmp_path.iterdir())
    result = here("task=sample", f"checkpoint={sd1_folder}", "num_steps=2", *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    assert words in result.stderr
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written"
