"""Merging of checkpoints and LoRAs: opens them in anybody's layout, walks through their tensors, writes what comes out.

Tensors stay in their files until their turn comes (`loading.open_any`), so that the memory needed is that of the output
and of the one tensor in hand, however many models are merged.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.adapters.content import Lora, LowRank
from ldm.adapters.lora import LoRA
from ldm.adapters.merging import add_difference, combined, extracted, weighted_sum, with_lora
from ldm.checkpoints.adapters import is_adapter, weight_names
from ldm.checkpoints.compatibility import check_compatible
from ldm.checkpoints.components import Components
from ldm.checkpoints.folder import State
from ldm.checkpoints.load import built, open_any
from ldm.checkpoints.save import check_carries, check_target, save_states
from ldm.errors import ConfigError, NotFinite
from ldm.formats import checkpoint as foreign
from ldm.formats.adapters import read_adapter, write_adapter
from ldm.formats.content import Stored
from ldm.formats.files.open import page_out
from ldm.formats.files.store import cast, finite

METHODS = ("sum", "add_difference", "lora", "extract")
LORA_FORMATS = LoRA.formats


def merge(
    checkpoints: Sequence[str | Path],
    output: str | Path,
    method: str = "sum",
    ratios: Sequence[float] | None = None,
    format: str | None = None,  # None: by the output's suffix, else as the first checkpoint is; of LoRAs kohya
    dtype: str = "float32",  # of the stored tensors
    rank: int | None = None,
    weights: str = "ema",
    config: str | Path | None = None,  # diffusers folder that says what single files of unpublished sizes do not
) -> Path:
    """Combines checkpoints, or LoRAs, in any layout, into one at `output`; ConfigError for what cannot be.

    sum             sum_i ratio_i checkpoint_i, equal shares by default; of LoRAs, one whose update is that sum
    add_difference  checkpoint_1 + ratio (checkpoint_2 - checkpoint_3)
    lora            checkpoint_1 + sum_i ratio_i LoRA_i, ratios 1 by default
    extract         the LoRA of a rank that comes nearest to checkpoint_2 - checkpoint_1

    The network and the text encoder are merged; the autoencoder is the first checkpoint's.
    """
    loras = _which_are_loras(checkpoints, method)
    given = _checked_ratios(len(checkpoints), method, ratios, all(loras))
    target = Path(output).expanduser()
    recipe = {"checkpoints": [str(path) for path in checkpoints], "method": method, "ratios": given, "rank": rank}
    if rank is not None and (rank < 1 or not (method == "extract" or all(loras))):
        raise ConfigError(f"rank={rank}: a number above 0, for method=extract or a sum of LoRAs.")
    if method == "extract" or all(loras):
        _check_lora_target(target, format, dtype)
        if all(loras):
            lora = combined([_read_lora(path) for path in checkpoints], given, rank)
        else:
            lora = _extract(checkpoints, rank, weights, config)
        lora.metadata["ldm.merge"] = json.dumps(recipe)
        write_adapter(lora, target, format or LORA_FORMATS[0], dtype)
    else:
        format = format or _default_format(target, checkpoints[0])
        check_target(target, format, dtype)
        given_models = checkpoints[:1] if method == "lora" else checkpoints
        opened, model = _opened(given_models, weights, config, widens=method == "add_difference")
        names = weight_names(model)
        added = [_read_lora(path, names) for path in checkpoints[1:]] if method == "lora" else []
        model.config["merge"] = recipe
        check_carries(model, format)
        of_layer = {
            f"{part}.{name.removesuffix('.weight')}": w for part, s in _shapes(model).items() for name, w in s.items()
        }
        for lora, path in zip(added, checkpoints[1:], strict=False):
            lora.check_fits(of_layer, str(path))
        save_states(model, _merged(opened, method, given, added, dtype), target, format, dtype)
    return target


def _merged(
    opened: Sequence[Stored], method: str, ratios: Sequence[float], loras: Sequence[Lora], dtype: str
) -> dict[str, State]:
    """The output's tensors, of the stored type: merged one by one, or the first checkpoint's, still in its file.

    NotFinite for numbers that the type cannot hold, and for those that are not finite already, by tensor and input.
    """
    kind = foreign.DTYPES[dtype]
    parts = _merged_parts(opened)
    states: dict[str, State] = {}
    for part, first in opened[0].states.items():
        names = {name for name in first if part in parts and not name.startswith("latents.")}  # in the first's units
        kept = {name: tensor for name, tensor in first.items() if name not in names}
        states[part] = {name: _kept(tensor, kind, part, name) for name, tensor in kept.items()}
        if not names:
            continue
        of_part = [_Finite(stored, part, [name for name in first if name in names]) for stored in opened]
        if method == "sum":
            named = weighted_sum(of_part, ratios)
        elif method == "add_difference":
            base, plus, minus = of_part
            named = add_difference(base, plus, minus, ratios[0])
        else:
            named = with_lora(of_part[0], part, loras, ratios)
        for name, tensor in named:
            states[part][name] = cast(_checked(tensor, f"{part}.{name}", ratios), kind, f"{part}.{name}")
            _let_go(name, [stored.states[part] for stored in opened])
    return states


def _kept(tensor: Tensor, kind: torch.dtype, part: str, name: str) -> Tensor:
    """As it is stored; units that nobody has measured, and previews, are NaN."""
    return tensor.to(kind) if name.startswith("latents.") else cast(tensor, kind, f"{part}.{name}")


class _Finite(Mapping[str, Tensor]):
    """A part of a checkpoint whose tensors are looked at as they are taken: NotFinite names the file and the tensor."""

    def __init__(self, stored: Stored, part: str, names: Sequence[str]):
        self.stored, self.part, self.names = stored, part, names

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.stored.states[self.part][name]
        if not finite(tensor):
            raise NotFinite(
                f"{self.stored.folder} holds NaN or infinities in {self.part}.{name}, and so would the result: leave "
                "it out, or take another version or step of it."
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _checked(tensor: Tensor, name: str, ratios: Sequence[float]) -> Tensor:
    if not finite(tensor):
        raise NotFinite(f"{name} would be infinite with ratios={list(ratios)}: give smaller ones.")
    return tensor


def _read_lora(path: str | Path, names: Sequence[str] | None = None) -> Lora:
    content = read_adapter(path, names)
    if not isinstance(content, Lora) or not content.layers:
        raise ConfigError(f"{path} is no LoRA: embeddings and hypernetworks cannot be merged into weights.")
    if content.words:
        words = ", ".join(str(word.token) for word in content.words)
        warnings.warn(
            f"{path} bundles embeddings with its LoRA ({words}), which weights cannot hold: they are left out.",
            stacklevel=4,
        )
    return content


def _which_are_loras(checkpoints: Sequence[str | Path], method: str) -> list[bool]:
    """Of the checkpoints, in order. ConfigError where their number or kinds are not the method's."""
    if method not in METHODS:
        raise ConfigError(f"method={method} is not known: choose one of {', '.join(METHODS)}.")
    wanted = {"sum": "two or more", "add_difference": "three", "lora": "two or more", "extract": "two"}[method]
    count = len(checkpoints)
    if count < 2 or (wanted == "two" and count != 2) or (wanted == "three" and count != 3):
        example = {"add_difference": "[A,B,C]", "lora": "[BASE,LORA]", "extract": "[BASE,TUNED]"}.get(method, "[A,B]")
        raise ConfigError(f"method={method} takes {wanted} checkpoints, not {count}: checkpoints={example}.")
    kinds = [is_adapter(path) for path in checkpoints]
    loras = [str(path) for path, is_lora in zip(checkpoints, kinds, strict=True) if is_lora]
    others = [str(path) for path, is_lora in zip(checkpoints[1:], kinds[1:], strict=True) if not is_lora]
    if method == "lora" and kinds[0]:
        raise ConfigError(
            f"method=lora starts from a checkpoint, and {checkpoints[0]} is a LoRA: give checkpoints=[BASE,LORA,...], "
            "or method=sum to add LoRAs to one another."
        )
    if method == "lora" and others:
        raise ConfigError(f"{others[0]} is a checkpoint, not a LoRA: method=lora takes one checkpoint, then LoRAs.")
    if method != "lora" and loras and not (method == "sum" and all(kinds)):
        raise ConfigError(
            f"{loras[0]} is a LoRA, and method={method} takes whole checkpoints: method=lora merges it into one."
        )
    return kinds


