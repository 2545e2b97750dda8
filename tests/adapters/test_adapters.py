"""Adapters on a frozen base: nothing changes at first, then exactly what the papers' formulas say, in any order."""

import copy

import peft
import pytest
import torch
from format_checks import conf
from published import tokenizer
from torch import nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import Embedding
from ldm.adapters.hypernetwork import Hypernetwork
from ldm.adapters.lora import LoRA, layers_of
from ldm.adapters.textual_inversion import TextualInversion
from ldm.build import build
from ldm.diffusion.condition import Condition
from ldm.errors import ConfigError
from ldm.models.resnet import Conv1x1
from ldm.models.unet import UNet
from ldm.text.clip import CLIPText
from ldm.text.prompts import Prompts

WORDS = tokenizer(1)


def base(**options):
    torch.manual_seed(0)
    unet = UNet(
        block_channels=[8, 16],
        attention_levels=[True, False],
        layers_per_block=1,
        cross_attention_dim=12,
        num_heads=2,
        norm_groups=4,
        **options,
    )
    words = copy.deepcopy(WORDS)
    text = CLIPText(len(words), 16, 12, 2, 2)
    text.set_tokenizer(words)
    for module in (unet, text):
        module.eval().requires_grad_(False)
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return unet, text


def give(unet, text, prompts=("a red cat", "")):
    """What the base gives for a picture and a prompt."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return unet(x, torch.tensor([10.0, 700.0]), text.encode(list(prompts)))


def stir(adapter: Adapter, seed=3, scale=0.3):
    """Any weights in place of the first ones."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter.named_parameters():
        if "magnitude" in name:
            parameter.data *= 1 + 0.5 * torch.rand(parameter.shape, generator=generator)
        else:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)


MAKERS = {
    "lora": lambda: LoRA(rank=3),
    "lora_transformer": lambda: LoRA(rank=3, alpha=1.5, layers="transformer", text_encoder=True),
    "lora_all": lambda: LoRA(rank=2, layers="all", text_encoder=True),
    "dora": lambda: LoRA(rank=2, layers="all", dora=True, text_encoder=True),
    "hypernetwork": lambda: Hypernetwork(),
    "hypernetwork_deep": lambda: Hypernetwork(structure=[1, 2, 2, 1], activation="swish", layer_norm=True),
    "textual_inversion": lambda: TextualInversion("<new>", num_vectors=2),
}


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("linear_projection", [False, True])
def test_at_first_nothing_changes_and_detached_everything_is_back(kind, linear_projection):
    unet, text = base(linear_projection=linear_projection)
    before, names = give(unet, text), list(unet.state_dict())
    weights = copy.deepcopy([*unet.state_dict().values(), *text.state_dict().values()])
    adapter = MAKERS[kind]()
    adapter.attach(unet, text)
    assert torch.equal(give(unet, text), before)
    stir(adapter)
    prompts = ("a red <new> cat", "")
    if kind != "textual_inversion":
        assert not torch.allclose(give(unet, text), before, atol=1e-4)
        adapter.strength = 0.0
        assert torch.equal(give(unet, text), before)
    else:
        assert torch.equal(give(unet, text), before)  # no prompt has the word
        assert not torch.allclose(give(unet, text, prompts), before, atol=1e-4)
    # The base itself is what it was, under the names that it had.
    assert list(unet.state_dict()) == names
    after = [*unet.state_dict().values(), *text.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(weights, after, strict=True))
    adapter.detach()
    assert torch.equal(give(unet, text), before)


@pytest.mark.parametrize("kind", ["lora", "lora_transformer", "lora_all", "dora"])
@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
def test_merged_is_attached(kind, strength):
    unet, text = base()
    adapter = MAKERS[kind]()
    adapter.attach(unet, text)
    stir(adapter)
    adapter.strength = strength
    attached = give(unet, text)
    adapter.detach()
    layers = layers_of(unet, text)
    for name, update in adapter.content().layers.items():
        layers[name].weight.data = update.merged(layers[name].weight, strength)
    assert (give(unet, text) - attached).abs().max() < 1e-5 * attached.abs().max()


