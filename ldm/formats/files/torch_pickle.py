"""Pickles of torch's as plain data. None is loaded: the few instructions that such files hold are interpreted here.

A pickle is a program for a stack machine. This one makes dicts, lists, tuples, numbers, texts and tensors; no name in a
file is looked up or called, so that nothing can run. What tensors claim is compared with what the file has before any
memory is taken, and their numbers are mapped: they take none before they are touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from pickletools import genops
from typing import IO, Any, NamedTuple

import torch
from torch import Tensor

from ldm.errors import ConfigError
from ldm.untrusted import is_count, shown

INSTRUCTIONS = 2**20  # of a file at most; a Stable Diffusion with averages and optimizer has a hundred thousand
_DTYPES: dict[str, torch.dtype] = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
_STORAGES = {f"torch.{name}Storage": dtype for name, dtype in _DTYPES.items()} | {
    f"torch.storage.{name}": torch.uint8 for name in ("UntypedStorage", "_UntypedStorage")
}
_BY_NAME = {str(dtype): dtype for dtype in (*_DTYPES.values(), torch.float8_e4m3fn, torch.float8_e5m2)}
_REBUILT = {f"torch._utils._rebuild_tensor{end}" for end in ("", "_v2", "_v3")}
_PARAMETERS = {f"torch._utils._rebuild_parameter{end}" for end in ("", "_with_state")}
_TYPED = "torch._tensor._rebuild_from_type_v2"
_DICTS = {"collections.OrderedDict", "collections.Counter"}
_PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"  # in which the first embeddings keep their vectors
# Names that published files mention beside their tensors. They hold no weights: inert objects stand in for them.
_MENTIONED = {
    *(
        f"{package}.callbacks.model_checkpoint.ModelCheckpoint"
        for package in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric")
    ),
    *(f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")),
    *(f"numpy.{name}" for name in ("dtype", "ndarray")),
    *(f"numpy.dtypes.{name}DType" for name in ("Float64", "Float32", "Int64", "Int32", "Bool")),
    *(f"builtins.{name}" for name in ("set", "frozenset", "bytearray", "complex")),
    *("_codecs.encode", "torch.Size", "torch.device", "torch.nn.parameter.Parameter", "torch.Tensor"),
}
_KNOWN = {*_STORAGES, *_BY_NAME, *_REBUILT, *_PARAMETERS, _TYPED, *_DICTS, _PARAMETER_DICT, *_MENTIONED}


class Name(NamedTuple):
    """A class or function that a file names: never more than its name."""

    text: str


class Inert:
    """Stands where another library's object was: takes anything, keeps nothing, does nothing."""


class Parameters(dict[str, Any]):
    """Stands for torch's ParameterDict: the tensors in it."""


@dataclass
class _Storage:
    """Numbers that lie in the file: how many, of which kind, under which key."""

    key: str
    dtype: torch.dtype
    count: int


class Damaged(Exception):
    """The file is no whole file of torch's."""


class Machine:
    """The stack machine. Tensors are made empty, and filled when it is known where their numbers lie."""

    def __init__(self, path: Path):
        self.path = path
        self.left = INSTRUCTIONS
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.tensors: list[tuple[Tensor, _Storage, int, tuple[int, ...], tuple[int, ...]]] = []

    def run(self, file: IO[bytes]) -> Any:
        """One pickle, from where the file stands; it then stands behind it."""
        self.stack, self.marks, self.memo = [], [], {}
        for opcode, arg, _ in genops(file):
            self.left -= 1
            if self.left < 0:
                raise Damaged(f"more than {INSTRUCTIONS} instructions")
            if opcode.name == "STOP":
                return self.stack.pop()
            if opcode.name in _LITERALS:
                self.stack.append(arg)
            elif opcode.name in _OPERATIONS:
                _OPERATIONS[opcode.name](self, arg)
            else:
                raise Damaged(f"the instruction {opcode.name}, which torch's files do not have")
        raise Damaged("its end is missing")

    def pop(self, count: int) -> list[Any]:
        """The last values of the stack, taken off it."""
        if count > len(self.stack):
            raise Damaged("it takes more than is there")
        items = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return items

    def marked(self) -> list[Any]:
        """All values since the last mark, taken off the stack."""
        return self.pop(len(self.stack) - self.marks.pop())

    def named(self, arg: str) -> Name:
        name = ".".join(arg.split(" ", 1)).replace("__builtin__.", "builtins.")
        if name not in _KNOWN:
            raise ConfigError(
                f"{self.path} asks for {shown(name)}, which is code: it was not run and the file was not read. "
                "Take the .safetensors version of this model, or one from somebody you trust."
            )
        return Name(name)

    def called(self, function: Any, args: Any) -> Any:
        """What a call would give, for those that make data."""
        if not isinstance(function, Name) or not isinstance(args, tuple):
            raise Damaged("it calls what is no function")
        name = function.text
        if name in _REBUILT:
            return self._tensor(args, name.endswith("v3"))
        if name in _PARAMETERS:
            return args[0]
        if name == _TYPED:  # function, type, its arguments, state
            return self.called(args[0], args[2])
        if name in _DICTS:
            pairs = [pair for pair in (args[0] if args else []) if isinstance(pair, list | tuple) and len(pair) == 2]
            return _updated({}, [item for pair in pairs for item in pair])
        return Parameters() if name == _PARAMETER_DICT else Inert()

    def _tensor(self, args: tuple[Any, ...], says_dtype: bool) -> Tensor:
        storage, offset, size, stride = args[:4]
        if not isinstance(storage, _Storage):
            raise Damaged("a tensor without numbers")
        dtype = _BY_NAME[args[6].text] if says_dtype else storage.dtype
        shape, steps = (tuple(x) for x in (size, stride))
        if len(shape) != len(steps) or len(shape) > 8 or not all(is_count(n) for n in (offset, *shape, *steps)):
            raise Damaged("a tensor of impossible shape")
        there = storage.count * storage.dtype.itemsize // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if prod(shape) > there or (prod(shape) and last >= there):
            raise Damaged(f"a tensor {shape} of {there} numbers")
        made = torch.empty(0, dtype=dtype)
        self.tensors.append((made, storage, offset, shape, steps))
        return made

    def fill(self, places: Mapping[str, tuple[int, int]]) -> None:
        """Gives every tensor its numbers; places: by key, where they begin in the file and how many bytes there are."""
        if not self.tensors:
            return
        size = self.path.stat().st_size
        if sum(made.dtype.itemsize * prod(shape) for made, _, _, shape, _ in self.tensors) > 2 * size:
            raise Damaged("its tensors share their numbers, and are larger than the file")
        mapped = torch.UntypedStorage.from_file(str(self.path), False, size)
        numbers: dict[str, torch.UntypedStorage] = {}
        for made, storage, offset, shape, steps in self.tensors:
            start, count = places[storage.key]
            if storage.count * storage.dtype.itemsize > count:
                raise Damaged(f"{storage.count} numbers where there are {count} bytes")
            if storage.key not in numbers:
                part = mapped[start : start + count]
                numbers[storage.key] = part if start % 8 == 0 else part.clone()
            made.set_(numbers[storage.key], offset, shape, steps)


