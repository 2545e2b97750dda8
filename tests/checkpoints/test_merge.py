"""Merging: sums, differences, LoRAs into models and out of them, by their formulas, in every layout."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from merge_models import NAMES, PARTS, lora, maps, model, nodes, saved, states
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm import merge
from ldm.adapters.content import Lora, LowRank
from ldm.adapters.merging import combined, extracted, weighted_sum, with_lora
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import Content, write
from ldm.checkpoints.save import save_any
from ldm.errors import ConfigError
from ldm.formats.adapters import read_adapter, write_adapter
from ldm.formats.files.open import load, page_out
from ldm.formats.files.store import save_tensors

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("merged")


@pytest.fixture(autouse=True)
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def layers_of(found: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {f"{part}.{name}": tensor for part in PARTS for name, tensor in found[part].items()}


def assert_states(found, expected, **tolerance) -> None:
    assert found.keys() == expected.keys()
    for part in found:
        assert found[part].keys() == expected[part].keys()
        for name, tensor in found[part].items():
            torch.testing.assert_close(tensor, expected[part][name], **tolerance, equal_nan=True)


EXACT = {"atol": 0, "rtol": 0}


# Sums and differences of models.


@pytest.mark.parametrize("format", NAMES)
def test_a_share_of_one_is_that_checkpoint_bit_for_bit(place, format):
    pair = [saved(place, 2, "ldm"), saved(place, 1, format)]
    ratios = [1, 0] if format == "ldm" else [0, 1]
    output = merge(pair, place / f"share-{NAMES[format]}", ratios=ratios)
    assert_states(states(output), states(saved(place, 2 if format == "ldm" else 1, "ldm")), **EXACT)


@pytest.mark.parametrize("first", NAMES)
def test_equal_shares_are_the_mean_whatever_the_layouts(place, first):
    """Three layouts in one merge, each of them the first one once: its layout is the output's."""
    order = [first, *(format for format in NAMES if format != first)]
    output = merge([saved(place, seed, format) for seed, format in enumerate(order, 1)], place / f"mean-{NAMES[first]}")
    assert output.is_file() == (first == "compvis") and (output / "model_index.json").is_file() == (
        first == "diffusers"
    )
    each = [states(saved(place, seed, "ldm")) for seed in (1, 2, 3)]
    expected = {p: {k: torch.stack([s[p][k] for s in each]).mean(0) for k in each[0][p]} for p in each[0]}
    expected["vae"] = each[0]["vae"]
    assert_states(states(output), expected, atol=1e-7, rtol=1e-6)


def test_ratios_weigh_and_need_not_sum_to_one(place):
    pair = [saved(place, seed, "ldm") for seed in (1, 2)]
    with pytest.warns(UserWarning, match=r"ratios=\[0.5, 0.75\] sum to 1.25, .* \[1-w,w\]"):
        output = merge(pair, place / "stretched", ratios=[0.5, 0.75])
    one, other, found = (layers_of(states(p)) for p in (*pair, output))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.5 * one[name] + 0.75 * other[name], atol=1e-6, rtol=1e-6)


def test_the_difference_of_a_model_with_itself_adds_nothing(place):
    first, second = (saved(place, seed, "ldm") for seed in (1, 2))
    output = merge([first, second, second], place / "same", method="add_difference", ratios=[0.7])
    assert_states(states(output), states(first), **EXACT)


def test_a_difference_is_added_in_its_ratio(place):
    paths = [saved(place, seed, format) for seed, format in ((1, "compvis"), (2, "diffusers"), (3, "ldm"))]
    a, b, c, found = (
        layers_of(states(p)) for p in (*paths, merge(paths, place / "added", "add_difference", ratios=[0.5]))
    )
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, a[name] + 0.5 * (b[name] - c[name]), atol=1e-6, rtol=1e-6)


def test_the_first_autoencoder_is_kept_and_a_different_one_named(place):
    other = model(2)
    with torch.no_grad():
        other.autoencoder.quant_conv.bias += 1
    save_any(other, place / "other_vae", "ldm")
    first = saved(place, 1, "ldm")
    with pytest.warns(UserWarning, match=r"autoencoders of .*1-ours and .*other_vae differ: the first one's is kept"):
        output = merge([first, place / "other_vae"], place / "kept_vae")
    assert_states({"vae": states(output)["vae"]}, {"vae": states(first)["vae"]}, **EXACT)


