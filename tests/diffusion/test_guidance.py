"""Guidance: published formulas on a toy network, for every parameterization, and what reduces to what."""

import pytest
import torch
from conf_nodes import build, options
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer, normalized_guidance
from draws import randn
from torch import nn

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.guidance import AdaptiveProjected, Autoguidance, ClassifierFree
from ldm.errors import ConfigError

PARAMETERIZATIONS = options("parameterization")
GUIDERS = [name for name in options("guider") if name != "own"]  # own: the checkpoint's, one of the others
COND, REFERENCE = Condition(context=randn(2, 5, 6)), Condition(context=randn(2, 5, 6, seed=1))


class Toy(nn.Module):
    """Not linear in anything, each sample for itself; counts its calls and keeps what it was last given."""

    def __init__(self, seed: int = 0, in_channels: int = 4):
        super().__init__()
        torch.manual_seed(seed)
        self.image = nn.Conv2d(in_channels, 4, 3, padding=1, dtype=torch.float64)
        self.text = nn.Linear(6, 4, dtype=torch.float64)
        self.calls, self.seen = 0, []

    @torch.no_grad()
    def forward(self, x, timestep, cond):
        self.calls += 1
        self.seen.append((x, cond))
        out = self.image(x) + 0.001 * timestep.view(-1, 1, 1, 1)
        if cond.context is not None:
            out = out * self.text(cond.context).mean(1).view(-1, 4, 1, 1).exp()
        return out.tanh()


def denoiser_of(parameterization="eps", seed=0, scheduler="scaled_linear", **toy):
    return Denoiser(Toy(seed, **toy), build("scheduler", scheduler), build("parameterization", parameterization))


@pytest.fixture(params=PARAMETERIZATIONS)
def denoiser(request):
    return denoiser_of(request.param)


@pytest.fixture
def level():
    return build("scheduler", "scaled_linear").level(0.5)


@pytest.fixture
def x_t():
    return randn(2, 4, 3, 5, seed=2)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("batched", [True, False])
def test_classifier_free_is_the_published_formula(denoiser, level, x_t, batched):
    positive, negative = denoiser.output(x_t, level, COND), denoiser.output(x_t, level, REFERENCE)
    expected = denoiser.x0(x_t, negative + 7.5 * (positive - negative), level)
    denoise = ClassifierFree(batched=batched)(denoiser, COND, REFERENCE, 7.5)
    denoiser.model.calls = 0
    close(denoise(x_t, level), expected)
    assert denoiser.model.calls == (1 if batched else 2)
    # x0 is affine in the output: guiding x0 is the same line.
    x0_positive, x0_negative = (denoiser.x0(x_t, out, level) for out in (positive, negative))
    close(denoise(x_t, level), x0_negative + 7.5 * (x0_positive - x0_negative))


@pytest.mark.parametrize("name", GUIDERS)
def test_where_nothing_is_guided_the_caption_is_asked_once(name, level, x_t):
    denoiser = denoiser_of()
    alone, ratio = denoiser(x_t, level, COND), level.ratio
    cases = [({}, 1.0), ({}, 0.5), ({"interval": [2 * ratio, 9 * ratio]}, 7.5), ({"interval": [0, ratio / 2]}, 7.5)]
    for options_, scale in cases:
        guider = build("guider", name, **options_)
        if isinstance(guider, Autoguidance):
            guider = guider.with_denoiser(denoiser_of(seed=1))
        denoiser.model.calls = 0
        assert torch.equal(guider(denoiser, COND, REFERENCE, scale)(x_t, level), alone)
        assert denoiser.model.calls == 1


@pytest.mark.parametrize("name", GUIDERS)
def test_inside_the_interval_it_is_as_without_one(name, level, x_t):
    denoiser, answers = denoiser_of(), []
    for interval in (None, [level.ratio, level.ratio], [level.ratio / 2, 2 * level.ratio]):
        guider = build("guider", name, interval=interval)
        if isinstance(guider, Autoguidance):
            guider = guider.with_denoiser(denoiser_of(seed=1))
        answers.append(guider(denoiser, COND, REFERENCE, 3.0)(x_t, level))
    assert torch.equal(answers[0], answers[1]) and torch.equal(answers[0], answers[2])
    assert not torch.allclose(answers[0], denoiser(x_t, level, COND), atol=1e-3)


