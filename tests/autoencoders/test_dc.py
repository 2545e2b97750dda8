"""The deep compression autoencoder: diffusers' numbers, shortcuts that are reshuffles, and a training run."""

from __future__ import annotations

import json

import pytest
import torch
from commands import metrics
from conf_nodes import build
from tiny_training import Spy, config, make_data, same_when_killed, train_watched
from torch import Tensor

from ldm.autoencoders.dc import AutoencoderDC, Downsample, Upsample
from ldm.autoencoders.efficient_vit import FixedBatchNorm, LinearAttention
from ldm.autoencoders.latents import Point
from ldm.checkpoints.components import Components, build_components
from ldm.checkpoints.load import load_any
from ldm.checkpoints.pretrained import load_autoencoder, load_pretrained
from ldm.checkpoints.save import save_any
from ldm.errors import ConfigError
from ldm.formats.checkpoint import kind
from ldm.formats.kinds import of_names
from ldm.tasks.work.encode import encode_shards
from ldm.training.run.fit import train_run

SANA = dict(
    latent_channels=8,
    block_channels=(16, 16, 32, 64),
    encoder_layers=(1, 1, 1, 2),
    decoder_layers=(1, 1, 2, 1),
    attention_levels=(False, False, True, True),
    head_dim=8,
    kernel_sizes=(5,),
)
PAPER = dict(  # as the ImageNet weights: no finest level, one scale, BatchNorm with ReLU in the decoder's ResBlocks
    latent_channels=8,
    block_channels=(16, 32, 32, 64),
    encoder_layers=(0, 1, 1, 1),
    decoder_layers=(0, 2, 1, 1),
    attention_levels=(False, False, True, True),
    head_dim=8,
    kernel_sizes=None,
    downsample="pixel_unshuffle",
    upsample="pixel_shuffle",
    decoder_norm="batch",
)
CONVOLUTIONS = dict(
    latent_channels=4,
    block_channels=(16, 32, 32),
    encoder_layers=(1, 2, 1),
    decoder_layers=(2, 1, 1),
    attention_levels=(False, False, False),
)
TINY = dict(  # conf/autoencoder/dc_tiny.yaml
    latent_channels=8,
    block_channels=(8, 16, 16, 32),
    encoder_layers=(1, 1, 1, 1),
    decoder_layers=(1, 1, 1, 1),
    attention_levels=(False, False, False, True),
    head_dim=8,
    kernel_sizes=(3,),
    downsample="pixel_unshuffle",
    upsample="pixel_shuffle",
)
ARCHITECTURES = {
    "like_sana": SANA,
    "like_the_paper": PAPER,
    "convolutions_strided": CONVOLUTIONS,
    "convolutions_shuffled": CONVOLUTIONS | dict(downsample="pixel_unshuffle", upsample="pixel_shuffle"),
    "no_finest_level_strided_two_scales": SANA
    | dict(encoder_layers=(0, 1, 1, 1), decoder_layers=(0, 1, 1, 1), kernel_sizes=(3, 5), downsample="conv"),
}


