"""Stable Diffusion's own sizes: diffusers' random weights load strictly and give equal outputs."""

import gc

import diffusers
import pytest
import torch
from conf_nodes import build

from ldm.diffusion.condition import Condition


@pytest.mark.slow
@torch.no_grad()
def test_stable_diffusion_15_unet():
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).eval()
    with torch.device("meta"):
        ours = build("model", "unet_sd15").eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict, and without a second copy of 3.4 GB
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, 768)
    expected = theirs(x, 500.25, context).sample
    output = ours(x, torch.tensor([500.25]), Condition(context=context))
    assert expected.std() > 0.01
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    del ours, theirs
    gc.collect()


@pytest.mark.slow
@torch.no_grad()
def test_stable_diffusion_autoencoder():
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
    ).eval()
    with torch.device("meta"):
        ours = build("autoencoder", "kl_f8").eval()
    missing, unknown = ours.load_state_dict(theirs.state_dict(), strict=False, assign=True)
    assert not unknown and all(name.startswith("latents.") for name in missing)  # the units of the latents are ours
    image = torch.rand(1, 3, 256, 256) * 2 - 1
    z = ours.encode(image).mode()
    assert z.shape == (1, 4, 32, 32)
    torch.testing.assert_close(z, theirs.encode(image).latent_dist.mode(), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours.decode(z), theirs.decode(z).sample, atol=1e-4, rtol=0)
