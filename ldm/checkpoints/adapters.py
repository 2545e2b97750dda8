"""Adapters between a model in memory and files: ours in runs, everybody's beside them, and merged into the model."""

from __future__ import annotations

import re
from pathlib import Path

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import Content, Embedding, Lora
from ldm.adapters.hypernetwork import Hypernetwork
from ldm.adapters.lora import LoRA
from ldm.adapters.textual_inversion import TextualInversion
from ldm.build import build
from ldm.checkpoints.components import Components, load_state
from ldm.checkpoints.folder import State, find, load_parts, read_config
from ldm.checkpoints.load import load_any
from ldm.errors import ConfigError, NotFinite
from ldm.formats.adapters import adapter_kind, read_adapter, write_adapter
from ldm.formats.kinds import is_ours
from ldm.untrusted import place as what_is_at

# Those of checkpoints that adapters share are not among them: "diffusers" is a folder where a model is meant.
ADAPTER_FORMATS = ("kohya", "peft", "a1111")


def load_adapters(
    path: str | Path, parts: Components, strength: float = 1.0, token: str | None = None
) -> list[Adapter]:
    """Attaches what `path` holds: a file in anybody's layout, or a run or checkpoint folder of ours with adapters.

    token: the word of an embedding, where its file does not say it or another is wanted.
    """
    path = Path(path).expanduser()
    network, text_encoder = parts.network, parts.text_encoder
    assert text_encoder is not None
    made: list[Adapter] = []
    try:
        if is_ours(path):
            _attach_of_run(path, parts, made)
        else:
            for adapter in adapters_of(read_adapter(path, weight_names(parts), token)):
                made.append(adapter)
                adapter.attach(network, text_encoder)
        _set_strength(made, strength, path)
    except ConfigError:  # all or nothing
        for adapter in made:
            adapter.detach()
        raise
    for adapter in made:
        adapter.eval().requires_grad_(False)
    return made


def _set_strength(adapters: list[Adapter], strength: float, path: Path) -> None:
    """Words of a run have none; where nothing else is there that could have it, it is refused."""
    weighed = [adapter for adapter in adapters if not isinstance(adapter, TextualInversion)]
    for adapter in weighed:
        adapter.strength = strength
    if strength != 1 and not weighed:
        word = next(a.placeholder for a in adapters if isinstance(a, TextualInversion))
        raise ConfigError(
            f"{path}: new words have no weight of their own ({strength:g} was asked). Leave it out, and weigh the word "
            f"in the prompt: prompt_weights=true, ({word}:{strength:g})."
        )


def adapters_of(content: Content) -> list[Adapter]:
    """The adapters that a file's content is, not attached yet: a LoRA brings the words that its file bundles."""
    if isinstance(content, Lora):
        words: list[Adapter] = [TextualInversion.of(word) for word in content.words]
        return [LoRA.of(content), *words] if content.layers else words
    if isinstance(content, Embedding):
        return [TextualInversion.of(content)]
    return [Hypernetwork.of(content)]


def save_adapters(adapters: dict[str, Adapter], folder: Path, name: str) -> list[Path]:
    """A file for each, in its format, under the name by which prompts call it: its word, or `name`."""
    written = []
    for adapter in adapters.values():
        content = adapter.content()
        stem = re.sub(r"[^\w-]+", "", content.token or "") if isinstance(content, Embedding) else ""
        end = ".pt" if adapter.format == "a1111" else ".safetensors"
        path = folder / f"{stem or name}{end}"
        if path in written:
            path = folder / f"{stem or name}-{adapter.kind}{end}"
        write_adapter(content, path, adapter.format)
        written.append(path)
    return written


def is_adapter(path: str | Path) -> bool:
    """Whether a path is an adapter's own file or folder, in anybody's layout; False for what cannot be read."""
    place = Path(path).expanduser()
    try:
        if what_is_at(place) == "nothing" or is_ours(place):
            return False
        adapter_kind(place)
    except ConfigError:
        return False
    return True


def convert_adapter(path: str | Path, output: Path, format: str, dtype: str = "float32", weights: str = "ema") -> None:
    """An adapter's file, or that of a run of ours, in another program's format."""
    if is_adapter(path):
        contents = [read_adapter(path)]
    else:
        adapters = load_any(path, weights).adapters
        contents = [adapter.content() for adapter in adapters.values() if format in adapter.formats]
    if len(contents) != 1:
        raise ConfigError(
            f"checkpoint={path} has {len(contents)} adapters that could be format={format}: give the file of one of "
            "them, in its run's export/."
        )
    write_adapter(contents[0], output, format, dtype)


def merged_states(parts: Components) -> dict[str, State]:
    """Tensors of all parts with LoRAs worked into them. ConfigError for adapters that weights cannot hold."""
    states = {part: dict(module.state_dict()) for part, module in parts.modules().items()}
    for name, adapter in parts.adapters.items():
        content = adapter.content()
        if not isinstance(content, Lora):
            raise ConfigError(
                f"the model has a {adapter.kind} ({name}), which no checkpoint's weights can hold: it leaves as a file "
                "of its own (export/ of its run). Take the adapter off, or load the base alone."
            )
        for layer, update in content.layers.items():
            part, path = layer.split(".", 1)
            weight = states[part][f"{path}.weight"]
            states[part][f"{path}.weight"] = update.merged(weight, adapter.strength).to(weight.dtype)
    return states


def _attach_of_run(path: Path, parts: Components, made: list[Adapter]) -> None:
    """Attaches all adapters of a run; `made` holds those that it came to, also when one does not fit."""
    folder = find(path)
    nodes = read_config(folder).get("adapter") or {}
    if not nodes:
        raise ConfigError(f"{path} is a whole model without adapters: load it as checkpoint=, not as an adapter.")
    assert parts.text_encoder is not None
    states = load_parts(folder, only=list(nodes))
    for name, node in nodes.items():
        if name not in states:
            raise ConfigError(f"{folder} describes an adapter {name} and holds no tensors of it: fetch the whole run.")
        made.append(build(node, f"adapter.{name}"))
        made[-1].check_state(states[name], f"{folder}: its adapter {name}")
        made[-1].attach(parts.network, parts.text_encoder)
        load_state(made[-1], states[name], name, folder)
        wrong = [key for key, tensor in states[name].items() if not bool(tensor.isfinite().all())]
        if wrong:
            raise NotFinite(
                f"{folder} holds NaN or infinities in its {name} ({wrong[0]}): give another step of the run."
            )


def weight_names(parts: Components) -> list[str]:
    """All that a LoRA could change, as files call it."""
    return [f"{part}.{name}" for part, module in parts.modules().items() for name in module.state_dict()]
