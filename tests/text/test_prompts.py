"""Prompts: parity with states taken by hand from transformers; options change nothing where nothing is asked."""

import random
import warnings
from collections import Counter
from itertools import pairwise

import pytest
import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.data.sources.shapes import all_captions
from ldm.errors import ConfigError
from ldm.text.clip import CLIPText
from ldm.text.encoder import TextEncoder
from ldm.text.null import NullText
from ldm.text.prompts import Prompts, in_chunks, weigh
from ldm.text.small import SmallTextEncoder
from ldm.text.tokenizer import build_tokenizer
from ldm.text.weights import parse

ODD = [
    "",
    "  a   Small RED\tstar\n",
    "Ünïcödé café, naïve e\u0301 vs é",
    "emoji 😀🏳️‍🌈 and 漢字 かな العربية",
    "it's we'll they've 3.14159 1st <b>html</b> &amp; a_b-c#d",
    "<|endoftext|> inside <|startoftext|>",
    "ß ǅ İ \u00a0 nbsp \u200b zero \x1c width",
]
ALL = Prompts(chunked=True, weighted=True)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(list(all_captions())[::7], 1024)


@pytest.fixture(scope="module", params=[CLIPText, SmallTextEncoder])
def encoder(request, tokenizer):
    torch.manual_seed(0)
    encoder = request.param(1024, 77, width=32, layers=3, heads=2)
    # As trained ones have it: tokens' states do not sum to zero.
    nn.init.normal_(encoder.text_model.final_layer_norm.bias, mean=-0.2, std=0.1)
    encoder.set_tokenizer(tokenizer)
    return encoder.requires_grad_(False)


def theirs(encoder, layers=None):
    """transformers' own model with the same weights, or with their first `layers`."""
    config = CLIPTextConfig(**(encoder.text_model.config.to_dict() | {"num_hidden_layers": layers or 3}))
    model = CLIPTextModel(config)
    state = {k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()}
    model.load_state_dict({k: v for k, v in state.items() if k in model.state_dict()})
    return model.requires_grad_(False)


def ids_of(encoder, texts):
    return encoder.tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids


def same(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# clip_skip.


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_clip_skip_is_the_earlier_hidden_state_and_the_encoder_without_its_last_layers(encoder, skip):
    prompts, negative = ["a red star", "blue"], ["a circle", ""]
    cond, reference = Prompts(clip_skip=skip).encode(encoder, prompts, negative)
    full = theirs(encoder)
    hidden = full(ids_of(encoder, prompts), output_hidden_states=True).hidden_states[-(skip + 1)]
    same(cond.context, full.final_layer_norm(hidden))
    same(cond.context, theirs(encoder, layers=3 - skip)(ids_of(encoder, prompts)).last_hidden_state)
    # The negative prompt is not skipped, as in diffusers.
    same(reference.context, full(ids_of(encoder, negative)).last_hidden_state)
    for a, b in zip(Prompts(skip, True, True).encode(encoder, prompts, negative), (cond, reference), strict=True):
        same(a.context, b.context)


# Long prompts.


def words(n, seed):
    draw = random.Random(seed)
    return [draw.choice(["red", "star", "a", "purple,", "well-known", "it's", "3.14", "Zürich"]) for _ in range(n)]


def test_long_prompts_are_chunks_encoded_apart_and_put_in_a_row(encoder):
    """By hand: words go into a chunk's text while the tokenizer counts at most 75."""
    prompts, negative = [" ".join(words(120, seed=0)), "a star"], ["", " ".join(words(50, seed=1))]
    cond, reference = Prompts(chunked=True).encode(encoder, prompts, negative)
    full, count = theirs(encoder), lambda text: len(encoder.tokenizer(text, add_special_tokens=False).input_ids)

    def by_hand(prompt):
        texts = [""]
        for word in prompt.split():
            if count(f"{texts[-1]} {word}") > 75:
                texts.append("")
            texts[-1] += " " + word
        return texts

    longest = len(by_hand(prompts[0]))
    assert longest > len(by_hand(negative[1])) > 1
    for condition, texts in ((cond, prompts), (reference, negative)):
        assert condition.context.shape == (2, 77 * longest, 32)
        for states, text in zip(condition.context, texts, strict=True):
            chunks = by_hand(text)
            chunks += [""] * (longest - len(chunks))
            expected = full(ids_of(encoder, chunks)).last_hidden_state.reshape(-1, 32)
            torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    swapped, _ = Prompts(chunked=True).encode(encoder, negative, prompts)  # the longest may be a negative one
    same(swapped.context, reference.context)


def test_chunks_keep_every_word_whole_where_it_fits():
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(1, 12)
        words = [[(draw.randint(0, 9), 1.0)] * draw.randint(1, 2 * size) for _ in range(draw.randint(0, 20))]
        chunks = in_chunks(words, size)
        assert [t for c in chunks for t in c] == [t for w in words for t in w]
        assert all(0 < len(c) <= size for c in chunks) or (not words and chunks == [[]])
        start = 0
        bounds = {sum(len(c) for c in chunks[:i]) for i in range(len(chunks))}
        for word in words:
            inside = bounds & set(range(start + 1, start + len(word)))
            assert not inside or len(word) > size
            start += len(word)


def test_too_long_a_prompt_is_cut_as_a_caption_is_with_one_warning(encoder):
    long = [" ".join(words(120, seed=0))]
    encoder._warned = False
    with pytest.warns(UserWarning, match="chunks") as caught:
        cond, _ = Prompts(weighted=True).encode(encoder, long * 2)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(cond.context, encoder.encode(long * 2).context)
        Prompts(chunked=True).encode(encoder, long)


# Weights.


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("", []),
        ("a red star", [("a red star", 1.0)]),
        ("a (red) star", [("a ", 1.0), ("red", 1.1), (" star", 1.0)]),
        ("a (red:1.3) star", [("a ", 1.0), ("red", 1.3), (" star", 1.0)]),
        ("[red] star", [("red", 1 / 1.1), (" star", 1.0)]),
        ("((red))", [("red", 1.1 * 1.1)]),
        ("(a (red:0.5) star:2)", [("a ", 2.0), ("red", 1.0), (" star", 2.0)]),
        ("([a])(b:.5)[(c:2.)]", [("a", 1.1 / 1.1), ("b", 0.5), ("c", 2 / 1.1)]),
        ("(a: 1.5 )", [("a", 1.5)]),
        ("(a:b:1.5)(c:d)", [("a:b", 1.5), ("c:d", 1.1)]),
        (r"a \(red\) \[x\] \\ \n", [(r"a (red) [x] \ \n", 1.0)]),
        (r"(a\):1.5)", [("a)", 1.5)]),
        ("((red:1.3)", [("(", 1.0), ("red", 1.3)]),
        ("red:1.3) :) [", [("red:1.3) :) [", 1.0)]),
        ("([a)]", [("[a", 1.1), ("]", 1.0)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:-1)(b:1e3)(c:1.2.3)", [("a:-1b:1e3c:1.2.3", 1.1)]),
        ("(a:1)(b:1.0) c", [("ab c", 1.0)]),
        ("()(:2)[]a", [("a", 1.0)]),
        ("a\\", [("a\\", 1.0)]),
    ],
)
def test_what_people_write(prompt, expected):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected], rel=1e-12)


