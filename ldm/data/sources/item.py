"""What a source is, and what it hands to the writer: one sample, as the bytes that will stand in the tar."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable


@dataclass
class Item:
    """One sample: extension -> bytes, for example {"png": ..., "txt": ..., "json": ...}.

    `split` names the sub-folder it goes to. `key` is its name inside the tar; None lets the writer number it, which is
    what sources of one's own want: a zero-padded number cannot hold a dot, a slash or a duplicate.
    """

    fields: dict[str, bytes]
    split: str = "train"
    key: str | None = None


@dataclass
class Reject:
    """A sample that a source could not use: its name and why. The writer counts it and lists it in rejects.jsonl."""

    name: str
    reason: str
    detail: str = field(default="")


@runtime_checkable
class Source(Protocol):
    """Where task=prepare takes pictures from. conf/source/x.yaml names a class with these three.

    Iterating gives its samples in an order that is always the same, and what it could not use.
    """

    def __iter__(self) -> Iterator[Item | Reject]: ...

    def identity(self) -> dict[str, Any]:
        """Plain data that decide the samples: equal ones are not made twice. A number in it that you raise when the
        code gives other samples, or other facts, stands for the code.
        """
        ...

    def facts(self) -> dict[str, Any]:
        """What whoever reads the shards should know, asked after the last sample: "image_size", in pixels a side."""
        ...


def image_item(
    image: bytes,
    ext: str,
    caption: str,
    extra: dict[str, Any] | None = None,
    split: str = "train",
    key: str | None = None,
) -> Item:
    """An image, its caption as .txt and, where there is any, what else is known of it as .json."""
    fields = {ext.lower().lstrip("."): image, "txt": caption.encode("utf-8")}
    if extra:
        fields["json"] = json.dumps(extra, ensure_ascii=False, sort_keys=True).encode("utf-8")
    return Item(fields, split, key)