def test_autoencoders_alone_are_merged_but_for_their_units(place):
    pair, given = [], []
    for seed in (1, 2):
        alone = model(1)
        with torch.no_grad():
            alone.autoencoder.quant_conv.bias += seed
            alone.autoencoder.latents.scale.fill_(seed)
        given.append(alone.autoencoder.state_dict())
        pair.append(place / f"vae-{seed}")
        save_any(Components(alone.autoencoder, config=nodes()), pair[-1], "ldm")
    found = states(merge(pair, place / "vae-mean"))["vae"]
    torch.testing.assert_close(found["quant_conv.bias"], given[0]["quant_conv.bias"] + 0.5)
    assert torch.equal(found["latents.scale"], given[0]["latents.scale"])


def test_half_precision_is_read_and_written(place):
    half = place / "half.safetensors"
    save_any(model(1), half, "compvis", "float16")
    output = merge([half, saved(place, 2, "ldm")], place / "half_mean.safetensors", dtype="float16")
    assert {t.dtype for t in load_file(output).values()} == {torch.float16}
    one, other = (layers_of(states(p)) for p in (half, saved(place, 2, "ldm")))
    for name, tensor in layers_of(states(output)).items():
        assert torch.equal(tensor, ((one[name] + other[name]) / 2).half().float()), name
    folder = merge([half, half], place / "from_half", format="ldm")  # our folders hold float32
    assert_states(states(folder), states(half), **EXACT)


def test_averaged_weights_are_merged_unless_raw_ones_are_asked_for(place):
    run = place / "averaged"
    source = saved(place, 1, "ldm")
    raw, averaged = states(source), states(saved(place, 2, "ldm"))
    encoder = model(1).text_encoder
    text = (source / "config.yaml").read_text()
    write(run, Content(raw, {"unet": averaged["unet"]}, {"global_step": 0}, text, (), encoder.save_tokenizer), step=0)
    for weights, expected in (("ema", averaged), ("raw", raw)):
        output = merge([run, run], place / f"of-{weights}", weights=weights)
        assert_states({"unet": states(output)["unet"]}, {"unet": expected["unet"]}, **EXACT)


# LoRAs.


@pytest.mark.parametrize("format", NAMES)
def test_loras_are_merged_by_the_formula(place, format):
    updates = [lora(5, 3, alpha=2.0), lora(6, 2, every=2)]
    files = [place / f"{format}-{i}.safetensors" for i in range(2)]
    for update, file in zip(updates, files, strict=True):
        write_adapter(update, file, "peft")
    base = saved(place, 1, format)
    output = merge([base, *files], place / f"with-{NAMES[format]}", method="lora", ratios=[0.8, -0.5])
    before, after = states(base), states(output)
    changed = 0
    for name, weight in layers_of(before).items():
        expected, layer = weight.double(), name.removesuffix(".weight")
        for update, ratio in zip(updates, [0.8, -0.5], strict=True):
            if name.endswith(".weight") and layer in update.layers:
                u = update.layers[layer]
                product = u.up.flatten(1).double() @ u.down.flatten(1).double()
                expected = expected + ratio * u.alpha / u.rank * product.reshape(weight.shape)
                changed += 1
        torch.testing.assert_close(layers_of(after)[name], expected.float(), atol=1e-6, rtol=1e-6)
    assert changed == sum(len(u.layers) for u in updates)
    assert_states({"vae": after["vae"]}, {"vae": before["vae"]}, **EXACT)


def test_a_dora_sets_the_lengths_of_the_rows_and_stands_alone():
    weight, update = torch.randn(4, 6), lora(5, 2).layers["unet.time_embedding.linear_1"]
    down, up, lengths = torch.randn(2, 6), torch.randn(4, 2), torch.rand(4) + 0.5
    dora = Lora({"unet.x": LowRank(down, up, 2.0, lengths)})
    found = dict(with_lora({"x.weight": weight, "x.bias": up[:, 0]}, "unet", [dora], [1.0]))
    torch.testing.assert_close(found["x.weight"].norm(dim=1), lengths)
    directions = torch.nn.functional.normalize(weight + up @ down, dim=1)
    torch.testing.assert_close(found["x.weight"] / lengths[:, None], directions)
    assert found["x.bias"] is not None and update.magnitude is None
    with pytest.raises(ConfigError, match=r"unet\.x is changed by 2 LoRAs, one of which is a DoRA"):
        dict(with_lora({"x.weight": weight}, "unet", [dora, dora], [1.0, 1.0]))
    with pytest.raises(ConfigError, match=r"unet\.x is a DoRA, whose update hangs on the weight"):
        combined([dora, dora], [0.5, 0.5])


