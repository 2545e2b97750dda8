"""Terms of an autoencoder's loss: values computed by hand, gradients that go where they should, what cannot be."""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from commands import here
from conf_nodes import CONF, composed
from omegaconf import OmegaConf
from tiny_training import config
from torch import nn
from vision import small_dinov2

from ldm.build import build
from ldm.config.schema import options
from ldm.training.losses.adversarial import Adversarial
from ldm.training.losses.discriminators import PatchDiscriminator, ResidualDiscriminator
from ldm.training.losses.frequency import FocalFrequency, Wavelet, haar
from ldm.training.losses.reconstruction import HUBER, Reconstruction
from ldm.training.losses.term import Reconstructed
from ldm.training.run.build import build_module, build_parts


def made(images, output, step=0):
    return Reconstructed(images, output, images, torch.zeros(len(images), 1, 2, 2), step)


def pictures(n=3, size=32):
    return (torch.rand(2, n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1).unbind()


@pytest.mark.parametrize(
    ("error", "wanted"),
    [("squared", [0.0025, 0.25]), ("absolute", [0.05, 0.5]), ("both", [0.0525, 0.75]), ("huber", [0.0125, 0.45])],
)
def test_errors_of_pixels(error, wanted):
    images = torch.zeros(2, 3, 4, 4)
    output = images + torch.tensor([0.05, 0.5]).view(2, 1, 1, 1)
    assert Reconstruction(error)(made(images, output)).tolist() == pytest.approx(wanted)
    assert HUBER == 0.1


def test_spectra_of_a_wave_have_one_wrong_frequency():
    """A cosine of amplitude a is two lines of energy (a/2)^2 N each in an orthonormal spectrum of N pixels."""
    n, a = 16, 0.3
    wave = a * torch.cos(2 * math.pi * 3 * torch.arange(n) / n).expand(1, 3, n, n)
    value = FocalFrequency()(made(torch.zeros_like(wave), wave))
    torch.testing.assert_close(value, torch.tensor([2 * (a / 2) ** 2]))
    torch.testing.assert_close(
        FocalFrequency(alpha=0.0)(made(torch.zeros_like(wave), wave)), wave.square().mean()[None]
    )


def test_haar_keeps_energy_and_details_of_a_flat_picture_are_none():
    images, _ = pictures()
    means, details = haar(images)
    torch.testing.assert_close(means.square().sum() + details.square().sum(), images.square().sum())
    flat = made(torch.zeros(2, 3, 8, 8), torch.full((2, 3, 8, 8), 0.7))
    assert Wavelet()(flat).abs().max() < 1e-6
    columns = torch.tensor([1.0, -1.0]).repeat(4).expand(2, 3, 8, 8)
    torch.testing.assert_close(Wavelet(levels=1)(made(torch.zeros_like(columns), columns)), torch.full((2,), 2 / 3))


def test_a_patch_s_logit_sees_70_pixels_and_is_what_its_layers_say():
    torch.manual_seed(0)
    network = PatchDiscriminator(width=8, norm="none")
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    logits = network(images).view(14, 14)
    (slope,) = torch.autograd.grad(logits[7, 7], images)
    seen = slope.abs().sum((0, 1)) > 0
    assert seen.any(1).sum() == seen.any(0).sum() == 70
    for i, (stride, norm) in enumerate([(2, False), (2, True), (2, True), (1, True), (1, False)]):
        convolutions = [m for m in PatchDiscriminator(width=8).scales[0] if isinstance(m, nn.Conv2d)]
        assert convolutions[i].stride == (stride, stride) and (convolutions[i].bias is None) == norm
    torch.manual_seed(0)
    three = PatchDiscriminator(width=4, scales=3)
    whole = three(images.detach())
    halves = three.scales[1](F.avg_pool2d(images.detach(), 3, 2, 1, count_include_pad=False)).flatten(1)
    first = three.scales[0](images.detach()).flatten(1).shape[1]
    torch.testing.assert_close(whole[:, first : first + halves.shape[1]], halves)


class Given(nn.Module):
    """A discriminator whose logits are the mean of a picture's quarters, times its weight."""

    def __init__(self, weight=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images):
        return self.weight * F.avg_pool2d(images.mean(1), images.shape[-1] // 2).flatten(1)


def test_losses_of_both_sides_by_hand():
    images, output = torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), -0.2)
    hinge, saturating = Adversarial(Given(2.0)), Adversarial(Given(2.0), kind="non_saturating")
    of_pictures, of_outputs = 1.0, -0.4
    assert hinge(made(images, output)).item() == pytest.approx(-of_outputs)
    loss, seen = hinge.own(made(images, output))
    assert loss.item() == pytest.approx((max(0, 1 - of_pictures) + max(0, 1 + of_outputs)) / 2)
    assert seen["logit_pictures"].item() == pytest.approx(of_pictures)
    assert saturating(made(images, output)).item() == pytest.approx(math.log1p(math.exp(-of_outputs)))
    both = math.log1p(math.exp(-of_pictures)) + math.log1p(math.exp(of_outputs))
    assert saturating.own(made(images, output))[0].item() == pytest.approx(both / 2)
    penalised = Adversarial(Given(2.0), r1=10.0)
    # Each pixel and channel has the slope 2 / (3 x 4) / 4 of the mean of four logits; there are 48.
    slope = 48 * (2 / 12 / 4) ** 2
    assert penalised.own(made(images, output))[1]["r1"].item() == pytest.approx(slope)
    assert penalised.own(made(images, output))[0].item() == pytest.approx(0.3 + 16 * 10 / 2 * slope)
    assert "r1" not in penalised.own(made(images, output, step=3))[1]


