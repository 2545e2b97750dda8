"""Reconstruction, statistics and diffusability of autoencoders' latents, side by side."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from ldm.autoencoders.implied import ImpliedCodebook
from ldm.autoencoders.kl import Autoencoder
from ldm.autoencoders.latents import LatentSpace, Posterior
from ldm.autoencoders.usage import MOST_CODES, perplexity, shares, use
from ldm.autoencoders.vq import VQModel
from ldm.checkpoints.components import task_device
from ldm.checkpoints.load import load_any
from ldm.config.check import check
from ldm.config.root import digest, plain
from ldm.data.fields import fields_of
from ldm.data.shards.splits import Shards, file_name
from ldm.devices import on_device
from ldm.diffusion.exact import Gaussian
from ldm.errors import ConfigError
from ldm.evaluation.drawing import image_shards, pictures_of
from ldm.metrics.latent_space import snr_db, spectrum, statistics
from ldm.metrics.reconstruction import Reconstruction
from ldm.pictures import curves, reconstruction_rows, reconstruction_sheet
from ldm.training.probe import Latents, decoded_jumps, gaussian_of, held_out_errors, scores, train_denoiser
from ldm.training.randomness import generator
from ldm.training.run.directory import write_json

HELD_OUT = 1024  # pictures that are reconstructed, at most
DENOISED = 256  # of them the first, on which the denoiser is judged
JUMPED = 64  # of those the first, whose jumps are decoded
SHOWN = 8  # pictures on the sheet
SPECTRA = "spectra.png"


@dataclass
class Space:
    """An autoencoder that is looked at."""

    label: str
    path: str
    autoencoder: Autoencoder
    image_size: int | None  # of the pictures that it was trained on, where that is known


@dataclass
class Measured:
    """All about a space. channels: lists of a number a channel; spectrum: as `ldm.metrics.latent_space.spectrum`."""

    metrics: dict[str, float]
    channels: dict[str, list[float]]
    spectrum: tuple[Tensor, Tensor]
    sheet: Image.Image


@dataclass
class Encoded:
    """Raw posteriors of a split's pictures, on the host: mean and standard deviation, (N,C,h,w) each."""

    mean: Tensor
    std: Tensor

    def standardised(self, space: LatentSpace) -> Latents:
        return Latents(space.standardise(self.mean), self.std / space.scale.view(-1, 1, 1))


def compare(config: DictConfig) -> dict[str, float]:
    """One row an autoencoder in latents.csv, all about it in latents.json; sheets, and spectra in one figure."""
    check(config, "latents")
    values = plain(config)
    if not values["checkpoint"] or not values["shards"]:
        raise ConfigError(
            "task=latents needs shards=PATH (of pictures) and checkpoint=RUN, or checkpoint=[A,B] to compare several."
        )
    paths = listed(values["checkpoint"])
    data = values["data"]
    images = image_shards(values["shards"], fields_of(data), data["validation_fraction"])
    spaces = [_opened(path, label, values) for path, label in zip(paths, labels(paths), strict=True)]
    size = values["image_size"] or images["train"].facts.get("image_size") or spaces[0].image_size
    if not size:
        raise ConfigError(
            f"neither {values['shards']} nor {paths[0]} says how large pictures are: type image_size=256."
        )
    for space in spaces:
        _check_fits(space, size)
    asked = {k: values[k] for k in ("shards", "weights", "seed", "denoiser_steps", "denoiser_images")}
    asked |= {"image_size": size, "checkpoint": paths}
    output = Path(values["output"] or Path(values["outputs"]) / f"latents-{digest(asked)}")
    output.mkdir(parents=True, exist_ok=True)
    _remark_on_shared(images)
    found: dict[str, dict[str, float]] = {}
    about, spectra = {}, {}
    for space in spaces:
        begun = time.perf_counter()
        measured = _measure(space, images, size, values)
        found[space.label], spectra[space.label] = measured.metrics, measured.spectrum
        about[space.label] = {"checkpoint": space.path, "metrics": measured.metrics, "channels": measured.channels}
        measured.sheet.save(output / f"reconstructions-{file_name(space.label)}.png")
        print(f"{space.label}: {time.perf_counter() - begun:.0f} s")
    write_json(output / "latents.json", {"asked": asked, "spaces": about})
    _write(found, output)
    figure = _figure(spectra)
    if figure is not None:
        figure.save(output / SPECTRA)
    print(f"latents: {output}")
    if len(found) == 1:
        return dict(next(iter(found.values())))
    return {f"{label}/{name}": value for label, row in found.items() for name, value in row.items()}