@pytest.mark.parametrize("kind", ["lora", "lora_transformer", "lora_all", "dora"])
def test_peft_gives_the_same(kind):
    """peft's own layers with the same tensors, on copies of the same base."""
    unet, text = base()
    theirs_unet, theirs_text = copy.deepcopy(unet), copy.deepcopy(text)
    adapter = MAKERS[kind]()
    adapter.attach(unet, text)
    stir(adapter)
    content = adapter.content().layers
    for part, root in (("unet", theirs_unet), ("text_encoder", theirs_text)):
        mine = {n.removeprefix(f"{part}."): u for n, u in content.items() if n.startswith(f"{part}.")}
        if not mine:
            continue
        for layer in root.modules():
            if isinstance(layer, Conv1x1):  # peft makes layers of the same class, with the arguments of its parent
                layer.__class__ = nn.Conv2d
        settings = peft.LoraConfig(
            r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(mine), use_dora=adapter.dora
        )
        peft.inject_adapter_in_model(settings, root)
        for name, update in mine.items():
            layer = root.get_submodule(name)
            layer.lora_A["default"].weight.data = update.down.clone()
            layer.lora_B["default"].weight.data = update.up.clone()
            if update.magnitude is not None:
                vector = layer.lora_magnitude_vector["default"].weight
                vector.data = update.magnitude.view(vector.shape).clone()
    ours, theirs = give(unet, text), give(theirs_unet.eval(), theirs_text.eval())
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_a_lora_of_given_tensors_is_the_one_they_came_from():
    unet, text = base()
    adapter = MAKERS["dora"]()
    adapter.attach(unet, text)
    stir(adapter)
    attached, content = give(unet, text), adapter.content()
    adapter.detach()
    again = LoRA.of(content)
    again.attach(unet, text)
    assert torch.equal(give(unet, text), attached)
    assert again.changes_text


def test_adapters_combine_in_any_order():
    made = []
    for order in (("lora", "hypernetwork", "textual_inversion"), ("textual_inversion", "hypernetwork", "lora")):
        unet, text = base()
        for kind in order:
            adapter = MAKERS[kind]()
            adapter.attach(unet, text)
            stir(adapter, scale=0.1)
        made.append(give(unet, text, ("a <new> cat", "a dog")))
    assert torch.equal(*made)


def test_a_hypernetwork_is_its_formula():
    """context_k = c + f_k(c), context_v = c + f_v(c) in self- and cross-attention, f chosen by the context's width."""
    unet, text = base()
    reference = copy.deepcopy(unet)
    adapter = Hypernetwork(structure=[1, 1.5, 1], activation="relu", activate_output=True)
    adapter.attach(unet, text)
    stir(adapter)
    content = adapter.content()
    assert sorted(content.networks) == [8, 12, 16]  # two levels' tokens, and the text's states

    def run(state, x):
        for i in (0, 2):  # linear maps at 0 and 2, activations between and behind
            x = torch.relu(x @ state[f"linear.{i}.weight"].T + state[f"linear.{i}.bias"])
        return x

    class Changed(nn.Module):
        def __init__(self, inner, which):
            super().__init__()
            self.inner, self.which = inner, which

        def forward(self, context):
            return self.inner(context + run(content.networks[context.shape[-1]][self.which], context))

    for module in reference.modules():
        if hasattr(module, "to_k"):
            module.to_k, module.to_v = Changed(module.to_k, 0), Changed(module.to_v, 1)
    ours, theirs = give(unet, text), give(reference, text)
    assert (ours - theirs).abs().max() < 1e-5 * theirs.abs().max()
    again = Hypernetwork.of(content)
    adapter.detach()
    again.attach(unet, text)
    assert torch.equal(give(unet, text), ours)