def test_anchors_are_moving_averages_over_whole_steps():
    """Two micro-batches are one; logits are pulled to the other side's average where they beat it (Tseng et al.)."""
    images, output = pictures(4)
    whole, halves = (Adversarial(Given(2.0), lecam=0.5) for _ in range(2))
    whole.own(made(images, output))
    whole.end_step(lambda sums: None)
    for part in (slice(0, 1), slice(1, 4)):
        halves.own(made(images[part], output[part]))
    halves.end_step(lambda sums: None)
    means = torch.stack([2 * images.mean(), 2 * output.mean()])
    torch.testing.assert_close(whole.anchors, 0.01 * means)
    torch.testing.assert_close(halves.anchors, whole.anchors)
    whole.anchors.copy_(torch.tensor([0.4, -0.3]))
    constant = made(torch.full((1, 3, 4, 4), 0.5), torch.full((1, 3, 4, 4), -0.2))  # logits of 1.0 and -0.4
    loss, seen = whole.own(constant)
    assert seen["lecam"].item() == pytest.approx((1.0 + 0.3) ** 2 + (0.4 + 0.4) ** 2)
    assert loss.item() == pytest.approx(0.3 + 0.5 * seen["lecam"].item())
    assert set(whole.state_dict()) == {"discriminator.weight", "anchors"}


@pytest.mark.parametrize("discriminator", [PatchDiscriminator(8), ResidualDiscriminator(8, 3)])
def test_each_side_learns_from_its_own_loss_alone(discriminator):
    images, output = pictures()
    output.requires_grad_()
    term = Adversarial(discriminator)
    term(made(images, output)).mean().backward()
    assert output.grad.abs().sum() > 0 and all(p.grad is None for p in term.parameters())
    output.grad = None
    term.own(made(images, output))[0].mean().backward()
    assert output.grad is None and all(p.grad is not None for p in term.parameters())


TERMS = [name for name in options("loss") if "of module=autoencoder" in (CONF / f"loss/{name}.yaml").read_text()]


