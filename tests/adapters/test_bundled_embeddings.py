"""A LoRA's file with embeddings inside: both are attached, under the words that the file says."""

from __future__ import annotations

import pytest
import torch
from adapter_files import assert_same_lora, random_lora, weights
from commands import here
from merge_models import lora, saved
from safetensors.torch import load_file, save_file

from ldm import Pipeline, merge
from ldm.adapters.content import Embedding, Lora
from ldm.adapters.textual_inversion import TextualInversion
from ldm.errors import ConfigError
from ldm.formats.adapters import adapter_kind, read_adapter, write_adapter
from ldm.formats.checkpoint import read
from ldm.text.clip import CLIPText
from ldm.text.tokenizer import build_tokenizer

PROMPT = "a photo of my-cat in the manner of v1.5_style"
LAYOUTS = {  # of one embedding in a bundle: A1111's page, kohya's and OneTrainer's files
    "a1111": "string_to_param.*",
    "kohya": "emb_params",
    "onetrainer": "emp_params",
    "clip_l": "clip_l",
}


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


WORDS = {"my-cat": vectors(1, seed=1), "v1.5_style": vectors(4, seed=2)}  # a name may have dots


def bundled(words: dict[str, torch.Tensor], layout: str = "a1111") -> dict[str, torch.Tensor]:
    return {f"bundle_emb.{word}.{LAYOUTS[layout]}": rows for word, rows in words.items()}


@pytest.fixture(scope="module")
def update(sd1_folder) -> Lora:
    return random_lora(weights(read(sd1_folder)), layers=r"unet\.mid_block\.attentions\.0.*|text_encoder.*self_attn.*")


@pytest.fixture
def files(update, tmp_path):
    """The LoRA alone, its words alone, and all in one."""
    write_adapter(update, tmp_path / "lora.safetensors", "kohya")
    save_file(load_file(tmp_path / "lora.safetensors") | bundled(WORDS), tmp_path / "bundle.safetensors")
    for word, rows in WORDS.items():
        write_adapter(Embedding(word, rows), tmp_path / f"{word}.pt", "a1111")
    return tmp_path


@pytest.fixture(scope="module")
def pipe(sd1_folder) -> Pipeline:
    return Pipeline.load(sd1_folder)


def drawn(pipe: Pipeline, prompt: str = PROMPT) -> torch.Tensor:
    return pipe.sample(prompt, num_steps=2, height=64, width=64)


def test_both_are_attached_as_if_they_came_one_by_one(pipe, files):
    plain = drawn(pipe)
    pipe.load_adapter(files / "bundle.safetensors", 0.7)
    together = drawn(pipe)
    with pytest.raises(ConfigError, match=r"'my-cat' was added before"):
        pipe.load_adapter(files / "my-cat.pt")
    with pytest.raises(ConfigError, match=r"textual_inversion .*which no checkpoint's weights can hold"):
        pipe.save(files / "saved")
    pipe.unload_adapters()
    assert torch.equal(drawn(pipe), plain) and not torch.equal(together, plain)
    pipe.load_adapter(files / "lora.safetensors", 0.7)
    without_words = drawn(pipe)
    for word in WORDS:
        pipe.load_adapter(files / f"{word}.pt")
    one_by_one = drawn(pipe)
    pipe.unload_adapters()
    assert torch.equal(one_by_one, together) and not torch.equal(without_words, together)
    assert torch.equal(drawn(pipe), plain)


def test_a_bundle_that_does_not_fit_leaves_nothing_behind(pipe, files):
    save_file(
        load_file(files / "lora.safetensors") | bundled(WORDS | {"wide": vectors(1, 48)}), files / "wide.safetensors"
    )
    plain = drawn(pipe)
    with pytest.raises(ConfigError, match=r"the embedding wide is 48 numbers wide, this model's words are 32"):
        pipe.load_adapter(files / "wide.safetensors")
    assert torch.equal(drawn(pipe), plain) and not pipe.adapters


