"""What a GPU would be asked, without one: steps on the meta device, which has no numbers and refuses other devices'.

A copy of a number to the host makes the host wait until the device has done all that it was given; a step has none, but
where the losses are read. Copies to the device are few, and none of them waits.
"""

import traceback
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conf_nodes import build, options
from tiny_training import config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ldm.sampling import Request, Sampler
from ldm.text.tokenizer import build_tokenizer
from ldm.training.callbacks.validation import validate
from ldm.training.latent_diffusion import LatentDiffusion
from ldm.training.module import TrainedModule
from ldm.training.run.build import build_module, build_parts
from ldm.training.run.class_images import ClassImages

pytestmark = pytest.mark.slow
READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}  # the host waits for their numbers
SIZE = 32


class Crossings(TorchDispatchMode):
    """Counts what goes from the meta device to the host and back, by the function of ours that asks for it."""

    def __init__(self):
        super().__init__()
        self.to_host, self.to_device = Counter(), Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        on_device = any(isinstance(t, torch.Tensor) and t.is_meta for t in tree_leaves((args, kwargs)))
        if on_device and name in READS:
            self.to_host[asker()] += 1
            return 1
        target = kwargs.get("device")
        if name == "_to_copy" and target is not None and (torch.device(target).type == "meta") != args[0].is_meta:
            counted = self.to_host if args[0].is_meta else self.to_device
            counted[asker()] += 1
            if args[0].is_meta:  # it has no numbers to give
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return function(*args, **kwargs)


def asker() -> str:
    """module.function of ours that is the last on the stack."""
    frames = [f for f in traceback.extract_stack() if "/ldm/" in f.filename and "/tests/" not in f.filename]
    if not frames:
        return "torch"
    last = next(f for f in reversed(frames) if not f.name.startswith("<"))
    return f"{last.filename.rpartition('/')[2].removesuffix('.py')}.{last.name}"


def on_device(monkeypatch, *overrides, of_class=False):
    """(module, batch) with all that a strategy would have moved on the meta device."""
    values = config("shards=x", *overrides)
    parts = build_parts(values, "meta")
    of_classes = None
    if of_class:
        channels, side = 2 * len(parts.autoencoder.latents.mean), SIZE // parts.autoencoder.factor
        of_classes = ClassImages(torch.zeros(3, channels, side, side), ["a dog"] * 3)
    module = build_module(values, parts, of_classes)
    if isinstance(module, LatentDiffusion):
        module.text_encoder._tokenizer = build_tokenizer(["a dog"], 530)
        for adapter in module.adapters.values():
            adapter.attach(module.model, module.text_encoder)
    module.to("meta").train()
    monkeypatch.setattr(TrainedModule, "global_step", 0)
    images = torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8, device="meta")
    batch = {"image": images, "caption": ["a dog", "b"], "key": ["0", "1"], "index": [0, 1]}
    return module, batch


MODELS = [f"model={m}" for m in options("model") if m.endswith("_tiny")]
AVERAGES = ["+autoencoder.codebook_decay=0.99", "+autoencoder.revive_after=2", "+autoencoder.entropy_weight=0.1"]
CASES = {
    **{model: [model] for model in MODELS},
    **{f"{m} {a}": [m, f"adapter=[{a}]"] for m in MODELS for a in ("lora", "hypernetwork")},
    "a word": ["adapter=[textual_inversion]"],
    "masking": ["masking=random", "+model.in_channels=9"],
    "several noises": ["noises_per_image=2"],
    "stratified and weighted": ["weighting=min_snr", "times=logit_normal"],
    "autoencoder": ["module=autoencoder"],
    "codebook": ["module=autoencoder", "autoencoder=vq_tiny"],
    "terms": [
        *("module=autoencoder", "loss=[perceptual,adversarial_residual,focal_frequency,wavelet]"),
        *("module.losses.perceptual.features=random", "module.losses.adversarial.start=0"),
    ],
    "perturbed": ["module=autoencoder", "perturbation=[equivariance,noise,channel_dropout]", "loss=[adversarial]"]
    + ["module.losses.adversarial.start=0", "module.losses.adversarial.lecam=1"],
    "codebook of averages": ["module=autoencoder", "autoencoder=vq_tiny", *AVERAGES],
    "codebook revived": ["module=autoencoder", "autoencoder=vq_tiny", AVERAGES[1]],
    "fsq": ["module=autoencoder", "autoencoder=fsq_tiny"],
    "lfq": ["module=autoencoder", "autoencoder=lfq_tiny"],
}


@pytest.mark.parametrize("case", [*CASES, "prior"])
def test_a_step_copies_no_number_to_the_host(monkeypatch, case):
    module, batch = on_device(monkeypatch, *CASES.get(case, []), of_class=case == "prior")
    with Crossings() as seen:
        module.training_step(batch, 0).backward()
        module.autoencoder.end_step(lambda values: None, 0, 0)
    assert not seen.to_host, seen.to_host
    assert seen.to_device.keys() == {"devices.on_device"} and seen.to_device.total() <= 6, seen.to_device
    with Crossings() as seen:
        module.totals.end_step()
        module.training_step(batch, 0)
        module.totals.reduce()
    assert seen.to_host == {"totals.reduce": 2}, "rows and values, once for all steps"


@pytest.mark.parametrize("case", ["model=unet_tiny", "masking", "autoencoder", "codebook", "terms", "lfq"])
def test_neither_does_a_validation(monkeypatch, case):
    module, batch = on_device(monkeypatch, *CASES[case])
    batch["valid"] = torch.ones(2, dtype=torch.bool, device="meta")
    trainer = SimpleNamespace(
        datamodule=SimpleNamespace(val_dataloader=lambda: [batch, batch]),
        strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
        precision_plugin=SimpleNamespace(val_step_context=nullcontext),
    )
    with Crossings() as seen:
        validate(trainer, module)
    assert seen.to_host == {"totals.reduce": 2}, "rows and values, once a validation"


SOLVERS = [name for name in options("sampler") if name != "own"]


@pytest.mark.parametrize("name", SOLVERS)
def test_neither_does_a_step_of_sampling(monkeypatch, name):
    module, _ = on_device(monkeypatch, "scheduler=scaled_linear")
    sampler = Sampler(module.denoiser, module.autoencoder, module.text_encoder)
    request = Request(["a dog", "b"], SIZE, SIZE, num_steps=4, solver=build("sampler", name), seeds=[0, 1])
    with Crossings() as seen:
        last = [step.x_next for step in sampler.steps(request)][-1]
    assert not seen.to_host, seen.to_host
    assert seen.to_device.keys() == {"devices.on_device"}
    assert seen.to_device.total() <= 3 + 2 * 4, "both captions, the first noise, two draws a step"
    with Crossings() as seen:
        sampler.decode(last)
    assert seen.to_host == {"sampling._pixels": 1}, "whether all is finite"
