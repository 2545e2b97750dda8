"""What a run is and how it went, in sentences."""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from ldm.analysis.figures import events_of
from ldm.analysis.logged import is_number
from ldm.analysis.run import Run
from ldm.errors import ConfigError
from ldm.formats.files import safetensors_header

NAMES = {  # of classes, as people call them; others are called by their own name
    "UNet": "a U-Net",
    "DiT": "a diffusion transformer",
    "MMDiT": "a multimodal diffusion transformer",
    "AutoencoderKL": "a KL autoencoder",
    "AutoencoderDC": "a deep compression autoencoder",
    "VQModel": "a vector-quantised autoencoder",
    "FSQModel": "an autoencoder with finite scalars",
    "LFQModel": "an autoencoder with signs",
    "Eps": "the noise",
    "X0": "the clean latent",
    "V": "v",
    "Velocity": "the velocity",
    "EDM": "EDM's preconditioned target",
    "ScaledLinear": "Stable Diffusion's scaled linear noise schedule",
    "Linear": "a linear noise schedule",
    "Cosine": "a cosine noise schedule",
    "Sigmoid": "a sigmoid noise schedule",
    "Flow": "straight paths from noise to data",
}
SCHEDULES = {"EDM": "EDM's noise levels"}  # where a scheduler shares its name
PARTS = {"latent_diffusion": "unet", "autoencoder": "vae"}


def introduction(run: Run) -> str:
    """What the run is, in one sentence: model, size, data, steps, time, hardware."""
    config = run.config
    kind = "autoencoder" if "utoencoder" in _target(config.get("module")) else "latent_diffusion"
    size = parameters(run, PARTS[kind])
    with_size = f" of {count(size)} parameters" if size else ""
    if kind == "autoencoder":
        what = f"{_named(config.get('autoencoder'))}{with_size}"
    else:
        what = f"{_named(config.get('model'))}{with_size} that predicts {_named(config.get('parameterization'))}"
        what += f" along {_named(config.get('scheduler'), SCHEDULES)}, in the latents of an autoencoder,"
    tuned = config.get("adapter")
    what += f" with {' and '.join(map(str, tuned))}" if isinstance(tuned, dict) and tuned else ""
    step, _ = run.last()
    images = images_seen(run)
    shown = f"{count(step)} step{'s' * (step != 1)}" + (f" ({count(images)} images)" if images else "")
    parts = [f"{what} trained on {_data(run)} for {shown}"]
    if seconds := training_seconds(run):
        parts.append(f"in {duration(seconds)}")
    if where := hardware(run):
        parts.append(f"on {where}")
    sentence = " ".join(parts) + "."
    return sentence[0].upper() + sentence[1:]


def notice(run: Run) -> str:
    """What a reader has to know first: that it diverged, was stopped, or is not finished; "" for a finished run."""
    status = run.status
    state, reason = status.get("state"), str(status.get("reason") or "")
    step, _ = run.last()
    step, last = max(step, status["step"] if isinstance(status.get("step"), int) else 0), run.config.get("max_steps")
    at = f"at step {count(step)}" + (f" of {count(last)}" if isinstance(last, int) else "")
    if state == "finished":
        return "It was stopped early, as one of its callbacks asked." if status.get("stopped_early") is True else ""
    if state == "stopped":
        kind, _, said = reason.partition(": ")
        if kind == "NotFinite":
            return f"This run diverged {at}: {said or reason}"
        if kind == "KeyboardInterrupt":
            return f"This run was stopped {at}, by Ctrl-C."
        return f"This run was stopped {at}" + (f": {reason}" if reason else ".")
    if state == "running":
        return f"This run is not finished: it was {at} when this page was written, or was killed there."
    return f"This run is not finished: nothing says how it stands; its last record is {at}."


def course(run: Run) -> list[str]:
    """How it went: speed, restarts, and what stages came before."""
    events = run.events.to_dict("records")
    resumes = [e.get("step") for e in events if e.get("event") == "resume"]
    said = []
    if resumes:
        steps = listed([f"step {count(s)}" for s in resumes if isinstance(s, int)])
        times = {1: "once", 2: "twice"}.get(len(resumes), f"{len(resumes)} times")
        said.append(f"It was interrupted and went on {times}{f', from {steps}' if steps else ''}.")
    elif run.status.get("state") == "finished":
        said.append("It ran in one go, without a restart.")
    made = [_stage(name, stage) for name, stage in run.stages.items()]
    if any(made):
        said.append(f"The command {listed([m for m in made if m])}.")
    return said


