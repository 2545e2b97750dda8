"""LoRA: a low-rank change beside each chosen layer (Hu et al. 2022), and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import Lora, LowRank
from ldm.errors import ConfigError
from ldm.text.encoder import TextEncoder

Changeable = nn.Linear | nn.Conv2d
Chosen = Literal["attention", "transformer", "all"]
_UPDATES: WeakKeyDictionary[nn.Module, list[LowRankUpdate]] = WeakKeyDictionary()  # those attached, by layer


class LoRA(Adapter):
    """y + alpha/rank up(down(x)) for each chosen layer; `up` is 0 at first.

    Kohya's files call the choice "transformer" LoRA, "all" LoCon.
    """

    kind = "lora"
    formats = ("kohya", "peft")

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,  # the update is scaled by alpha/rank; null: alpha = rank
        dropout: float = 0.0,  # of the layer's input, on the way into the update
        layers: Chosen = "attention",  # attention's maps; transformer: all of the transformers; all: resnets' too
        text_encoder: bool = False,  # true: layers of the text encoder, too
        dora: bool = False,  # rows of the weights are turned by the update, their lengths learnt beside it
        lr: float | None = None,
        format: str | None = None,
    ):
        super().__init__(lr, format)
        if rank < 1:
            raise ConfigError(f"adapter.lora.rank={rank}: must be at least 1; 4 to 128 are usual.")
        if layers not in ("attention", "transformer", "all"):
            raise ConfigError(f"adapter.lora.layers={layers}: choose one of attention, transformer, all.")
        if not 0 <= dropout < 1:
            raise ConfigError(f"adapter.lora.dropout={dropout}: must lie in [0, 1).")
        if alpha is not None and alpha <= 0:
            raise ConfigError(f"adapter.lora.alpha={alpha}: must be above 0; null is the rank.")
        self.rank, self.alpha, self.dropout = rank, float(rank if alpha is None else alpha), dropout
        self.layers, self.text_encoder, self.dora = layers, text_encoder, dora
        self.changes_text = text_encoder
        self.updates: nn.Module = nn.Module()  # a tree with the layers' names, LowRankUpdate at its leaves
        self._given: Lora | None = None
        self._layers: list[Changeable] = []

    @classmethod
    def of(cls, content: Lora) -> LoRA:
        """The LoRA that a file holds."""
        made = cls()
        made._given = content
        made.changes_text = any(name.startswith("text_encoder.") for name in content.layers)
        return made

    def attach(self, network: nn.Module, text_encoder: TextEncoder) -> None:
        known = layers_of(network, text_encoder)
        if self._given is not None:
            self._given.check_fits({name: layer.weight for name, layer in known.items()}, "the LoRA")
            starts = self._given.layers
        else:
            chosen = self._chosen(known)
            starts = {n: _first(layer, self.rank, self.alpha, self.dora) for n, layer in chosen.items()}
        for name, start in starts.items():
            _refuse_second(name, known[name], start)
        for name, start in starts.items():
            layer = known[name]
            update = LowRankUpdate(start, layer.weight, self.dropout)
            _grow(self.updates, name, update)
            _UPDATES.setdefault(layer, []).append(update)
            self._layers.append(layer)
            self._handles.append(layer.register_forward_hook(partial(self._changed, update)))

    def check_state(self, state: Mapping[str, Tensor], where: str) -> None:
        ranks = {len(t) if t.ndim else 0 for name, t in state.items() if name.endswith(".down")}
        if ranks != {self.rank}:
            raise ConfigError(
                f"{where} says rank={self.rank}, and its tensors have {sorted(ranks)[:3]}: it was edited."
            )

    def detach(self) -> None:
        super().detach()
        own = list(self.updates.modules())
        for layer in self._layers:
            _UPDATES[layer] = [u for u in _UPDATES[layer] if not any(u is mine for mine in own)]
        self._layers = []

    def _chosen(self, known: dict[str, Changeable]) -> dict[str, Changeable]:
        chosen = {name: layer for name, layer in known.items() if self._wants(name)}
        if not any(name.startswith("unet.") for name in chosen):
            raise ConfigError(f"adapter.lora.layers={self.layers}: this model has no such layers. Choose all.")
        if self.text_encoder and not any(name.startswith("text_encoder.") for name in chosen):
            raise ConfigError("adapter.lora.text_encoder=true: this model's text encoder has no layers. Leave it out.")
        return chosen

    def _wants(self, name: str) -> bool:
        part, path = name.split(".", 1)
        if part == "text_encoder":
            return self.text_encoder and (".self_attn." in path or self.layers != "attention")
        if self.layers == "all":  # of the blocks: what leads in and out of the network is left alone
            return path.split(".", 1)[0].endswith(("block", "blocks"))
        inside = (
            (".attn1.", ".attn2.", ".attn.") if self.layers == "attention" else ("transformer_blocks", "attentions")
        )
        return any(word in path for word in inside)

    def _changed(self, update: LowRankUpdate, layer: Changeable, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return out + self.strength * update(layer, args[0], out)

    def content(self) -> Lora:
        leaves = {n: m for n, m in self.updates.named_modules() if isinstance(m, LowRankUpdate)}
        return Lora(
            {name: update.content() for name, update in leaves.items()}, dict(getattr(self._given, "metadata", {}))
        )


class LowRankUpdate(nn.Module):
    """What is added to one layer's output."""

    alpha: Tensor
    magnitude: nn.Parameter | None

    def __init__(self, start: LowRank, weight: Tensor, dropout: float = 0.0):  # weight: the layer's
        super().__init__()
        down, up = start.down.detach().float(), start.up.detach().float().flatten(1)
        self.down = nn.Parameter(down.reshape(start.rank, *weight.shape[1:]).to(weight.device))
        self.up = nn.Parameter(up.to(weight.device))
        self.register_buffer("alpha", torch.tensor(start.alpha, device=weight.device))
        self.dropout = dropout
        self.magnitude = None
        if start.magnitude is not None:
            self.magnitude = nn.Parameter(start.magnitude.detach().float().flatten().to(weight.device))

    @property
    def scale(self) -> Tensor:
        return self.alpha / self.down.shape[0]

    def forward(self, layer: Changeable, x: Tensor, out: Tensor) -> Tensor:
        """alpha/rank up(down(x)); for DoRA what turning and stretching the whole weight adds to `out`."""
        low = F.dropout(x, self.dropout, self.training)
        if isinstance(layer, nn.Conv2d):
            padding = layer.padding if isinstance(layer.padding, str) else tuple(layer.padding)
            low = F.conv2d(low, self.down.to(x.dtype), None, layer.stride, padding, layer.dilation)
            change = F.conv2d(low, self.up[:, :, None, None].to(x.dtype))
        else:
            change = F.linear(F.linear(low, self.down.to(x.dtype)), self.up.to(x.dtype))
        change = self.scale.to(change.dtype) * change
        if self.magnitude is None:
            return change
        shape = (-1, 1, 1) if isinstance(layer, nn.Conv2d) else (-1,)
        stretch = self._stretch(layer).to(out.dtype).view(shape)
        plain = out if layer.bias is None else out - layer.bias.view(shape).to(out.dtype)
        return (stretch - 1) * plain + stretch * change

    def _stretch(self, layer: Changeable) -> Tensor:  # (out,)
        """magnitude / |W + update| by rows; the length is a constant to the gradient (Liu et al. 2024, section 4.3)."""
        assert self.magnitude is not None
        with torch.no_grad():
            delta = self.scale * (self.up @ self.down.flatten(1))
            lengths = (layer.weight.detach().float().flatten(1) + delta).norm(dim=1)
        return torch.where(lengths > 0, self.magnitude / lengths, 1.0)  # a row of zeros has no direction to stretch

    def content(self) -> LowRank:
        ends = (1,) * (self.down.ndim - 2)
        magnitude = None if self.magnitude is None else self.magnitude.detach()
        return LowRank(
            self.down.detach(), self.up.detach().reshape(*self.up.shape, *ends), float(self.alpha), magnitude
        )