@pytest.mark.slow
def test_task_sample_takes_it(sd1_folder, pipe, files):
    options = ("num_steps=2", "output=out", "seed=0", "guidance=7.5")
    adapters = f"adapters=[{files / 'bundle.safetensors'}:0.7]"
    done = here("task=sample", f"checkpoint={sd1_folder}", f"prompt={PROMPT}", adapters, *options, cwd=files)
    assert done.returncode == 0, done.stderr
    from PIL import Image

    from ldm.pictures import to_pil

    pipe.load_adapter(files / "bundle.safetensors", 0.7)
    expected = to_pil(pipe.sample(PROMPT, num_steps=2)[0])
    pipe.unload_adapters()
    assert Image.open(files / "out/0000.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_of_the_words_is_read(update, files, layout):
    one_row = WORDS | {"row": vectors(1, seed=3)[0]}
    more = {"bundle_emb.my-cat.string_to_token.*": torch.tensor(265)}
    tensors = load_file(files / "lora.safetensors") | bundled(one_row, layout) | more
    save_file(tensors, files / "x.safetensors")
    found = read_adapter(files / "x.safetensors")
    assert adapter_kind(files / "x.safetensors") == "lora" and isinstance(found, Lora)
    assert_same_lora(update, found)
    assert {word.token: word.vectors.shape for word in found.words} == {
        "my-cat": (1, 32),
        "v1.5_style": (4, 32),
        "row": (1, 32),
    }
    assert all(torch.equal(word.vectors, one_row[word.token].reshape(-1, 32)) for word in found.words)


def test_words_alone_are_attached_too(pipe, files):
    """A trainer with its LoRA off writes such a file."""
    save_file(bundled(WORDS), files / "words.safetensors")
    pipe.load_adapter(files / "words.safetensors")
    together = drawn(pipe)
    pipe.unload_adapters()
    for word in WORDS:
        pipe.load_adapter(files / f"{word}.pt")
    assert torch.equal(drawn(pipe), together)
    pipe.unload_adapters()


def test_stable_diffusion_1_s_own_width():
    """768 numbers a token, 1 and 4 vectors: each stands for as many tokens as it has vectors."""
    words = build_tokenizer(["a photo of a cat"], 560)
    encoder = CLIPText(vocab_size=len(words), max_length=20, layers=1).eval()
    encoder.set_tokenizer(words)
    usual = len(encoder.tokens("a photo of a"))
    for count in (1, 4):
        TextualInversion.of(Embedding(f"<{count}>", vectors(count, 768))).attach(torch.nn.Module(), encoder)
        assert len(encoder.tokens(f"a photo of a <{count}>")) == usual + count
    assert encoder.encode(["<1> and <4>"]).context.shape == (1, 20, 768)


def test_converting_keeps_both_or_says_that_it_cannot(update, files):
    def convert(source: str, **options: str):
        given = {"format": "kohya", "output": "again.safetensors"} | options
        return here("task=convert", f"checkpoint={source}", *(f"{k}={v}" for k, v in given.items()), cwd=files)

    assert convert("bundle.safetensors").returncode == 0
    found = read_adapter(files / "again.safetensors")
    assert_same_lora(update, found)
    assert {word.token: word.vectors.tolist() for word in found.words} == {k: v.tolist() for k, v in WORDS.items()}
    done = convert("bundle.safetensors", format="peft", output="peft.safetensors")
    assert done.returncode == 2 and "format=peft cannot carry the embeddings" in done.stderr and "my-cat" in done.stderr
    assert not (files / "peft.safetensors").exists()
    assert convert("lora.safetensors", format="peft", output="peft.safetensors").returncode == 0


def test_token_renames_the_one_word_of_a_bundle(files):
    save_file(load_file(files / "lora.safetensors") | bundled({"a": vectors(1)}), files / "one.safetensors")
    assert [word.token for word in read_adapter(files / "one.safetensors", token="<new>").words] == ["<new>"]
    for name, count in (("bundle", "a lora with 2 embeddings"), ("lora", "a lora")):
        with pytest.raises(ConfigError, match=f"token=<new> names an embedding, and .* is {count}: leave it out"):
            read_adapter(files / f"{name}.safetensors", token="<new>")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"bundle_emb.x.clip_l": vectors(1), "bundle_emb.x.clip_g": vectors(1, 1280)}, "for Stable Diffusion XL"),
        ({"bundle_emb.x.banana": vectors(1)}, r"bundle_emb.x.banana, which is no embedding of a kind that is read"),
        ({"bundle_emb.x": vectors(1)}, r"bundle_emb.x, which is no embedding"),
        ({"bundle_emb.x.emb_params": torch.full((1, 32), torch.nan)}, "the embedding x holds infinities or NaN"),
        ({"bundle_emb.x.emb_params": torch.zeros(0, 32)}, r"the embedding x is \(0, 32\)"),
        ({"bundle_emb.x.emb_params": torch.zeros(1, 1, 32)}, r"the embedding x is \(1, 1, 32\)"),
        ({"bundle_emb.x.emb_params": vectors(1), "bundle_emb.x.clip_l": vectors(1)}, "the embedding x twice"),
    ],
)
def test_bundles_that_cannot_be_read_are_named(files, entries, words):
    save_file(load_file(files / "lora.safetensors") | entries, files / "x.safetensors")
    with pytest.raises(ConfigError, match=words):
        read_adapter(files / "x.safetensors")


def test_a_bundle_is_no_checkpoint(files):
    with pytest.raises(ConfigError, match="is a LoRA: it is an adapter"):
        Pipeline.load(files / "bundle.safetensors")


def test_merging_says_that_words_stay_out(tmp_path):
    base = saved(tmp_path, 1, "diffusers")
    content = lora(5, 2)
    content.words.append(Embedding("<new>", vectors(1)))
    write_adapter(content, tmp_path / "bundle.safetensors", "kohya")
    with pytest.warns(UserWarning, match=r"bundles embeddings with its LoRA \(<new>\), which weights cannot hold"):
        merge([base, tmp_path / "bundle.safetensors"], tmp_path / "merged.safetensors", method="lora")
    save_file(bundled({"<new>": vectors(1)}), tmp_path / "words.safetensors")
    with pytest.raises(ConfigError, match="is no LoRA: embeddings"):
        merge([base, tmp_path / "words.safetensors"], tmp_path / "x.safetensors", method="lora")