def training_seconds(run: Run) -> float:
    """From each start to its stop, or to the last record before the next start."""
    records = [t for t in run.metrics["time"] if is_number(t)]
    total, begun = 0.0, None
    for time, event in [*events_of(run), (math.inf, "start")]:
        if event in ("start", "resume"):
            if begun is not None:  # killed, or still running
                total += max([t - begun for t in records if begun <= t < time], default=0.0)
            begun = time
        elif begun is not None and event in ("stop", "finish"):
            total, begun = total + time - begun, None
    return total


def parameters(run: Run, part: str) -> int:
    """Numbers in a part of the newest checkpoint; 0 where there is none."""
    for folder in reversed(run.checkpoints):
        try:
            header = safetensors_header.read(folder / f"{part}.safetensors")
        except (OSError, ConfigError):
            continue
        return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return 0


def hardware(run: Run) -> str:
    about = run.about.get("hardware")
    about = about if isinstance(about, dict) else {}
    gpus = about.get("gpus")
    if isinstance(gpus, list) and gpus:
        kinds = list(dict.fromkeys(map(str, gpus)))
        return listed([f"{gpus.count(k)} {k}" for k in kinds])
    cpus, threads = about.get("cpus"), about.get("threads")
    if not isinstance(cpus, int):
        return ""
    used = f" ({threads} thread{'s' * (threads != 1)})" if isinstance(threads, int) else ""
    return f"{cpus} CPU core{'s' * (cpus != 1)}{used}"


def duration(seconds: float) -> str:
    """Two units at most: 45 s, 3 min 57 s, 5 h 12 min, 2 d 3 h."""
    whole = round(seconds)
    for size, unit, part, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size} {unit}" + (f" {rest} {smaller}" if rest else "")
    return f"{whole} s" if whole else f"{seconds:.1f} s"


def count(number: Any) -> str:
    """1,234; 1.2 million; 860 million; 1.5 billion."""
    if not is_number(number):
        return str(number)
    for size, word in ((1e9, "billion"), (1e6, "million")):
        if number >= size:
            return f"{number / size:.{0 if number >= 10 * size else 1}f} {word}"
    return f"{number:,.0f}"


def _stage(name: str, made: dict[str, Any]) -> str:
    samples = made.get("samples")
    total = sum(v for v in samples.values() if isinstance(v, int)) if isinstance(samples, dict) else 0
    did = {
        "prior": "drew class pictures",
        "prepare": f"prepared {count(total)} pictures" if total else "took the pictures as they were",
        "autoencoder": "trained the autoencoder",
        "encode": f"encoded {count(total)} latents" if total else "took the latents as they were",
        "diffusion": "trained the model",
        "evaluate": "scored it",
    }.get(name, "")
    seconds = made.get("seconds")
    if not did or not is_number(seconds) or seconds < 0.1:  # less: it was there already
        return did
    return f"{did} ({duration(seconds)})"


def _data(run: Run) -> str:
    stages, config = run.stages, run.config
    samples = next((s["samples"] for n in ("encode", "prepare") if "samples" in (s := stages.get(n, {}))), None)
    number = samples.get("train") if isinstance(samples, dict) else None
    kind = stages.get("prepare", {}).get("facts")
    source = f" ({kind['source']})" if isinstance(kind, dict) and isinstance(kind.get("source"), str) else ""
    side = config.get("image_size")
    pixels = f" of {side} x {side} pixels" if isinstance(side, int) else ""
    return f"{count(number)} pictures{pixels}{source}" if number else f"pictures{pixels}{source}"


def images_seen(run: Run) -> int:
    return int(max((i for i in run.metrics["images"] if is_number(i)), default=0))


def _named(node: Any, special: dict[str, str] | None = None) -> str:
    name = _target(node)
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return (special or {}).get(name) or NAMES.get(name) or spaced or "nothing that is named"


def _target(node: Any) -> str:
    return str(node.get("_target_", "")).rpartition(".")[2] if isinstance(node, dict) else ""


def listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def commands(run: Run, path: Path) -> list[tuple[str, str]]:
    """(what for, what to type) to go on from here, where there is something to go on from."""
    typed, given = run.about.get("command"), shlex.quote(f"checkpoint={path}")
    found = [("go on, or see that it is finished", typed)] if isinstance(typed, str) else []
    if run.checkpoints:
        base = f"python -m ldm.run task={{}} {given}"
        if "utoencoder" not in _target(run.config.get("module")):
            found.append(("draw", base.format("sample") + " prompt='...' output=samples"))
        found.append(("score", base.format("evaluate")))
    found.append(("write this page again", f"python -m ldm.run task=report {given}"))
    return found
