"""Folders and files that are not what they say: a small model in every layout, and a table of what is done to a copy.

tests/formats/test_malformed.py reads some through Python, experiments/009_malformed all through the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HUGE = 10**9


class Kept:
    """A pickle written by hand: `instructions` between its head and its end."""

    def __init__(self, instructions: bytes):
        self.data = b"\x80\x02" + instructions + b"."


def make_base(folder: Path) -> Path:
    """pipe/ (diffusers), run/ (a checkpoint folder of ours), single.safetensors; lora.safetensors, word.pt, ..."""
    from ldm.adapters.content import Embedding, HypernetworkTensors, Lora, LowRank
    from ldm.checkpoints.components import build_components
    from ldm.checkpoints.save import save_any
    from ldm.formats.adapters import write_adapter
    from ldm.formats.match import AUTOENCODER, TEXT, UNET
    from ldm.text.tokenizer import build_tokenizer

    nodes = {
        "model": {
            "_target_": UNET,
            "block_channels": [32, 32],
            "attention_levels": [True, False],
            "layers_per_block": 1,
            "cross_attention_dim": 32,
            "num_heads": 4,
            "norm_groups": 8,
        },
        "autoencoder": {"_target_": AUTOENCODER, "block_channels": [8, 8], "layers_per_block": 1, "norm_groups": 4},
        "text_encoder": {"_target_": TEXT, "vocab_size": 600, "max_length": 16, "width": 32, "layers": 2, "heads": 2},
        "scheduler": {"_target_": "ldm.diffusion.schedulers.ScaledLinear"},
        "parameterization": {"_target_": "ldm.diffusion.parameterizations.Eps"},
        "image_size": 16,
    }
    torch.manual_seed(0)
    parts = build_components(nodes)
    parts.autoencoder.latents.set(0.0, 1 / 0.18215)
    parts.text_encoder.set_tokenizer(build_tokenizer(["a red star", "a blue cat"], 600))
    save_any(parts, folder / "pipe", "diffusers")
    save_any(parts, folder / "run", "ldm")
    save_any(parts, folder / "single.safetensors", "compvis")
    shape = parts.network.state_dict()["mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"].shape
    update = LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2), 2.0)
    write_adapter(
        Lora({"unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q": update}),
        folder / "lora.safetensors",
        "kohya",
    )
    write_adapter(Embedding("<new>", torch.randn(2, 32)), folder / "word.pt", "a1111")
    network = {"linear.0.weight": torch.randn(64, 32), "linear.0.bias": torch.randn(64)}
    network |= {"linear.1.weight": torch.randn(32, 64), "linear.1.bias": torch.randn(32)}
    write_adapter(HypernetworkTensors({32: (network, network)}), folder / "hyper.pt", "a1111")
    return folder


def edit(path: Path, **changes: Any) -> None:
    """Some keys of a JSON file changed; NaN and infinities as Python writes them."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def sealed(folder: Path) -> Path:
    """A checkpoint folder of ours whose manifest fits whatever was done to its files."""
    files = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file() and p.name != "manifest.json"
    }
    entries = {
        n: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()} for n, p in files.items()
    }
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 0, "files": entries}))
    return folder


def header(path: Path, said: Any, numbers: bytes = b"", length: int | None = None) -> Path:
    """A .safetensors file with any header."""
    text = said if isinstance(said, bytes) else json.dumps(said).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + numbers)
    return path


