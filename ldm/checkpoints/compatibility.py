"""Whether checkpoints are of one architecture, schedule and vocabulary, so that their tensors mean the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.config.check import locate
from ldm.errors import ConfigError
from ldm.formats.content import DIFFUSION_NODES, State, Stored, meaning
from ldm.formats.match import match
from ldm.text.tokenizer import load_tokenizer


def check_compatible(first: Stored, other: Stored, shapes: Mapping[str, State], widens: bool = False) -> None:
    """ConfigError that names the node, or the vocabulary, in which a checkpoint differs from the first one.

    shapes: part -> the state that both must have, on the meta device. widens: the first may have more input channels.
    """
    if ("unet" in first.states) != ("unet" in other.states):
        alone, whole = (first, other) if "unet" in other.states else (other, first)
        raise ConfigError(
            f"{alone.folder} is an autoencoder and {whole.folder} a whole model: give checkpoints of one kind."
        )
    for key in DIFFUSION_NODES:
        if key in first.config and key in other.config:
            difference = _difference(first.config[key], other.config[key], key, ("in_channels",) if widens else ())
            if difference is not None:
                name, mine, theirs = difference
                raise ConfigError(
                    f"{other.folder} has {name}={theirs}, {first.folder} has {mine}: their tensors do not mean the "
                    "same, so there is no merging them. Give checkpoints of one architecture, schedule and target."
                )
    for part, wanted in shapes.items():
        if part in other.states:
            if widens and part == "unet":
                wanted = _with_inputs_of(other.states[part], wanted)
            match(other.states[part], wanted, f"{other.folder} ({part})")
    if first.tokenizer is not None and other.tokenizer is not None and first.tokenizer != other.tokenizer:
        mine, theirs = _words(first.tokenizer), _words(other.tokenizer)
        if mine != theirs:
            raise ConfigError(
                f"{other.folder} and {first.folder} have different vocabularies ({len(theirs)} and {len(mine)} words): "
                "one embedding would stand for two words. Give checkpoints with the same tokenizer."
            )


def _with_inputs_of(state: State, wanted: State) -> State:
    """The wanted shapes, with the fewer input channels that a state has."""
    for name in ("conv_in.weight", "pos_embed.proj.weight"):  # U-Net; transformers
        if name in state and name in wanted and state[name].shape[1] < wanted[name].shape[1]:
            return {**wanted, name: wanted[name][:, : state[name].shape[1]]}
    return wanted


def _words(folder: Path) -> dict[str, int]:
    return load_tokenizer(folder).get_vocab() if any(folder.iterdir()) else {}


def _difference(
    first: Mapping[str, Any], second: Mapping[str, Any], key: str, aside: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first setting in which two nodes differ, and its values; None where they mean the same."""
    one, other = (_class(node, key) for node in (first, second))
    if not (issubclass(one, other) or issubclass(other, one)):
        return key, first["_target_"], second["_target_"]
    ours, theirs = _meaning(first, one), _meaning(second, other)
    for name in ours:
        if name in theirs and name not in aside and ours[name] != theirs[name]:
            return f"{key}.{name}", ours[name], theirs[name]
    return None


def _class(node: Mapping[str, Any], key: str) -> type:
    target = locate(node["_target_"], key)
    assert isinstance(target, type), target
    return target


def _meaning(node: Mapping[str, Any], kind: type) -> dict[str, Any]:
    parameters = inspect.signature(kind).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return meaning(found | {k: v for k, v in node.items() if not k.startswith("_")})