def _checked_ratios(count: int, method: str, ratios: Sequence[float] | None, loras: bool) -> list[float]:
    """The ratios, or the method's own; a warning where a sum of checkpoints is no mean."""
    wanted = {"sum": count, "add_difference": 1, "lora": count - 1, "extract": 0}[method]
    if ratios is None:
        return [1 / count] * count if method == "sum" else [1.0] * wanted
    if len(ratios) != wanted:
        what = {"sum": "one a checkpoint", "add_difference": "one, of the difference", "lora": "one a LoRA"}
        raise ConfigError(
            f"ratios={list(ratios)}: method={method} takes {wanted} of them here"
            f"{f' ({what[method]})' if method in what else ''}, not {len(ratios)}."
        )
    given = [float(ratio) for ratio in ratios]
    if not all(math.isfinite(ratio) for ratio in given) or (given and not any(given)):
        raise ConfigError(f"ratios={list(ratios)}: finite numbers, not all of them 0.")
    if method == "sum" and not loras and not math.isclose(sum(given), 1.0, abs_tol=1e-6):
        warnings.warn(
            f"ratios={given} sum to {sum(given):g}, which stretches all weights by as much. A mean has ratios that sum "
            "to 1, of two checkpoints [1-w,w].",
            stacklevel=3,
        )
    return given


def _default_format(target: Path, first: str | Path) -> str:
    if target.suffix in (".safetensors", ".ckpt"):
        return "compvis"
    return "diffusers" if foreign.kind(first) == "diffusers" else "ldm"