def test_without_a_reference_only_autoguidance_guides(level, x_t):
    denoiser, weak = denoiser_of(), denoiser_of(seed=1)
    alone = denoiser(x_t, level, Condition())
    for name in ("classifier_free", "apg"):
        assert torch.equal(build("guider", name)(denoiser, Condition(), None, 7.5)(x_t, level), alone)
    guided = Autoguidance().with_denoiser(weak)(denoiser, Condition(), None, 2.0)
    close(guided(x_t, level), 2 * alone - weak(x_t, level, Condition()))


def test_rescale_restores_the_spread_of_the_caption_alone(denoiser, level, x_t):
    """Lin et al. 2024, equations 14 to 16, on the network's output; all other directions stay."""
    positive, negative = denoiser.output(x_t, level, COND), denoiser.output(x_t, level, REFERENCE)
    output = negative + 7.5 * (positive - negative)
    full = output * (positive.std(dim=(1, 2, 3)) / output.std(dim=(1, 2, 3))).view(-1, 1, 1, 1)
    for share in (1.0, 0.7):
        rescaled = ClassifierFree(rescale=share)(denoiser, COND, REFERENCE, 7.5)(x_t, level)
        close(rescaled, denoiser.x0(x_t, share * full + (1 - share) * output, level))
    close(full.std(dim=(1, 2, 3)), positive.std(dim=(1, 2, 3)))
    apg = AdaptiveProjected(rescale=1.0)(denoiser, COND, REFERENCE, 7.5)(x_t, level)
    close(apg.std(dim=(1, 2, 3)), denoiser(x_t, level, COND).std(dim=(1, 2, 3)))


@pytest.mark.parametrize("batched", [True, False])
def test_apg_without_its_three_ideas_is_classifier_free(denoiser, level, x_t, batched):
    plain = AdaptiveProjected(eta=1.0, momentum=0.0, norm_threshold=None, batched=batched)
    close(
        plain(denoiser, COND, REFERENCE, 7.5)(x_t, level),
        ClassifierFree()(denoiser, COND, REFERENCE, 7.5)(x_t, level),
    )


@pytest.mark.parametrize(("eta", "momentum", "threshold"), [(0.0, -0.5, 1.5), (0.3, -0.75, 0.5), (1.0, 0.9, 50.0)])
def test_apg_is_the_published_algorithm_over_a_run(denoiser, x_t, eta, momentum, threshold):
    """Momentum runs over the calls of one run and no further: a second run begins as the first did."""
    guider, scheduler = AdaptiveProjected(eta, momentum, threshold), denoiser.scheduler
    for _ in range(2):
        denoise, average = guider(denoiser, COND, REFERENCE, 7.5), MomentumBuffer(momentum)
        for t in (0.9, 0.5, 0.2):
            level = scheduler.level(t)
            x0 = [denoiser(x_t, level, c) for c in (COND, REFERENCE)]
            expected = normalized_guidance(*x0, 7.5 - 1, average, eta, threshold, use_original_formulation=True)
            close(denoise(x_t, level), expected)


def test_apg_moves_at_right_angles_and_no_further_than_allowed(denoiser, level, x_t):
    positive = denoiser(x_t, level, COND)
    for threshold in (0.01, 1e6):
        moved = AdaptiveProjected(0.0, 0.0, threshold)(denoiser, COND, REFERENCE, 3.0)(x_t, level) - positive
        close((moved * positive).sum(dim=(1, 2, 3)), torch.zeros(2, dtype=torch.float64))
        assert (moved.flatten(1).norm(dim=1) <= 2 * threshold).all() and (moved.abs().amax(dim=(1, 2, 3)) > 1e-4).all()