def archive(path: Path, program: bytes, numbers: bytes = b"", compressed: bool = False) -> Path:
    """A zip archive like torch's, with any pickle in it."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", numbers)
    return path


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def named(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tensor(count: int, size: tuple[int, ...], stride: tuple[int, ...]) -> bytes:
    """A state dict of one tensor over a storage of `count` numbers."""
    numbers = b"".join(
        b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", n) for n in row) + b"t" for row in (size, stride)
    )
    storage = b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + b"\x8a\x08"
    storage += struct.pack("<q", count) + b"tQ"
    rebuilt = named("torch._utils._rebuild_tensor_v2") + b"(" + storage + b"K\x00" + numbers + b"\x89N" + b"tR"
    return b"\x80\x02}" + text("state_dict") + b"}" + text("model.diffusion_model.x") + rebuilt + b"ss."


def legacy(program: bytes) -> bytes:
    """The layout before zip archives, with any pickle as its content."""
    head = [0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True}]
    return b"".join(pickle.dumps(item, 2) for item in head) + program + pickle.dumps(["0"], 2)


def numbered(value: Any, **names: Any) -> Any:
    """The same tree of settings with every whole number (no flag) replaced."""
    if isinstance(value, dict):
        return {k: numbered(v, **names) for k, v in value.items()}
    if isinstance(value, list):
        return [numbered(v, **names) for v in value]
    return names["by"] if type(value) is int else value


Make = Callable[[Path], Path]
CASES: list[tuple[str, str, Make]] = []  # what it is, by which door, what is done to a copy of the base: what to open


def case(name: str, *doors: str) -> Callable[[Make], Make]:
    def kept(make: Make) -> Make:
        CASES.extend((name, door, make) for door in doors)
        return make

    return kept


def settings(file: str, name: str, door: str = "sample", **changes: Any) -> None:
    """A case that changes some keys of a JSON file of the pipeline's."""

    def make(base: Path) -> Path:
        edit(base / "pipe" / file, **changes)
        return base / "pipe"

    CASES.append((f"{file}: {name}", door, make))


def raw(file: str, name: str, content: bytes, door: str = "sample", top: str = "pipe") -> None:
    """A case that replaces a file of a folder."""

    def make(base: Path) -> Path:
        (base / top / file).write_bytes(content)
        return sealed(base / top) if top == "run" and file != "manifest.json" else base / top

    CASES.append((f"{top}/{file}: {name}", door, make))


def alone(end: str, name: str, make: Callable[[Path], Any], *doors: str) -> None:
    """A case that is one file."""

    def made(base: Path) -> Path:
        make(base / f"x.{end}")
        return base / f"x.{end}"

    CASES.extend((f"{end}: {name}", door, made) for door in doors or ("sample",))


# diffusers' settings.
for _value in (0, -1, HUGE, 1.5, True, None, "8", float("nan"), [], [8] * 1000, {"a": 1}):
    settings("unet/config.json", f"layers_per_block={str(_value)[:12]}", layers_per_block=_value)
for _key in ("block_out_channels", "attention_head_dim", "norm_num_groups", "in_channels", "cross_attention_dim"):
    for _value in (0, -4, HUGE, [HUGE, HUGE], "many", [None, None]):
        settings("unet/config.json", f"{_key}={_value}", "load", **{_key: _value})
settings("unet/config.json", "10^9 transformers", transformer_layers_per_block=HUGE)
settings("unet/config.json", "10^9 layers", "train", layers_per_block=HUGE)
settings("unet/config.json", "unknown blocks", down_block_types=["Block"] * 2)
settings("unet/config.json", "blocks that are no texts", down_block_types=[[1], {}])
settings("unet/config.json", "sample_size 10^9", sample_size=HUGE)
settings("unet/config.json", "sample_size a list of texts", "convert", sample_size=["64", "64"])
for _value in (0, -1, float("nan"), float("inf"), None, "much", [1], True):
    settings("vae/config.json", f"scaling_factor={_value}", "sample" if _value == 0 else "load", scaling_factor=_value)
settings("vae/config.json", "shift_factor text", "load", shift_factor="far")
settings("vae/config.json", "10^9 layers", "convert", layers_per_block=HUGE)
settings(
    "vae/config.json",
    "1000 levels",
    "encode",
    block_out_channels=[8] * 1000,
    down_block_types=["DownEncoderBlock2D"] * 1000,
)
for _key, _value in (
    ("num_hidden_layers", HUGE),
    ("num_hidden_layers", -3),
    ("hidden_size", HUGE),
    ("num_attention_heads", 0),
    ("vocab_size", 10**12),
    ("max_position_embeddings", "77"),
    ("hidden_act", 7),
    ("hidden_act", "os.system"),
    ("layer_norm_eps", None),
    ("text_config", [1]),
    ("eos_token_id", "x"),
):
    settings("text_encoder/config.json", f"{_key}={_value}", "merge" if _value == HUGE else "load", **{_key: _value})
