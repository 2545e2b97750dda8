"""What task=evaluate hands to every metric, and what it wants back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """What the model drew: pictures (N, 3, H, W) in [-1, 1], one caption each."""

    pictures: Tensor
    captions: Sequence[str]


@dataclass(frozen=True)
class Evaluation:
    """A model's pictures beside real ones. All are float32 in [-1, 1] on the CPU, (B, 3, H, W), of the training's size.

    splits: the data's: "train", "val", and what else they have (the shapes: "unseen", whose pairs training lacks).
    real(split, limit): batches of a split's pictures, in the order of the shards; limit: at most so many, None: all.
    reconstruct: pictures through the autoencoder and back.
    drawn: of each half of the captions: "seen" and "unseen" for the shapes, the real ones of which are the splits "val"
    and "unseen"; else "val". {} for an autoencoder alone.
    count: pictures of a half that were asked for (eval_images=).
    facts: what the data say of themselves, such as source: "shapes".
    """

    splits: Sequence[str]
    real: Callable[[str, int | None], Iterator[Tensor]]
    reconstruct: Callable[[Tensor], Tensor]
    drawn: Mapping[str, Drawn]
    count: int
    facts: Mapping[str, Any] = field(default_factory=dict)


@runtime_checkable
class Scored(Protocol):
    """A metric of conf/metric: any class with this method.

    Names are those of ours, HALF/METRIC, so that a table keeps a half together. A class attribute `scores`, the names
    that it may give, lets optimized_metric= be judged before a sweep begins; without it every name is taken.
    """

    def score(self, evaluation: Evaluation) -> Mapping[str, float]:
        """{name: number}, {} where the evaluation has nothing for it. NAME/low and NAME/high are a 95 % interval,
        NAME/se a standard error, NAME/n a count, NAME/chance what guessing gives; NaN where there is no number.
        """
        ...
