"""Tensors against the classes that they should fill: every missing, unknown or misshapen one is an error."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ldm.autoencoders.dc import AutoencoderDC
from ldm.autoencoders.kl import AutoencoderKL
from ldm.autoencoders.vq import VQModel
from ldm.errors import ConfigError
from ldm.formats.content import Node, State
from ldm.formats.files import bounded
from ldm.models.unet import UNet
from ldm.text.clip import CLIPText
from ldm.text.small import SmallTextEncoder

VQ, DC = "ldm.autoencoders.vq.VQModel", "ldm.autoencoders.dc.AutoencoderDC"
UNET, AUTOENCODER, TEXT = "ldm.models.unet.UNet", "ldm.autoencoders.kl.AutoencoderKL", "ldm.text.clip.CLIPText"
CLASSES: dict[str, type[torch.nn.Module]] = {
    UNET: UNet,
    AUTOENCODER: AutoencoderKL,
    VQ: VQModel,
    DC: AutoencoderDC,
    TEXT: CLIPText,
    "ldm.text.small.SmallTextEncoder": SmallTextEncoder,
}
TARGETS = {"unet": UNET, "vae": AUTOENCODER, "text_encoder": TEXT}


def expected(node: Node, where: str = "the model") -> State:
    """The state that fills what a node describes: names and shapes, on the meta device.

    ConfigError, opened by `where`, for nodes that nothing can be built from.
    """
    try:
        return dict(_expected(json.dumps(node)))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error


@lru_cache(maxsize=16)  # a U-Net takes a third of a second to build even on meta, and reading and writing both look
def _expected(node: str) -> State:
    said = json.loads(node)
    kind = CLASSES[said["_target_"]]
    arguments = {k: v for k, v in said.items() if not (k.startswith("_") and k.endswith("_"))}
    bounded.check_arguments(kind, arguments, "its configuration")
    with bounded.building("its configuration"), torch.device("meta"):
        return kind(**arguments).state_dict()


def settings(node: Node, part: str) -> dict[str, Any]:
    """All arguments of a part's own class that a node stands for, defaults included, those of its subclass too."""
    found: dict[str, Any] = {}
    for kind in (CLASSES[TARGETS[part]], CLASSES[node["_target_"]]):
        parameters = inspect.signature(kind).parameters.values()
        found |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return found | {k: v for k, v in node.items() if not k.startswith("_")}


def carries(node: Node, part: str, vq: bool = False) -> bool:
    """Whether a node is of the one architecture that other programs' formats know for this part.

    vq: the format has VQ autoencoders too.
    """
    kind = CLASSES.get(node.get("_target_", ""))
    if kind is VQModel:
        return vq and part == "vae"
    return kind is not None and issubclass(kind, CLASSES[TARGETS[part]])


def architecture(part: str) -> str:
    """Our class for a part, as people call it."""
    return TARGETS[part].rsplit(".", 1)[1]


def filled(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> State:
    """The tensors that `wanted` names, in its order and as they are stored, once they match it."""
    match(state, wanted, source)
    return {k: state[k] for k in wanted}


def match(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """ConfigError that counts what is missing, unknown or of another shape, with the first three names."""
    floating = [k for k in wanted if k in state and wanted[k].is_floating_point()]
    codes = [k for k in floating if not state[k].is_floating_point()]
    if codes:
        raise ConfigError(
            f"{source} has {codes[0]} as {state[codes[0]].dtype}, codes that stand for numbers: quantised files are "
            "not read here. Take the float16, bfloat16 or float32 version."
        )
    missing = [k for k in wanted if k not in state]
    unknown = [k for k in state if k not in wanted]
    shapes = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if not (missing or unknown or shapes):
        return
    examples = [
        f"{key} is {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}" if key in shapes else key
        for key in [*missing[:3], *unknown[:3], *shapes[:3]][:3]
    ]
    raise ConfigError(
        f"{source} does not fit the model that it should fill: {len(missing)} tensors missing, {len(unknown)} unknown, "
        f"{len(shapes)} of another shape (first: {', '.join(examples)}). It is of another architecture, or damaged; "
        "config=DIR, a diffusers folder of the same model, says sizes that a file does not."
    )
