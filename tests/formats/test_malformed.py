"""Folders and files that are not what they say (support/malformed.py) end in one line, soon and without memory."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import signal
from collections import OrderedDict
from pathlib import Path

import malformed
import pytest
import torch
from commands import here

from ldm import untrusted
from ldm.errors import ConfigError
from ldm.formats.files import torch_file
from ldm.formats.files.bounded import MODULES
from ldm.formats.match import TEXT, UNET, expected
from ldm.pipeline import Pipeline
from ldm.text.tokenizer import build_tokenizer, content, load_tokenizer, save_tokenizer

BY_PYTHON = [c for c in malformed.CASES if c[1] in ("load", "attach")][::4]
TYPED = [
    ("adapter", "a pipe"),
    ("sample", "a dict in itself"),
    ("sample", "os.system"),
    ("sample", "10^9 transformers"),
    ("sample", "scale of the latents 0"),
    ("merge", "num_hidden_layers=1000000000"),
    ("convert", "10^9 layers"),
    ("encode", "10^9 layers"),
    ("evaluate", "a part is missing"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return malformed.make_base(tmp_path_factory.mktemp("malformed"))


@pytest.fixture(autouse=True)
def soon():
    """A hang is a failure, and so is a GiB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(60)  # ends the process: nothing else reaches one that waits inside C
    yield
    signal.alarm(0)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # KiB


@pytest.mark.parametrize(("name", "door", "make"), BY_PYTHON, ids=[name for name, _, _ in BY_PYTHON])
def test_one_line_by_python(base, tmp_path, name, door, make):
    path = make(shutil.copytree(base, tmp_path / "copy"))
    with pytest.raises(ConfigError):
        if door == "load":
            Pipeline.load(path)("a red star", num_steps=1)
        else:
            Pipeline.load(base / "pipe").load_adapter(path)


@pytest.mark.parametrize(("door", "name"), TYPED, ids=[f"{door}: {name}" for door, name in TYPED])
def test_one_line_when_typed(base, tmp_path, door, name):
    make = next(m for n, d, m in malformed.CASES if d == door and name in n)
    path = make(shutil.copytree(base, tmp_path / "copy"))
    sample = ["task=sample", "prompt=a red star", "num_steps=1"]
    result = here(
        *{
            "sample": [*sample, f"checkpoint={path}"],
            "adapter": [*sample, f"checkpoint={base / 'pipe'}", f"adapters={path}"],
            "convert": ["task=convert", f"checkpoint={path}", "format=ldm", "output=out"],
            "merge": ["task=merge", f"checkpoints=[{path},{path}]", "output=out"],
            "encode": ["task=encode", f"checkpoint={path}", f"shards={base}"],
            "evaluate": ["task=evaluate", f"checkpoint={path}"],
        }[door],
        cwd=tmp_path,
    )
    errors = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert result.returncode == 2 and len(errors) == 1, result.stderr[-2000:]
    assert not Path("/tmp/owned").exists() and not (tmp_path / "out").exists()


def test_the_base_of_this_table_is_good(base):
    for path in ("pipe", "run", "single.safetensors"):
        pipe = Pipeline.load(base / path)
        assert pipe.sample("a red star", num_steps=1).isfinite().all()
    for path in ("lora.safetensors", "word.pt", "hyper.pt"):
        pipe.load_adapter(base / path)


@pytest.mark.parametrize("zipped", [True, False])
def test_interpreted_files_are_what_torch_loads(tmp_path, zipped):
    shared = torch.arange(24.0).reshape(2, 3, 4)
    made = {
        "ours": OrderedDict(a=shared, b=shared[1, :, ::2].half(), c=shared.permute(2, 0, 1)),
        "kinds": [torch.ones(3, dtype=kind) for kind in (torch.int64, torch.bfloat16, torch.bool, torch.uint8)],
        "parameter": torch.nn.Parameter(torch.randn(2)),
        "empty": torch.empty(0, 7),
        "plain": {3: (1, -(2**40), 2.5, None, True, "text, é"), "nested": [[], {}, ()]},
    }
    torch.save(made, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    found, wanted = torch_file.unpickled(tmp_path / "x.pt"), torch.load(tmp_path / "x.pt", weights_only=True)
    assert found["plain"] == wanted["plain"] == made["plain"]
    for name in "abc":
        assert torch.equal(found["ours"][name], wanted["ours"][name])
        assert found["ours"][name].stride() == wanted["ours"][name].stride()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found["kinds"], wanted["kinds"], strict=True))
    assert torch.equal(found["parameter"], made["parameter"]) and found["empty"].shape == (0, 7)


