"""Each way of fine-tuning teaches the quickstart's model two things from 8 pictures: what is learnt, what is forgotten.

    python experiments/006_adapters/run.py RUN [METHOD ...]      # RUN: a run of experiment=quickstart

mine: small purple stars, by a word of their own: a look that the model can draw and has no word for.
words: what the base draws of mine when it is asked in its own words, the most that a new word can do.
heart: a figure that it never saw. Captions say the rest ("a large red WORD at the left on a grey background").
Scores are shares of 128 pictures drawn from captions that were not among the 8, with their 95 % intervals:
figure: the nearest textbook figure is the right one; all: colour, size, place, background, too; kept: every word right
in 128 pictures of captions that the base was trained on. Writes results.csv and methods.png; one thread.
"""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ldm.metrics.shapes as reader
from ldm import Pipeline
from ldm.data.sources import shapes
from ldm.metrics.shapes import wilson
from ldm.pictures import grid, to_pil

HERE = Path(__file__).parent
WORK = Path("outputs/006_adapters")
STEPS, PICTURES = 400, 128
NEW = "adapter.textual_inversion.placeholder=<new>"
ONE_WORD = [NEW, "adapter.textual_inversion.lr=2e-2"]
LORA = ["adapter=[lora]", "adapter.lora.lr=1e-3"]
PRIOR = ["experiment=dreambooth", "num_class_images=64"]
METHODS = {
    "textual_inversion": ["adapter=[textual_inversion]", *ONE_WORD],
    "textual_inversion_4": ["adapter=[textual_inversion]", *ONE_WORD, "adapter.textual_inversion.num_vectors=4"],
    "lora": LORA,
    "lora_all": [*LORA, "adapter.lora.layers=all"],
    "lora_and_word": ["adapter=[lora,textual_inversion]", *LORA[1:], *ONE_WORD],
    "hypernetwork": ["adapter=[hypernetwork]", "adapter.hypernetwork.lr=3e-4"],
    "whole": ["optimizer.lr=2e-4"],
    "dreambooth_lora": [*LORA, "adapter.lora.layers=all", *PRIOR],
    "dreambooth_whole": ["optimizer.lr=2e-4", *PRIOR],
}
SUBJECTS = ("mine", "heart")


def heart() -> np.ndarray:
    """(64, 2) vertices, of about the other figures' mean width."""
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y + 2], axis=1) * (1.1 / 16)


def teach_the_drawer() -> None:
    shapes._OUTLINES["heart"] = heart()


def attributes(subject: str, index: int, split: int) -> dict[str, str]:
    """Of picture `index`: the 8 to learn from are split 0, prompts are split 1."""
    uniform = shapes._Uniform([6, SUBJECTS.index(subject), split, index])
    drawn = shapes._draw_attributes([("purple", "star") if subject == "mine" else ("red", "heart")], uniform)
    if subject == "mine":
        drawn["size"] = "small"
    else:
        drawn["colour"] = shapes.COLOURS[index % 8]
    return drawn


def caption(subject: str, values: dict[str, str], word: str) -> str:
    told = shapes.caption(values)
    if subject == "mine":
        return told.replace("small purple star", word)
    return told.replace("heart", word)


def folder(subject: str, word: str) -> Path:
    """The 8 pictures with their captions."""
    place = WORK / "pictures" / f"{subject}_{'new' if word == '<new>' else word}"
    place.mkdir(parents=True, exist_ok=True)
    for i in range(8):
        values = attributes(subject, i, 0)
        pixels = shapes.render(values, 32, shapes._Uniform([7, i]), 0.02)
        Image.fromarray(pixels).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption(subject, values, word))
    return place


def class_pictures(base: str) -> Path:
    """64 that the base draws of captions it knows, with these captions."""
    place = WORK / "class"
    if not (place / "63.txt").is_file():
        place.mkdir(parents=True, exist_ok=True)
        captions = shapes.draw_captions(shapes.pairs_seen(), 64, seed=7)
        for i, image in enumerate(drawn(Pipeline.load(base), captions)):
            to_pil(image).save(place / f"{i:02d}.png")
            (place / f"{i:02d}.txt").write_text(captions[i])
    return place


def figures(images: torch.Tensor) -> torch.Tensor:
    """(B,) index of the nearest figure, 5 the heart, -1 none."""
    _, cover, _, plain = reader.segment(((images + 1) / 2).clamp(0, 1))
    distance = torch.cat([reader.shape_distances(cover), heart_distance(cover)], dim=1)
    nearest, index = distance.min(dim=1)
    return torch.where(plain & (nearest < 1), index, -1)


def heart_distance(cover: torch.Tensor) -> torch.Tensor:
    values = {"size": "large", "colour": "red", "shape": "heart", "place": "centre", "background": "white"}

    class Still:
        def signed(self, limit):
            return 0.0

    pixels = torch.from_numpy(shapes.render(values, 96, Still(), 0.0)).permute(2, 0, 1)[None] / 255
    prototype = reader.shape_features(reader.segment(pixels)[1])
    difference = (reader.shape_features(cover)[:, None] - prototype[None].to(cover)) / torch.tensor(reader._TOLERANCE)
    return difference.norm(dim=2)