for _index in ([], "text", None, 7):
    raw("model_index.json", f"a JSON {type(_index).__name__}", json.dumps(_index).encode())
settings("model_index.json", "parts that are no pairs", unet="UNet2DConditionModel", vae=[], text_encoder=[1, 2, 3])
settings("model_index.json", "classes that are no texts", unet=["diffusers", {"a": []}], _class_name=[[]] * 99)
raw("unet/config.json", "a key twice", b'{"in_channels": 4, "in_channels": 5}')
raw("unet/config.json", "nested 10^6 deep", b'{"a":' + b"[" * 10**6 + b"]" * 10**6 + b"}")
raw("unet/config.json", "100 MB", b"{" + b" " * 10**8 + b"}")
raw("unet/config.json", "not UTF-8", b'{"a": "\xff"}')
raw("unet/config.json", "10^6 digits", b'{"in_channels": ' + b"9" * 10**6 + b"}")
raw("unet/config.json", "cut", b'{"in_chan', "evaluate")


def index(name: str, said: Any, door: str = "load") -> None:
    def make(base: Path) -> Path:
        part = base / "pipe/unet"
        (part / "diffusion_pytorch_model.safetensors").rename(part / "one.safetensors")
        (part / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(said))
        return base / "pipe"

    CASES.append((f"index.json: {name}", door, make))


index("a list", [1, 2], "sample")
index("no weight_map", {"metadata": {}})
index("weight_map a list", {"weight_map": ["one.safetensors"]})
index("weight_map of numbers", {"weight_map": {"a": 7}})
index("out of its folder", {"weight_map": {"a": "../vae/diffusion_pytorch_model.safetensors"}})
index("an absolute path", {"weight_map": {"a": "/dev/zero"}})
index("itself", {"weight_map": {"a": "diffusion_pytorch_model.safetensors.index.json"}})
index("a missing shard", {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})

# Tokenizers.
raw("tokenizer/tokenizer.json", "cut", b'{"model": {"vocab": {"a"')
raw("tokenizer/tokenizer.json", "no model", b'{"version": "1.0"}', "load")
raw(
    "tokenizer/tokenizer.json",
    "one id twice",
    b'{"model": {"type": "BPE", "vocab": {"a": 1, "b": 1}, "merges": []}}',
    "load",
)
raw("tokenizer/tokenizer.json", "ids 10^12", b'{"model": {"vocab": {"a": 1000000000000}, "merges": []}}', "load")
raw("tokenizer/tokenizer.json", "merges of nothing", b'{"model": {"vocab": {"a": 1}, "merges": ["a b"]}}', "load")
raw("tokenizer/tokenizer.json", "without marks", b'{"model": {"vocab": {"a": 0}, "merges": []}}', "load")
settings("tokenizer/tokenizer_config.json", "marks that are numbers", "load", bos_token=7)


@case("tokenizer: ids outside the embedding", "sample", "convert")
def _outside(base: Path) -> Path:
    found = json.loads((base / "pipe/tokenizer/tokenizer.json").read_text())
    found["model"]["vocab"] = {k: i + 500 for k, i in found["model"]["vocab"].items()}
    found["added_tokens"] = []
    (base / "pipe/tokenizer/tokenizer.json").write_text(json.dumps(found))
    return base / "pipe"


@case("tokenizer: merges.txt cut", "load")
def _cut_merges(base: Path) -> Path:
    (base / "pipe/tokenizer/tokenizer.json").unlink()
    (base / "pipe/tokenizer/merges.txt").write_text("#version: 0.2\nr e\nre\n")
    return base / "pipe"