def test_a_pickle_that_runs_code_when_it_is_loaded_is_not_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "owned",)

    for data in (pickle.dumps({"a": Evil()}, 4), pickle.dumps({"a": Evil()}, 0)):
        malformed.archive(tmp_path / "x.ckpt", data)
        with pytest.raises(ConfigError, match="is code: it was not run"):
            torch_file.unpickled(tmp_path / "x.ckpt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "'a' is there twice"),
        ('{"a": [NaN]}', "NaN is no number"),
        ('{"a": 1e999}', "1e999 is no number"),
        ('{"a": "\\ud800"}', "half a character"),
        ('{"a":' + "[" * 65 + "]" * 65 + "}", "deeper than 64 levels"),
        ("[1]", "no JSON object but a list"),
        ('{"a": [' + "[]," * 2**20 + "[]]}", "more than 1048576 lists"),
    ],
)
def test_json_is_read_strictly(text, said):
    with pytest.raises(ConfigError, match=f"^it .*{said}"):
        untrusted.parse_json(text, "it")


def test_plain_settings_are_read(tmp_path):
    settings = {"a": [1, 2.5, True, None, "é"], "b": {"c": [[], {}]}}
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(settings).encode())
    assert untrusted.read_json(tmp_path / "x.json") == settings
    (tmp_path / "x.yaml").write_text("a: &one [1, 2.5, true, null, é]\nb: {c: [[], {}], again: *one}\n")
    found = untrusted.read_yaml(tmp_path / "x.yaml")
    assert found["a"] == found["b"].pop("again") == settings["a"] and found["b"] == settings["b"]


def test_what_is_shared_counts_wherever_it_stands():
    tree: list = ["x"]
    for _ in range(19):  # 2^20 values in 20 lists
        tree = [tree, tree]
    with pytest.raises(ConfigError, match="more than 1048576 values"):
        untrusted.check_tree(tree, "it")
    untrusted.check_tree(tree[0][0], "it")
    loop: list = []
    loop.append([loop])
    with pytest.raises(ConfigError, match="in itself"):
        untrusted.check_tree({"a": loop}, "it")


def test_networks_stop_growing_before_they_are_built():
    for node in (
        {"_target_": UNET, "layers_per_block": 1000, "transformer_depth": 1000},
        {"_target_": TEXT, "layers": 1000, "width": 2**20, "heads": 1, "vocab_size": 2**20},
    ):
        try:
            state = expected(node)
        except ConfigError as error:
            assert f"more than {MODULES} modules" in str(error)
        else:  # on the meta device: names and shapes alone
            assert len(state) < MODULES and all(v.is_meta for v in state.values())


def test_a_tokenizer_is_copied_without_code_paths_or_padding(tmp_path):
    save_tokenizer(build_tokenizer(["a red star", "blue"], 560), tmp_path / "words")
    plain = load_tokenizer(tmp_path / "words")
    malformed.edit(
        tmp_path / "words/tokenizer_config.json",
        tokenizer_class="Evil",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        vocab_file="/dev/zero",
        init_inputs=["/dev/zero"],
        chat_template="{{ x }}",
        model_max_length=10**30,
    )
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_id": 0, "pad_type_id": 0, "pad_token": "a"}
    malformed.edit(tmp_path / "words/tokenizer.json", padding=padding)
    found = load_tokenizer(tmp_path / "words")
    assert type(found) is type(plain) and "auto_map" not in found.init_kwargs
    for caption in ("a red star", "Blue, 7 stars!", "猫 <|endoftext|> x"):
        assert content(found, [caption]) == content(plain, [caption])