def _storage(persistent: Any) -> _Storage:
    if not isinstance(persistent, tuple) or len(persistent) < 5 or persistent[0] != "storage":
        raise Damaged("a reference to something outside the file")
    _, kind, key, _, count = persistent[:5]
    if not isinstance(kind, Name) or kind.text not in _STORAGES or not isinstance(key, str) or not is_count(count):
        raise Damaged("a storage of no known kind")
    if persistent[5:] not in ((), (None,)):
        raise Damaged("a view of a storage, as only files before torch 0.4 have")
    return _Storage(key, _STORAGES[kind.text], count)


def _extended(items: list[Any], target: Any) -> None:
    if not isinstance(target, list):
        raise Damaged("it appends to what is no list")
    target.extend(items)


def _updated(target: Any, items: list[Any]) -> Any:
    """The dict with keys and values in turn. Keys are texts and numbers: a tuple would be hashed, however deep."""
    if not isinstance(target, dict) or len(items) % 2:
        raise Damaged("it sets an item of what is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, Name):
            key = key.text
        if not isinstance(key, str | int | float | type(None)):
            raise Damaged("a key that is no text")
        target[key] = value
    return target


def _set_state(state: Any, target: Any) -> None:
    """An object's own attributes: of a ParameterDict its tensors, of dicts and tensors nothing that is needed here."""
    if isinstance(target, Parameters):
        _updated(target, [item for pair in state["_parameters"].items() for item in pair])
    elif not isinstance(target, dict | Tensor | Inert):
        raise Damaged("it sets attributes of what has none")


# What a value stands for itself, and what the others do with the stack.
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
}
_OPERATIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda m, arg: None,
    "FRAME": lambda m, arg: None,
    "MARK": lambda m, arg: m.marks.append(len(m.stack)),
    "POP": lambda m, arg: m.pop(1),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), lambda m, arg: m.memo.update({arg: m.stack[-1]})),
    "MEMOIZE": lambda m, arg: m.memo.update({len(m.memo): m.stack[-1]}),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda m, arg: m.stack.append(m.memo[arg])),
    "NONE": lambda m, arg: m.stack.append(None),
    "NEWTRUE": lambda m, arg: m.stack.append(True),
    "NEWFALSE": lambda m, arg: m.stack.append(False),
    "EMPTY_TUPLE": lambda m, arg: m.stack.append(()),
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda m, arg: m.stack.append([])),
    "EMPTY_DICT": lambda m, arg: m.stack.append({}),
    "TUPLE": lambda m, arg: m.stack.append(tuple(m.marked())),
    "TUPLE1": lambda m, arg: m.stack.append(tuple(m.pop(1))),
    "TUPLE2": lambda m, arg: m.stack.append(tuple(m.pop(2))),
    "TUPLE3": lambda m, arg: m.stack.append(tuple(m.pop(3))),
    "LIST": lambda m, arg: m.stack.append(m.marked()),
    "DICT": lambda m, arg: m.stack.append(_updated({}, m.marked())),
    "APPEND": lambda m, arg: _extended(m.pop(1), m.stack[-1]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda m, arg: _extended(m.marked(), m.stack[-1])),
    "SETITEM": lambda m, arg: _updated(m.stack[-3], m.pop(2)),
    "SETITEMS": lambda m, arg: _set_items(m),
    "GLOBAL": lambda m, arg: m.stack.append(m.named(arg)),
    "STACK_GLOBAL": lambda m, arg: m.stack.append(m.named(" ".join(map(str, m.pop(2))))),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda m, arg: m.stack.append(m.called(*m.pop(2)))),
    "BUILD": lambda m, arg: _set_state(m.pop(1)[0], m.stack[-1]),
    "BINPERSID": lambda m, arg: m.stack.append(_storage(m.pop(1)[0])),
}


def _set_items(machine: Machine) -> None:
    items = machine.marked()
    _updated(machine.stack[-1], items)
