"""Stable Diffusion's own sizes: diffusers' random weights load strictly and give equal outputs."""

import gc

import diffusers
import pytest
import torch
from conf_nodes import CONF, build
from omegaconf import OmegaConf

from ldm.diffusion.condition import Condition
from ldm.formats.keys.unet import compvis_names
from ldm.formats.single import sizes

UNETS = {
    "unet_sd15": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "unet_sd21": {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", UNETS)
@torch.no_grad()
def test_stable_diffusion_unet(name):
    """diffusers' attention_head_dim is the number of heads."""
    torch.manual_seed(0)
    theirs = diffusers.UNet2DConditionModel(**UNETS[name]).eval()
    with torch.device("meta"):
        ours = build("model", name).eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)  # strict, and without a second copy of 3.4 GB
    x, context = torch.randn(1, 4, 32, 32), torch.randn(1, 77, UNETS[name]["cross_attention_dim"])
    expected = theirs(x, 500.25, context).sample
    output = ours(x, torch.tensor([500.25]), Condition(context=context))
    assert expected.std() > 0.01
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    del ours, theirs
    gc.collect()


@pytest.mark.parametrize("name", UNETS)
def test_a_single_files_shapes_say_which_unet_it_is(name):
    """All 686 tensors get their CompVis name, and their shapes say what the YAML says."""
    with torch.device("meta"):
        ours = build("model", name).state_dict()
    names = compvis_names(ours)
    assert len(names) == 686
    found = sizes.unet({names[key]: tensor for key, tensor in ours.items()})
    written = OmegaConf.to_container(OmegaConf.load(CONF / "model" / f"{name}.yaml"))
    assert {key: found[key] for key in written if key in found} == {k: v for k, v in written.items() if k in found}
    assert found["cross_attention_dim"] == UNETS[name]["cross_attention_dim"]


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
