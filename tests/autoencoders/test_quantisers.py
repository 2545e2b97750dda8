"""Codebooks of moving averages, codes that are revived, entropies, and the quantisers whose codes are a grid."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from commands import here, metrics
from conf_nodes import build
from ranks import command, on_ranks
from safetensors.torch import load_file
from tiny_training import TINY, config, make_data, same_when_killed, train_watched
from torch import Tensor

from ldm.autoencoders import usage
from ldm.autoencoders.fsq import FSQModel
from ldm.autoencoders.latents import Point
from ldm.autoencoders.lfq import LFQModel
from ldm.autoencoders.tally import Tally, drawn_places, sums_by_code
from ldm.autoencoders.vq import LEARNING, VQModel
from ldm.checkpoints.components import load_state
from ldm.checkpoints.folder import all_folders
from ldm.checkpoints.load import load_any
from ldm.errors import ConfigError
from ldm.training.run.fit import train_run


def tiny(option: str = "vq_tiny", **changes):
    torch.manual_seed(0)
    return build("autoencoder", option, **changes)


def latents(n: int, seed: int, size: int = 4, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed))


def alone(values: Tensor) -> None:
    """What sums over the processes of one."""


# -- a codebook of moving averages


def test_moving_averages_are_the_papers() -> None:
    """Appendix A.1 of van den Oord et al. 2017 with Sonnet's smoothing, in float64, from one pixel a code."""
    model, decay = tiny(codebook_decay=0.9, codebook_size=12), 0.9
    assert not model.quantize.embedding.weight.requires_grad
    e = model.quantize.embedding.weight.double().clone()
    n, m = torch.ones(12, dtype=torch.float64), e.clone()
    for step in range(5):
        batches = [latents(2, seed=10 * step + i) for i in range(3)]
        for z in batches:
            model.regulariser(Point(z), 0.0)
        model.end_step(alone, 0, step)
        pixels = torch.cat(batches).movedim(1, -1).reshape(-1, 3).double()
        nearest = (pixels[:, None] - e).square().sum(-1).argmin(1)
        assert len(nearest.unique()) > 4
        for code in range(12):
            mine = pixels[nearest == code]
            n[code] = decay * n[code] + (1 - decay) * len(mine)
            m[code] = decay * m[code] + (1 - decay) * mine.sum(0)
        e = m / ((n + 1e-5) / (n.sum() + 12e-5) * n.sum())[:, None]
        torch.testing.assert_close(model.quantize.embedding.weight.double(), e, atol=1e-6, rtol=1e-6)
    assert model.quantize.cluster_size.double().allclose(n, atol=1e-6)


def test_the_loss_of_moving_averages_is_commitment_alone() -> None:
    model, z = tiny(codebook_decay=0.99, commitment=0.5, codebook_weight=2.0), latents(2, 0).requires_grad_()
    term, watched = model.regulariser(Point(z), kl_weight=1e9)
    codes = model.quantize(model.quantize.nearest(z))
    torch.testing.assert_close(term, 2.0 * 0.5 * (codes - z).square().mean((1, 2, 3)))
    assert tuple(watched) == model.regulariser_names and all(v.shape == (2,) for v in watched.values())


@pytest.mark.parametrize("options", [{"codebook_decay": 0.9}, {"revive_after": 1}])
def test_nothing_is_counted_where_nothing_is_learnt(options) -> None:
    model = tiny(**options)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval().regulariser(Point(latents(2, 0)), 0.0)
    with torch.no_grad():
        model.train().regulariser(Point(latents(2, 0)), 0.0)
    model.end_step(alone, 0, 0)
    model.regulariser(Point(latents(2, 0).fill_(torch.nan)), 0.0)  # a step that is left out
    model.end_step(alone, 0, 1)
    assert all(torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())
    model.regulariser(Point(latents(2, 0)), 0.0)
    model.end_step(alone, 0, 2)
    assert any(not torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items())


BOTH = [{"codebook_decay": 0.9, "revive_after": 2}, {"revive_after": 2}]