@pytest.mark.parametrize("vectors", [1, 4])
def test_new_words_are_rows_behind_the_embedding(vectors):
    """What a base with that many more rows gives when their ids are put into the prompt by hand."""
    _, text = base()
    made = torch.randn(vectors, 12, generator=torch.Generator().manual_seed(5))
    prompts = ["a <New> cat, <new>", "two <new>s"]
    grown = copy.deepcopy(text)
    rows = torch.cat([text.token_embedding.weight, made])
    grown.text_model.embeddings.token_embedding = nn.Embedding.from_pretrained(rows)
    grown.vocab_size = len(rows)
    ids = {w: [t.id for t in text.tokens(w)] for w in ("a", "cat,", "two", "s")}
    new = list(range(text.vocab_size, len(rows)))
    by_hand = [[*ids["a"], *new, *ids["cat,"], *new], [*ids["two"], *new, *ids["s"]]]
    expected = grown.states(text.frame([row[:14] for row in by_hand])).context
    TextualInversion.of(Embedding("<new>", made)).attach(nn.Module(), text)
    assert torch.equal(text.encode(prompts).context, expected)
    assert torch.equal(Prompts(chunked=False, weighted=True).encode(text, prompts)[0].context, expected)
    assert torch.equal(Prompts().encode(text, ["a"] * 2, prompts)[1].context, expected)  # a negative prompt
    assert "<new>" not in text.tokenizer.get_vocab()  # what is saved with the model is the model's own


def test_words_begin_as_what_they_are_told():
    _, text = base()
    ids = [token.id for token in text.tokens("red cat")]
    adapter = TextualInversion("<one>", "red cat", 3)
    adapter.attach(nn.Module(), text)
    assert torch.equal(adapter.vectors, text.token_embedding.weight[[ids[0], ids[0], ids[1]]])


def test_only_the_words_have_gradients():
    unet, text = base()
    adapter = TextualInversion("<new>", num_vectors=2)
    adapter.attach(unet, text)
    x = torch.randn(1, 4, 8, 8)
    unet(x, torch.tensor([5.0]), text.encode(["a <new> cat"])).square().mean().backward()
    assert adapter.vectors.grad.abs().sum() > 0
    assert all(p.grad is None for m in (unet, text) for p in m.parameters())


def test_recomputed_blocks_see_their_adapters():
    """Gradient checkpointing runs a block twice: hooks run both times, and gradients are those without it."""
    gradients = []
    for recompute in ("none", "blocks"):
        unet, text = base(checkpoint=recompute)
        adapter = MAKERS["lora_all"]()
        adapter.attach(unet, text)
        stir(adapter)
        x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2))
        cond = Condition(context=torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(4)))
        unet(x, torch.tensor([5.0, 9.0]), cond).square().mean().backward()
        gradients.append([p.grad for n, p in adapter.named_parameters() if "unet" in n])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*gradients, strict=True))


def test_what_does_not_fit_is_said():
    unet, text = base()
    lora = MAKERS["lora_transformer"]()
    lora.attach(unet, text)
    content = lora.content()
    torch.manual_seed(0)
    sizes = {"block_channels": [8, 16], "attention_levels": [True, False], "num_heads": 2, "norm_groups": 4}
    other = UNet(**sizes, layers_per_block=1, cross_attention_dim=20)
    with pytest.raises(ConfigError, match=r"does not fit.*attn2.to_k.*768.*1024"):
        LoRA.of(content).attach(other, text)
    with pytest.raises(ConfigError, match=r"layers that this model does not have"):
        LoRA.of(content).attach(nn.Linear(2, 2), text)
    with pytest.raises(ConfigError, match=r"20 numbers wide.*12"):
        TextualInversion.of(Embedding("<new>", torch.zeros(1, 20))).attach(unet, text)
    with pytest.raises(ConfigError, match=r"ordinary word"):
        TextualInversion("cat").attach(unet, text)
    TextualInversion("<new>").attach(unet, text)
    with pytest.raises(ConfigError, match=r"added before"):
        TextualInversion("<NEW>").attach(unet, text)
    with pytest.raises(ConfigError, match=r"without blanks"):
        TextualInversion("my cat").attach(unet, text)
    hypernetwork = Hypernetwork()
    hypernetwork.attach(other, text)
    with pytest.raises(ConfigError, match=r"widths has 7"):
        Hypernetwork(widths=[7]).attach(unet, text)
    for options in ({"structure": [1, 2]}, {"activation": "warp"}, {"dropout": [0.1]}):
        with pytest.raises(ConfigError):
            Hypernetwork(**options)
    bad = [{"rank": 0}, {"layers": "some"}, {"dropout": 1.5}, {"alpha": 0.0}, {"lr": -1.0}, {"format": "a1111"}]
    for options in bad:
        with pytest.raises(ConfigError):
            LoRA(**options)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_loras_on_one_layer_add_up(order):
    """Whichever came first, what is drawn is the base with both changes in its weights."""
    unet, text = base()
    made = [LoRA(rank=2, layers="all"), LoRA(rank=3, layers="transformer", text_encoder=True)]
    for i in order:
        made[i].attach(unet, text)
        stir(made[i], seed=i, scale=0.2)
        made[i].strength = (0.7, -0.4)[i]
    attached = give(unet, text)
    for adapter in made:
        adapter.detach()
    layers = layers_of(unet, text)
    for adapter in made:
        for name, update in adapter.content().layers.items():
            layers[name].weight.data = update.merged(layers[name].weight, adapter.strength)
    assert (give(unet, text) - attached).abs().max() < 1e-5 * attached.abs().max()