def test_a_sum_of_loras_is_the_sum_of_their_updates(place):
    given = [lora(5, 3, alpha=2.0), lora(6, 2, every=3), lora(7, 1)]
    files = [place / f"sum-{i}.safetensors" for i in range(3)]
    for update, file in zip(given, files, strict=True):
        write_adapter(update, file, "peft")
    ratios = [0.5, -1.0, 2.0]
    found = read_adapter(merge(files, place / "sum.safetensors", ratios=ratios))
    assert found.layers.keys() == maps().keys()
    for name, update in found.layers.items():
        shares = [r * g.layers[name].delta() for g, r in zip(given, ratios, strict=True) if name in g.layers]
        assert update.rank == 4 + 2 * (name in given[1].layers)
        torch.testing.assert_close(update.delta(), sum(shares), atol=1e-6, rtol=1e-5)
    with safe_open(place / "sum.safetensors", "pt") as file:
        assert '"ratios": [0.5, -1.0, 2.0]' in file.metadata()["ldm.merge"]


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_cut_sum_is_the_best_of_its_rank(rank):
    """Its distance is that of Eckart, Young and Mirsky: the singular values left out."""
    given = [lora(5, 3, alpha=2.0), lora(6, 2)]
    whole, cut = combined(given, [1.0, 0.5]), combined(given, [1.0, 0.5], rank)
    for name, update in cut.layers.items():
        delta = whole.layers[name].delta().flatten(1).double()
        left_out = torch.linalg.svdvals(delta)[rank:].square().sum().sqrt()
        distance = (delta - update.delta().flatten(1).double()).norm()
        assert update.rank == min(rank, *delta.shape)
        assert abs(distance - left_out) < 1e-5, name
    with pytest.raises(ConfigError, match="rank=6: the sum has rank 5 at most"):
        combined(given, [1.0, 0.5], 6)


def test_extraction_finds_the_low_rank_difference(place):
    """Base and base + LoRA: at the LoRA's rank the difference comes back, and merging it gives the tuned model."""
    given, base = lora(5, 3), saved(place, 1, "diffusers")
    write_adapter(given, place / "given.safetensors", "peft")
    tuned = merge([base, place / "given.safetensors"], place / "tuned", method="lora", format="ldm")
    found = read_adapter(merge([base, tuned], place / "extracted.safetensors", method="extract", rank=3))
    assert found.layers.keys() == given.layers.keys()
    for name, update in found.layers.items():
        assert update.rank == update.alpha == 3
        torch.testing.assert_close(update.delta(), given.layers[name].delta(), atol=1e-5, rtol=0)
        assert update.down.shape == given.layers[name].down.shape and update.up.shape == given.layers[name].up.shape
    again = merge([base, place / "extracted.safetensors"], place / "again", method="lora", format="ldm")
    assert_states(states(again), states(tuned), atol=1e-5, rtol=0)


def test_extraction_is_the_best_of_its_rank_and_says_what_it_leaves(place):
    pair = [saved(place, seed, "ldm") for seed in (1, 2)]
    with pytest.warns(
        UserWarning, match=r"\d+ tensors differ that no LoRA carries .*, \d+\.\d% of the difference"
    ) as w:
        output = merge(pair, place / "best.safetensors", method="extract", rank=7)
    base, tuned = (layers_of(states(p)) for p in pair)
    found = read_adapter(output).layers
    assert found.keys() == maps().keys()
    for name, update in found.items():
        change = (tuned[f"{name}.weight"] - base[f"{name}.weight"]).flatten(1).double()
        left_out = torch.linalg.svdvals(change)[7:].square().sum().sqrt()
        distance = (change - update.delta().flatten(1).double()).norm()
        assert abs(distance - left_out) < 1e-5 * change.norm(), name
    strays = {k for k in base if k.removesuffix(".weight") not in found and not torch.equal(base[k], tuned[k])}
    left = sum((tuned[k] - base[k]).double().square().sum() for k in strays)
    whole = sum((tuned[k] - base[k]).double().square().sum() for k in base)
    assert f"{len(strays)} tensors differ" in str(w[0].message) and f"{(left / whole).sqrt():.1%} of" in str(
        w[0].message
    )


def test_layers_without_difference_are_left_out():
    base = {"a.weight": torch.randn(4, 5), "b.weight": torch.randn(3, 3), "b.bias": torch.zeros(3)}
    tuned = base | {"a.weight": base["a.weight"] + 1, "b.bias": torch.ones(3)}
    found = dict(extracted(base, tuned, 2, {"a", "b"}))
    assert [name for name, d in found.items() if d.update is not None] == ["a.weight"]
    assert found["a.weight"].squared == pytest.approx(20) and found["a.weight"].carried == pytest.approx(20)
    assert (found["b.weight"].squared, found["b.bias"].squared) == (0, 3)