@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize("cut", [(range(4), range(4, 8)), (range(4, 8), range(4)), (range(2), range(2, 8))])
def test_a_step_is_the_same_however_it_is_cut(options, cut) -> None:
    """Micro-batches are the batch, in any order: moving averages, counters, and which pixels revive which codes."""
    whole, parts = tiny(**options), tiny(**options)
    for step in range(4):
        z = latents(8, seed=step)
        for model, places in ((whole, [range(8)]), (parts, cut)):
            for place in places:
                model.begin_batch(place, 8)
                model.regulariser(Point(z[place.start : place.stop]), 0.0)
            model.end_step(alone, 7, step)
    for name, value in whole.quantize.state_dict().items():
        torch.testing.assert_close(parts.quantize.state_dict()[name], value, atol=1e-6, rtol=1e-6)


def test_sums_by_code_and_places() -> None:
    values, codes = torch.arange(12.0).view(6, 2), torch.tensor([3, 0, 3, 3, 0, 1])
    assert sums_by_code(values, codes, 5).tolist() == [[10, 12], [10, 11], [0, 0], [10, 13], [0, 0]]
    places = drawn_places(64, 64, seed=3)
    assert sorted(places.tolist()) == list(range(64)), "one in each stratum"
    assert torch.equal(places, drawn_places(64, 64, seed=3)) and not torch.equal(places, drawn_places(64, 64, seed=4))
    assert len(drawn_places(64, 1000, 0).unique()) == 64 and drawn_places(64, 5, 0).max() == 4
    assert Tally().close(4, alone, True, 0) is None


# -- revival


@pytest.mark.parametrize("options", BOTH)
def test_a_code_is_revived_when_it_was_unused_for_so_long_and_onto_a_pixel(options) -> None:
    model = tiny(codebook_size=32, **options)
    weight = model.quantize.embedding.weight
    with torch.no_grad():
        weight[2:] += 1000.0  # far from all
        if model.quantize.decay is not None:
            model.quantize.cluster_sum.copy_(weight)
    before = weight.detach().clone()
    for step in range(2):
        z = latents(4, seed=step)
        pixels = z.movedim(1, -1).reshape(-1, 3)
        assert (weight[2:] > 500).all(), "not before"
        model.regulariser(Point(z), 0.0)
        model.end_step(alone, 0, step)
    assert all((pixels == code).all(1).any() for code in weight[2:]), "pixels, bit for bit"
    assert len(weight[2:].unique(dim=0)) == 30, "of their own each"
    if model.quantize.decay is None:
        assert torch.equal(weight[:2], before[:2]), "those in use stay with the optimizer"
    else:
        assert model.quantize.cluster_size[2:].eq(1).all() and torch.equal(model.quantize.cluster_sum[2:], weight[2:])
    assert model.quantize.unused.eq(0).all()


@pytest.mark.parametrize("decay", [None, 0.9])
def test_revival_raises_use_where_codes_die(decay) -> None:
    """Pixels in one corner that most of the codebook is far from."""

    def trained(revive_after: int | None) -> float:
        model = tiny(codebook_size=64, codebook_decay=decay, revive_after=revive_after)
        optimizer = torch.optim.Adam([p for p in model.quantize.parameters() if p.requires_grad] or [torch.zeros(1)])
        for step in range(30):
            term, watched = model.regulariser(Point(5 + latents(8, seed=step)), 0.0)
            if decay is None:
                optimizer.zero_grad()
                term.mean().backward()
                optimizer.step()
            model.end_step(alone, 0, step)
        return float(watched["use"][0])

    before, after = trained(None), trained(3)
    assert before < 0.2 and after > 0.6, (before, after)


# -- what they are saved as


def test_a_state_of_any_way_of_learning_fits_any_other(tmp_path) -> None:
    plain, moving = tiny(), tiny(codebook_decay=0.9, revive_after=3)
    assert set(moving.state_dict()) - set(plain.state_dict()) == set(LEARNING)
    moving.regulariser(Point(latents(2, 0)), 0.0)
    moving.end_step(alone, 0, 0)
    load_state(plain, moving.state_dict(), "vae", tmp_path)
    assert torch.equal(plain.quantize.embedding.weight, moving.quantize.embedding.weight)
    fresh = tiny(codebook_decay=0.9, revive_after=3)
    load_state(fresh, plain.state_dict(), "vae", tmp_path)
    assert torch.equal(fresh.quantize.cluster_sum, plain.quantize.embedding.weight)
    assert fresh.quantize.cluster_size.eq(1).all() and fresh.quantize.unused.eq(0).all()
    load_state(fresh, moving.state_dict(), "vae", tmp_path)
    states = zip(fresh.state_dict().items(), moving.state_dict().values(), strict=True)
    assert all(torch.equal(v.nan_to_num(), other.nan_to_num()) for (_, v), other in states)
    with pytest.raises(ConfigError, match="4 tensors missing"):
        load_state(fresh, {k: v for k, v in plain.state_dict().items() if "embedding" not in k}, "vae", tmp_path)


