"""Are the pictures, taken together, like the real ones? Distances between their features, one network for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm.errors import ConfigError
from ldm.features.cache import compute
from ldm.features.network import PictureFeatures
from ldm.metrics.distances.frechet import Moments, frechet, read_moments
from ldm.metrics.distances.inception_score import SPLITS, inception_score
from ldm.metrics.distances.interval import GROUPS, Estimate
from ldm.metrics.distances.kernels import discrepancy, gaussian, polynomial
from ldm.metrics.distances.neighbours import density_coverage, precision_recall
from ldm.metrics.evaluation import Evaluation

MEASURES = ("frechet", "kernel", "gaussian_kernel", "precision_recall", "density_coverage", "inception_score")
MOST_REAL = 50_000  # real pictures that are compared with


class Distribution(Metric):
    """Distances between drawn pictures and real ones in a network's features.

    measures: of frechet (FID with Inception's features; FD_NAME else), kernel (KID; KD_NAME), gaussian_kernel (CMMD
        with CLIP's; MMD_NAME), precision_recall, density_coverage, and inception_score, of drawn pictures alone.
    reference: a split of the data, or an .npz with published statistics mu and sigma (frechet alone); None: what was
        trained on ("train"), for the shapes' unseen pairs the split "unseen". An autoencoder's reconstructions are
        compared with the validation pictures that they are of.

    FID is also given as `fid_infinity`: what it would be with pictures without end (Chong and Forsyth 2020, here by the
    jackknife). `fid` itself is as large as its number of pictures makes it, and compares with others of that number.
    """

    full_state_update = False
    ours: list[Tensor]

    def __init__(
        self,
        features: PictureFeatures,
        measures: Sequence[str],
        reference: str | None = None,
        neighbours: int | None = None,
    ):
        super().__init__()
        wrong = sorted(set(measures) - set(MEASURES))
        if wrong or not measures:
            raise ConfigError(f"measures={list(measures)}: choose among {', '.join(MEASURES)}.")
        if "inception_score" in measures and not features.classifies:
            raise ConfigError(f"measures=inception_score needs a classifier, which {type(features).__name__} is not.")
        if neighbours is not None and neighbours < 1:
            raise ConfigError(f"neighbours={neighbours}: at least 1; null: 3 for precision and recall, else 5.")
        if reference is not None and reference.endswith(".npz"):
            if list(measures) != ["frechet"]:
                raise ConfigError(f"reference={reference} holds statistics, which measures=[frechet] alone can use.")
            if not Path(reference).is_file():
                raise ConfigError(f"reference={reference}: there is no such file.")
        self.features, self.measures, self.reference = features, tuple(measures), reference
        self.neighbours = neighbours
        self.scores = tuple(f"{of}/{n}" for of in ("seen", "unseen", "val", "reconstruction") for n in self._names())
        self.drawn = True  # else given back by an autoencoder
        self._references: dict[str, str] = {}  # in words, by what was compared with them
        self._held: dict[str, tuple[Tensor, str]] = {}  # of real pictures, for the next time
        self.add_state("ours", [], dist_reduce_fx="cat")

    # --- as a torchmetrics.Metric

    def update(self, images: Tensor) -> None:
        """Drawn pictures (B,3,H,W) in [-1, 1]; the network must have been started."""
        self.ours.append(self.features(images).float())

    def compute(self, real: Tensor | Moments | None = None) -> dict[str, float]:
        """{name: number, name/low, name/high, ...}; real: (M, width) features, or moments."""
        ours = dim_zero_cat(self.ours) if len(self.ours) else torch.zeros(0, self.features.width)
        return self.measured(ours, real)

    def measured(self, ours: Tensor, real: Tensor | Moments | None) -> dict[str, float]:
        """Of features (N, width) and (M, width)."""
        found: dict[str, float] = {}
        for measure in self.measures:
            least, sides = self.least(measure), {"drawn" if self.drawn else "reconstructed": ours}
            sides |= {"real": real} if isinstance(real, Tensor) and measure != "inception_score" else {}
            few = [f"{len(side)} {which}" for which, side in sides.items() if len(side) < least]
            if few:
                print(f"{measure} is left out: it needs at least {least} pictures, and there are {few[0]} ones.")
            else:
                found |= self._measure(measure, ours, real)
        return found

    def _measure(self, measure: str, ours: Tensor, real: Any) -> dict[str, float]:
        if measure == "inception_score":
            logits = self.features.logits(ours)
            assert logits is not None
            return inception_score(logits).named(self._named("inception_score"), 1.0)
        if measure == "frechet":
            name = self._called("fid", "fd")
            estimate = frechet(ours, real)
            return estimate.named(name, 0.0) | _at_least_zero(estimate.without_limit()).named(f"{name}_infinity", 0.0)
        if measure == "kernel":
            return discrepancy(ours, real, polynomial).named(self._called("kid", "kd"))
        if measure == "gaussian_kernel":
            name = "cmmd" if self.features.name == "clip" else f"mmd_{self.features.name}"
            return _times(1000, discrepancy(ours, real, gaussian, biased=True)).named(name)
        found = precision_recall if measure == "precision_recall" else density_coverage
        # As many real ones as drawn: the share that is covered grows with the one, and shrinks with the other.
        real = real[torch.linspace(0, len(real) - 1, min(len(real), len(ours))).round().long()]
        options = {} if self.neighbours is None else {"k": self.neighbours}
        made: dict[str, Estimate] = found(ours, real, **options)
        return {
            k: v
            for name, e in made.items()
            for k, v in e.named(self._named(name), 0.0, math.inf if name == "density" else 1.0).items()
        }

    def least(self, measure: str) -> int:
        """Pictures on either side without which a measure has no number."""
        if measure == "frechet":  # each covariance, also without a group, is of full rank
            return (self.features.width + 2) * GROUPS // (GROUPS - 1) + 1
        if measure == "inception_score":
            return 2 * SPLITS
        # A vector has its neighbours also where a group is left out.
        return 2 * GROUPS + (self.neighbours or 0) * 2 if measure in ("precision_recall", "density_coverage") else 4

    def _called(self, of_inception: str, other: str) -> str:
        return of_inception if not self.features.name else f"{other}_{self.features.name}"

    def _named(self, name: str) -> str:
        return f"{name}_{self.features.name}" if self.features.name else name

    def _names(self) -> Iterator[str]:
        names = {
            "frechet": [self._called("fid", "fd"), f"{self._called('fid', 'fd')}_infinity"],
            "kernel": [self._called("kid", "kd")],
            "gaussian_kernel": ["cmmd" if self.features.name == "clip" else f"mmd_{self.features.name}"],
            "precision_recall": [self._named("precision"), self._named("recall")],
            "density_coverage": [self._named("density"), self._named("coverage")],
            "inception_score": [self._named("inception_score")],
        }
        for measure in self.measures:
            yield from (f"{name}{end}" for name in names[measure] for end in ("", "/low", "/high"))

    # --- in an evaluation

    def wants(self, count: int) -> None:
        """ConfigError where so many drawn pictures are too few for one of the measures: asked before any is drawn."""
        for measure in self.measures:
            if count < (least := self.least(measure)):
                raise ConfigError(
                    f"{measure} on {self.features.width} features needs at least {least} pictures, and {count} are "
                    f"drawn: give eval_images={least} or more, or leave it out of measures=."
                )

    def score(self, evaluation: Evaluation) -> dict[str, float]:
        """Of each half of what was drawn: val/fid and so on; of an autoencoder alone reconstruction/fid (rFID)."""
        self.features.start(lambda most: evaluation.captioned("train", most), evaluation.cache.folder)
        self.features.to(evaluation.device)
        if self.features.learnt:  # one network for all processes, whatever their devices made of the last digits
            for tensor in self.features.state_dict().values():
                tensor.copy_(evaluation.group.gather(tensor)[0])
        halves: Mapping[str, Callable[[], Iterable[Tensor]]] = {
            half: drawn.batches for half, drawn in evaluation.drawn.items()
        }
        if not halves and "val" in evaluation.splits:
            halves = {"reconstruction": lambda: map(evaluation.reconstruct, evaluation.mine("val"))}
        found: dict[str, float] = {}
        self.drawn = bool(evaluation.drawn)
        for half, pictures in halves.items():
            split = "val" if half == "reconstruction" else self.reference or ("unseen" if half == "unseen" else "train")
            real, self._references[half] = self._real(evaluation, split)
            if evaluation.group.size > 1 or half == "reconstruction":  # each process looks at its share
                self.reset()
                for batch in pictures():
                    self.update(batch.to(evaluation.device))
                made = self.compute(real)
            else:
                made = self.measured(evaluation.cache.features(self.features, pictures, evaluation.device)[0], real)
            found |= {f"{half}/{k}": v for k, v in made.items()}
        return found

    def _real(self, evaluation: Evaluation, split: str) -> tuple[Tensor | Moments | None, str]:
        """Features of the reference, and what it is in words."""
        if self.measures == ("inception_score",):
            return None, "none"
        if split.endswith(".npz"):
            return read_moments(split, self.features.width), f"{Path(split).name}"
        if split not in evaluation.splits:
            raise ConfigError(f"reference={split} is no split of these data: choose {', '.join(evaluation.splits)}.")
        if split not in self._held:
            if evaluation.group.size > 1:  # in training, which writes no cards: nobody looks at all of them
                mine = compute(self.features, evaluation.mine(split, MOST_REAL), evaluation.device)
                self._held[split] = torch.cat(evaluation.group.gather(mine)), "not looked at"
            else:
                self._held[split] = evaluation.cache.features(
                    self.features, lambda: evaluation.real(split, MOST_REAL), evaluation.device
                )
        features, content = self._held[split]
        return features, f"{split}, {len(features)} pictures, {content}"

    def card(self, name: str) -> dict[str, Any]:
        """What a score was measured with, but for how the pictures were drawn."""
        reference = self._references.get(name.split("/")[0])
        return {**self.features.card(), "reference": reference, "interval": f"jackknife, {GROUPS} groups, 95 %"}


def _at_least_zero(e: Estimate) -> Estimate:  # what no distance is below
    return replace(e, value=max(0.0, e.value))


def _times(factor: float, e: Estimate) -> Estimate:
    return Estimate(factor * e.value, factor * e.error, factor * e.bias, e.quantile)
