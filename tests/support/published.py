"""Pipelines as other programs publish them: Stable Diffusion's structure, small, of random weights, made on the spot.

Weights are a function of the seed, and large enough that prompts, seeds and schedulers move the pictures visibly.
The tokenizer is a real CLIP tokenizer of 768 tokens: it knows some English and reads any other text byte by byte.
"""

from __future__ import annotations

from pathlib import Path

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.text.tokenizer import build_tokenizer, save_tokenizer

CAPTIONS = [
    "a photo of a red cat on a green chair",
    "an oil painting of the small blue house by the sea, 1889",
    "café crème at the naïve señor's, très bien; grüße!",
    "<b>bold</b> &amp; (brackets:1.3) [more] 100% it's, they're",
    "a very very detailed photograph of the mountains in the morning light",
]
WIDTH = 32  # of the text states
SIZE = 64  # pixels a side of the pictures: latents of 8x8
TABLE = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", num_train_timesteps=1000)


def sd1(seed: int = 0) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 1: eight heads a level, 1x1 convolutions around the transformers, CLIP, eps."""
    return _pipeline(diffusers.StableDiffusionPipeline, seed, _unet(4, version=1), layers=2, version=1)


def sd1_inpaint(seed: int = 1) -> diffusers.StableDiffusionInpaintPipeline:
    """Stable Diffusion 1.5 for inpainting: the U-Net reads 9 channels, noisy latents, mask, masked image's latents."""
    return _pipeline(diffusers.StableDiffusionInpaintPipeline, seed, _unet(9, version=1), layers=2, version=1)


def sd2(v: bool = True, seed: int = 2) -> diffusers.StableDiffusionPipeline:
    """Stable Diffusion 2: heads of one width, linear projections, 23 layers of OpenCLIP, padding "!"; v or eps."""
    pipeline = _pipeline(diffusers.StableDiffusionPipeline, seed, _unet(4, version=2), layers=23, version=2)
    if v:
        pipeline.scheduler = diffusers.DDIMScheduler(
            **TABLE, prediction_type="v_prediction", steps_offset=1, set_alpha_to_one=False, clip_sample=False
        )
    return pipeline


def draw(pipeline: diffusers.DiffusionPipeline, prompt: str = "a red cat", steps: int = 10, **options) -> torch.Tensor:
    """(B, 3, 64, 64) in [0, 1]: what the pipeline draws from seed 0."""
    options = dict(height=SIZE, width=SIZE, generator=torch.Generator().manual_seed(0)) | options
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt, num_inference_steps=steps, output_type="pt", **options).images


def save(pipeline: diffusers.DiffusionPipeline, folder: Path) -> Path:
    """The pipeline's folder as on the hub: `save_pretrained`'s, and the tokenizer's vocab.json + merges.txt."""
    pipeline.save_pretrained(folder)
    save_tokenizer(pipeline.tokenizer, folder / "tokenizer")
    return folder


def tokenizer(version: int) -> CLIPTokenizer:
    """CLIP's tokenizer; version 2 pads with "!", id 0, as OpenCLIP's zeros do."""
    made = build_tokenizer(CAPTIONS, 768)
    made.model_max_length = 77
    if version == 2:
        made.pad_token = "!"
    return made


def randomise(module: torch.nn.Module, seed: int, gain: float = 1.0) -> None:
    """Every parameter random, norms too, so that no two tensors could be mistaken for each other; gain: of maps."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sorted(module.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "embedding.weight" in name:
            values = 0.5 * noise
        elif parameter.ndim > 1:
            values = gain * noise / parameter[0].numel() ** 0.5
        elif name.endswith("weight"):  # of norms
            values = 1 + 0.1 * noise
        else:
            values = 0.1 * noise
        parameter.data.copy_(values)


def _pipeline(kind: type, seed: int, unet: diffusers.UNet2DConditionModel, layers: int, version: int):
    parts = {"unet": unet, "vae": _vae(), "text_encoder": _text(layers, version)}
    for i, (name, module) in enumerate(parts.items()):
        randomise(module.eval(), 10 * seed + i, gain=1.5 if name == "unet" else 1.0)
    scheduler = diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    return kind(
        **parts,
        scheduler=scheduler,
        tokenizer=tokenizer(version),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _unet(in_channels: int, version: int) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=in_channels,
        block_out_channels=(32, 64, 64, 64),
        norm_num_groups=8,
        cross_attention_dim=WIDTH,
        attention_head_dim=8 if version == 1 else [4, 8, 8, 8],  # diffusers' name for the number of heads
        use_linear_projection=version == 2,
    )


def _vae() -> diffusers.AutoencoderKL:
    return diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[16, 16, 32, 32],
        layers_per_block=2,
        norm_num_groups=8,
        sample_size=SIZE,
        scaling_factor=0.18215,
    )


def _text(layers: int, version: int) -> CLIPTextModel:
    words = tokenizer(version)
    settings = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu" if version == 1 else "gelu",
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return CLIPTextModel(settings)


def same(ours, theirs, limit=1e-4):
    assert theirs.std() > 0.05  # a picture, so that the difference says something
    assert ((ours / 2 + 0.5).cpu() - theirs).abs().max() < limit