def test_diffusers_and_peft_read_the_loras_written_here(place, sd1_folder, tmp_path):
    """The base with our LoRA in diffusers gives what its U-Net and text encoder give with the merged weights."""
    import diffusers

    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder)
    for part in PARTS:
        generator = torch.Generator().manual_seed(1)
        for _, parameter in sorted(getattr(pipeline, part).named_parameters()):
            if parameter.ndim > 1:
                parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    pipeline.save_pretrained(tmp_path / "tuned")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = merge([sd1_folder, tmp_path / "tuned"], tmp_path / "l.safetensors", "extract", rank=4, format="peft")
        merged = merge([sd1_folder, file], tmp_path / "merged", "lora", ratios=[0.7], format="diffusers")
        theirs = diffusers.StableDiffusionPipeline.from_pretrained(sd1_folder)
        theirs.load_lora_weights(file, adapter_name="ours")
        theirs.set_adapters(["ours"], [0.7])
        ours = diffusers.StableDiffusionPipeline.from_pretrained(merged)
    x, ids = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(77)[None]
    with torch.no_grad():
        texts = [p.text_encoder(ids).last_hidden_state for p in (theirs, ours)]
        outs = [p.unet(x, 500, texts[1]).sample for p in (theirs, ours)]
        plain = pipeline.from_pretrained(sd1_folder).unet(x, 500, texts[1]).sample
    torch.testing.assert_close(texts[0], texts[1], atol=2e-5, rtol=0)
    torch.testing.assert_close(outs[0], outs[1], atol=5e-5, rtol=0)
    assert (plain - outs[1]).abs().max() > 0.1


# Files and memory.


def test_files_are_written_as_the_library_writes_them(tmp_path):
    joined = torch.randn(6, 4)
    kinds = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
    tensors = {f"{kind}-é": torch.ones(3, 2, dtype=getattr(torch, kind)) for kind in kinds}
    tensors |= {"b": torch.randn(3, 2), "a": torch.tensor(2.0), "none": torch.zeros(0, 3)}
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    save_tensors(tensors, tmp_path / "ours", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    views = {"top": joined[:3], "turned": joined.T, "all": joined}  # of one memory, and in another order
    save_tensors(views, tmp_path / "views", torch.bfloat16)
    found = load_file(tmp_path / "views")
    assert all(torch.equal(found[k], v.bfloat16()) for k, v in views.items())


def test_tensors_let_go_are_read_again(tmp_path):
    def in_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    values = torch.arange(4_000_000, dtype=torch.float32)
    save_file({"x": values}, tmp_path / "x.safetensors")
    torch.save({"x": values}, tmp_path / "x.ckpt")
    for name in ("x.safetensors", "x.ckpt"):
        mapped = load(tmp_path / name).tensors["x"]
        before = in_memory()
        assert torch.equal(mapped, values) and in_memory() > before + 12_000
        page_out(mapped)
        assert in_memory() < before + 4_000
        assert torch.equal(mapped, values)
    page_out(values)  # not mapped: nothing happens to it
    assert values[-1] == 3_999_999


def test_a_sum_takes_tensors_one_by_one():
    """No tensor of the second name is touched before the first one was taken."""
    touched = []

    class Spy(dict):
        def __getitem__(self, name):
            touched.append(name)
            return super().__getitem__(name)

    state = Spy(a=torch.ones(2), b=torch.ones(2))
    walk = weighted_sum([state, state], [0.5, 0.5])
    next(walk)
    assert set(touched) == {"a"}


def test_a_model_that_repaints_takes_what_another_learnt(place):
    """A has mask and masked latent among its inputs, B and C have not: those weights stay, all others move."""
    wide = place / "repaints"
    save_any(model(1, model={"in_channels": 9}), wide, "ldm")
    tuned, base = saved(place, 2, "ldm"), saved(place, 3, "ldm")
    found = states(merge([wide, tuned, base], place / "wide_tuned", "add_difference", [0.5]))["unet"]
    before, plus, minus = (states(path)["unet"] for path in (wide, tuned, base))
    first = before["conv_in.weight"]
    assert first.shape[1] == 9 and torch.equal(found["conv_in.weight"][:, 4:], first[:, 4:])
    expected = first[:, :4] + 0.5 * (plus["conv_in.weight"] - minus["conv_in.weight"])
    torch.testing.assert_close(found["conv_in.weight"][:, :4], expected)
    with pytest.raises(ConfigError, match=r"model.in_channels"):
        merge([wide, tuned], place / "no")
