"""Hypernetworks in the files of A1111's web page: by width of what is read, a network for keys and one for values."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm.adapters.content import HypernetworkTensors
from ldm.errors import ConfigError
from ldm.formats.adapters.tensors import read_weights

# The first files count their two linear maps from 1, without a sequence around them.
_OLD = {f"linear{i + 1}.{leaf}": f"linear.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
_DROPOUT = 0.3  # where a file says that there is dropout, and not how much


def read(content: Mapping[Any, Any], file: Path) -> HypernetworkTensors:
    """A file's networks, and of its settings those that are missing as the web page fills them in.

    ConfigError where the tensors are not those that the settings describe.
    """
    try:
        found = _settings(content, file)
        widths = sorted(key for key in content if isinstance(key, int) and not isinstance(key, bool))
        wanted = {width: shapes(found, width) for width in widths}
    except (TypeError, ValueError, IndexError, OverflowError) as error:
        raise ConfigError(f"{file}: its settings cannot be read ({error}): it is damaged. Fetch it again.") from error
    for width in widths:
        pair = content[width]
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(p, Mapping) for p in pair):
            raise ConfigError(f"{file}: {width} is no pair of networks, for keys and values. Fetch it again.")
        keys, values = (_network(part, wanted[width], f"{file}, width {width}") for part in pair)
        found.networks[width] = keys, values
    return found


def pack(content: HypernetworkTensors, path: Path) -> dict[Any, Any]:
    """What A1111's file holds."""
    if not content.networks:
        raise ConfigError("a hypernetwork without networks is not written: nothing would be in its file.")
    for width, pair in content.networks.items():
        for part in pair:
            _network(part, shapes(content, width), f"the hypernetwork to be written, width {width}")
    settings = {
        "name": content.name or path.stem,
        "layer_structure": list(content.structure),
        "activation_func": content.activation,
        "is_layer_norm": content.layer_norm,
        "activate_output": content.activate_output,
        "use_dropout": content.dropout is not None,
        "dropout_structure": content.dropout,
        "last_layer_dropout": content.dropout is not None and content.dropout[-2] != 0,
        "sd_checkpoint": None,
        "sd_checkpoint_name": None,
    }
    return {**content.networks, **settings, **({} if content.step is None else {"step": content.step})}


def shapes(content: HypernetworkTensors, width: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one network's tensors: linear map, activation, norm and dropout count in the sequence."""
    sizes = [int(width * multiple) for multiple in content.structure]
    found: dict[str, tuple[int, ...]] = {}
    place = 0
    for i, (given, made) in enumerate(pairwise(sizes)):
        found |= {f"linear.{place}.weight": (made, given), f"linear.{place}.bias": (made,)}
        place += 1
        last = i == len(sizes) - 2
        place += content.activation != "linear" and (content.activate_output or not last)
        if content.layer_norm:
            found |= {f"linear.{place}.weight": (made,), f"linear.{place}.bias": (made,)}
            place += 1
        place += content.dropout is not None and content.dropout[i + 1] > 0
    return found


def _settings(content: Mapping[Any, Any], file: Path) -> HypernetworkTensors:
    structure = [float(x) for x in content.get("layer_structure") or (1, 2, 1)]
    if len(structure) < 2 or structure[0] != 1 or structure[-1] != 1 or min(structure) <= 0:
        raise ValueError(f"layer_structure {structure} does not begin and end with 1")
    dropout = content.get("dropout_structure")
    if dropout is None and content.get("use_dropout"):
        after_last = _DROPOUT if content.get("last_layer_dropout") else 0.0
        dropout = [0.0, *[_DROPOUT] * (len(structure) - 3), after_last, 0.0][: len(structure)]
    dropout = None if dropout is None or not any(dropout) else [float(x) for x in dropout]
    if dropout is not None and (len(dropout) != len(structure) or not all(0 <= x < 1 for x in dropout)):
        raise ValueError(f"dropout_structure {dropout} does not fit layer_structure {structure}")
    step = content.get("step")
    return HypernetworkTensors(
        networks={},
        structure=structure,
        activation=str(content.get("activation_func") or "linear"),
        layer_norm=bool(content.get("is_layer_norm", False)),
        activate_output=bool(content.get("activate_output", True)),
        dropout=dropout,
        name=str(content.get("name") or file.stem),
        step=None if step is None else int(step),
    )


def _network(found: Mapping[str, Any], wanted: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Tensor]:
    tensors = {_OLD.get(name, name): read_weights(tensor, f"{where}: {name}") for name, tensor in found.items()}
    wrong = [n for n in [*wanted, *tensors] if n not in tensors or wanted.get(n) != tuple(tensors[n].shape)]
    if wrong:
        raise ConfigError(
            f"{where}: its layers are not those that its settings describe ({', '.join(dict.fromkeys(wrong))}, "
            f"of {', '.join(wanted)}): the file is damaged, or of a kind that is not read. Fetch it again."
        )
    return {name: tensors[name] for name in wanted}
