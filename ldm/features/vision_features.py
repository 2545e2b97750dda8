"""Features of published vision transformers: DINOv2's class token, CLIP's two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, CLIPModel

from ldm.errors import ConfigError
from ldm.features.frozen import Frozen
from ldm.features.network import Captioned, PictureFeatures, digest_of, scaled_as_pillow
from ldm.features.vgg import MEAN, STD
from ldm.features.vision import read_config
from ldm.pictures import in_256

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
REMEDY = "Give a folder that save_pretrained wrote, or measure with metric=trained, which needs none."


class VisionFeatures(PictureFeatures):
    """A network of transformers; only its configuration is read before `start`.

    encoder: hub id or folder. size: pixels a side that it looks at. mean, std: of its pixels in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: str, size: int, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.encoder, self.size, self.resize = encoder, size, f"{size} pixels, antialiased bicubic"
        self.network = Frozen()
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, 255 * torch.tensor(values).view(3, 1, 1), persistent=False)

    @property
    def called(self) -> str:
        return self.encoder

    @cached_property
    def weights_digest(self) -> str:
        return digest_of(self.network.network)

    def seen(self, images: Tensor) -> Tensor:  # (B,3,H,W) in [-1, 1] -> (B,3,size,size), standardised
        return (scaled_as_pillow(in_256(images), self.size) - self.mean) / self.std


class DINOv2(VisionFeatures):
    """The class token of DINOv2 after its last normalisation (Oquab et al. 2024): FD-DINOv2 (Stein et al. 2023).

    encoder: facebook/dinov2-large is what FD-DINOv2 is published with.
    """

    name = "dinov2"

    def __init__(self, encoder: str = "facebook/dinov2-large", size: int = 224):
        super().__init__(encoder, size, MEAN, STD)
        self.width = read_config(encoder, "features.encoder", REMEDY).hidden_size

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.network.network is None:
            self.network.hold(AutoModel.from_pretrained(self.encoder, use_safetensors=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return self.network(pixel_values=self.seen(images)).last_hidden_state[:, 0]


class CLIP(VisionFeatures):
    """CLIP's embeddings of pictures and of captions, of length 1 (Radford et al. 2021): CMMD, CLIP score.

    encoder: with its tokenizer; CMMD is published with openai/clip-vit-large-patch14-336.
    """

    name = "clip"

    def __init__(self, encoder: str = "openai/clip-vit-large-patch14-336"):
        config = read_config(encoder, "features.encoder", REMEDY)
        if getattr(config, "model_type", "") != "clip":
            raise ConfigError(f"features.encoder={encoder} is a {config.model_type}, not a CLIP of pictures and texts.")
        super().__init__(encoder, config.vision_config.image_size, CLIP_MEAN, CLIP_STD)
        self.width = config.projection_dim
        self._tokenizer: Any = None

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.network.network is None:
            self.network.hold(CLIPModel.from_pretrained(self.encoder, use_safetensors=True))
            self._tokenizer = AutoTokenizer.from_pretrained(self.encoder)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        return _embedded(self.network.network.get_image_features(pixel_values=self.seen(images)))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:  # -> (B, width), of length 1; what is beyond 77 tokens is cut
        assert self._tokenizer is not None
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt")
        return _embedded(self.network.network.get_text_features(**tokens.to(self.mean.device)))


def _embedded(found: Any) -> Tensor:  # what transformers gives -> (B, width), of length 1
    vectors = found if isinstance(found, Tensor) else found.pooler_output
    return vectors / vectors.norm(dim=1, keepdim=True)
