"""What can be bought: GPUs by their maker's data sheets."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ldm.errors import ConfigError, nearest

TERA, GIGA = 1e12, 1e9
# What the best documented run of Stable Diffusion's own size reached: mosaicml/diffusion's SD 2 on 8 A100, latents made
# beforehand, 1100 images/s at 256 pixels and 290 at 512, which is 0.238 and 0.280 of the peak.
PUBLISHED_MFU = 0.25
MFU_SOURCE = "mosaicml/diffusion's README: 0.24 at 256 and 0.28 at 512 pixels on 8 A100"


@dataclass(frozen=True)
class Card:
    """A GPU. Rates are dense and per second; GB are 1e9 bytes.

    half: TFLOP/s of products in float16, and in bfloat16 where it has that, with sums in float32. single: in float32.
    bandwidth: GB of its own memory. link: GB one way to another GPU of its host, half of what sheets call NVLink's, or
    PCIe's 16 lanes. network: GB to other hosts for each GPU, of which the maker's own servers have so much; assumed.
    """

    memory: int  # GB
    half: float
    single: float
    bandwidth: float
    link: float
    network: float
    has_bfloat16: bool = True

    def peak(self, half: torch.dtype | None) -> float:
        """FLOP/s of products under autocast to `half`; None: in float32, without TF32."""
        return TERA * (self.single if half is None else self.half)


# NVIDIA's data sheets: T4 (2018), V100 SXM2 (2017), GA102 and Ada white papers, L40S, A100, H100 and H200 SXM.
CARDS = {
    "t4_16gb": Card(16, 65, 8.1, 320, 16, 3, has_bfloat16=False),
    "v100_16gb": Card(16, 125, 15.7, 900, 150, 6, has_bfloat16=False),
    "rtx3090_24gb": Card(24, 71, 35.6, 936, 32, 3),
    "rtx4090_24gb": Card(24, 165, 82.6, 1008, 32, 3),
    "l40s_48gb": Card(48, 362, 91.6, 864, 32, 25),
    "a100_40gb": Card(40, 312, 19.5, 1555, 300, 25),
    "a100_80gb": Card(80, 312, 19.5, 2039, 300, 25),
    "h100_80gb": Card(80, 989, 67, 3350, 450, 50),
    "h200_141gb": Card(141, 989, 67, 4800, 450, 50),
}
HERE = "here"  # this machine, whose kernels are timed


def card(name: str, half: torch.dtype | None) -> Card:
    """The card of a name; ConfigError for a name that is none, and for a type that the card does not compute in."""
    if name not in CARDS:
        raise ConfigError(f"gpu={name} is not known.{nearest(name, list(CARDS))} Choose {', '.join(CARDS)} or {HERE}.")
    found = CARDS[name]
    if half is torch.bfloat16 and not found.has_bfloat16:
        raise ConfigError(f"gpu={name} does not compute in bfloat16: use trainer.precision=16-mixed, or another gpu=.")
    return found
