"""Train, fine-tune, sample and study Stable-Diffusion-style latent diffusion models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ldm.checkpoints.merge import merge
    from ldm.pipeline import Pipeline as Pipeline

__all__ = ["Pipeline", "merge"]


def __getattr__(name: str) -> object:
    # Late, so that `python -m ldm.run --help` and wrong command lines answer without importing torch.
    if name == "Pipeline":
        from ldm.pipeline import Pipeline

        return Pipeline
    if name == "merge":
        from ldm.checkpoints.merge import merge

        return merge
    raise AttributeError(f"module 'ldm' has no attribute '{name}'")