def test_every_term_says_of_what_it_is_one():
    assert {"adversarial", "focal_frequency", "latent_alignment", "perceptual", "wavelet"} <= set(TERMS)
    assert set(options("loss")) - set(TERMS) == {
        "representation_alignment",
        "perceptual_random",
        "adversarial_residual",
    }


@pytest.mark.parametrize("name", sorted({*TERMS, "perceptual_random", "adversarial_residual"} - {"perceptual"}))
def test_laws_of_every_term(name, tmp_path):
    """(B,) numbers, a gradient into what it looks at and nothing else; but for what looks at the batch, each picture's
    own; and 0 where nothing is wrong, if it is an error of pictures."""
    node = composed(f"loss=[{name}]", "module=autoencoder").module.losses
    node = OmegaConf.to_container(next(v for k, v in node.items() if k != "reconstruction"))
    if name == "latent_alignment":
        node["encoder"] = small_dinov2(tmp_path)
    torch.manual_seed(0)
    term = build(node, "loss")
    term.bind(type("A", (), {"latents": type("L", (), {"mean": torch.zeros(4)})}))
    term.start()
    images, output = pictures(4)
    z = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(2), requires_grad=True)
    output.requires_grad_()

    def value(rows):
        return term(Reconstructed(images[rows], output[rows], images[rows], z[rows], 0))

    values = value(slice(None))
    assert values.shape == (4,) and values.isfinite().all() and term.weight >= 0
    of_output, of_z = torch.autograd.grad(values.sum(), [output, z], allow_unused=True, retain_graph=True)
    reached = of_z if term.of_latents else of_output
    assert reached is not None and reached.isfinite().all() and reached.abs().sum() > 0
    assert (of_output is None) == term.of_latents
    if not term.adversary:
        back = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(value(back), values[back], rtol=1e-4, atol=1e-6)
    if term.likelihood:
        assert term(Reconstructed(images, images, images, z, 0)).abs().max() < 1e-6


def tiny(*overrides):
    values = config("module=autoencoder", "shards=nowhere", "loss=[adversarial]", *overrides)
    torch.manual_seed(0)
    module = build_module(values, build_parts(values))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return module, {"image": images, "caption": ["a"] * 2}


START = "module.losses.adversarial.start=0"


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    """Weighed with it, the term's gradient there is `weight` times as large as the reconstruction's."""
    module, batch = tiny(START, "kl_weight=0")
    last = module.autoencoder.last_layer
    images = batch["image"] / 127.5 - 1
    posterior = module.autoencoder.encode(images)
    z = posterior.sample(module.draws.normal(posterior.mean.shape[1:], "posterior", 0, range(2)))
    output = module.autoencoder.decode(z)
    rec = torch.autograd.grad((output - images).square().mean(), last, retain_graph=True)[0]
    adv = torch.autograd.grad(module.losses["adversarial"](made(images, output)).mean(), last)[0]
    module.training_step(batch, 0).backward()
    factor = rec.norm() / (adv.norm() + 1e-6)
    torch.testing.assert_close(last.grad, rec + 0.5 * factor * adv, atol=1e-6, rtol=1e-4)
    module.totals.end_step()
    module.totals.reduce()
    assert module.totals.means()["train/adversarial_weight"] == pytest.approx(factor.item(), rel=1e-4)


def test_before_its_start_a_term_gives_no_gradient_but_takes_part():
    module, batch = tiny("module.losses.adversarial.start=1")
    loss = module.training_step(batch, 0)
    loss.backward()
    alone, _ = tiny("module.losses.adversarial=null")
    alone.load_state_dict(module.state_dict(), strict=False)
    torch.testing.assert_close(loss, alone.training_step(batch, 0))
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.losses.parameters())
    module.on_before_optimizer_step(None)
    assert all(p.grad is None for p in module.losses.parameters())