def listed(text: str) -> list[str]:
    """The paths of checkpoint=A or checkpoint=[A,B]; a path with a comma stands in quotes. ConfigError for none."""
    inside = text.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return [text]
    paths = [p for row in csv.reader([inside[1:-1].replace("'", '"')], skipinitialspace=True) for p in row]
    paths = [path.strip() for path in paths if path.strip()]
    twice = [path for path in paths if paths.count(path) > 1]
    if not paths or twice:
        what = f"names {twice[0]} twice" if twice else "names none"
        raise ConfigError(f"checkpoint={text} {what}: give different autoencoders, checkpoint=[outputs/a,outputs/b].")
    return paths


def labels(paths: list[str]) -> list[str]:
    """What each is called in tables: its last name where those differ, else its path."""
    names = [Path(path).name or path for path in paths]
    return names if len(set(names)) == len(names) else paths


def _opened(path: str, label: str, values: dict[str, Any]) -> Space:
    parts = load_any(path, values["weights"], values["config"])
    channels = (parts.config.get("autoencoder") or {}).get("in_channels", 3)
    if channels != 3:
        raise ConfigError(
            f"{path} is an autoencoder of {channels} channels, and pictures of shards have 3: take another."
        )
    return Space(label, path, parts.for_sampling().autoencoder, parts.config.get("image_size"))


