"""Features on disk, found again by what they are of: the pictures' own bytes and the network's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.atomic import atomic_write
from ldm.features.network import PictureFeatures
from ldm.pictures import in_256


class Fingerprint:
    """Of pictures (B,3,H,W) in [-1, 1] as 8-bit files would hold them, in their order; n: how many they are."""

    def __init__(self) -> None:
        self._found, self.n = hashlib.sha256(), 0

    def over(self, batches: Iterable[Tensor]) -> Iterator[Tensor]:
        """The same batches, which it has seen."""
        for batch in batches:
            if self.n == 0:
                self._found.update(f"{tuple(batch.shape[1:])}".encode())
            self._found.update(in_256(batch).to(torch.uint8).cpu().numpy().tobytes())
            self.n += len(batch)
            yield batch

    def __str__(self) -> str:
        return self._found.hexdigest()[:16]


def fingerprint(batches: Iterable[Tensor]) -> Fingerprint:
    found = Fingerprint()
    for _ in found.over(batches):
        pass
    return found


def compute(network: PictureFeatures, batches: Iterable[Tensor], device: torch.device | str) -> Tensor:
    """(N, width) float32 on the host."""
    found = [network(batch.to(device)).float().cpu() for batch in batches]
    return torch.cat(found) if found else torch.zeros(0, network.width)


class FeatureCache:
    """One file a network and set of pictures, in a folder. None: nothing is kept."""

    def __init__(self, folder: Path | None):
        self.folder = folder

    def features(
        self, network: PictureFeatures, pictures: Callable[[], Iterable[Tensor]], device: torch.device | str
    ) -> tuple[Tensor, str]:
        """(N, width) float32 of the pictures, and their fingerprint.

        Where there is a folder, new pictures are looked at twice: by then it is known that they are.
        """
        if self.folder is None:
            seen = Fingerprint()
            return compute(network, seen.over(pictures()), device), str(seen)
        content = fingerprint(pictures())
        file = self.folder / f"{network.weights_digest}-{content}.safetensors"
        kept = _read(file, (content.n, network.width))
        if kept is None:
            kept = compute(network, pictures(), device)
            with atomic_write(file) as part:
                save_file({"features": kept}, part)
        return kept, str(content)


def _read(file: Path, shape: tuple[int, int]) -> Tensor | None:
    """None where nothing is kept, or where it was damaged."""
    try:
        kept = load_file(file).get("features")
    except (OSError, SafetensorError):
        return None
    return kept if kept is not None and kept.shape == shape and kept.dtype == torch.float32 else None