# -- entropies


def test_entropies_of_tiny_cases_by_hand() -> None:
    """q(1) = sigmoid(4 z / T): with z = log(3) / 4 three quarters, and two such pixels apart are even in the mean."""
    z = torch.tensor([math.log(3) / 4, -math.log(3) / 4]).view(1, 1, 1, 2)
    h = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    pixel, batch = usage.entropy_of_signs(z, 1.0)
    assert pixel.tolist() == pytest.approx([h]) and batch.item() == pytest.approx(math.log(2))
    two = z.expand(1, 2, 1, 2)  # its channels agree: in the mean q(+,+) = q(-,-) = (9/16 + 1/16) / 2
    pixel, batch = usage.entropy_of_signs(two, 1.0)
    even, odd = 10 / 32, 6 / 32
    assert pixel.item() == pytest.approx(2 * h)
    assert batch.item() == pytest.approx(-2 * (even * math.log(even) + odd * math.log(odd)), rel=1e-6)
    certain = torch.tensor([[1.0, 1.0], [-1.0, 1.0]]).view(2, 2, 1, 1) * 1000
    pixel, batch = usage.entropy_of_signs(certain.requires_grad_(), 1.0)
    assert pixel.tolist() == [0, 0] and batch.item() == pytest.approx(math.log(2)), "two codes of four"
    (pixel.sum() - batch).backward()
    assert certain.grad.isfinite().all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_the_entropy_of_signs_is_that_of_all_codes(temperature, monkeypatch) -> None:
    z = (0.5 * latents(2, 0, channels=5)).requires_grad_()
    codes = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=5)))
    found, gradients = [], []
    for pixel, batch in (usage.entropy_of_signs(z, temperature), usage.entropy_of_nearest(z, codes, temperature)):
        found.append(torch.cat([pixel, batch[None]]))
        gradients += torch.autograd.grad(pixel.mean() - batch, z)
    torch.testing.assert_close(*found), torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(usage, "LARGEST_TABLE", 7 * 32)  # in slices
    pixel, batch = usage.entropy_of_nearest(z, codes, temperature)
    torch.testing.assert_close(torch.cat([pixel, batch[None]]), found[0])
    torch.testing.assert_close(torch.autograd.grad(pixel.mean() - batch, z)[0], gradients[0], atol=1e-6, rtol=1e-4)
    monkeypatch.setattr(usage, "MOST_CODES", 2**2)  # channels in groups: a bound from above
    assert usage.entropy_of_signs(z, temperature)[1] > batch


def test_entropy_in_a_codebooks_loss() -> None:
    model, z = tiny(entropy_weight=0.3, entropy_temperature=0.1), latents(2, 0)
    term, watched = model.regulariser(Point(z), 0.0)
    pixel, batch = usage.entropy_of_nearest(z, model.quantize.embedding.weight, 0.1)
    assert tuple(watched) == model.regulariser_names and "entropy" in watched
    torch.testing.assert_close(term, watched["quantisation"] + 0.3 * (pixel - batch))
    term.mean().backward()
    assert model.quantize.embedding.weight.grad.abs().sum(1).gt(0).all(), "each code is drawn somewhere"


# -- grids


LEVELS = [[8, 5, 5, 5], [2, 3, 4], [7], [2, 2]]


def fsq(levels) -> FSQModel:
    return tiny("fsq_tiny", levels=levels)


@pytest.mark.parametrize("levels", LEVELS)
def test_finite_scalars_reach_all_their_codes_and_no_others(levels) -> None:
    model, size = fsq(levels), math.prod(levels)
    z = model.bounded(torch.linspace(-8, 8, 20_001).view(-1, 1, 1, 1).expand(-1, len(levels), 1, 1))
    assert z.abs().max() < 1 and z.diff(dim=0).min() >= 0
    rounded = model.rounded(z)
    assert [len(rounded[:, i].unique()) for i in range(len(levels))] == levels
    every = torch.arange(size).view(1, 1, -1)
    codes = model.codes(every)
    assert len(codes[0, :, 0].T.unique(dim=0)) == size == model.size and codes.abs().max() <= 1
    assert torch.equal(model.indices(codes), every), "there and back"
    assert torch.equal(model.rounded(codes), codes), "a code is its own"
    assert torch.equal(model.codes(model.indices(z)), rounded)
    assert torch.equal(model.rounded(100 * z.sign()), model.codes(model.indices(100 * z.sign()))), (
        "whatever is diffused"
    )


