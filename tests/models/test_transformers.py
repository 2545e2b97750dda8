"""DiT and MMDiT are the published ones: same weights, same numbers; silent at first; masks and sizes as said."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from conf_nodes import CONF, build
from torch import Tensor, nn

from ldm.diffusion.condition import Condition
from ldm.diffusion.denoiser import Denoiser
from ldm.diffusion.exact import Gaussian
from ldm.diffusion.loss import predict
from ldm.errors import ConfigError
from ldm.models.dit import DiT
from ldm.models.mmdit import MMDiT, mean_of_tokens
from ldm.models.transformer import positions

NETWORKS = ["dit_tiny", "mmdit_tiny"]


def tiny(option: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    return build("model", option, **changes)


def awake(option: str, **changes) -> nn.Module:
    """Random weights everywhere, the zero-initialised ones included: a silent branch hides its errors."""
    model, generator = tiny(option, **changes), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def inputs(height: int = 8, width: int = 8, batch: int = 3) -> tuple[Tensor, Tensor, Condition]:
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(batch, 4, height, width, generator=generator)
    return x_t, torch.linspace(0.0, 998.7, batch), Condition(torch.randn(batch, 5, 64, generator=generator))


# -- parity


def test_dit_equals_diffusers() -> None:
    """Class-conditional; diffusers has a copy of the embeddings in every block, and spaces its waves otherwise."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.DiTTransformer2DModel(2, 12, 4, num_layers=3, sample_size=8, norm_eps=1e-6).eval()
    state = reference.state_dict()
    embeddings = {
        k.split("norm1.emb.")[1]: v for k, v in state.items() if k.startswith("transformer_blocks.0.norm1.emb")
    }
    for block in reference.transformer_blocks:  # tied, as in the published weights
        block.norm1.emb.load_state_dict(embeddings)
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    ours = DiT(width=24, depth=3, num_heads=2, cross_attention_dim=None, pooled_dim=24, sample_size=8)
    mapped = {k: v for k, v in state.items() if ".emb." not in k and "proj_out" not in k}
    mapped |= {f"norm_out.linear.{k}": state[f"proj_out_1.{k}"] for k in ("weight", "bias")}
    mapped |= {f"proj_out.{k}": state[f"proj_out_2.{k}"] for k in ("weight", "bias")}
    mapped |= {k.replace("timestep_embedder", "time_embedding"): v for k, v in embeddings.items() if "timestep" in k}
    mapped |= {"pooled_embedding.weight": torch.eye(24), "pooled_embedding.bias": torch.zeros(24)}
    ours.load_state_dict(mapped, strict=True)
    x_t, timestep, classes = *inputs()[:2], torch.tensor([0, 7, 1000])
    pooled = embeddings["class_embedder.embedding_table.weight"][classes]
    with torch.no_grad():
        expected = reference(x_t, timestep, classes).sample
        torch.testing.assert_close(ours(x_t, timestep, Condition(pooled=pooled)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_mmdit_equals_diffusers(qk_norm: bool) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=24,
        pooled_projection_dim=10,
        pos_embed_max_size=4,
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()
    ours = MMDiT(width=24, depth=3, num_heads=2, cross_attention_dim=64, pooled_dim=10, sample_size=8, qk_norm=qk_norm)
    mapped = {}
    for key, value in reference.state_dict().items():
        key = key.replace("time_text_embed.timestep_embedder", "time_embedding")
        key = key.replace("time_text_embed.text_embedder", "pooled_embedding")
        if key.startswith(("norm_out.linear", "transformer_blocks.2.norm1_context.linear")):
            value = torch.cat(value.chunk(2)[::-1])  # diffusers puts the scale first there
        mapped[key] = value
    del mapped["pos_embed.pos_embed"]
    ours.load_state_dict(mapped, strict=True)
    x_t, timestep, cond = inputs()
    pooled = torch.randn(3, 10, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = reference(x_t, cond.context, pooled, timestep).sample
        out = ours(x_t, timestep, Condition(cond.context, pooled=pooled))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


def test_published_sizes() -> None:
    """DiT-XL/2 (Peebles and Xie 2023, table 4) and SD3-medium, to the parameter."""
    with torch.device("meta"):
        dit = DiT(cross_attention_dim=None, pooled_dim=1152)
        mmdit = MMDiT(in_channels=16, out_channels=16, cross_attention_dim=4096, pooled_dim=2048, qk_norm=False)
    ours = sum(p.numel() for p in dit.parameters())
    # Published: a table of 1,001 classes that needs no map, stored positions, and learnt variances in the output.
    assert ours - 1152 * 1153 + 1001 * 1152 + 256 * 1152 + 16 * 1153 == 675_129_632
    assert sum(p.numel() for p in mmdit.parameters()) == 2_028_328_000


@pytest.mark.parametrize("file", sorted((CONF / "model").glob("*dit_*.yaml")), ids=lambda f: f.stem)
def test_parameter_counts_in_the_yaml_comments(file) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in build("model", file.stem).parameters())
    assert f" {count:,} parameters" in file.read_text().splitlines()[0]


# -- silence, masks, batches, sizes


@pytest.mark.parametrize("option", NETWORKS)
def test_untrained_answers_zero_with_identity_blocks_yet_learns(option: str) -> None:
    model = tiny(option)
    x_t, timestep, cond = inputs()
    states: list[Tensor] = []
    handles = [
        module.register_forward_hook(lambda m, i, o: states.append(o[0] if isinstance(o, tuple) else o))
        for module in (model.pos_embed, *model.transformer_blocks)
    ]
    assert not model(x_t, timestep, cond).any()
    assert len(states) == 3 and all(torch.equal(a, b) for a, b in pairwise(states))
    for handle in handles:
        handle.remove()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(4):  # the last map wakes first, then the modulations, then what they gate
        optimizer.zero_grad()
        (model(x_t, timestep, cond) - x_t).square().mean().backward()
        optimizer.step()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Published MMDiT weights hold queries of the last block's text, whose answers nobody reads.
    assert [
        n
        for n in unreached
        if not n.startswith(("transformer_blocks.1.attn.add_q", "transformer_blocks.1.attn.norm_added_q"))
    ] == []


@pytest.mark.parametrize("option", NETWORKS)
def test_a_masked_token_is_an_absent_token_and_images_are_independent(option: str) -> None:
    model = awake(option)
    x_t, timestep, cond = inputs()
    assert cond.context is not None
    mask = torch.tensor([[True, True, True, False, False]] * 3)
    junk = torch.where(mask[..., None], cond.context, 1e3)
    with torch.no_grad():
        masked = model(x_t, timestep, Condition(junk, mask))
        short = model(x_t, timestep, Condition(cond.context[:, :3]))
        torch.testing.assert_close(masked, short, atol=1e-5, rtol=0)
        whole = model(x_t, timestep, cond)
        assert (whole - short).abs().max() > 1e-3, "the caption is heard"
        for i in range(3):
            alone = model(x_t[i : i + 1], timestep[i : i + 1], cond[i : i + 1])
            torch.testing.assert_close(alone, whole[i : i + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("option", NETWORKS)
def test_any_size_that_patches_tile(option: str) -> None:
    """Sizes never trained on run; and but for its positions a transformer moves its answer along with the patches."""
    model = awake(option)
    x_t, timestep, cond = inputs(6, 14)
    with torch.no_grad():
        assert model(x_t, timestep, cond).shape == x_t.shape
        with pytest.raises(ConfigError, match="7x14 do not divide into patches of 2"):
            model(x_t[:, :, :1].repeat(1, 1, 7, 1), timestep, cond)
        model.pos_embed.forward = lambda x: (
            nn.functional.conv2d(x, model.pos_embed.proj.weight, model.pos_embed.proj.bias, stride=2).flatten(2).mT
        )
        moved = torch.cat([x_t[..., 4:], x_t[..., :4]], dim=-1)
        out = model(x_t, timestep, cond)
        torch.testing.assert_close(
            model(moved, timestep, cond), torch.cat([out[..., 4:], out[..., :4]], -1), atol=1e-5, rtol=0
        )


def test_positions_scale_about_the_trained_size() -> None:
    """0, 1, ... at the trained size; at twice that, neighbours average to the old places; rows are not columns."""
    trained, finer = positions(4, 4, 16, trained=4), positions(8, 8, 16, trained=4)
    torch.testing.assert_close(trained[:4, 0], torch.arange(4.0).sin())  # the fastest wave along a row's columns
    torch.testing.assert_close(trained[::4, 8], torch.arange(4.0).sin())  # and along a column's rows
    place = torch.atan2(finer[:6, 0], finer[:6, 4])
    torch.testing.assert_close(place.view(3, 2).mean(1).sin(), trained[:3, 0], atol=1e-5, rtol=0)
    assert torch.pdist(positions(3, 5, 16, trained=4)).min() > 0.1


@pytest.mark.parametrize("option", NETWORKS)
def test_recomputing_changes_memory_and_nothing_else(option: str) -> None:
    def run(checkpoint: str) -> tuple[list[Tensor], int]:
        model, sizes = awake(option, checkpoint=checkpoint), {}

        def pack(t: Tensor) -> Tensor:
            sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        x_t, timestep, cond = inputs()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(x_t, timestep, cond).square().mean()
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters())], sum(sizes.values())

    (plain, kept_plain), (recomputed, kept) = run("none"), run("blocks")
    assert kept < kept_plain
    torch.testing.assert_close(recomputed, plain, atol=0, rtol=0)


@pytest.mark.parametrize("option", NETWORKS)
def test_bfloat16_is_near_float32(option: str) -> None:
    model = awake(option)
    x_t, timestep, cond = inputs()
    with torch.no_grad():
        exact = model(x_t, timestep, cond)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = model(x_t, timestep, cond)
        cast = model.bfloat16()(x_t, timestep, cond)
    for out in (rough, cast):
        assert (out.float() - exact).norm() < 0.03 * exact.norm()


# -- pooled vectors


def test_pooled_vectors_are_heard_and_their_width_is_checked() -> None:
    x_t, timestep, cond = inputs()
    generator = torch.Generator().manual_seed(4)
    for option in NETWORKS:
        model, pooled = awake(option, pooled_dim=10), torch.randn(3, 10, generator=generator)
        with torch.no_grad():
            one, other = (model(x_t, timestep, Condition(cond.context, pooled=p)) for p in (pooled, -pooled))
        assert (one - other).abs().max() > 1e-3
        with pytest.raises(ConfigError, match=r"pooled vectors of width 10 and was given None"):
            model(x_t, timestep, cond)
        with pytest.raises(ConfigError, match=r"model\.pooled_dim=7"):
            model(x_t, timestep, Condition(cond.context, pooled=pooled[:, :7]))


def test_the_mean_of_tokens_is_over_those_that_count() -> None:
    cond = inputs()[2]
    assert cond.context is not None
    mask = torch.tensor([[True] * n + [False] * (5 - n) for n in (1, 3, 5)])
    expected = torch.stack([cond.context[i, :n].mean(0) for i, n in enumerate((1, 3, 5))])
    torch.testing.assert_close(mean_of_tokens(Condition(cond.context, mask)), expected)
    torch.testing.assert_close(mean_of_tokens(cond), cond.context.mean(1))


# -- training


@pytest.mark.slow
@pytest.mark.parametrize("option", NETWORKS)
def test_training_converges_to_the_exact_denoiser(option: str) -> None:
    """Gaussian latents with correlated pixels, rectified flow: the excess over the irreducible loss, by level."""
    torch.manual_seed(0)
    scheduler = build("scheduler", "flow")
    model = tiny(option, in_channels=1, out_channels=1, width=32, depth=1, sample_size=2, patch_size=1)
    denoiser = Denoiser(model, scheduler, build("parameterization", "velocity"))
    times, weighting = build("times", "uniform", stratified=True), build("weighting", "simple")
    law = Gaussian(torch.full((1, 1, 2, 2), 0.5), torch.tensor([[[[0.3, 1.0], [1.0, 0.3]]]]))
    cond = Condition(torch.zeros(128, 1, 64))
    optimizer = torch.optim.Adam(model.parameters(), lr=8e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    draws = torch.Generator().manual_seed(1)
    for _ in range(300):
        x0, eps = law.sample(128, draws), torch.randn(128, 1, 2, 2, generator=draws)
        u = (torch.arange(128) + torch.rand(128, generator=draws)) / 128
        predict(denoiser, x0, cond, times(u, scheduler), eps).loss(weighting).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    cond = Condition(torch.zeros(2048, 1, 64))
    for ratio in (0.3, 1.0, 3.0):
        level = scheduler.level_at(ratio)
        x_t = level.alpha * law.sample(2048, draws) + level.sigma * torch.randn(2048, 1, 2, 2, generator=draws)
        with torch.no_grad():
            excess = (denoiser(x_t, level, cond) - law.denoise(x_t, level)).square().mean()
        assert excess < 0.05 * torch.as_tensor(law.irreducible_loss(level)).mean(), ratio


# -- refusals


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(num_heads=3), "num_heads among 2, 4, 8, 16"),
        (dict(sample_size=7), "sample_size=8"),
        (dict(checkpoint="norms"), "none, blocks"),
    ],
)
def test_impossible_sizes_are_refused_with_a_way_out(changes: dict, words: str) -> None:
    for network in (DiT, MMDiT):
        sizes = dict(width=64, depth=1, num_heads=2, cross_attention_dim=64, sample_size=8) | changes
        with pytest.raises(ConfigError) as error:
            network(**sizes)
        assert words in str(error.value)


def test_impossible_inputs_are_refused_with_a_way_out() -> None:
    x_t, timestep, cond = inputs()
    for option in NETWORKS:
        model = tiny(option)
        with pytest.raises(ConfigError, match=r"model\.in_channels=9"):
            model(torch.randn(3, 9, 8, 8), timestep, cond)
        with pytest.raises(ConfigError, match=r"model\.cross_attention_dim=7"):
            model(x_t, timestep, Condition(torch.randn(3, 2, 7)))