def test_parse_takes_any_string_and_gives_its_text_back():
    draw, alphabet = (
        random.Random(0),
        ["(", ")", "[", "]", "\\", ":", "1.3", ".", " ", "a", "é", "😀", "<b>", ":2)", "\n"],
    )
    for _ in range(4000):
        prompt = "".join(draw.choices(alphabet, k=draw.randint(0, 14)))
        pieces = parse(prompt)
        text = "".join(piece for piece, _ in pieces)
        assert all(piece and 0 < weight <= 100 for piece, weight in pieces), prompt
        assert all(a[1] != b[1] for a, b in pairwise(pieces)), prompt
        rest = iter(prompt)
        assert all(character in rest for character in text), f"{prompt!r}: in the same order"
        assert set(Counter(prompt) - Counter(text)) <= set("()[]\\:.123 \n"), prompt
        escaped = "".join("\\" + c if c in "()[]\\" else c for c in text)
        assert parse(escaped) == ([(text, 1.0)] if text else []), prompt


def test_parse_reads_what_a_tree_of_weights_was_written_from():
    draw = random.Random(1)

    def written(weight, depth):
        """(a prompt, its characters with their weights)"""
        prompt, characters = "", []
        for _ in range(draw.randint(1, 3)):
            kind = draw.choice(["text", "up", "down", "number"]) if depth else "text"
            if kind == "text":
                text = draw.choice(["a", "b c", "(", "]", "\\", "x:1.2", "é"])
                prompt += "".join("\\" + c if c in "()[]\\" else c for c in text)
                characters += [(c, weight) for c in text]
                continue
            number = draw.choice([0.5, 1.25, 2.0])
            factor = {"up": 1.1, "down": 1 / 1.1, "number": number}[kind]
            inner, more = written(weight * factor, depth - 1)
            if kind == "up" and inner.endswith(":1.2"):
                inner, more = inner + "!", [*more, ("!", weight * factor)]  # else it would be a number
            prompt += {"up": f"({inner})", "down": f"[{inner}]", "number": f"({inner}:{number})"}[kind]
            characters += more
        return prompt, characters

    for _ in range(500):
        prompt, characters = written(1.0, 3)
        found = [(c, weight) for piece, weight in parse(prompt) for c in piece]
        assert [c for c, _ in found] == [c for c, _ in characters], prompt
        assert [w for _, w in found] == pytest.approx([w for _, w in characters]), prompt


def test_deep_and_long_prompts_take_linear_time():
    n = 30000  # a second look at every bracket before it would take minutes
    assert parse("(" * n + "a" + ")" * n) == [("a", 100.0)]
    assert parse("[" * n + ")" * n) == [("[" * n + ")" * n, 1.0)]
    assert parse("(" + "[" * n + ")" * n)[0] == ("[" * n, 1.1)
    assert parse("(:1" * n) == [("(:1" * n, 1.0)]