def test_the_bound_is_the_papers_listing() -> None:
    """Mentzer et al. 2023, appendix A.1, by numbers: odd levels are symmetric, even ones shifted by a half."""
    model, z = fsq([8, 5]), torch.tensor([-0.7, 0.0, 0.4])
    found = model.bounded(z.view(3, 1, 1, 1).expand(3, 2, 1, 1))[..., 0, 0]
    for i, levels in enumerate([8, 5]):
        half = (levels - 1) * (1 - 1e-3) / 2
        offset = 0.5 if levels % 2 == 0 else 0.0
        expected = [math.tanh(v + math.tan(offset / half)) * half - offset for v in z.tolist()]
        assert found[:, i].tolist() == pytest.approx([v / (levels // 2) for v in expected], abs=1e-6)


def test_signs_and_their_numbers() -> None:
    model = tiny("lfq_tiny", latent_channels=6)
    every = torch.arange(64).view(1, 8, 8)
    codes = model.codes(every)
    assert torch.equal(model.indices(codes), every) and torch.equal(model.rounded(codes), codes)
    assert torch.equal(codes.abs(), torch.ones_like(codes)) and model.size == 64
    assert model.rounded(torch.zeros(1, 6, 1, 1)).eq(-1).all() and model.indices(torch.zeros(1, 6, 1, 1)).item() == 0
    z = latents(2, 0, channels=6).requires_grad_()
    term, watched = model.regulariser(Point(z), 1e9)
    expected = (z.abs() - 1).square().mean((1, 2, 3))
    torch.testing.assert_close(watched["commitment"], expected)
    torch.testing.assert_close(term, 0.25 * expected + 0.1 * watched["entropy"])
    assert watched["use"][0] == len(model.indices(z).unique()) / 64
    term.mean().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("option", ["fsq_tiny", "lfq_tiny"])
def test_decoding_is_straight_through(option) -> None:
    """Decoding z is decoding its codes, exactly, and its gradient is theirs; what is cached is what was encoded."""
    model = tiny(option)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    posterior = model.encode(images)
    assert torch.equal(model.posterior(posterior.moments()).mode(), posterior.mode())
    z = posterior.mode().detach().requires_grad_()
    codes = model.rounded(z).requires_grad_()
    assert not torch.equal(codes, z) and torch.equal(model.quantised(z), codes)
    weight = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    out, direct = model.decode(z), super(type(model).__mro__[1], model).decode(codes)
    assert torch.equal(out, direct)
    (out * weight).sum().backward(), (direct * weight).sum().backward()
    assert torch.equal(z.grad, codes.grad)
    term, watched = model.regulariser(posterior, 1.0)
    assert tuple(watched) == model.regulariser_names and term.shape == (2,)
    if option == "fsq_tiny":
        assert term.eq(0).all()


def test_codes_that_are_too_many_are_not_counted() -> None:
    assert LFQModel(latent_channels=18, block_channels=(32,)).regulariser_names[-1] == "use"
    model = LFQModel(latent_channels=19, block_channels=(32,))
    assert model.regulariser_names == ("commitment", "entropy")
    assert tuple(model.regulariser(Point(latents(1, 0, channels=19)), 0.0)[1]) == model.regulariser_names


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        (VQModel, {"codebook_size": 0}, "codebook_size=0 must be at least 2"),
        (VQModel, {"codebook_decay": 0.0}, "codebook_decay=0.0 .*codebook_decay=0.99"),
        (VQModel, {"codebook_decay": 1.0}, "codebook_decay=1.0 "),
        (VQModel, {"codebook_decay": math.nan}, "codebook_decay=nan "),
        (VQModel, {"revive_after": 0}, "revive_after=0 .*revive_after=100"),
        (VQModel, {"commitment": -1.0}, "commitment=-1.0 "),
        (VQModel, {"codebook_weight": math.inf}, "codebook_weight=inf "),
        (VQModel, {"entropy_weight": math.nan}, "entropy_weight=nan "),
        (VQModel, {"entropy_temperature": 0.0}, "entropy_temperature=0.0 "),
        (FSQModel, {"levels": []}, r"levels=\[\] "),
        (FSQModel, {"levels": [8, 1]}, r"levels=\[8, 1\] "),
        (FSQModel, {"levels": [8, 5], "latent_channels": 4}, r"latent_channels=4, but .* 2 channels"),
        (FSQModel, {"levels": [2**16] * 4}, "levels implies .* codes"),
        (LFQModel, {"latent_channels": 0}, "latent_channels=0 "),
        (LFQModel, {"latent_channels": 63}, "latent_channels implies"),
        (LFQModel, {"commitment": math.nan}, "commitment=nan "),
        (LFQModel, {"entropy_weight": -0.1}, "entropy_weight=-0.1 "),
        (LFQModel, {"entropy_temperature": math.inf}, "entropy_temperature=inf "),
    ],
)
def test_what_cannot_be_is_one_line(kind, options, said) -> None:
    with pytest.raises(ConfigError, match=f"autoencoder.{said}") as refused:
        kind(**options, block_channels=(32,))
    assert "\n" not in str(refused.value)


# -- through the trainer

STEPS = ["module=autoencoder", "autoencoder=vq_tiny", "batch_size=4", "optimizer.lr=2e-3", "lr_scheduler=constant"]
STEPS += ["callbacks.checkpoints.every_n_steps=3", "callbacks.validation.every_n_steps=3", "max_steps=6"]
MOVING = ["+autoencoder.codebook_decay=0.9", "+autoencoder.revive_after=2"]
WAYS = {"averages": MOVING, "gradient": MOVING[1:], "entropy": [*MOVING[1:], "+autoencoder.entropy_weight=0.1"]}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("data"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["averages", "gradient"])
def test_a_resumed_run_is_the_whole_one_bit_for_bit(tmp_path, monkeypatch, shards, way) -> None:
    def train(name, spy):
        return train_watched(
            config(*STEPS, "accumulate=2", f"shards={shards}", *WAYS[way]), tmp_path / name, monkeypatch, spy
        )

    ends = same_when_killed(train, tmp_path)
    held = load_file(ends[0] / "vae.safetensors")
    assert held["quantize.unused"].max() <= 1 and ("quantize.cluster_size" in held) == (way == "averages")
    assert load_any(ends[0]).autoencoder.quantize.unused.dtype == torch.int64


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_two_processes_are_one_that_accumulates_two(tmp_path, shards, way) -> None:
    typed = [*TINY, *STEPS, "max_steps=4", *WAYS[way], f"shards={shards}"]
    one = here(*typed, "accumulate=2", f"outputs={tmp_path}/one", "name=mine", cwd=tmp_path)
    assert one.returncode == 0, one.stderr[-2000:]
    more = ["trainer=ddp", "trainer.accelerator=cpu", f"outputs={tmp_path}/two", "name=mine"]
    two = on_ranks(command(*typed, *more, cwd=tmp_path))
    assert [r.code for r in two] == [0, 0], two[0].err[-2000:] + two[1].err[-2000:]
    first, second = metrics(tmp_path / "one/mine"), metrics(tmp_path / "two/mine")
    assert first.keys() == second.keys()
    for step, values in first.items():
        assert values == pytest.approx(second[step], rel=1e-5, abs=1e-6), step
    a, b = (load_file(all_folders(tmp_path / n / "mine")[-1] / "vae.safetensors") for n in ("one", "two"))
    assert not torch.equal(a["quantize.embedding.weight"], tiny().quantize.embedding.weight)
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-6, equal_nan=True, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("option", ["fsq_tiny", "lfq_tiny"])
def test_grids_are_trained_and_read_back(tmp_path, shards, option) -> None:
    done = train_run(config(*STEPS, f"autoencoder={option}", f"shards={shards}"), lambda digest: tmp_path / option)
    assert {"val/use", "val/perplexity", "val/psnr"} <= done.metrics.keys() and 0 < done.metrics["val/use"] <= 1
    again = load_any(done.path).autoencoder
    assert again.latents.measured
    z = latents(1, 0, channels=len(again.latents.mean))
    assert torch.equal(again.decode(z), again.decode(again.rounded(z)))