def score(images: torch.Tensor, subject: str) -> dict[str, float]:
    """Shares of right pictures of the subject's prompts."""
    told = [attributes(subject, i, 1) for i in range(len(images))]
    found, figure = reader.read(images), figures(images)
    wanted = reader.WORDS["shape"].index("star") if subject == "mine" else 5
    right = figure == wanted
    others = [n for n in ("colour", "size", "place", "background")]
    all_right = right.clone()
    for name in others:
        all_right &= found[name] == torch.tensor([reader.WORDS[name].index(t[name]) for t in told])
    if subject == "mine":  # its look is figure and colour
        right = right & (found["colour"] == reader.WORDS["colour"].index("purple"))
    return {"figure": int(right.sum()), "all": int(all_right.sum())}


def drawn(pipe: Pipeline, prompts: list[str]) -> torch.Tensor:
    seeds = list(range(len(prompts)))
    return pipe.sample(prompts, num_steps=10, guidance=1.5, seed=seeds)


def main(base: str, *chosen: str) -> None:
    torch.set_num_threads(1)
    teach_the_drawer()
    WORK.mkdir(parents=True, exist_ok=True)
    kept_prompts = shapes.draw_captions(shapes.pairs_seen(), PICTURES, seed=6)
    rows = []
    for method in ("base", "words", *METHODS):
        if chosen and method not in chosen:
            continue
        for subject in SUBJECTS:
            if method == "words" and subject == "heart":
                continue  # the base has no word for it
            word = (
                "small purple star"
                if method == "words"
                else "<new>"
                if "inversion" in method or "word" in method
                else "sks"
            )
            rows.append(result(base, method, subject, word, kept_prompts))
            print(rows[-1], flush=True)
            write(rows, "results.csv" if not chosen else f"results_{'_'.join(chosen)}.csv")
    if not chosen:
        overview()


def result(base: str, method: str, subject: str, word: str, kept_prompts: list[str]) -> dict[str, str]:
    untrained = method in ("base", "words")
    run, seconds, trained, size = WORK / f"{method}_{subject}", 0.0, 0, 0
    if not untrained:
        given = METHODS[method]
        pictures = folder(subject, word)
        experiment = [] if any(o.startswith("experiment=") for o in given) else ["experiment=finetune"]
        overrides = [*experiment, f"checkpoint={base}", f"images={pictures}", f"outputs={WORK}", f"name={run.name}"]
        overrides += ["batch_size=8", f"max_steps={STEPS}", "guidance=1.5", "num_steps=10", "logger=none"]
        overrides += ["callbacks.validation=null", "callbacks.jump_to_x0.every_n_steps=400", "export=ldm"]
        overrides += ["callbacks.samples.every_n_steps=200", "callbacks.samples.num_steps=10", "caption_dropout=0.1"]
        overrides += ["callbacks.checkpoints.every_n_steps=400", "lr_scheduler.warmup_steps=20", *given]
        if "experiment=dreambooth" in given:
            overrides += ["class_prompt=a shape", f"class_images={class_pictures(base)}"]
        started = time.time()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-m", "ldm.run", *overrides], check=True, env=environment)
        seconds = time.time() - started
    pipe = Pipeline.load(base if untrained else run)
    if pipe.adapters:
        trained = sum(p.numel() for adapter in pipe.adapters.values() for p in adapter.parameters())
    elif not untrained:
        trained = sum(p.numel() for p in pipe.sampler.denoiser.model.parameters())
    files = [p for p in (run / "export").rglob("*") if p.is_file() and p.suffix in (".safetensors", ".pt")]
    size = sum(p.stat().st_size for p in files)
    prompts = [caption(subject, attributes(subject, i, 1), word) for i in range(PICTURES)]
    images = drawn(pipe, prompts)
    grid(images[:16], prompts[:16]).save(WORK / f"{subject}_{method}.png")
    metric = reader.ShapeScore()
    metric.update(drawn(pipe, kept_prompts), kept_prompts)
    found = score(images, subject) | {"kept": round(float(metric.compute()["all"]) * PICTURES)}
    shares = {}
    for name, right in found.items():
        low, high = wilson(right, PICTURES)
        shares |= {name: f"{right / PICTURES:.3f}", f"{name}_low": f"{low:.3f}", f"{name}_high": f"{high:.3f}"}
    return {
        "subject": subject,
        "method": method,
        **shares,
        "trained_parameters": str(trained),
        "file_kib": f"{size / 1024:.1f}",
        "minutes": f"{seconds / 60:.2f}",
    }


SHOWN = ["base", "textual_inversion_4", "lora", "hypernetwork", "whole", "dreambooth_lora"]
SHOWN_OF_MINE = ["base", "words", "textual_inversion", "lora", "dreambooth_lora"]


def overview() -> None:
    """methods.png: the same eight prompts by several methods, hearts above and stars below."""
    names = [f"heart_{m}" for m in SHOWN] + [f"mine_{m}" for m in SHOWN_OF_MINE]
    sheets = [Image.open(WORK / f"{name}.png") for name in names]
    halves = [sheet.crop((0, 0, sheet.width, sheet.height // 2)) for sheet in sheets]
    whole = Image.new("RGB", (max(h.width for h in halves), sum(h.height for h in halves)), "white")
    top = 0
    for half in halves:
        whole.paste(half, (0, top))
        top += half.height
    whole.save(HERE / "methods.png")


def write(rows: list[dict[str, str]], name: str) -> None:
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
