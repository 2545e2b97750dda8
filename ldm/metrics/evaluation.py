"""What task=evaluate and the callback `scores` hand to every metric, and what they want back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm.features.cache import FeatureCache
from ldm.pictures import to_bytes, to_unit

BATCH = 256


class Drawn:
    """What the model drew, as 8-bit pictures, one caption each: those of this process, where several share the work."""

    def __init__(self, pictures: Tensor, captions: Sequence[str], everyone: Sequence[str] | None = None):
        """pictures: (N,3,H,W) in [-1, 1], or uint8; everyone: the captions of all processes' pictures."""
        self.bytes = as_bytes(pictures)
        self.captions = list(captions)
        self.everyone = self.captions if everyone is None else list(everyone)

    @property
    def pictures(self) -> Tensor:
        """(N,3,H,W) float32 in [-1, 1], all at once."""
        return to_unit(self.bytes)

    def batches(self) -> Iterator[Tensor]:
        """The same in batches."""
        return (pictures for pictures, _ in self.captioned())

    def captioned(self, size: int = BATCH) -> Iterator[tuple[Tensor, list[str]]]:
        """In batches, with their captions."""
        for first in range(0, len(self.captions), size):
            yield to_unit(self.bytes[first : first + size]), self.captions[first : first + size]


def as_bytes(pictures: Tensor) -> Tensor:  # (N,3,H,W) in [-1, 1] or uint8 -> uint8 on the host
    if pictures.dtype == torch.uint8:
        return pictures.cpu()
    return torch.from_numpy(to_bytes(pictures)).movedim(-1, 1).contiguous()


@dataclass(frozen=True)
class Group:
    """The processes that score together.

    rank, size: which this one is of how many. gather: a tensor of each, in all of them; first dimensions may differ.
    """

    rank: int = 0
    size: int = 1
    gather: Callable[[Tensor], list[Tensor]] = field(default=lambda tensor: [tensor])

    def share(self, of: range) -> range:
        """What this one does of it; one after the other they do all."""
        return of[self.rank * len(of) // self.size : (self.rank + 1) * len(of) // self.size]


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
    captioned(split, limit): as `real`, with the pictures' captions.
    draw(captions, seeds): more pictures, uint8 (N, 3, H, W), one a caption; None for an autoencoder alone.
    device: where networks that look at pictures compute; cache: their features that are known already.
    share: as `real`, this process's part of it; group: the processes that score together.
    """

    splits: Sequence[str]
    real: Callable[[str, int | None], Iterator[Tensor]]
    reconstruct: Callable[[Tensor], Tensor]
    drawn: Mapping[str, Drawn]
    count: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    captioned: Callable[[str, int | None], Iterator[tuple[Tensor, list[str]]]] = lambda split, limit: iter(())
    draw: Callable[[Sequence[str], Sequence[int]], Tensor] | None = None
    device: torch.device | str = "cpu"
    cache: FeatureCache = field(default_factory=lambda: FeatureCache(None))
    share: Callable[[str, int | None], Iterator[Tensor]] | None = None
    group: Group = field(default_factory=Group)

    def bind(self, metric: Any) -> None:
        """Its `compute` is of these processes from now on: of one alone also where others are there, and wait."""
        if isinstance(metric, Metric):
            metric.distributed_available_fn = lambda: self.group.size > 1
            metric.dist_sync_fn = lambda tensor, group=None: self.group.gather(tensor)

    def mine(self, split: str, limit: int | None = None) -> Iterator[Tensor]:
        """Of `real` what is this process's to look at: one after the other the processes have all, in their order."""
        return self.real(split, limit) if self.share is None else self.share(split, limit)


@runtime_checkable
class Scored(Protocol):
    """A metric of conf/metric: any class with this method.

    Names are those of ours, HALF/METRIC, so that a table keeps a half together. A class attribute `scores`, the names
    that it may give, lets optimized_metric= be judged before a sweep begins; without it every name is taken.

    Optional methods: `card(name)` says what a score was measured with; `wants(count)` raises ConfigError where so many
    pictures are too few for it, before any is drawn. With several processes a torchmetrics.Metric is updated with
    `drawn` and `mine`, and its `compute` is of all of them.
    """

    def score(self, evaluation: Evaluation) -> Mapping[str, float]:
        """{name: number}, {} where the evaluation has nothing for it. NAME/low and NAME/high are a 95 % interval,
        NAME/se a standard error, NAME/n a count, NAME/chance what guessing gives; NaN where there is no number.
        """
        ...
