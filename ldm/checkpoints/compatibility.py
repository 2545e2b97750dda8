"""Whether checkpoints are of one architecture, schedule and vocabulary, so that their tensors mean the same."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm.checkpoints.folder import DIFFUSION_NODES
from ldm.config.check import locate
from ldm.errors import ConfigError
from ldm.formats.content import State, Stored
from ldm.formats.match import ASIDE, match
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
    mine: Mapping[str, Any], theirs: Mapping[str, Any], key: str, aside: Sequence[str] = ()
) -> tuple[str, Any, Any] | None:
    """The first setting in which two nodes differ, and its values; None where they mean the same."""
    one, other = (_class(node, key) for node in (mine, theirs))
    if not (issubclass(one, other) or issubclass(other, one)):
        return key, mine["_target_"], theirs["_target_"]
    said, heard = _said(mine, one), _said(theirs, other)
    for name in said:
        if name in heard and name not in aside and said[name] != heard[name]:
            return f"{key}.{name}", said[name], heard[name]
    return None


def _class(node: Mapping[str, Any], key: str) -> type:
    target = locate(node["_target_"], key)
    assert isinstance(target, type), target
    return target


def _said(node: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """What a node says of the model, defaults spelled out, in plain lists."""
    parameters = inspect.signature(kind).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    found |= {k: v for k, v in node.items() if not k.startswith("_")}
    if found.get("pad") is None:  # the tokenizer's own
        found.pop("pad", None)
    if not any(found.get("attention_levels") or ()):  # of autoencoders: null is none
        found["attention_levels"] = None
    return {k: list(v) if isinstance(v, tuple) else v for k, v in found.items() if k not in ASIDE}
