"""task=sample: prompts to pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from PIL.PngImagePlugin import PngInfo
from rich.console import Console
from rich.progress import Progress

from ldm.checkpoints.components import task_device
from ldm.checkpoints.folder import find, run_of
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.errors import ConfigError
from ldm.formats.adapters import located
from ldm.formats.kinds import is_ours
from ldm.pictures import film_strip, grid, to_pil
from ldm.pipeline import Pipeline
from ldm.sampling import Request, chosen_steps

# Keys that Pipeline.request takes under the same name, and groups that decide the picture too.
ASKED = (
    *("height", "width", "num_steps", "guidance", "guidance_rescale", "eta", "num_images", "init_image", "strength"),
    *("mask", "clip_skip", "chunked", "prompt_weights", "tiling"),
)
GROUPS = ("sampler", "grid", "guider")
PICTURES = ("init_image", "mask")


def sample(config: DictConfig, prompts: list[str]) -> dict[str, float]:
    """Writes PNGs with their recipe inside, a grid, and with film_strip=true the steps of the first pictures."""
    check(config, "sample")
    pipe = Pipeline.load(config.checkpoint, config.config, config.weights)
    for name, value in pipe.settings(plain(config)).items():  # what was not given is the run's own
        config[name] = value
    for path, weight in _adapters(config):
        pipe.load_adapter(path, weight)
    pipe.to(task_device()).compile(config.compile)
    request = _request(pipe, config, prompts)
    output = Path(config.output) if config.output else _default_output(config, pipe, request)
    taken = next(p for p in (output, *output.absolute().parents) if p.exists())
    if not taken.is_dir():
        raise ConfigError(f"output={output}: {taken} is a file, and pictures need a folder: give another output=.")
    walked = int(request.num_steps * request.strength)
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        steps = list(bar.track(pipe.sampler.steps(request), total=walked, description="sampling"))
    images = pipe.decode(steps[-1].x_next, request.tiling)
    output.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images):
        recipe = _recipe(config, pipe, request, i)
        info = PngInfo()
        info.add_text("ldm", json.dumps(recipe, ensure_ascii=False))
        to_pil(image).save(output / f"{i:04d}.png", pnginfo=info)
    grid(images, request.prompts).save(output / "grid.png")
    if config.film_strip:
        frames = pipe.sampler.frames(steps, chosen_steps(len(steps)), request.tiling)
        film_strip(frames, request.prompts).save(output / "film_strip.png")
    if config.animation:
        jumps = [grid(pipe.decode(step.x0, request.tiling), request.prompts) for step in steps]
        jumps.append(grid(images, request.prompts))
        pauses = [120] * len(steps) + [2000]  # milliseconds
        jumps[0].save(output / "animation.gif", save_all=True, append_images=jumps[1:], duration=pauses, loop=0)
    print(f"pictures: {output}")
    return {"images": float(len(images))}


def _adapters(config: DictConfig) -> list[tuple[str, float]]:
    """adapters=, as paths and weights."""
    given = plain(config)["adapters"] or []
    return [split_weight(item) for item in (given if isinstance(given, list) else [given])]


def _fingerprint(path: str) -> str:
    """Of an adapter's file, or of a run's newest state."""
    place = Path(path).expanduser()
    file = find(place) / "manifest.json" if is_ours(place) else located(path)
    return hashlib.sha256(file.read_bytes()).hexdigest()


def split_weight(given: Any) -> tuple[str, float]:
    """PATH or PATH:WEIGHT."""
    path, colon, weight = str(given).rpartition(":")
    try:
        return (path, float(weight)) if colon else (str(given), 1.0)
    except ValueError:  # the colon is the path's own
        return str(given), 1.0


def _request(pipe: Pipeline, config: DictConfig, prompts: list[str]) -> Request:
    seed: Any = OmegaConf.to_container(config.seed) if OmegaConf.is_list(config.seed) else config.seed
    nodes = {"sampler": plain(config.sampler), "spacing": plain(config.grid), "guider": plain(config.guider)}
    return pipe.request(prompts, config.negative_prompt, seed=seed, **nodes, **{key: config[key] for key in ASKED})


def _default_output(config: DictConfig, pipe: Pipeline, request: Request) -> Path:
    """A folder beside the run's checkpoints, found again by the same request and by no other."""
    asked = {key: config[key] for key in (*ASKED, "seed", "weights")} | {g: plain(config[g]) for g in GROUPS}
    asked |= {"prompts": list(request.prompts), "negative_prompt": config.negative_prompt}
    asked |= {key: hashlib.sha256(Path(config[key]).read_bytes()).hexdigest() for key in PICTURES if config[key]}
    asked |= {f"adapter {i}": f"{_fingerprint(path)}:{weight}" for i, (path, weight) in enumerate(_adapters(config))}
    run = run_of(pipe.folder)
    if not (pipe.folder / "manifest.json").is_file():  # other people's checkpoints are left as they are
        run = Path(config.outputs)
        asked |= {"checkpoint": _absolute(str(pipe.folder)), "config": _absolute(config.config)}
    return run / "samples" / f"{pipe.folder.name}-{digest({k: str(v) for k, v in asked.items()})}"


def _recipe(config: DictConfig, pipe: Pipeline, request: Request, i: int) -> dict[str, Any]:
    """What draws picture i again, in the words of the command line: picture `position` of `num_images` of one prompt.

    Pictures that share a seed, or a mask (its posterior sample is the first seed's), are drawn together again.
    """
    together = len(request.seeds) == 1 or request.mask is not None
    seeds = list(request.seeds) if together else [request.seeds[i]]
    groups: dict[str, Any] = {group: plain(config[group]) or "own" for group in GROUPS}
    if groups["guider"].get("checkpoint"):
        groups["guider"]["checkpoint"] = _absolute(groups["guider"]["checkpoint"])
    return {
        "prompt": request.prompts[i],
        "negative_prompt": config.negative_prompt,
        "seed": seeds[0] if len(seeds) == 1 else seeds,
        **{key: config[key] for key in ASKED},
        **{key: _absolute(config[key]) for key in PICTURES},
        "adapters": [f"{_absolute(path)}:{weight:g}" for path, weight in _adapters(config)],
        "num_images": len(request.prompts) if together else 1,
        "position": i if together else 0,
        "height": request.height,
        "width": request.width,
        "strength": request.strength,
        **groups,
        "weights": config.weights,
        "checkpoint": _absolute(str(pipe.folder)),
        "config": _absolute(config.config),
    }


def _absolute(path: str | None) -> str | None:
    """Found from any working directory; what is no path here is a hub id."""
    return str(Path(path).resolve()) if path and Path(path).exists() else path
