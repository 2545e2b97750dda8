"""Sizes that a file names, bounded before anything is built: nobody waits for 10^9 layers or pays for them."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from ldm.errors import ConfigError
from ldm.untrusted import number, shown, whole

LEVELS = 16  # of a network; published ones have up to 6
DEPTH = 1024  # layers of a kind in a row
MODULES = 2**15  # and parameters, of one network; Stable Diffusion 1's has 1,700


@contextmanager
def building(where: str) -> Iterator[None]:
    """Within the block networks of up to MODULES modules are built: on the meta device, where they take no memory.

    ConfigError for more, and for settings that nothing can be built from. `where` opens its message.
    """
    left = [MODULES]

    def counted(*_: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise ConfigError(f"{where} describes a network of more than {MODULES} modules: it is not what it says.")

    hooks = [register_module_module_registration_hook(counted), register_module_parameter_registration_hook(counted)]
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # what torch says of a size depends on where in the network it first meets it
        raise ConfigError(
            f"{where} describes no network that can be built ({type(error).__name__}: {shown(error, 100)}): it was "
            "edited, or is of another kind. Fetch it again."
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def check_arguments(kind: type, arguments: Mapping[str, Any], where: str) -> None:
    """ConfigError for a value that is of another type than the class says, or of no size that networks have."""
    hints = typing.get_type_hints(kind.__init__)
    for key, value in arguments.items():
        if key not in hints:
            raise ConfigError(f"{where} says {key}={shown(value)}, which {kind.__name__} does not have.")
        _check(value, hints[key], key, where)


def check_numbers(node: Any, where: str, key: str = "") -> None:
    """ConfigError for numbers in a tree of settings that are beyond every network's, whatever they are of."""
    if isinstance(node, Mapping):
        for name, value in node.items():
            check_numbers(value, where, str(name))
    elif isinstance(node, list):
        if len(node) > (4 * LEVELS if isinstance(node[0], int | float) else 2**16):
            raise ConfigError(f"{where} says {key}, a list of {len(node)}: no network has as many. Fetch it again.")
        for value in node:
            check_numbers(value, where, key)
    elif isinstance(node, int) and not isinstance(node, bool):
        whole(node, key, where, -1 if key == "marks" else 0, _most(key))


def _most(key: str) -> int:
    return DEPTH if "layers" in key or "depth" in key else 2**20


def _least(key: str) -> int:
    return -1 if key == "marks" else 0 if key in ("encoder_layers", "decoder_layers") else 1


def _check(value: Any, hint: Any, key: str, where: str) -> None:
    origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if type(None) in choices or hint is type(None):
        if value is None:
            return
        hint = next(choice for choice in choices if choice is not type(None))
        origin, choices = typing.get_origin(hint), typing.get_args(hint)
    if hint is int:
        whole(value, key, where, _least(key), _most(key))
    elif hint is float:
        number(value, key, where, 0.0, 1e6)
    elif origin is typing.Literal:
        if value not in choices:
            raise _odd(value, key, where, f"one of {', '.join(map(str, choices))}")
    elif origin is Sequence or origin is list:
        if not isinstance(value, list | tuple) or not 1 <= len(value) <= LEVELS:
            raise _odd(value, key, where, f"a list of 1 to {LEVELS}")
        for item in value:
            _check(item, choices[0], key, where)
    elif isinstance(hint, type) and not isinstance(value, hint):
        raise _odd(value, key, where, "true or false" if hint is bool else "a text")


def _odd(value: Any, key: str, where: str, wanted: str) -> ConfigError:
    return ConfigError(f"{where} says {key}={shown(value)}: {wanted} belongs there. Fetch it again.")