# Single files: safetensors.
F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
alone("safetensors", "empty", lambda p: p.write_bytes(b""), "sample", "adapter")
alone("safetensors", "a header of 10^12 bytes", lambda p: header(p, b"{}", length=10**12), "sample", "merge")
alone("safetensors", "a key twice", lambda p: header(p, b'{"a":' + json.dumps(F32).encode() + b',"a":{}}', b"1234"))
alone("safetensors", "overlapping", lambda p: header(p, {"a": F32, "b": F32}, b"1234"))
alone(
    "safetensors",
    "out of the file",
    lambda p: header(p, {"a": F32 | {"data_offsets": [0, 10**12], "shape": [10**12 // 4]}}, b"1234"),
)
alone("safetensors", "negative", lambda p: header(p, {"a": F32 | {"data_offsets": [-4, 0]}}, b"1234"))
alone("safetensors", "of no known type", lambda p: header(p, {"a": F32 | {"dtype": "F7"}}, b"1234"), "convert")
alone("safetensors", "metadata a list", lambda p: header(p, {"__metadata__": [1], "a": F32}, b"1234"))
alone("safetensors", "a header nested 10^5 deep", lambda p: header(p, b'{"a":' + b"[" * 10**5))
alone("safetensors", "shape of texts", lambda p: header(p, {"a": F32 | {"shape": "1"}}, b"1234"), "adapter")
alone("safetensors", "a folder", lambda p: p.mkdir(), "sample", "adapter")
alone("safetensors", "a pipe", os.mkfifo, "sample", "convert", "adapter", "merge", "train")
alone("safetensors", "/dev/zero", lambda p: p.symlink_to("/dev/zero"), "sample", "adapter")
alone("safetensors", "a link to itself", lambda p: p.symlink_to(p), "sample", "adapter")
alone(
    "safetensors",
    "10^4 layers by one name",
    lambda p: save_file(
        {
            "cond_stage_model.transformer.text_model.encoder.layers.999999999.mlp.fc1.bias": torch.ones(1),
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": torch.ones(3, 768),
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": torch.ones(3, 768),
            "model.diffusion_model.x": torch.ones(1),
        },
        p,
    ),
    "convert",
)


def metadata(name: str, key: str, change: Callable[[Any], Any], door: str = "load") -> None:
    def make(base: Path) -> Path:
        path = base / "single.safetensors"
        with path.open("rb") as file:
            said = json.loads(file.read(int.from_bytes(file.read(8), "little")))["__metadata__"]
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        save_file(tensors, path, said | {key: change(said[key])})
        return path

    CASES.append((f"metadata: {name}", door, make))


for _value in (0, -1, HUGE, None, "8", 1.5, True):
    metadata(
        f"all sizes {_value}",
        "ldm.config",
        lambda s, v=_value: json.dumps(numbered(json.loads(s), by=v)),
        "sample" if _value == HUGE else "load",
    )
metadata("a list", "ldm.config", lambda s: "[1]")
metadata("a class of torch's", "ldm.config", lambda s: s.replace("ldm.models.unet.UNet", "torch.nn.Linear"))
metadata("scaling_factor nan", "ldm.scaling_factor", lambda s: "nan")
metadata("scaling_factor text", "ldm.scaling_factor", lambda s: "much")
metadata("words a list", "ldm.tokenizer", lambda s: "[]")
metadata("words cut", "ldm.tokenizer", lambda s: json.dumps({"tokenizer.json": "{"}))

# torch's files.
SELF = b"\x80\x02}q\x00" + text("state_dict") + b"h\x00s."  # a dict that is its own state_dict
alone("ckpt", "a dict in itself", lambda p: archive(p, SELF), "sample", "adapter", "convert", "train")
alone("ckpt", "10^6 nested tuples", lambda p: archive(p, b"\x80\x02})" + b"\x85" * 10**6 + text("a") + b"s."))
alone(
    "ckpt",
    "10^6 nested tuples as a value",
    lambda p: archive(p, b"\x80\x02}" + text("a") + b")" + b"\x85" * 10**6 + b"s."),
)
alone(
    "ckpt",
    "laughs",
    lambda p: archive(
        p, b"\x80\x02}" + text("a") + b"(K\x01lq\x00" + b"(h\x00h\x00h\x00h\x00h\x00h\x00h\x00h\x00lq\x00" * 40 + b"s."
    ),
)
alone(
    "ckpt",
    "os.system",
    lambda p: archive(p, b"\x80\x02" + named("os.system") + text("touch /tmp/owned") + b"\x85R."),
    "sample",
    "adapter",
)
alone(
    "ckpt",
    "bytearray(10^12)",
    lambda p: archive(
        p,
        b"\x80\x02}"
        + text("a")
        + named("builtins.bytearray")
        + b"\x8a\x06"
        + struct.pack("<Q", 10**12)[:6]
        + b"\x85Rs.",
    ),
)
alone(
    "ckpt",
    "FloatTensor(10^10)",
    lambda p: archive(
        p,
        b"\x80\x02}"
        + text("a")
        + named("torch.FloatTensor")
        + b"\x8a\x06"
        + struct.pack("<Q", 10**10)[:6]
        + b"\x85Rs.",
    ),
)
alone("ckpt", "10^12 numbers claimed", lambda p: archive(p, tensor(10**12, (10**12,), (1,)), b"1234"))
alone("ckpt", "10^10 of one number", lambda p: archive(p, tensor(1, (10**5, 10**5), (0, 0)), b"1234"))
alone("ckpt", "numbers outside", lambda p: archive(p, tensor(1, (1,), (10**9,)).replace(b"K\x00", b"K\x07"), b"1234"))
alone("ckpt", "a zip bomb", lambda p: archive(p, tensor(10**8, (10**8,), (1,)), bytes(4 * 10**8), compressed=True))
alone("ckpt", "a reference outside", lambda p: archive(p, b"\x80\x02" + text("/etc/passwd") + b"Q."))
alone("ckpt", "another zip", lambda p: zipfile.ZipFile(p, "w").writestr("word/document.xml", "<x/>"))
alone("ckpt", "a pickle alone", lambda p: p.write_bytes(SELF))
alone("ckpt", "old layout, a dict in itself", lambda p: p.write_bytes(legacy(SELF)))
alone("ckpt", "old layout, 10^12 numbers", lambda p: p.write_bytes(legacy(tensor(10**12, (10**12,), (1,)))))
alone("ckpt", "10^7 instructions", lambda p: archive(p, b"\x80\x02" + b"N0" * 5 * 10**6 + b"N."))
alone("ckpt", "a key that is a list", lambda p: archive(p, b"\x80\x02}]K\x01s."))
alone(
    "ckpt",
    "layer names that are numbers",
    lambda p: torch.save(
        {
            "state_dict": {
                "model.diffusion_model.out.2.weight": torch.ones(()),
                "model.diffusion_model.input_blocks.0.0.weight": torch.ones(1),
            }
        },
        p,
    ),
)


# Our own folders.
for _said in ("[]", "null", '{"files": []}', '{"step": 0, "files": {"config.yaml": 7}}', '{"step": -1, "files": {}}'):
    raw("manifest.json", _said, _said.encode(), "load", "run")
for _name in ("../pipe/model_index.json", "/etc/passwd", "a//b", ""):
    raw(
        "manifest.json",
        f"a file {_name}",
        json.dumps({"step": 0, "files": {_name: {"bytes": 1, "sha256": ""}}}).encode(),
        "load",
        "run",
    )
raw(
    "manifest.json",
    "-5 bytes",
    b'{"step": 0, "files": {"config.yaml": {"bytes": -5, "sha256": ""}}}',
    "evaluate",
    "run",
)
LAUGHS = "a: &a0 [x, x]\n" + "".join(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
MERGES = "a: &a0 {x: 1}\n" + "".join(f"b{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12))
for _name, _yaml in (
    ("a Python tag", b"a: !!python/object/apply:os.system [touch /tmp/owned]"),
    ("billion laughs", LAUGHS.encode()),
    ("merge keys", MERGES.encode()),
    ("nested 10^5 deep", b"a: " + b"[" * 10**5),
    ("in itself", b"a: &a [*a]"),
    ("100 MB", b"# " + b"x" * 10**8),
    ("a text", b"hello"),
    ("a number of 10^5 parts", b"a: 1" + b":1" * 10**5),
    ("no nodes", b"module: latent_diffusion"),
):
    raw("config.yaml", _name, _yaml, "sample" if "laughs" in _name else "load", "run")


def own(name: str, change: Callable[[dict[str, Any]], Any], door: str = "load") -> None:
    def make(base: Path) -> Path:
        import yaml

        path = base / "run/config.yaml"
        nodes = yaml.safe_load(path.read_text())
        change(nodes)
        path.write_text(yaml.safe_dump(nodes))
        return sealed(base / "run")

    CASES.append((f"run/config.yaml: {name}", door, make))


for _key in ("layers_per_block", "transformer_depth", "in_channels", "norm_groups"):
    for _value in (HUGE, 0, -1, "x", None, 1.5, [1]):
        own(
            f"model.{_key}={_value}",
            lambda n, k=_key, v=_value: n["model"].update({k: v}),
            "sample" if _value == HUGE else "load",
        )
own("10^9 layers", lambda n: n["text_encoder"].update(layers=HUGE), "encode")
own("10^9 layers in the network", lambda n: n["model"].update(layers_per_block=HUGE), "train")
own("10^9 words", lambda n: n["text_encoder"].update(vocab_size=HUGE), "evaluate")
own("image_size 10^9", lambda n: n.update(image_size=HUGE), "sample")
own("image_size text", lambda n: n.update(image_size="big"))
own("a node that is a list", lambda n: n.update(model=[1, 2]))
own("a module that is a number", lambda n: n.update(module=5))
own("10^9 levels", lambda n: n["autoencoder"].update(block_channels=[8] * 10**5), "merge")


@case("run: a part is missing", "load", "evaluate")
def _without_part(base: Path) -> Path:
    (base / "run/unet.safetensors").unlink()
    return sealed(base / "run")


@case("run: scale of the latents 0", "sample")
def _zero_scale(base: Path) -> Path:
    path = base / "run/vae.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file(tensors | {"latents.scale": torch.zeros(4)}, path)
    return sealed(base / "run")


@case("run: mean of the latents NaN", "sample")
def _nan_mean(base: Path) -> Path:
    path = base / "run/vae.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    save_file(tensors | {"latents.mean": torch.full((4,), torch.nan)}, path)
    return sealed(base / "run")


# Adapters.
def lora(name: str, change: Callable[[dict[str, torch.Tensor]], Any], door: str = "attach") -> None:
    def make(base: Path) -> Path:
        path = base / "lora.safetensors"
        tensors = {k: v.clone() for k, v in load_file(path).items()}
        change({k.rsplit(".", 2)[-2] if k.endswith("weight") else "alpha": k for k in tensors} | {"": tensors})  # type: ignore[arg-type]
        save_file(tensors, path)
        return path

    CASES.append((f"lora: {name}", door, make))


def _put(role: str, value: torch.Tensor) -> Callable[[Any], None]:
    return lambda names: names[""].update({names[role]: value})


lora("rank 0", _put("lora_down", torch.ones(0, 32)), "adapter")
lora("alpha 10^9", _put("alpha", torch.tensor(1e9)), "adapter")
lora("alpha NaN", _put("alpha", torch.tensor(torch.nan)))
lora("NaN inside", _put("lora_up", torch.full((32, 2), torch.nan)))
lora("pairs that do not fit", _put("lora_up", torch.ones(32, 5)))
lora("of another layer's size", _put("lora_down", torch.ones(2, 77)))
lora("3-D", _put("lora_down", torch.ones(2, 4, 8)))
lora("no pair", lambda names: names[""].pop(names["lora_up"]), "convert_adapter")


def word(name: str, content: Any, door: str = "attach") -> None:
    alone("pt", f"embedding {name}", lambda p: torch.save(content, p), door)


word("of width 0", {"string_to_param": {"*": torch.ones(2, 0)}}, "adapter")
word("3-D", {"string_to_param": {"*": torch.ones(1, 2, 32)}})
word("10^5 vectors", {"string_to_param": {"*": torch.ones(10**5, 32)}}, "adapter")
word("of texts", {"string_to_param": {"*": "vectors"}})
word("in itself", {"string_to_param": [1]})
NETWORK = {"linear.0.weight": torch.ones(64, 32)}
word("hypernetwork, odd settings", {32: (NETWORK, NETWORK), "layer_structure": [1, HUGE, 1]}, "adapter")
word("hypernetwork, 10^400", {10**400: (NETWORK, NETWORK)})
word("hypernetwork, structure of texts", {32: (NETWORK, NETWORK), "layer_structure": "121"})
word("hypernetwork, no networks", {32: 7, "step": "x"})
