"""Text: the tokenizer is the same in every build and for transformers too; the small encoder is CLIP's."""

import copy
import pickle
import random
import shutil
import warnings

import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from ldm.data.sources.shapes import all_captions
from ldm.errors import ConfigError
from ldm.text.null import NullText
from ldm.text.small import SmallTextEncoder
from ldm.text.tokenizer import build_tokenizer, load_tokenizer, save_tokenizer

CAPTIONS = list(all_captions())[::7]
ODD = [
    "",
    "  a   Small RED\tstar\n",
    "Ünïcödé café, naïve e\u0301 vs é",
    "emoji 😀🏳️‍🌈 and 漢字 かな العربية",
    "it's we'll they've I'd 3.14159 1st <b>html</b> &amp; a_b-c#d",
    "<|endoftext|> inside <|startoftext|>",
    "ß ǅ \u00a0 nbsp \u200b zero width",
]


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(CAPTIONS, 1024)


@pytest.fixture
def encoder(tokenizer):
    torch.manual_seed(0)
    encoder = SmallTextEncoder(1024, 24, width=32, layers=2, heads=2)
    encoder.set_tokenizer(copy.deepcopy(tokenizer))
    return encoder


def files(tokenizer, directory):
    save_tokenizer(tokenizer, directory)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_two_builds_are_identical_whatever_the_order(tokenizer, tmp_path):
    shuffled = random.Random(0).sample(CAPTIONS, len(CAPTIONS))
    first, second = files(tokenizer, tmp_path / "a"), files(build_tokenizer(iter(shuffled), 1024), tmp_path / "b")
    assert first == second
    assert {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"} <= set(first)


def test_words_of_the_captions_are_single_tokens(tokenizer):
    assert max(len(ids) for ids in tokenizer(CAPTIONS)["input_ids"]) == 11 + 2
    assert len(tokenizer) <= 1024
    small = build_tokenizer(CAPTIONS, 520)
    assert len(small) == 520 and tokenizer.tokenize("a") == small.tokenize("a") == ["a</w>"]


def test_ties_go_by_text_order():
    merges = build_tokenizer(["zy ab", "cd"], 514 + 2).backend_tokenizer.to_str()
    assert '"merges":[["a","b</w>"],["c","d</w>"]]' in merges


def test_published_layout_gives_the_same_ids(tokenizer, encoder, tmp_path):
    both, published = tmp_path / "both", tmp_path / "published"
    save_tokenizer(tokenizer, both)
    shutil.copytree(both, published, ignore=shutil.ignore_patterns("tokenizer.json"))
    for folder in (both, published):
        theirs, ours = CLIPTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
        padded = theirs(ODD, padding="max_length", truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        encoder.set_tokenizer(ours)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(encoder.tokenize(ODD), padded)
        assert ours(ODD)["input_ids"] == tokenizer(ODD)["input_ids"]


def test_unseen_text_survives_as_bytes(tokenizer):
    for text in ["naïve café", "漢字 😀"]:
        ids = tokenizer(text)["input_ids"]
        assert max(ids) < len(tokenizer) and tokenizer.decode(ids, skip_special_tokens=True) == text


def test_saving_again_changes_nothing(encoder, tmp_path):
    encoder.save_tokenizer(tmp_path / "a")
    other = SmallTextEncoder(1024, 24, width=32, layers=1, heads=2, tokenizer=str(tmp_path / "a"))
    other.save_tokenizer(tmp_path / "b")
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in "ab")
    assert first == second
    assert CLIPTokenizer.from_pretrained(str(tmp_path / "b")).model_max_length == 24


def test_a_long_caption_is_cut_with_one_warning(encoder):
    with pytest.warns(UserWarning, match=r"text_encoder\.max_length"):
        ids = encoder.tokenize(["star " * 60, "a"])
    assert ids.shape == (2, 24) and ids[0, -1] == ids[1, -1] == encoder.tokenizer.eos_token_id
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder.tokenize(["star " * 60])


def test_context_is_transformers_last_hidden_state(encoder):
    theirs = CLIPTextModel(encoder.text_model.config)
    theirs.load_state_dict({k.removeprefix("text_model."): v for k, v in encoder.state_dict().items()})
    ids = encoder.tokenize(CAPTIONS[:4])
    condition = encoder(ids)
    assert condition.mask is None and condition.context.shape == (4, 24, encoder.context_dim)
    torch.testing.assert_close(condition.context, theirs(ids).last_hidden_state, rtol=0, atol=0)
    condition.context.sum().backward()
    assert all(p.grad is not None for p in encoder.parameters()) and encoder.trainable


def test_both_spellings_load(encoder):
    state = encoder.state_dict()
    assert all(key.startswith("text_model.") for key in state)
    bare = {key.removeprefix("text_model."): value for key, value in state.items()}
    old = state | {"text_model.embeddings.position_ids": torch.arange(24)[None]}
    holder = torch.nn.ModuleDict({"text_encoder": SmallTextEncoder(1024, 24, width=32, layers=2, heads=2)})
    for spelling in (state, bare, old):
        other = SmallTextEncoder(1024, 24, width=32, layers=2, heads=2)
        other.load_state_dict(spelling)
        assert all(torch.equal(value, state[key]) for key, value in other.state_dict().items())
        holder.load_state_dict({f"text_encoder.{key}": value for key, value in spelling.items()})


def test_it_builds_on_meta_and_copies(encoder):
    with torch.device("meta"):
        other = SmallTextEncoder(1024, 24, width=32, layers=2, heads=2)
    other.load_state_dict(encoder.state_dict(), assign=True)
    other.set_tokenizer(encoder.tokenizer)
    expected = encoder.encode(CAPTIONS[:2]).context
    for copied in (other, copy.deepcopy(encoder), pickle.loads(pickle.dumps(encoder))):
        assert torch.equal(copied.encode(CAPTIONS[:2]).context, expected)


def test_errors_name_the_way_out(tokenizer, tmp_path):
    with pytest.raises(ConfigError, match=r"text_encoder\.tokenizer=DIR"):
        SmallTextEncoder(1024, 24, width=32, layers=1, heads=2).encode(["a"])
    with pytest.raises(ConfigError, match=f"vocab_size={len(tokenizer)}"):
        SmallTextEncoder(520, 24, width=32, layers=1, heads=2).set_tokenizer(tokenizer)
    with pytest.raises(ConfigError, match=r"merges\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="1024"):
        build_tokenizer(CAPTIONS, 100)


def test_null_text_is_an_empty_condition():
    encoder = NullText()
    condition = encoder.encode(["a", "b"])
    assert condition.context is None and encoder.context_dim is None and encoder.tokenize(["a", "b"]).shape == (2, 0)
    assert not encoder.trainable and not encoder.state_dict()