def test_a_dora_stands_alone_on_its_layers():
    """It sets lengths of rows, so with another LoRA the order would count."""
    unet, text = base()
    before = give(unet, text)
    first = MAKERS["dora"]()
    first.attach(unet, text)
    with pytest.raises(ConfigError, match=r"two LoRAs, one of which is a DoRA"):
        LoRA(rank=2).attach(unet, text)
    first.detach()
    second = LoRA(rank=2)
    second.attach(unet, text)
    with pytest.raises(ConfigError, match=r"two LoRAs, one of which is a DoRA"):
        MAKERS["dora"]().attach(unet, text)
    stir(second)
    second.detach()
    assert torch.equal(give(unet, text), before)


def test_a_row_of_zeros_stays_finite_in_a_dora():
    unet, text = base()
    for layer in layers_of(unet, text).values():
        layer.weight.data[0] = 0
    before = give(unet, text)
    adapter = MAKERS["dora"]()
    adapter.attach(unet, text)
    assert torch.equal(give(unet, text), before)
    layers = layers_of(unet, text)
    merged = [u.merged(layers[name].weight) for name, u in adapter.content().layers.items()]
    assert all(weight.isfinite().all() for weight in merged)


@pytest.mark.parametrize("kind", ["lora_all", "hypernetwork"])
@pytest.mark.parametrize("model", ["dit_tiny", "mmdit_tiny"])
def test_transformers_take_adapters_too(model, kind):
    unet, text = base()
    del unet
    torch.manual_seed(0)
    node = conf("model", model)
    network = build(node | {"cross_attention_dim": text.context_dim} if "cross_attention_dim" in node else node)
    for parameter in network.parameters():
        parameter.data = 0.2 * torch.randn(parameter.shape)
    network.eval().requires_grad_(False)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 700.0])
    width = network.cross_attention_dim
    cond = Condition(context=torch.randn(2, 5, width), pooled=pooled_like(network))
    before = network(x, t, cond)
    adapter = MAKERS[kind]() if kind == "hypernetwork" else LoRA(rank=2, layers="all")
    adapter.attach(network, text)
    assert torch.equal(network(x, t, cond), before)
    stir(adapter)
    assert not torch.allclose(network(x, t, cond), before, atol=1e-3)
    if kind == "hypernetwork":  # joint attention's text map is read by it as well
        assert {int(w) for w in adapter.networks} == {
            m.in_features for n, m in network.named_modules() if n.split(".")[-1] in ("to_k", "add_k_proj")
        }
    adapter.detach()
    assert torch.equal(network(x, t, cond), before)


def pooled_like(network):
    return None if network.pooled_dim is None else torch.randn(2, network.pooled_dim)
