"""A small network that learns its features from the data at hand: scores of pictures without any download."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ldm.atomic import atomic_write
from ldm.errors import ConfigError
from ldm.features.network import Captioned, PictureFeatures, scaled_as_pillow
from ldm.pictures import in_256

LARGEST = 64  # pixels a side that it looks at
WORDS = 256  # that it learns to see, at most: the most frequent
RAREST = 5  # pictures that a word must stand beside
BATCH = 64


class TrainedFeatures(PictureFeatures):
    """Convolutions that were trained to name the words of the training captions; the features are what the words are
    read from.

    Its numbers compare models on the same data, and with nobody else's. The same data and the same settings give the
    same network (on one kind of device).

    width: of the features; steps: of training, batches of 64; images: of the training pictures, at most.
    """

    name = "trained"
    learnt = True
    scale: Tensor

    def __init__(self, width: int = 64, steps: int = 400, images: int = 8192):
        super().__init__()
        self.width, self.steps, self.images = width, steps, images
        self.resize = f"{LARGEST} pixels at most, antialiased bicubic"
        layers: list[nn.Module] = []
        channels = 3
        with torch.random.fork_rng(devices=[]):  # nobody's other weights depend on it
            torch.manual_seed(0)
            for out in (32, 64, 128):
                layers += [nn.Conv2d(channels, out, 3, stride=2, padding=1), nn.GroupNorm(8, out), nn.SiLU()]
                channels = out
            # A normalisation here would take away what the mean over places is to say.
            self.network = nn.Sequential(*layers, nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.SiLU())
        self.register_buffer("scale", torch.ones(()))
        self.words: list[str] = []

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.words:
            return
        pictures, told = [], []
        for images, captions in captioned(self.images):
            pictures.append(self._seen(images))
            told += [set(re.findall(r"\w+", caption.lower())) for caption in captions]
        counts = Counter(word for words in told for word in words)
        varied = {w: n for w, n in counts.items() if RAREST <= n < len(told)}
        if len(varied) < 2:
            raise ConfigError(
                f"metric.trained learns to see words, and of {len(told)} training captions no two words stand in at "
                f"least {RAREST} and not in all: measure with features of a published network (metric=fd_dinov2), or "
                "with metric=nearest."
            )
        self.words = sorted(sorted(varied, key=lambda w: (-varied[w], w))[:WORDS])
        answers = torch.tensor([[word in words for word in self.words] for words in told])
        seen = torch.cat(pictures)
        file = None if kept is None else kept / f"trained-{self._of(seen, answers)}.safetensors"
        if file is None or not self._read(file):
            self._learn(seen, answers)
            if file is not None:
                with atomic_write(file) as part:
                    save_file({k: v.cpu().contiguous() for k, v in self.state_dict().items()}, part)
        self.eval().requires_grad_(False)

    def _of(self, pictures: Tensor, answers: Tensor) -> str:
        """A fingerprint of all that decides the weights."""
        found = hashlib.sha256(f"2 {self.width} {self.steps} {tuple(pictures.shape)} {self.words}".encode())
        found.update(pictures.numpy().tobytes())
        found.update(answers.numpy().tobytes())
        return found.hexdigest()[:16]

    def _read(self, file: Path) -> bool:
        """Whether the weights were there; a damaged file is made again."""
        try:
            tensors, own = load_file(file), self.state_dict()
        except (OSError, SafetensorError):
            return False
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in own.items()}:
            return False
        self.load_state_dict(tensors)
        return True

    def _learn(self, pictures: Tensor, answers: Tensor) -> None:
        """The usual cross-entropy of every word, AdamW with a cosine; the order is drawn from a seed."""
        device = next(self.parameters()).device
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            head = nn.Linear(self.width, len(self.words)).to(device)
        learnt = [*self.parameters(), *head.parameters()]
        optimizer = torch.optim.AdamW(learnt, lr=2e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        with torch.enable_grad(), torch.inference_mode(False):
            for _ in range(self.steps):
                rows = torch.randint(len(pictures), (BATCH,), generator=generator)
                batch = pictures[rows].to(device).float() / 127.5 - 1
                loss = F.binary_cross_entropy_with_logits(head(self._pooled(batch)), answers[rows].to(device).float())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():  # of mean square 1 over training pictures, so that kernels see neither noise nor outliers
            found = [self._pooled(part.to(device).float() / 127.5 - 1) for part in pictures.split(256)]
            self.scale.copy_(1 / torch.cat(found).square().mean().sqrt().clamp_min(1e-6))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self._pooled(self._seen(images).float() / 127.5 - 1)

    def _pooled(self, x: Tensor) -> Tensor:  # (B,3,h,w) -> (B,width)
        return self.network(x).mean(dim=(2, 3))

    @staticmethod
    def _seen(images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] -> uint8, no side above LARGEST
        pixels, side = in_256(images), max(images.shape[-2:])
        return (scaled_as_pillow(pixels, LARGEST).round() if side > LARGEST else pixels).to(torch.uint8)
