"""Adapters between diffusers and us: the same file on the same base draws the same picture, either way."""

import diffusers
import peft
import published as published_models
import pytest
import torch
from published import same

from ldm import Pipeline
from ldm.adapters.content import Embedding
from ldm.adapters.lora import LoRA
from ldm.formats.adapters import write_adapter

pytestmark = pytest.mark.slow
PROMPT, NEGATIVE, STEPS = "a red <new> cat on a chair", "an old photograph", 4


@pytest.fixture(params=["sd1", "sd2"])
def both(request):
    """(our pipeline, diffusers'), fresh ones."""
    folder = request.getfixturevalue(f"{request.param}_folder")
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    return Pipeline.load(folder), theirs


def ours_drawn(pipe, **options):
    return pipe.sample(PROMPT, NEGATIVE, num_steps=STEPS, **options)


def theirs_drawn(pipe, **options):
    return published_models.draw(pipe, PROMPT, STEPS, negative_prompt=NEGATIVE, **options)


def lora(pipe, seed, **options):
    """A LoRA's content with random tensors, of effect."""
    adapter = LoRA(rank=3, alpha=1.5, **options)
    adapter.attach(pipe.sampler.denoiser.model, pipe.sampler.text_encoder)
    adapter.detach()
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapter.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
    return adapter.content()


@pytest.mark.parametrize("format", ["kohya", "peft"])
def test_diffusers_draws_with_our_lora(both, tmp_path, format):
    ours, theirs = both
    before = ours_drawn(ours)
    options = {"layers": "all", "text_encoder": True}
    write_adapter(lora(ours, 1, **options), tmp_path / "l.safetensors", format)
    ours.load_adapter(tmp_path / "l.safetensors")
    theirs.load_lora_weights(tmp_path, weight_name="l.safetensors")
    drawn = ours_drawn(ours)
    same(drawn, theirs_drawn(theirs))
    assert (drawn - before).abs().max() > 0.05


def test_several_with_weights(both, tmp_path):
    ours, theirs = both
    for seed, name in ((1, "a"), (2, "b")):
        write_adapter(lora(ours, seed, layers="transformer"), tmp_path / f"{name}.safetensors", "peft")
    for name, weight in (("a", 0.7), ("b", -0.4)):
        ours.load_adapter(tmp_path / f"{name}.safetensors", weight)
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    theirs.set_adapters(["a", "b"], [0.7, -0.4])
    same(ours_drawn(ours), theirs_drawn(theirs))


def test_we_draw_with_their_lora(both, tmp_path):
    """Made by peft inside diffusers' models, saved by diffusers."""
    ours, theirs = both
    settings = {"r": 4, "lora_alpha": 6, "init_lora_weights": "gaussian"}
    theirs.unet.add_adapter(
        peft.LoraConfig(**settings, target_modules=["to_q", "to_v", "to_out.0", "conv1", "proj_in"])
    )
    theirs.text_encoder.add_adapter(peft.LoraConfig(**settings, target_modules=["q_proj", "out_proj", "fc1"]))
    generator = torch.Generator().manual_seed(3)
    for module in (theirs.unet, theirs.text_encoder):
        for name, parameter in module.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.25
    layers = {
        f"{part}_lora_layers": peft.get_peft_model_state_dict(module)
        for part, module in (("unet", theirs.unet), ("text_encoder", theirs.text_encoder))
    }
    metadata = {
        f"{part}_lora_adapter_metadata": module.peft_config["default"].to_dict()
        for part, module in (("unet", theirs.unet), ("text_encoder", theirs.text_encoder))
    }
    diffusers.StableDiffusionPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    ours.load_adapter(tmp_path / "pytorch_lora_weights.safetensors")
    same(ours_drawn(ours), theirs_drawn(theirs))


@pytest.mark.parametrize("format", ["diffusers", "a1111"])
@pytest.mark.parametrize("vectors", [1, 4])
def test_new_words(both, tmp_path, format, vectors):
    """In the prompt and in the negative one."""
    ours, theirs = both
    made = torch.randn(vectors, ours.sampler.text_encoder.context_dim, generator=torch.Generator().manual_seed(4))
    path = tmp_path / f"word.{'pt' if format == 'a1111' else 'safetensors'}"
    write_adapter(Embedding("<new>", made), path, format)
    before = ours_drawn(ours)
    ours.load_adapter(path)
    theirs.load_textual_inversion(path)
    drawn = ours_drawn(ours)
    same(drawn, theirs_drawn(theirs))
    assert not torch.allclose(drawn, before, atol=1e-3)
    swapped = ours.sample("a cat", PROMPT, num_steps=STEPS)
    same(swapped, published_models.draw(theirs, "a cat", STEPS, negative_prompt=PROMPT))