def _check_fits(space: Space, size: int) -> None:
    factor = space.autoencoder.factor
    if size % factor:
        wanted = max(factor, size // factor * factor)
        larger = "larger than" if factor > size else "no divisor of"
        raise ConfigError(
            f"{space.path}: its factor, {factor} pixels a latent pixel, is {larger} the pictures' {size}: "
            f"image_size={wanted} fits."
        )


def _remark_on_shared(images: dict[str, Shards]) -> None:
    """Says where so few pictures are there that none is held out."""
    if np.isin(images["val"].index.keys, images["train"].index.keys).any():
        print("too few pictures to hold some out: they are judged on pictures that the denoiser is trained on.")


@torch.no_grad()
def _measure(space: Space, images: dict[str, Shards], size: int, values: dict[str, Any]) -> Measured:
    autoencoder = space.autoencoder.to(task_device())
    training = _encoded(autoencoder, images["train"], size, values["denoiser_images"], values["batch_size"])
    latents = autoencoder.latents
    if not latents.measured:
        print(
            f"{space.label}: its latents had no mean and scale, which were measured on {len(training.mean)} pictures."
        )
        latents.measure([Posterior(training.mean, 2 * training.std.log())])
    metrics, held_out, shown = _reconstructed(autoencoder, images["val"], size, values["batch_size"])
    latents.to("cpu")  # beside what it standardises
    train, val = training.standardised(latents), held_out.standardised(latents)
    x0 = train.sample(generator(values["seed"], "latents", "train"))
    raw, channels = _raw_statistics(training)
    metrics |= {f"latents/{k}": v for k, v in raw.items()}
    metrics |= {f"latents/{k}": v for k, v in statistics(x0, training.mean, training.std.square()).items()}
    judged = _diffusability(autoencoder, train, gaussian_of(x0), val, shown, values)
    metrics |= {f"diffusability/{k}": v for k, v in judged.items()}
    z = held_out.mean[:SHOWN]
    rows = reconstruction_rows(shown[:SHOWN], autoencoder.decode(on_device(z, task_device())).cpu(), z)
    return Measured(metrics, channels, spectrum(x0), reconstruction_sheet(rows))


def _raw_statistics(training: Encoded) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Of latents as the autoencoder speaks them: numbers, and lists of one a channel."""
    mean, variance = training.mean.double(), training.std.double().square()
    middle = mean.mean(dim=(0, 2, 3))
    scale = (mean.var(dim=(0, 2, 3), correction=0) + variance.mean(dim=(0, 2, 3))).sqrt()  # law of total variance
    _, channels, height, width = (float(n) for n in mean.shape)
    numbers = {"channels": channels, "height": height, "width": width, "mean": float(middle.mean())}
    numbers["scale"] = float(scale.square().mean().sqrt())
    by_channel = {"mean": middle, "scale": scale, "snr_db": snr_db(mean, variance)}
    return numbers, {k: v.tolist() for k, v in by_channel.items()}


def _diffusability(
    autoencoder: Autoencoder,
    train: Latents,
    gaussian: Gaussian,
    val: Latents,
    pictures: Tensor,
    values: dict[str, Any],
) -> dict[str, float]:
    """Trains the small denoiser and judges it on held-out latents, whose pictures (N,3,H,W) are in the same order."""
    device, seed = task_device(), values["seed"]

    def decode(x0: Tensor) -> Tensor:
        z = autoencoder.latents.restore(x0.cpu())
        return autoencoder.decode(on_device(z, device)).float().clamp(-1, 1)

    with torch.enable_grad():
        denoiser = train_denoiser(train, values["denoiser_steps"], seed, device)
    x0 = val.sample(generator(seed, "latents", "val"))[:DENOISED]
    errors = held_out_errors(denoiser, gaussian, x0, seed, device)
    decoded = decoded_jumps(denoiser, gaussian, x0[:JUMPED], pictures[:JUMPED], decode, seed, device)
    return scores(errors, decoded, x0[0].numel(), pictures[0, 0].numel())


def _encoded(autoencoder: Autoencoder, shards: Shards, size: int, limit: int, batch_size: int) -> Encoded:
    """Posteriors of the first pictures of a split."""
    made = [_posterior(autoencoder, some) for some in _batches(shards, size, limit, batch_size)]
    return _joined(made, shards)


def _reconstructed(
    autoencoder: Autoencoder, shards: Shards, size: int, batch_size: int
) -> tuple[dict[str, float], Encoded, Tensor]:
    """Scores of held-out pictures and of the codes that they use, their posteriors, and the first of the pictures."""
    device, metric = task_device(), Reconstruction()
    kept: list[Tensor] = []
    made: list[Encoded] = []
    indices: list[Tensor] = []
    count = _codes(autoencoder)
    for some in _batches(shards, size, HELD_OUT, batch_size):
        made.append(_posterior(autoencoder, some))
        z = on_device(made[-1].mean, device)
        metric.update(autoencoder.decode(z).float().clamp(-1, 1).cpu(), some)
        if count:
            indices.append(_indices(autoencoder, z).cpu())
        if sum(len(pictures) for pictures in kept) < DENOISED:
            kept.append(some)
    encoded = _joined(made, shards)
    found = {f"reconstruction/{k}": v for k, v in metric.compute().items()}
    if count:  # of all pictures together: a batch cannot use all codes
        frequencies = shares(torch.cat(indices), count)
        found["codebook/size"] = float(count)
        found["codebook/use"] = float(use(frequencies))
        found["codebook/perplexity"] = float(perplexity(frequencies))
    return found, encoded, torch.cat(kept)


def _batches(shards: Shards, size: int, limit: int, batch_size: int) -> Iterator[Tensor]:
    for pictures in pictures_of(shards, size, limit):
        yield from pictures.split(batch_size)


def _posterior(autoencoder: Autoencoder, pictures: Tensor) -> Encoded:
    posterior = autoencoder.encode(on_device(pictures, task_device()))
    return Encoded(posterior.mean.cpu(), (0.5 * posterior.logvar).exp().cpu())


def _joined(made: list[Encoded], shards: Shards) -> Encoded:
    if not made:
        raise ConfigError(f"{shards.path} has no picture that can be read: task=check shards={shards.path} says why.")
    return Encoded(torch.cat([e.mean for e in made]), torch.cat([e.std for e in made]))


def _codes(autoencoder: Autoencoder) -> int:
    """How many codes an autoencoder chooses among; 0 where it has none, or too many to count."""
    if isinstance(autoencoder, VQModel):
        return autoencoder.quantize.size
    few = isinstance(autoencoder, ImpliedCodebook) and autoencoder.size <= MOST_CODES
    return autoencoder.size if isinstance(autoencoder, ImpliedCodebook) and few else 0


def _indices(autoencoder: Autoencoder, z: Tensor) -> Tensor:  # (B,C,h,w) -> (B,h,w)
    if isinstance(autoencoder, VQModel):
        return autoencoder.quantize.nearest(z)
    assert isinstance(autoencoder, ImpliedCodebook)
    return autoencoder.indices(z)


def _write(found: dict[str, dict[str, float]], output: Path) -> None:
    """latents.csv, a row an autoencoder; on the screen a column each, because names are long and spaces few."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    with (output / "latents.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["autoencoder", *names])
        writer.writeheader()
        writer.writerows({"autoencoder": label, **row} for label, row in found.items())
    widths = {label: max(12, len(label)) for label in found}
    print(" " * 34 + "  ".join(f"{label:>{width}}" for label, width in widths.items()))
    for name in names:
        cells = [f"{row[name]:.4f}" if name in row else "" for row in found.values()]
        print(f"{name:<34}" + "  ".join(f"{c:>{w}}" for c, w in zip(cells, widths.values(), strict=True)))


def _figure(spectra: dict[str, tuple[Tensor, Tensor]]) -> Image.Image | None:
    """All spectra against cycles a picture, on which spaces of any size agree; None where none has two frequencies."""
    axis = max((frequencies.tolist() for frequencies, _ in spectra.values()), key=len)
    if len(axis) < 2:
        return None
    lines = {k: [*power.log10().tolist(), *[math.nan] * (len(axis) - len(power))] for k, (_, power) in spectra.items()}
    return curves([round(f, 1) for f in axis], lines, "cycles a picture", "log10 power of x0")