def test_apg_is_finite_where_both_conditions_agree(denoiser, level, x_t):
    guided = AdaptiveProjected()(denoiser, COND, COND, 7.5)
    close(guided(x_t, level), denoiser(x_t, level, COND))
    model = lambda x, timestep, cond: x * cond.context.sum().sign().clamp(min=0)  # noqa: E731  x0 = 0 under -1
    zero = Denoiser(model, denoiser.scheduler, build("parameterization", "x0"))
    minus, plus = Condition(context=-torch.ones(2, 5, 6)), Condition(context=torch.ones(2, 5, 6))
    assert AdaptiveProjected(batched=False)(zero, minus, plus, 7.5)(x_t, level).isfinite().all()


def test_autoguidance_is_the_published_formula(denoiser, level, x_t):
    """Karras et al. 2024, equation 3: w D1 + (1 - w) D0, also where the two predict different things."""
    for other in ("eps", "v"):
        weak = denoiser_of(other, seed=1)
        strong, bad = denoiser(x_t, level, COND), weak(x_t, level, COND)
        guided = Autoguidance().with_denoiser(weak)(denoiser, COND, REFERENCE, 2.5)
        close(guided(x_t, level), 2.5 * strong - 1.5 * bad)
    itself = Autoguidance().with_denoiser(denoiser)(denoiser, COND, REFERENCE, 2.5)
    close(itself(x_t, level), denoiser(x_t, level, COND))


def test_autoguidance_hears_the_caption_in_the_weak_models_own_words(level, x_t):
    denoiser, weak = denoiser_of(), denoiser_of(seed=1)
    guider = Autoguidance(checkpoint="somewhere")
    handed = guider.with_denoiser(weak, REFERENCE)
    assert guider.weak is None and handed.checkpoint == "somewhere"
    close(
        handed(denoiser, COND, None, 2.0)(x_t, level),
        2 * denoiser(x_t, level, COND) - weak(x_t, level, REFERENCE),
    )


@pytest.mark.parametrize("name", GUIDERS)
@pytest.mark.parametrize("batched", [True, False])
def test_concatenated_channels_stand_in_both_branches_unscaled(name, batched, x_t):
    denoiser = denoiser_of("edm", scheduler="edm", in_channels=9)  # x_t itself is divided there
    weak, level, concat = denoiser_of("edm", 1, "edm", in_channels=9), denoiser.scheduler.level(0.5), randn(2, 5, 3, 5)
    cond = Condition(context=COND.context, concat=concat)
    if name == "autoguidance":
        guider = Autoguidance().with_denoiser(weak, REFERENCE)
    else:
        guider = build("guider", name, batched=batched)
    guider(denoiser, cond, REFERENCE, 2.0)(x_t, level)
    seen = torch.cat([x for x, _ in denoiser.model.seen + weak.model.seen])
    contexts = torch.cat([c.context for _, c in denoiser.model.seen + weak.model.seen])
    assert torch.equal(seen[:, 4:], torch.cat([concat, concat]))
    close(seen[:, :4] * (1 + level.sigma**2) ** 0.5, torch.cat([x_t, x_t]))
    order = [COND, REFERENCE] if name == "autoguidance" else [REFERENCE, COND]
    assert torch.equal(contexts, torch.cat([c.context for c in order]))


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda: ClassifierFree(rescale=2.0), "0.7"),
        (lambda: ClassifierFree(interval=(5.0, 0.3)), r"\[0.3,5\]"),
        (lambda: AdaptiveProjected(momentum=-1.0), "-0.5"),
        (lambda: AdaptiveProjected(norm_threshold=0.0), "null"),
        (lambda: Autoguidance()(denoiser_of(), COND, None, 2.0), "guider.checkpoint=PATH"),
        (
            lambda: Autoguidance().with_denoiser(denoiser_of("v", scheduler="flow"))(denoiser_of(), COND, None, 2.0),
            "same scheduler=",
        ),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(act, words):
    with pytest.raises(ConfigError, match=words):
        act()
