"""A trainer's state parted: its tensors, by where they stand in it, go into a safetensors file, the rest into state.pt.

So they are written one at a time, and read by whoever needs which, in as many processes as there may be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ldm.formats.files.store import is_storable

FILE = "state/tensors.safetensors"  # below a checkpoint folder; its own tensors are those beside the folder


def parted(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """The state with None where it had tensors, and those: optimizer_states/0/state/17/exp_avg."""
    tensors: dict[str, Tensor] = {}

    def take(value: Any, path: str) -> Any:
        if not isinstance(value, Tensor) or not is_storable(value):
            return value
        tensors[path] = value
        return None

    return _mapped(state, take), tensors


def joined(state: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What `parted` was given; its tensors may be others."""
    return _mapped(state, lambda value, path: tensors.get(path) if value is None else value)


def _mapped(tree: Any, change: Callable[[Any, str], Any], path: str = "") -> Any:
    def below(key: Any) -> str:
        return f"{path}/{key}" if path else str(key)

    if isinstance(tree, dict):
        return {key: _mapped(value, change, below(key)) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_mapped(value, change, below(i)) for i, value in enumerate(tree)]
    return change(tree, path)
