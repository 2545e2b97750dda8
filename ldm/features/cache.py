"""Features on disk, found again by what they are of: the pictures' own bytes and the network's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.atomic import atomic_write
from ldm.features.network import PictureFeatures, bytes_of


def fingerprint(batches: Iterable[Tensor]) -> tuple[str, int]:
    """Of pictures (B,3,H,W) in [-1, 1] as 8-bit files would hold them, in their order; and how many they are."""
    found, n = hashlib.sha256(), 0
    for batch in batches:
        if n == 0:
            found.update(f"{tuple(batch.shape[1:])}".encode())
        found.update(bytes_of(batch).to(torch.uint8).cpu().numpy().tobytes())
        n += len(batch)
    return found.hexdigest()[:16], n


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
        """(N, width) float32 of the pictures, which are looked at twice where they are new; and their fingerprint."""
        content, n = fingerprint(pictures())
        file = (
            None if self.folder is None else self.folder / f"{network.card()['network_weights']}-{content}.safetensors"
        )
        if file is not None and file.is_file():
            try:
                kept = load_file(file).get("features")
            except (OSError, SafetensorError):  # damaged: made again
                kept = None
            if kept is not None and kept.shape == (n, network.width) and kept.dtype == torch.float32:
                return kept, content
        found = compute(network, pictures(), device)
        if file is not None:
            with atomic_write(file) as part:
                save_file({"features": found}, part)
        return found, content
