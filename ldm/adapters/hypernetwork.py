"""Hypernetworks as AUTOMATIC1111's web page has them: small networks on what attention reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import HypernetworkTensors
from ldm.errors import ConfigError
from ldm.text.encoder import TextEncoder

_READERS = {"k": ("to_k", "add_k_proj"), "v": ("to_v", "add_v_proj")}  # the second: joint attention's map of the text
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,  # what the web page means by it
    "hardswish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "mish": nn.Mish,
    "selu": nn.SELU,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
}


class Hypernetwork(Adapter):
    """context_k = context + f_k(context), context_v = context + f_v(context) in every attention, f chosen by its width.

    The context is the text's states in cross-attention, the tokens themselves in self-attention. f is 0 at first.
    """

    kind = "hypernetwork"
    formats = ("a1111",)

    def __init__(
        self,
        widths: Sequence[int] | None = None,  # contexts that get networks; null: all that the model's attentions read
        structure: Sequence[float] = (1, 2, 1),  # widths of the networks' layers, as multiples of the context's
        activation: str = "linear",  # none, or relu, swish, tanh ...
        layer_norm: bool = False,
        activate_output: bool = False,  # activation, norm and dropout after the last layer, too
        dropout: Sequence[float] | None = None,  # probabilities after each width of `structure`; first and last are 0
        lr: float | None = None,
        format: str | None = None,
    ):
        super().__init__(lr, format)
        _check(structure, activation, dropout)
        self.widths, self.structure, self.activation = widths, [float(s) for s in structure], activation
        self.layer_norm, self.activate_output = layer_norm, activate_output
        self.dropout = None if dropout is None else [float(p) for p in dropout]
        self.networks = nn.ModuleDict()  # width -> its two networks, "k" and "v"
        self._given: HypernetworkTensors | None = None

    @classmethod
    def of(cls, content: HypernetworkTensors) -> Hypernetwork:
        """The hypernetwork that a file holds."""
        made = cls(
            sorted(content.networks),
            content.structure,
            content.activation,
            content.layer_norm,
            content.activate_output,
            content.dropout,
        )
        made._given = content
        return made

    def attach(self, network: nn.Module, text_encoder: TextEncoder) -> None:
        readers = [
            (kind, layer)
            for module in network.modules()
            for kind, maps in _READERS.items()
            for name in maps
            if isinstance(layer := getattr(module, name, None), nn.Linear)
        ]
        found = sorted({layer.in_features for _, layer in readers})
        strangers = sorted(set(self.widths or ()) - set(found))
        if strangers and self._given is None:
            raise ConfigError(
                f"adapter.hypernetwork.widths has {strangers[0]}, but this model's attentions read {found}: leave it "
                "out."
            )
        if strangers or not found:
            raise ConfigError(
                f"the hypernetwork is for contexts of {strangers} numbers, this model's attentions read {found} "
                "(Stable Diffusion 1's text has 768, 2's 1024): load the base that it was trained on."
            )
        for width in found if self.widths is None else self.widths:
            self.networks[str(width)] = nn.ModuleDict({kind: self._network(int(width)) for kind in "kv"})
        if self._given is not None:
            self._fill(self._given)
        device = next(network.parameters()).device
        self.networks.to(device)
        for kind, layer in readers:
            if str(layer.in_features) in self.networks:
                part: Any = self.networks[str(layer.in_features)]
                self._handles.append(layer.register_forward_pre_hook(partial(self._changed, part[kind])))

    def check_state(self, state: Mapping[str, Tensor], where: str) -> None:
        widths = {name.split(".")[1] for name in state if name.startswith("networks.")}
        for width in widths:
            with torch.device("meta"):
                wanted = (
                    {k: v.shape for k, v in self._network(int(width)).state_dict().items()} if width.isdigit() else {}
                )
            for kind in "kv":
                start = f"networks.{width}.{kind}."
                if wanted != {k.removeprefix(start): v.shape for k, v in state.items() if k.startswith(start)}:
                    raise ConfigError(f"{where} says structure={self.structure}, and its tensors are of other sizes.")
        if self.widths is not None and widths != {str(width) for width in self.widths}:
            raise ConfigError(f"{where} says widths={list(self.widths)[:3]}, and its tensors are of others.")

    def _changed(self, network: nn.Module, layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        context = args[0]
        return (context + self.strength * network(context.float()).to(context.dtype), *args[1:])

    def _network(self, width: int) -> nn.Module:
        """The sequence that published files index: linear, activation, norm, dropout for each layer, as far as used."""
        sizes = [int(width * share) for share in self.structure]
        steps: list[nn.Module] = []
        for i, (size, following) in enumerate(pairwise(sizes)):
            steps.append(nn.Linear(size, following))
            last = i == len(sizes) - 2
            if self.activation != "linear" and (not last or self.activate_output):
                steps.append(ACTIVATIONS[self.activation]())
            if self.layer_norm:
                steps.append(nn.LayerNorm(following))
            if self.dropout is not None and self.dropout[i + 1] > 0:
                steps.append(nn.Dropout(self.dropout[i + 1]))
        final = next(s for s in reversed(steps) if isinstance(s, nn.LayerNorm | nn.Linear))
        for tensor in final.parameters():  # f is 0 at first; where a sigmoid follows it cannot be
            nn.init.zeros_(tensor)
        return nn.Sequential(*steps)

    def _fill(self, given: HypernetworkTensors) -> None:
        for width, pair in given.networks.items():
            for kind, state in zip("kv", pair, strict=True):
                network: Any = self.networks[str(width)]
                theirs = {name.removeprefix("linear."): tensor.float() for name, tensor in state.items()}
                own = network[kind].state_dict()
                wrong = sorted(own.keys() ^ theirs.keys()) or [k for k in own if own[k].shape != theirs[k].shape]
                if wrong:
                    raise ConfigError(
                        f"the hypernetwork's tensors are not those that it says of itself (layer_structure="
                        f"{self.structure}, activation={self.activation}; first that does not fit: {width}.{wrong[0]})."
                    )
                network[kind].load_state_dict(theirs)

    def content(self) -> HypernetworkTensors:
        networks = {}
        for width, pair in self.networks.items():
            k, v = (
                {f"linear.{n}": t.detach() for n, t in pair[kind].state_dict().items()}  # type: ignore[index]
                for kind in "kv"
            )
            networks[int(width)] = (k, v)
        return HypernetworkTensors(
            networks,
            self.structure,
            self.activation,
            self.layer_norm,
            self.activate_output,
            self.dropout,
        )


def _check(structure: Sequence[float], activation: str, dropout: Sequence[float] | None) -> None:
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1:
        raise ConfigError(
            f"adapter.hypernetwork.structure={list(structure)}: must begin and end with 1, as [1, 2, 1] does, because "
            "its output is added to its input."
        )
    if activation != "linear" and activation not in ACTIVATIONS:
        raise ConfigError(
            f"hypernetwork activation {activation} is not known: choose linear, {', '.join(ACTIVATIONS)}."
        )
    if dropout is not None and len(dropout) != len(structure):
        raise ConfigError(
            f"adapter.hypernetwork.dropout has {len(dropout)} numbers, structure {len(structure)}: one for each width."
        )