def pictures(n: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1


def theirs(scaling: float = 0.41407, **ours) -> torch.nn.Module:
    """diffusers' autoencoder of our settings, every weight away from where it starts."""
    diffusers = pytest.importorskip("diffusers")
    flags, batch = ours["attention_levels"], ours.get("decoder_norm") == "batch"
    blocks = tuple("EfficientViTBlock" if flag else "ResBlock" for flag in flags)
    scales = tuple((ours.get("kernel_sizes") or ()) if flag else () for flag in flags)
    torch.manual_seed(0)
    model = diffusers.AutoencoderDC(
        latent_channels=ours["latent_channels"],
        attention_head_dim=ours.get("head_dim", 32),
        encoder_block_types=blocks,
        decoder_block_types=blocks,
        encoder_block_out_channels=ours["block_channels"],
        decoder_block_out_channels=ours["block_channels"],
        encoder_layers_per_block=ours["encoder_layers"],
        decoder_layers_per_block=ours["decoder_layers"],
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        downsample_block_type=ours.get("downsample", "conv"),
        upsample_block_type=ours.get("upsample", "interpolate"),
        decoder_norm_types=tuple("batch_norm" if batch and not flag else "rms_norm" for flag in flags),
        decoder_act_fns=tuple("relu" if batch and not flag else "silu" for flag in flags),
        scaling_factor=scaling,
    ).eval()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if "norm" in name and tensor.is_floating_point():
            tensor.data += 0.3 * torch.rand_like(tensor)
    return model


def assert_equal(ours: AutoencoderDC, reference: torch.nn.Module, atol: float = 1e-4) -> None:
    with torch.no_grad():
        z = reference.encode(pictures()).latent
        torch.testing.assert_close(ours.encode(pictures()).mode(), z, atol=atol, rtol=0)
        torch.testing.assert_close(ours.decode(z), reference.decode(z).sample, atol=atol, rtol=0)


# -- parity


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_diffusers(name: str, tmp_path) -> None:
    """By `pretrained` and as a checkpoint: the same numbers, in the published units; keys are theirs."""
    reference, ours = theirs(**ARCHITECTURES[name]), AutoencoderDC(**ARCHITECTURES[name])
    own = {k for k in ours.state_dict() if not k.startswith("latents.")}
    assert own == reference.state_dict().keys()
    reference.save_pretrained(tmp_path)
    load_autoencoder(ours, str(tmp_path))
    assert_equal(ours, reference)
    torch.testing.assert_close(ours.latents.scale, torch.full_like(ours.latents.scale, 1 / 0.41407))
    assert ours.latents.mean.count_nonzero() == 0
    assert kind(tmp_path) == "vae"
    again = load_any(tmp_path).autoencoder
    assert isinstance(again, AutoencoderDC)
    assert all(torch.equal(again.state_dict()[k], v) for k, v in ours.state_dict().items() if "preview" not in k)
    assert_equal(again, reference)


def test_a_configuration_names_its_weights(tmp_path) -> None:
    """`autoencoder=dc_tiny autoencoder.pretrained=FOLDER` are those weights, in channels_last as a run has them."""
    reference = theirs(1.0, **TINY)
    reference.save_pretrained(tmp_path)
    parts = build_components(config("autoencoder=dc_tiny", f"+autoencoder.pretrained={tmp_path}"), whole=False)
    load_pretrained(parts, filled=set())
    assert_equal(parts.autoencoder, reference)
    assert parts.autoencoder.latents.measured


def test_few_pixels_are_the_published_quadratic_formula() -> None:
    """Theirs attends by another formula where a map has at most head_dim pixels: the value is the same."""
    ours, reference = AutoencoderDC(**SANA | dict(head_dim=32)), theirs(**SANA | dict(head_dim=32))
    ours.load_state_dict(reference.state_dict(), strict=False)
    with torch.no_grad():
        small = pictures(height=16, width=16)  # 2x2 at the coarsest level
        torch.testing.assert_close(ours.encode(small).mode(), reference.encode(small).latent, atol=1e-4, rtol=0)


def test_the_default_is_the_published_size() -> None:
    with torch.device("meta"):
        default, named = AutoencoderDC(), build("autoencoder", "dc_f32")
        paper = AutoencoderDC(
            encoder_layers=(0, 4, 8, 2, 2, 2),
            decoder_layers=(0, 5, 10, 2, 2, 2),
            kernel_sizes=None,
            downsample="pixel_unshuffle",
            upsample="pixel_shuffle",
            decoder_norm="batch",
        )
    for model in (default, named):
        assert sum(p.numel() for p in model.parameters()) == 312_250_275
        assert model.factor == 32 and model.last_layer.shape == (3, 128, 3, 3)
    assert sum(p.numel() for p in paper.parameters()) == 323_356_460
    assert paper.factor == 32 and paper.last_layer.shape == (12, 256, 3, 3)


# -- what it is made of


@pytest.mark.parametrize("how", [("pixel_unshuffle", "pixel_shuffle"), ("conv", "interpolate")])
@pytest.mark.parametrize(("fine", "coarse"), [(8, 8), (8, 16), (8, 32), (16, 8)])
def test_shortcuts_undo_each_other(how, fine: int, coarse: int) -> None:
    """Without their convolutions, down after up is the identity; up after down is one where no channel is averaged."""
    down, up = Downsample(fine, coarse, how[0]), Upsample(coarse, fine, how[1])
    for parameter in (*down.parameters(), *up.parameters()):
        torch.nn.init.zeros_(parameter)
    x = torch.randn(2, coarse, 3, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(down(up(x)), x)
    if coarse == 4 * fine:
        y = torch.randn(2, fine, 6, 10, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(up(down(y)), y)


def attention() -> LinearAttention:
    torch.manual_seed(0)
    return LinearAttention(16, head_dim=8, kernel_sizes=(3,))


def test_linear_attention_is_attention() -> None:
    """A mean of values weighed by relu(q) . relu(k), over all pixels; 0 for a pixel that nothing answers."""
    q, k, v = torch.randn(3, 2, 4, 8, 20, generator=torch.Generator().manual_seed(0)).double()
    weights = torch.einsum("bgdl,bgdm->bglm", q.relu(), k.relu())
    assert (weights.sum(-1) == 0).any()
    expected = torch.einsum("bglm,bgdm->bgdl", (weights / weights.sum(-1, keepdim=True)).nan_to_num(), v)
    torch.testing.assert_close(attention().attend(q, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_linear_attention_is_float32_in_half_precision(dtype: torch.dtype) -> None:
    """Whether by autocast or by the weights' type: what half precision would round or overflow, it does not."""
    q, k, v = torch.randn(3, 1, 2, 8, 400, generator=torch.Generator().manual_seed(0)).to(dtype)
    q, k = 30 * q, 30 * k
    exact = attention().attend(q.double(), k.double(), v.double())
    for autocast in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found = attention().attend(q, k, v)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact, atol=1e-5, rtol=1e-5)


def test_bfloat16_stays_near_and_gives_float32_latents() -> None:
    torch.manual_seed(0)
    model = build("autoencoder", "dc_tiny")
    with torch.no_grad():
        exact = model.encode(pictures()).mode()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            mixed = model.encode(pictures())
        model = model.bfloat16()
        half = model.encode(pictures())
        assert model.decode(half.mode()).dtype == torch.bfloat16
    for posterior in (mixed, half):
        assert isinstance(posterior, Point) and posterior.mean.dtype == torch.float32
        torch.testing.assert_close(posterior.mean, exact, atol=0.1, rtol=0.05)


def test_batch_norm_keeps_the_published_statistics_while_it_is_trained() -> None:
    model = AutoencoderDC(**PAPER).train()
    z = torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(0))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    both = model.decode(z)
    both.square().mean().backward()
    torch.testing.assert_close(both[:1], model.decode(z[:1]), atol=1e-5, rtol=0)
    assert any(isinstance(m, FixedBatchNorm) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items() if "running" in k)


@pytest.mark.parametrize("name", ["like_sana", "like_the_paper"])
def test_autoencoder_learns(name: str) -> None:
    """Every parameter gets a finite gradient, and a few steps bring picture and reconstruction closer."""
    torch.manual_seed(0)
    model = AutoencoderDC(**ARCHITECTURES[name])
    images = pictures(4, 2, 2).repeat_interleave(8, -1).repeat_interleave(8, -2)  # noise has nothing to compress
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(20):
        posterior = model.encode(images)
        term, watched = model.regulariser(posterior, kl_weight=1e9)
        assert term.shape == (4,) and term.count_nonzero() == 0 and tuple(watched) == model.regulariser_names
        loss = (model.decode(posterior.sample(torch.randn_like(posterior.mean))) - images).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert losses[-1] < 0.5 * losses[0], losses


# -- what cannot be


def test_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ConfigError, match="24x40 or 32x40") as error:
        build("autoencoder", "dc_tiny").encode(torch.zeros(1, 3, 30, 40))
    assert "factor 8" in str(error.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(latent_channels=7), r"latent_channels=7 does not divide the coarsest level's 64 .* a divisor"),
        (dict(block_channels=(16, 16, 128, 128)), r"4 x 16 channels .* averaged to 128"),
        (dict(head_dim=12), r"head_dim=12 does not divide the 32 channels"),
        (dict(kernel_sizes=(4,)), r"kernel_sizes=\[4\].*odd sizes"),
        (dict(encoder_layers=(1, 1)), r"encoder_layers has 2 numbers for 4 levels"),
        (dict(decoder_layers=(1, 0, 1, 1)), r"decoder_layers=\[1, 0, 1, 1\].*only the finest"),
        (dict(attention_levels=(True,)), r"1 flags for 4 levels"),
    ],
)
def test_shapes_that_cannot_be_are_refused(changes, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AutoencoderDC(**SANA | changes)


def test_folders_of_others_are_refused_by_name(tmp_path) -> None:
    theirs(**PAPER).save_pretrained(tmp_path / "dc")
    dc = str(tmp_path / "dc")
    with pytest.raises(ConfigError, match=r"is an AutoencoderDC, not an AutoencoderKL: choose autoencoder=dc_f32"):
        load_autoencoder(build("autoencoder", "kl_tiny"), dc)
    with pytest.raises(ConfigError, match=r"decoder_norm=rms, but .* says batch: set autoencoder\.decoder_norm=batch"):
        load_autoencoder(AutoencoderDC(**PAPER | dict(decoder_norm="rms")), dc)
    with pytest.raises(ConfigError, match=r"head_dim=16, but .* says 8: set autoencoder\.head_dim=8"):
        load_autoencoder(AutoencoderDC(**PAPER | dict(head_dim=16)), dc)
    with pytest.raises(ConfigError, match="does not fit this configuration"):
        load_autoencoder(AutoencoderDC(**PAPER | dict(decoder_layers=(0, 1, 1, 1))), dc)
    weights = tmp_path / "dc/diffusion_pytorch_model.safetensors"
    with pytest.raises(ConfigError, match=r"deep compression autoencoder's weights alone: give diffusers' folder"):
        load_any(weights)
    assert of_names(["encoder.project_in.conv.weight", "decoder.stages.0.op_list.0.main.conv.weight"])[0] == "other"
    said = json.loads((tmp_path / "dc/config.json").read_text())
    for changes, key in (
        ({"decoder_in_shortcut": False}, "decoder_in_shortcut=False"),
        ({"decoder_block_types": "ResBlock"}, "decoder_block_types="),
        ({"decoder_act_fns": "silu"}, "decoder_norm_types, decoder_act_fns="),
        ({"upsample_block_type": "nearest"}, "upsample_block_type=nearest"),
        ({"encoder_layers_per_block": 2}, "encoder_layers_per_block=2"),
        ({"encoder_qkv_multiscales": [[], [], [3], [5]]}, "qkv_multiscales="),
    ):
        (tmp_path / "dc/config.json").write_text(json.dumps(said | changes))
        with pytest.raises(ConfigError, match=f"{key}.*which ldm's deep compression autoencoder does not have"):
            load_any(dc)


def test_other_layouts_cannot_carry_it(tmp_path) -> None:
    theirs(**SANA).save_pretrained(tmp_path / "dc")
    loaded = load_any(tmp_path / "dc")
    for format, name in (("diffusers", "out"), ("compvis", "out.safetensors")):
        with pytest.raises(ConfigError, match=rf"format={format} cannot carry autoencoder=.*AutoencoderDC.*format=ldm"):
            save_any(loaded, tmp_path / name, format)
    assert isinstance(loaded, Components)
    save_any(loaded, tmp_path / "ours", "ldm")
    again = load_any(tmp_path / "ours").autoencoder.state_dict()
    assert all(torch.equal(again[k], v) for k, v in loaded.autoencoder.state_dict().items() if "preview" not in k)


# -- through the trainer

STEPS = ["module=autoencoder", "autoencoder=dc_tiny", "batch_size=8", "optimizer.lr=5e-3", "lr_scheduler=constant"]
STEPS += ["callbacks.checkpoints.every_n_steps=3", "callbacks.validation.every_n_steps=3", "ema=none"]


def train(directory, shards, monkeypatch, spy, *overrides):
    return train_watched(config(*STEPS, f"shards={shards}", *overrides), directory, monkeypatch, spy)


@pytest.mark.slow
def test_a_run_learns_resumes_exactly_and_its_latents_are_diffused(tmp_path, monkeypatch) -> None:
    shards, _, _ = make_data(tmp_path)
    same_when_killed(lambda name, spy: train(tmp_path / name, shards, monkeypatch, spy, "max_steps=6"), tmp_path)

    sparse = ["callbacks.checkpoints.every_n_steps=1000", "callbacks.validation.every_n_steps=1000"]
    whole = train(tmp_path / "whole", shards, monkeypatch, Spy(), "max_steps=42", *sparse)  # goes on
    rows = metrics(whole.path).values()
    errors = [row["train/reconstruction"] for row in rows if "train/reconstruction" in row]
    assert sum(errors[-6:]) < 0.5 * sum(errors[:6])  # two epochs each
    assert "val/psnr" in whole.metrics and "val/kl" not in whole.metrics
    assert all(row["train/loss"] == row["train/reconstruction"] for row in rows if "train/loss" in row)

    # z is cached, C numbers a pixel, and diffusion trains on it; each channel has a scale of its own.
    written = encode_shards(config(f"shards={shards}", f"checkpoint={whole.path}"), tmp_path / "dc_latents")
    assert load_any(whole.path).autoencoder.latents.scale.unique().numel() == 8
    settings = config(
        *(f"shards={written.output}", "autoencoder=dc_tiny", "+model.in_channels=8", "+model.out_channels=8"),
        *("max_steps=2", "callbacks.validation.every_n_steps=2"),
    )
    assert train_run(settings, lambda digest: tmp_path / "diffusion").metrics["val/loss"] > 0
