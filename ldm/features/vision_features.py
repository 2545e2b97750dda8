"""Features of published vision transformers: DINOv2's class token, CLIP's two embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPModel

from ldm.errors import ConfigError
from ldm.features.frozen import Frozen
from ldm.features.network import Captioned, PictureFeatures, bytes_of, digest_of, scaled_as_pillow
from ldm.features.vgg import MEAN, STD

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class DINOv2(PictureFeatures):
    """The class token of DINOv2 after its last normalisation (Oquab et al. 2024): FD-DINOv2 (Stein et al. 2023).

    encoder: hub id or folder; facebook/dinov2-large is what FD-DINOv2 is published with.
    """

    name = "dinov2"
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: str = "facebook/dinov2-large", size: int = 224):
        super().__init__()
        self.encoder, self.size = encoder, size
        self.width = read_config(encoder).hidden_size
        self.resize = f"{size} pixels, antialiased bicubic"
        self.network = Frozen()
        self.register_buffer("mean", 255 * torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(STD).view(3, 1, 1), persistent=False)

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.network.network is None:
            self.network.hold(AutoModel.from_pretrained(self.encoder, use_safetensors=True))

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        scaled = (scaled_as_pillow(bytes_of(images), self.size) - self.mean) / self.std
        return self.network(pixel_values=scaled).last_hidden_state[:, 0]

    def card(self) -> dict[str, str]:
        return {"network": self.encoder, "network_weights": digest_of(self.network.network), "resize": self.resize}


class CLIP(PictureFeatures):
    """CLIP's embeddings of pictures and of captions, of length 1 (Radford et al. 2021): CMMD, CLIP score.

    encoder: hub id or folder with its tokenizer; CMMD is published with openai/clip-vit-large-patch14-336.
    """

    name = "clip"
    mean: Tensor
    std: Tensor

    def __init__(self, encoder: str = "openai/clip-vit-large-patch14-336"):
        super().__init__()
        config = read_config(encoder)
        if getattr(config, "model_type", "") != "clip":
            raise ConfigError(f"features.encoder={encoder} is a {config.model_type}, not a CLIP of pictures and texts.")
        self.encoder, self.width, self.size = encoder, config.projection_dim, config.vision_config.image_size
        self.resize = f"{self.size} pixels, antialiased bicubic"
        self.network = Frozen()
        self._tokenizer: Any = None
        self.register_buffer("mean", 255 * torch.tensor(CLIP_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(CLIP_STD).view(3, 1, 1), persistent=False)

    def start(self, captioned: Captioned, kept: Path | None = None) -> None:
        if self.network.network is None:
            self.network.hold(CLIPModel.from_pretrained(self.encoder, use_safetensors=True))
            self._tokenizer = AutoTokenizer.from_pretrained(self.encoder)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        scaled = (scaled_as_pillow(bytes_of(images), self.size) - self.mean) / self.std
        return self._embedded(self.network.network.get_image_features(pixel_values=scaled))

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> Tensor:  # -> (B, width), of length 1; what is beyond 77 tokens is cut
        assert self._tokenizer is not None
        tokens = self._tokenizer(list(captions), padding=True, truncation=True, return_tensors="pt").to(
            self.mean.device
        )
        return self._embedded(self.network.network.get_text_features(**tokens))

    @staticmethod
    def _embedded(found: Tensor) -> Tensor:
        vectors = found if isinstance(found, Tensor) else found.pooler_output
        return vectors / vectors.norm(dim=1, keepdim=True)

    def card(self) -> dict[str, str]:
        return {"network": self.encoder, "network_weights": digest_of(self.network.network), "resize": self.resize}


def read_config(encoder: str) -> Any:
    """Its configuration, which is all that is read before a run; ConfigError where there is none."""
    try:
        return AutoConfig.from_pretrained(encoder)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"features.encoder={encoder}: transformers finds no model there ({' '.join(str(error).split())[:150]}). "
            "Give a folder that save_pretrained wrote, or measure with metric=trained, which needs none."
        ) from error