def test_without_weights_states_are_the_captions_to_the_bit(encoder):
    for prompts in (ODD, ["a (red:1.0) star", "(blue:1)"]):
        plain = [p.replace("(red:1.0)", "red").replace("(blue:1)", "blue") for p in prompts]
        cond, reference = ALL.encode(encoder, prompts, prompts)
        same(cond.context, theirs(encoder)(ids_of(encoder, plain)).last_hidden_state)
        same(reference.context, cond.context)
        same(Prompts().encode(encoder, plain)[0].context, cond.context)
    brackets = ["a (red:1.5) [star]"]  # off by default: ordinary characters
    same(Prompts().encode(encoder, brackets)[0].context, encoder.encode(brackets).context)


def test_weighted_states_are_those_made_by_hand(encoder):
    """Start mark, a, red, star, and a comma that stands outside; each prompt for itself; the negative one too."""
    cond, reference = ALL.encode(encoder, ["(a red:1.5) [star],", "blue"], ["(blue:0.5)", "a"])
    plain = theirs(encoder)(ids_of(encoder, ["a red star,", "blue"])).last_hidden_state
    weights = torch.ones(77, 1)
    weights[1:4, 0] = torch.tensor([1.5, 1.5, 1 / 1.1])
    expected = plain[0] * weights
    torch.testing.assert_close(cond.context[0], expected * (plain[0].mean() / expected.mean()))
    assert cond.context[0].mean() == pytest.approx(plain[0].mean().item(), rel=1e-5)
    same(cond.context[1], plain[1])
    alone, _ = ALL.encode(encoder, ["(a red:1.5) [star],"])
    torch.testing.assert_close(alone.context[0], cond.context[0])
    lighter = plain[1] * torch.where(torch.arange(77) == 1, 0.5, 1.0)[:, None]
    torch.testing.assert_close(reference.context[0], lighter * (plain[1].mean() / lighter.mean()))


def test_weights_reach_the_words_of_later_chunks(encoder):
    text = words(120, seed=0)
    plain, _ = Prompts(chunked=True).encode(encoder, [" ".join(text)])
    cond, _ = ALL.encode(encoder, [" ".join([*text[:-1], f"({text[-1]}:2)"])])
    ratio = (cond.context / plain.context)[0].mean(dim=1)
    heavy = (ratio > 1.5).nonzero().flatten()
    assert len(heavy) >= 1 and heavy.min() > 2 * 77
    torch.testing.assert_close(ratio[heavy] / ratio[0], torch.full((len(heavy),), 2.0), rtol=1e-3, atol=0)


def test_weights_do_not_change_which_tokens_there_are(encoder):
    """A word weighed in part stays one token, with the weight of its first letter."""
    cond, _ = ALL.encode(encoder, ["(r:1.5)ed star"])
    whole, _ = ALL.encode(encoder, ["(red:1.5) star"])
    same(cond.context, whole.context)


def test_the_scale_stays_within_the_weights_where_the_mean_is_no_measure():
    torch.manual_seed(0)
    states = nn.functional.layer_norm(torch.randn(50, 8, 16), (16,))  # every token sums to rounding errors
    weights = torch.ones(50, 8)
    weights[:, 2], weights[:, 3] = 2.0, 0.8
    weights[0] = 1
    ratio = weigh(states, weights)[:, 0] / states[:, 0]
    assert ((ratio > 0.499) & (ratio < 1.251)).all()
    same(weigh(states, weights)[0], states[0])
    same(weigh(torch.zeros(1, 8, 16), weights[1:2]), torch.zeros(1, 8, 16))


def test_any_text_with_every_option(encoder):
    draw = random.Random(2)
    prompts = ["".join(draw.choices([*"()[]\\: é", "red ", "😀", "1.3)", *ODD], k=12)) for _ in range(40)]
    cond, reference = Prompts(1, True, True).encode(encoder, prompts, prompts[::-1])
    assert cond.context.isfinite().all() and reference.context.isfinite().all()
    assert cond.context.shape == reference.context.shape and cond.context.shape[1] % 77 == 0


# Doors.


def test_no_text_stays_no_text():
    for prompts in (Prompts(), ALL):
        cond, reference = prompts.encode(NullText(), ["a", "(b"], ["", ""])
        assert cond.context is None and reference is None


class Other(TextEncoder):
    context_dim, max_length, trainable = 8, 4, False


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda e: Prompts(clip_skip=-1), "counted from 0"),
        (lambda e: Prompts(clip_skip=3).encode(e, ["a"]), "3 layers.*Use clip_skip=2"),
        (lambda e: Prompts(clip_skip=1).encode(NullText(), ["a"]), "Use clip_skip=0"),
        (lambda e: ALL.encode(Other(), ["a"]), "Leave both off"),
    ],
)
def test_what_cannot_be_is_refused_with_the_way_out(encoder, act, words):
    with pytest.raises(ConfigError, match=words):
        act(encoder)
