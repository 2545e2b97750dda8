"""task=sample on a published checkpoint: every option reaches the picture, whose recipe draws it again."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from commands import here
from PIL import Image

from ldm import Pipeline
from ldm.adapters.content import Embedding, Lora, LowRank
from ldm.build import build
from ldm.formats.adapters import write_adapter
from ldm.pictures import film_strip, from_pil, grid, to_pil
from ldm.sampling import Noise, chosen_steps
from ldm.tasks.work.sample import split_weight

pytestmark = pytest.mark.slow
STEPS = 3
load = cache(Pipeline.load)
CASES = {
    "plain": [],
    "image": [*("init_image=picture.png", "strength=0.5", "seed=7", "num_images=2"), "negative_prompt=an old photo"],
    "mask": ["init_image=picture.png", "mask=mask.png", "seed=[4,9]", "num_images=2", "guider.interval=[0.5,100]"],
    "words": [
        *("prompt=a (red:1.5) cat " + "on a chair " * 40, "clip_skip=1", "prompt_weights=true", "chunked=true"),
        *("guider=apg", "guider.norm_threshold=2", "guidance_rescale=0.5"),
    ],
    "weaker": [
        *("guider=autoguidance", "guider.checkpoint=weak", "guidance=3", "sampler=dpmpp_2m_sde", "grid=karras"),
        *("seed=[1,2]", "num_images=2", "height=32", "width=64"),
    ],
    "lines": ["prompts=prompts.txt", "sampler=ddim", "eta=1.0", "num_images=2", "seed=3"],
    "watched": ["film_strip=true", "animation=true", "tiling=true", "prompts=prompts.txt", "weights=raw"],
    "adapted": ["prompt=a <new> cat", "adapters=[a style.safetensors:0.5,word.pt]"],
}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory, sd1_folder):
    """Every case's folder, of commands typed in one place; what the checkpoint's folder held before and after."""
    place, before = tmp_path_factory.mktemp("drawn"), listing(sd1_folder)
    y, x = np.mgrid[0:64, 0:64]
    Image.fromarray(np.stack([4 * x, 4 * y, 2 * (x + y)], axis=-1).astype(np.uint8)).save(place / "picture.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (11, 18, 45, 50))
    mask.save(place / "mask.png")
    (place / "prompts.txt").write_text('a red cat\n\n  a café, 100% = "très" {bien} 猫\n', encoding="utf-8")
    weak = Pipeline.load(sd1_folder)
    for parameter in weak.sampler.denoiser.model.parameters():
        parameter.data.mul_(0.9)
    weak.save(place / "weak", "ldm")
    generator = torch.Generator().manual_seed(0)
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    width = weak.sampler.text_encoder.context_dim
    update = LowRank(*(torch.randn(shape, generator=generator) for shape in ((2, width), (64, 2))), 2.0)
    write_adapter(Lora({layer: update}), place / "a style.safetensors", "kohya")
    write_adapter(Embedding("<new>", torch.randn(2, width, generator=generator)), place / "word.pt", "a1111")
    folders = {name: typed(place, sd1_folder, *arguments) for name, arguments in CASES.items()}
    return SimpleNamespace(place=place, folders=folders, before=before, after=listing(sd1_folder))


def typed(place: Path, checkpoint: Path, *arguments: str) -> Path:
    prompt = [] if any(a.startswith("prompt") for a in arguments) else ["prompt=a red cat"]
    result = here("task=sample", f"checkpoint={checkpoint}", f"num_steps={STEPS}", *prompt, *arguments, cwd=place)
    assert result.returncode == 0, result.stderr
    assert result.stderr == "", "nothing but errors on a stderr that nobody watches"
    return place / result.stdout.splitlines()[-1].removeprefix("pictures: ")


def listing(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in [folder, *folder.rglob("*")]}


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("0*.png"))


def pixels(image: Image.Image | Path) -> np.ndarray:
    return np.asarray(Image.open(image) if isinstance(image, Path) else image, dtype=int)


def recipe_of(path: Path) -> dict:
    return json.loads(Image.open(path).text["ldm"])


def drawn_again(recipe: dict) -> Image.Image:
    """What a program draws that knows the recipe only."""
    pipe = load(recipe.pop("checkpoint"), recipe.pop("config"), recipe.pop("weights"))
    position, spacing = recipe.pop("position"), recipe.pop("grid")
    guider = build(recipe.pop("guider") | {"rescale": recipe.pop("guidance_rescale")}, "guider")
    pipe.unload_adapters()
    for path, weight in map(split_weight, recipe.pop("adapters")):
        pipe.load_adapter(path, weight)
    request = pipe.request(**recipe | {"sampler": pipe.solver(recipe["sampler"]), "guider": guider})
    request.spacing = None if spacing == "own" else build(spacing, "grid")
    return to_pil(pipe.sampler.sample(request)[position])


@pytest.mark.parametrize("name", [*CASES])
def test_the_recipe_in_a_picture_draws_it_again(drawn, name):
    for path in pictures(drawn.folders[name])[-1:]:
        recipe = recipe_of(path)
        assert {"prompt", "negative_prompt", "seed", "num_steps", "guidance", "sampler", "checkpoint"} <= recipe.keys()
        assert np.abs(pixels(drawn_again(recipe)) - pixels(path)).max() <= 1, recipe


def test_recipes_hold_in_any_working_directory(drawn):
    for name, key in (("image", "init_image"), ("mask", "mask"), ("plain", "checkpoint")):
        assert Path(recipe_of(pictures(drawn.folders[name])[0])[key]).is_absolute()
    assert Path(recipe_of(pictures(drawn.folders["weaker"])[0])["guider"]["checkpoint"]).is_absolute()


def test_prompts_and_seeds_make_the_pictures_they_should(drawn):
    counts = {name: len(pictures(folder)) for name, folder in drawn.folders.items()}
    assert [counts[n] for n in CASES] == [1, 2, 2, 1, 2, 4, 2, 1]
    lines = [recipe_of(p)["prompt"] for p in pictures(drawn.folders["lines"])]
    assert lines == 2 * ["a red cat"] + 2 * ['a café, 100% = "très" {bien} 猫']
    for name in ("image", "mask", "weaker", "lines"):
        first, second = (pixels(p) for p in pictures(drawn.folders[name])[:2])
        assert np.abs(first - second).max() > 3, "pictures of one prompt differ"


def test_outside_the_mask_the_picture_stays(drawn):
    pipe = load(recipe_of(pictures(drawn.folders["mask"])[0])["checkpoint"])
    given, black = drawn.place / "picture.png", Image.new("L", (64, 64), 0)
    kept = pipe.sample("a", init_image=given, mask=black, num_steps=2, seed=3)
    z = pipe.sampler._encode(from_pil(Image.open(given))[None], Noise([3]), tiling=False)
    torch.testing.assert_close(kept, pipe.decode(z), atol=1e-5, rtol=0)
    one, other = (pixels(p) for p in pictures(drawn.folders["mask"]))
    inside, outside = np.abs(one - other)[24:40, 20:36].mean(), np.abs(one - other)[:, 56:].mean()
    assert inside > 3 * outside, "two seeds differ where they repaint"


def test_other_people_s_folders_are_left_as_they_are(drawn):
    assert drawn.before == drawn.after
    assert all(folder.parent == drawn.place / "outputs/samples" for folder in drawn.folders.values())


def test_a_request_has_a_folder_of_its_own_and_finds_it_again(drawn, sd1_folder):
    folders = set(drawn.folders.values())
    assert len(folders) == len(CASES)
    assert typed(drawn.place, sd1_folder) == drawn.folders["plain"]
    Image.new("RGB", (64, 64), "red").save(drawn.place / "picture.png")
    assert typed(drawn.place, sd1_folder, *CASES["image"]) not in folders, "the picture is another one now"
    namesake = shutil.copytree(sd1_folder, drawn.place / "elsewhere" / sd1_folder.name)
    assert typed(drawn.place, namesake) not in folders


def test_the_film_strip_and_the_animation_are_of_these_steps(drawn):
    folder = drawn.folders["watched"]
    pipe = load(recipe_of(folder / "0000.png")["checkpoint"])
    prompts = [recipe_of(p)["prompt"] for p in pictures(folder)]
    steps = list(pipe.steps(prompts, num_steps=STEPS))
    strip = film_strip(pipe.sampler.frames(steps, chosen_steps(len(steps))), prompts)
    assert np.abs(pixels(strip) - pixels(folder / "film_strip.png")).max() <= 1
    with Image.open(folder / "animation.gif") as animation:
        pauses, frames = [], []
        for number in range(animation.n_frames):
            animation.seek(number)
            pauses.append(animation.info["duration"])
            frames.append(pixels(animation.convert("RGB")))
    # A GIF holds frames that do not differ as one of a longer pause: PNDM's last jump is its last picture.
    assert sum(pauses) == 120 * len(steps) + 2000 and len(frames) in (len(steps), len(steps) + 1)
    expected = [grid(pipe.decode(step.x0), prompts) for step in steps]
    for number, frame in enumerate(frames[: len(steps)]):
        distances = [np.abs(frame - pixels(picture)).mean() for picture in expected]
        assert np.argmin(distances) == number and distances[number] < 12, "of 255: a GIF has 256 colours"
    assert np.abs(frames[-1] - pixels(folder / "grid.png")).mean() < 12