def _check_lora_target(target: Path, format: str | None, dtype: str) -> None:
    if format not in (None, *LORA_FORMATS):
        raise ConfigError(f"format={format} is not for LoRAs, which this merge makes: use {', '.join(LORA_FORMATS)}.")
    if target.suffix != ".safetensors":
        raise ConfigError(f"output={target}: a LoRA is one file, so give a name that ends in .safetensors.")
    if target.exists():
        raise ConfigError(f"output={target} exists already: give another output=, or remove it first.")
    if dtype not in foreign.DTYPES:
        raise ConfigError(f"dtype={dtype} is not known: choose one of {', '.join(foreign.DTYPES)}.")


def _opened(
    checkpoints: Sequence[str | Path], weights: str, config: str | Path | None, widens: bool = False
) -> tuple[list[Stored], Components]:
    """The checkpoints, once they agree, and the model that they are of, without numbers.

    widens: the first may have more input channels (a model that repaints). A warning where their autoencoders differ.
    """
    opened = [open_any(path, weights, config, whole=i == 0) for i, path in enumerate(checkpoints)]
    for stored in opened:
        if stored.config.get("adapter"):
            raise ConfigError(
                f"{stored.folder} was trained with adapters on a base: give the base, and the LoRA in the run's "
                "export/, with method=lora."
            )
    first = opened[0]
    model = built(first, device="meta")
    shapes = _shapes(model)
    for stored in opened:
        check_compatible(first, stored, shapes, widens)
    if "unet" in first.states:
        for stored in opened[1:]:
            if "text_encoder" not in stored.states:
                warnings.warn(
                    f"{stored.folder} has no text encoder: that of {first.folder} is kept as it is.", stacklevel=3
                )
            if not all(_same(name, first.states["vae"], stored.states["vae"]) for name in shapes["vae"]):
                warnings.warn(
                    f"the autoencoders of {first.folder} and {stored.folder} differ: the first one's is kept.",
                    stacklevel=3,
                )
    return opened, model


def _same(name: str, one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    """Whether two tensors are equal in the coarser of their precisions."""
    coarse = min((one[name].dtype, other[name].dtype), key=lambda dtype: torch.finfo(dtype).bits)
    mine, theirs = (state[name].to(coarse).float() for state in (one, other))
    same = bool(torch.isclose(mine, theirs, rtol=0, atol=0, equal_nan=True).all())
    _let_go(name, (one, other))
    return same


def _shapes(model: Components) -> dict[str, State]:
    return {part: dict(module.state_dict()) for part, module in model.modules().items()}


def _merged_parts(opened: Sequence[Stored]) -> list[str]:
    """Parts that are merged: those of the network and its text that all have; of autoencoders alone, these."""
    parts = ("unet", "text_encoder") if "unet" in opened[0].states else ("vae",)
    return [part for part in parts if all(part in stored.states for stored in opened)]


def _extract(checkpoints: Sequence[str | Path], rank: int | None, weights: str, config: str | Path | None) -> Lora:
    """The LoRA of the second checkpoint over the first, and how much of the difference it carries."""
    if rank is None:
        raise ConfigError("method=extract needs rank=, the directions that each layer keeps, for example rank=32.")
    opened, model = _opened(checkpoints, weights, config)
    base, tuned = opened
    if "unet" not in base.states:
        raise ConfigError(f"{base.folder} is an autoencoder: LoRAs are for networks and text encoders.")
    modules = model.modules()
    layers = {part: _linear_maps(modules[part]) for part in _merged_parts(opened)}
    largest = max(min(m.weight.shape[0], m.weight[0].numel()) for maps in layers.values() for m in maps.values())
    if rank > largest:
        raise ConfigError(f"rank={rank}: no layer of this model has more than {largest} directions: give fewer.")
    found: dict[str, LowRank] = {}
    whole, carried, left, strays = 0.0, 0.0, 0.0, 0
    for part, maps in layers.items():
        one, other = (_Finite(stored, part, list(base.states[part])) for stored in opened)
        for name, difference in extracted(one, other, rank, maps):
            _let_go(name, [stored.states[part] for stored in opened])
            whole, carried = whole + difference.squared, carried + difference.carried
            if difference.update is not None:
                found[f"{part}.{name.removesuffix('.weight')}"] = difference.update
            elif difference.squared:
                strays, left = strays + 1, left + difference.squared
    if not found:
        raise ConfigError(f"{tuned.folder} and {base.folder} have the same linear maps: there is nothing to extract.")
    if strays:
        warnings.warn(
            f"{strays} tensors differ that no LoRA carries (biases, norms, embeddings), {math.sqrt(left / whole):.1%} "
            "of the difference's length: the LoRA is without it.",
            stacklevel=3,
        )
    return Lora(found, {"ldm.carried": f"{math.sqrt(carried / whole):.4f}"})


def _linear_maps(module: nn.Module) -> dict[str, nn.Linear | nn.Conv2d]:
    return {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}


def _let_go(name: str, states: Iterable[Mapping[str, Tensor]]) -> None:
    for state in states:
        page_out(state[name])
