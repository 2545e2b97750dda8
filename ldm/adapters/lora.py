"""LoRA: a low-rank change beside each chosen layer (Hu et al. 2022), and DoRA (Liu et al. 2024)."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.adapters.adapter import Adapter
from ldm.adapters.content import Lora, LowRank
from ldm.errors import ConfigError
from ldm.text.encoder import TextEncoder

Changeable = nn.Linear | nn.Conv2d
Chosen = Literal["attention", "transformer", "all"]


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
        self.rank, self.alpha, self.dropout = rank, float(rank if alpha is None else alpha), dropout
        self.layers, self.text_encoder, self.dora = layers, text_encoder, dora
        self.changes_text = text_encoder
        self.updates: nn.Module = nn.Module()  # a tree with the layers' names, LowRankUpdate at its leaves
        self._given: Lora | None = None

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
            _refuse_strangers(self._given, known)
            chosen = {name: known[name] for name in self._given.layers}
            _refuse_shapes(self._given, chosen)
        else:
            chosen = {name: layer for name, layer in known.items() if self._wants(name)}
        if not chosen:
            raise ConfigError(f"adapter.lora.layers={self.layers}: this model has no such layers. Choose all.")
        for name, layer in chosen.items():
            update = LowRankUpdate(layer, self.rank, self.alpha, self.dropout, self.dora)
            if self._given is not None:
                update.load(self._given.layers[name])
            _grow(self.updates, name, update)
            self._handles.append(layer.register_forward_hook(partial(self._changed, update)))

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

    def __init__(self, layer: Changeable, rank: int, alpha: float, dropout: float, dora: bool):
        super().__init__()
        weight = layer.weight
        self.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:], dtype=torch.float32))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank, dtype=torch.float32))
        self.register_buffer("alpha", torch.tensor(float(alpha), device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=5**0.5)
        self.dropout = dropout
        lengths = weight.detach().float().flatten(1).norm(dim=1) if dora else None
        self.magnitude = None if lengths is None else nn.Parameter(lengths)

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
        return self.magnitude / lengths

    def load(self, given: LowRank) -> None:
        """Takes a file's tensors; the rank is theirs."""
        device = self.up.device
        self.down = nn.Parameter(given.down.detach().float().reshape(given.rank, *self.down.shape[1:]).to(device))
        self.up = nn.Parameter(given.up.detach().float().flatten(1).to(device))
        self.alpha.fill_(given.alpha)
        if given.magnitude is not None:
            self.magnitude = nn.Parameter(given.magnitude.detach().float().flatten().to(device))
        else:
            self.magnitude = None

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


def _refuse_strangers(lora: Lora, known: dict[str, Changeable]) -> None:
    strangers = sorted(lora.layers.keys() - known.keys())
    if strangers:
        raise ConfigError(
            f"the LoRA changes {len(strangers)} layers that this model does not have (first: {strangers[0]}): it was "
            "made for another architecture. Load the base that it was trained on."
        )


def _refuse_shapes(lora: Lora, layers: dict[str, Changeable]) -> None:
    wrong = []
    for name, update in lora.layers.items():
        weight = layers[name].weight
        fits = update.up.shape[0] == weight.shape[0] and update.down[0].numel() == weight[0].numel()
        if not fits:
            wrong.append((name, (update.up.shape[0], *update.down.shape[1:]), tuple(weight.shape)))
    if wrong:
        name, theirs, ours = wrong[0]
        raise ConfigError(
            f"the LoRA does not fit this model: {len(wrong)} layers are of another size (first: {name}, {theirs} in "
            f"the LoRA, {ours} here). Stable Diffusion 1 reads text of 768 numbers a token, 2 of 1024: load the base "
            "that it was trained on."
        )


def _grow(root: nn.Module, name: str, leaf: nn.Module) -> None:
    """Hangs a module into a tree of modules under a name with dots, so that its tensors are called by that name."""
    *path, last = name.split(".")
    for step in path:
        if step not in root._modules:
            root.add_module(step, nn.Module())
        root = root.get_submodule(step)
    root.add_module(last, leaf)