def test_a_discriminator_has_its_own_options_and_is_not_averaged():
    module, _ = tiny(START, "module.losses.adversarial.lr=3e-3", "ema=decay")
    found = module.configure_optimizers()["optimizer"]
    groups = {id(p): g for g in found.param_groups for p in g["params"]}
    own = groups[id(next(module.losses.parameters()))]
    assert own["betas"] == (0.5, 0.9) and own["initial_lr"] == 3e-3 and own["weight_decay"] == 0
    assert groups[id(module.autoencoder.last_layer)]["initial_lr"] == 1e-4
    module.ema.start(module.averaged_parameters())
    assert module.ema.shadow and not any(name.startswith("losses.") for name in module.ema.shadow)
    muon, _ = tiny(START, "optimizer=muon")
    groups = muon.configure_optimizers()["optimizer"].param_groups
    of_discriminator = {id(p) for p in muon.losses.parameters()}
    assert not any(g["orthogonal"] for g in groups if of_discriminator & {id(p) for p in g["params"]})


def test_each_side_s_gradients_are_clipped_by_themselves():
    module, batch = tiny(START)
    module.training_step(batch, 0).backward()
    for parameter in module.losses.parameters():
        parameter.grad = parameter.grad * 1e4
    before = {k: p.grad.clone() for k, p in module.averaged_parameters().items()}
    module._trainer = type("T", (), {"precision_plugin": None})()
    norm = nn.utils.get_total_norm(before.values())
    module.configure_gradient_clipping(None, float(norm) * 2)
    assert all(torch.equal(p.grad, before[k]) for k, p in module.averaged_parameters().items())
    module.configure_gradient_clipping(None, float(norm) / 2)
    of_discriminator = nn.utils.get_total_norm([p.grad for p in module.losses.parameters()])
    assert of_discriminator.item() == pytest.approx(float(norm) / 2, rel=1e-4)


def test_a_learnt_variance_is_minus_the_log_likelihood():
    """At its best, s is the logarithm of the error, and the loss 1 + log of it."""
    module, batch = tiny(
        "module.losses.adversarial=null", "+module.losses.reconstruction.learnt_variance=true", "kl_weight=0"
    )
    module.training_step(batch, 0).backward()
    s = module.losses["reconstruction"].log_variance
    with torch.no_grad():
        error = module.training_step(batch, 0)
        assert s.grad.item() == pytest.approx(1 - error.item(), rel=1e-5)
        s.fill_(error.log())
        assert module.training_step(batch, 0).item() == pytest.approx(1 + error.log().item(), rel=1e-5)
    assert "losses.reconstruction.log_variance" in module.averaged_parameters()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["loss=[perceptual]"], r"features=timm/vgg16.*features=random"),
        (["loss=[adversarial]"], r"start=50000: the run ends after max_steps=1000"),
        (["loss=[wavelet]", "module.losses.wavelet.weight=-1"], r"wavelet\.weight=-1: a number, at least 0"),
        (["loss=[wavelet]", "module.losses.wavelet.weight=nan"], r"wavelet\.weight=nan: a number, at least 0"),
        (["loss=[wavelet]", "module.losses.wavelet.levels=0"], "levels=0: at least 1"),
        (["loss=[adversarial]", "module.losses.adversarial.discriminator.layers=0"], "layers=0"),
        (["loss=[adversarial]", "module.losses.adversarial.r1=-1"], "r1=-1"),
        (["loss=[representation_alignment]"], r"no term of module=autoencoder"),
        (["reconstruction=hubert"], "Did you mean 'huber'"),
        (["kl_weight=-1"], "kl_weight=-1"),
    ],
)
def test_what_cannot_be_is_one_line(typed, said, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if "representation" in typed[0]:
        typed = [*typed, f"module.losses.alignment.encoder={small_dinov2(tmp_path / 'e')}"]
    done = here("module=autoencoder", "autoencoder=kl_tiny", "shards=nowhere", *typed, cwd=tmp_path)
    assert done.returncode == 2 and re.search(said, done.stderr) and done.stderr.count("\n") == 1, done.stderr
