"""Which members of a sample are its picture and its caption."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.data.captions import SampleError, decode_text, json_of, spoken
from ldm.data.order import uniforms
from ldm.errors import ConfigError
from ldm.text import reading

IMAGE_FIELDS = ("jpg", "jpeg", "png", "webp", "bmp")
CAPTION_FIELDS = ("txt", "json:caption", "json:text", "cls")


@dataclass(frozen=True)
class Fields:
    """Member extensions in order of preference, named as webdataset does: what follows the first dot of the base name.

    a.jpg is field jpg of sample a, a.seg.png its field seg.png. In `caption`, MEMBER:KEY is an entry of a json member
    (json:caption); a cls member is a class, as a name or as a number whose name stands in `class_names`. The same holds
    for whole numbers in a json where there are class names. No caption members: every caption is the empty one.
    """

    image: tuple[str, ...] = IMAGE_FIELDS
    caption: tuple[str, ...] = CAPTION_FIELDS
    class_names: tuple[str, ...] | None = None  # of class 0, 1, ...
    needed: bool = True  # false: a sample without a caption has None for one; True: it is no usable sample

    @property
    def members(self) -> tuple[str, ...]:
        """The members that are read for a picture and its caption."""
        return tuple(dict.fromkeys([*self.image, *self.caption_members]))

    @property
    def caption_members(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name.partition(":")[0] for name in self.caption))

    def optional(self) -> Fields:
        """The same for those who can do without captions, but not with unreadable ones."""
        return replace(self, needed=False)

    def unread(self) -> Fields:
        """The same for those who look at pictures only."""
        return replace(self, caption=())

    def mark(self) -> str:
        """What a choice other than the usual one adds to a data set's fingerprint; '' for the usual."""
        chosen = (self.image, self.caption, self.class_names)
        usual = (IMAGE_FIELDS, CAPTION_FIELDS, None)
        return "" if chosen == usual else hashlib.sha256(json.dumps(chosen).encode()).hexdigest()

    def picture_of(self, sample: Mapping[str, Any]) -> bytes:
        """The bytes of the picture; SampleError naming the members present where there is none."""
        found = next((name for name in self.image if name in sample), None)
        if found is None:
            present = ", ".join(name for name in sample if not name.startswith("__"))
            raise SampleError(
                "no image", f"no image (data.fields.image: {', '.join(self.image)}); present: {present or 'nothing'}"
            )
        return sample[found]

    def caption_of(self, sample: Mapping[str, Any]) -> str | None:
        """The caption, stripped; without one SampleError naming what is there, or None where it is not `needed`.

        Of a list of captions (in a json) another one is taken each epoch, the same for everyone who asks.
        """
        if not self.caption:
            return ""
        records: dict[str, dict[str, Any]] = {}
        odd: SampleError | None = None
        for name in self.caption:
            member, colon, key = name.partition(":")
            if member not in sample:
                continue
            if not colon:
                text = decode_text(sample[member], member)
                return self._class_name(text, name) if member.rpartition(".")[2] == "cls" else text
            if member not in records:
                records[member] = json_of(sample[member])
            try:
                if (found := self._entry(records[member].get(key), name, sample)) is not None:
                    return found
            except SampleError as error:  # another field may hold one
                odd = odd or error
        if odd is not None:
            raise odd
        if not self.needed:
            return None
        present = [name for name in sample if not name.startswith("__")]
        present += [f"{member}:{key}" for member, record in records.items() for key in record]
        listed = ", ".join(present[:30]) or "nothing"
        raise SampleError("no caption", f"no caption ({', '.join(self.caption)}); present: {listed}")

    def _entry(self, value: Any, where: str, sample: Mapping[str, Any]) -> str | None:
        if self.class_names is not None and type(value) is int:
            return self._class_name(str(value), where)
        several = isinstance(value, list) and len(value) > 1 and "__epoch__" in sample
        choice = uniforms(0, "caption", sample["__epoch__"], sample.get("__index__", 0))[0] if several else 0.0
        return spoken(value, where, choice)

    def _class_name(self, text: str, where: str) -> str:
        if self.class_names is None or not text.lstrip("-").isdecimal():
            return text
        if not 0 <= int(text) < len(self.class_names):
            raise SampleError(
                "class without a name", f"{where} is {text}, the names are of 0 to {len(self.class_names) - 1}"
            )
        return self.class_names[int(text)]


def read_fields(node: Mapping[str, Any] | None = None, class_names: str | None = None) -> Fields:
    """What data.fields and data.class_names say; ConfigError for what cannot be."""
    node = dict(node or {})
    if unknown := sorted(set(node) - {"image", "caption"}):
        raise ConfigError(f"data.fields.{unknown[0]}: there is data.fields.image and data.fields.caption.")
    image = _listed("image", node.get("image"), IMAGE_FIELDS)
    caption = _listed("caption", node.get("caption"), CAPTION_FIELDS)
    if not image or any(":" in name for name in image):
        raise ConfigError(
            f"data.fields.image={list(image)}: a picture is a member by itself, such as jpg or seg.png; name one."
        )
    return Fields(image, caption, None if class_names is None else _class_names(class_names))


def fields_of(data: Mapping[str, Any]) -> Fields:
    """The same of a whole data node, also of a run from before there was a choice."""
    return read_fields(data.get("fields"), data.get("class_names"))


def _listed(what: str, given: Any, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Extensions in lower case, as they are in the index; the key of a json keeps its case."""
    if given is None:
        return usual
    names: Sequence[Any] = [given] if isinstance(given, str) else given
    found = []
    for name in names:
        member, colon, key = str(name).partition(":")
        member = member.lower().lstrip(".")
        if not member or "/" in member or (colon and not key):
            raise ConfigError(
                f"data.fields.{what}={name!r} is no field: give extensions, such as [jpg,seg.png]"
                + (", or MEMBER:KEY, such as [txt,json:caption]." if what == "caption" else ".")
            )
        found.append(member + colon + key)
    return tuple(dict.fromkeys(found))


def _class_names(path: str) -> tuple[str, ...]:
    names = [line.strip() for line in reading.lines(reading.read_text(path, "data.class_names="))]
    while names and not names[-1]:
        names.pop()
    if not names or "" in names:
        where = f"line {names.index('') + 1} is empty" if names else "it is empty"
        raise ConfigError(f"data.class_names={path}: {where}; it holds one name a line, that of class 0 first.")
    return tuple(names)