def layers_of(network: nn.Module, text_encoder: nn.Module) -> dict[str, Changeable]:
    """All layers that LoRAs know, by the names that files give them."""
    found: dict[str, Changeable] = {}
    for part, root in (("unet", network), ("text_encoder", text_encoder)):
        found.update({f"{part}.{name}": m for name, m in root.named_modules() if isinstance(m, Changeable)})
    return found


def _first(layer: Changeable, rank: int, alpha: float, dora: bool) -> LowRank:
    """An update that changes nothing yet."""
    weight = layer.weight.detach()
    down = weight.new_empty(rank, *weight.shape[1:], dtype=torch.float32)
    nn.init.kaiming_uniform_(down, a=5**0.5)
    up = weight.new_zeros(weight.shape[0], rank, dtype=torch.float32)
    return LowRank(down, up, alpha, weight.float().flatten(1).norm(dim=1) if dora else None)


def _refuse_second(name: str, layer: Changeable, start: LowRank) -> None:
    """ConfigError for a DoRA beside another update: it sets the lengths of the rows, so their order would count."""
    there = _UPDATES.get(layer, [])
    if there and (start.magnitude is not None or any(update.magnitude is not None for update in there)):
        raise ConfigError(
            f"{name} would be changed by two LoRAs, one of which is a DoRA: that sets the lengths of the rows, so "
            "there is no sum of them. Merge one into the model first, task=merge method=lora, and attach the other."
        )


def _grow(root: nn.Module, name: str, leaf: nn.Module) -> None:
    """Hangs a module into a tree of modules under a name with dots, so that its tensors are called by that name."""
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(last, leaf)
