"""The caption of a sample."""

import json
from typing import Any

from ldm.text import reading
from ldm.untrusted import once

# What to do where no picture has a caption.
CAPTIONS_WANTED = (
    "Captions go into NAME.txt beside NAME.jpg; or train with one for all pictures, "
    'instance_prompt="a photo of sks dog", or with templates=object subject="sks dog" '
    "(task=prepare: source.uncaptioned=true)."
)


class SampleError(ValueError):
    """One sample that cannot be used. `reason` is a few words to count by, the message is for the person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def decode_text(data: bytes, what: str) -> str:
    """A caption file's text, stripped (`ldm.text.reading.decode`); SampleError where it is none."""
    try:
        return reading.decode(data).strip()
    except reading.NotText as error:
        raise SampleError("caption is not UTF-8", f"the {what} is {error}") from None


def json_of(data: bytes | str) -> dict[str, Any]:
    """An object of JSON whose keys are there once, else SampleError."""
    try:
        text = data if isinstance(data, str) else reading.decode(data)
        record = json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise SampleError("unreadable json", f"the json is unreadable: {error}") from None
    if not isinstance(record, dict):
        raise SampleError("unreadable json", f"the json is no object but {_kind(record)}")
    return record


def spoken(value: Any, where: str, choice: float = 0.0) -> str | None:
    """A value of a json or a table as a caption, stripped; None where there is none (null, NaN).

    A list of texts holds several captions: `choice` in [0, 1) picks one. SampleError for what is no text.
    """
    if value is None or value != value:
        return None
    if isinstance(value, list) and value and all(isinstance(text, str) for text in value):
        value = value[int(choice * len(value))]
    if not isinstance(value, str):
        raise SampleError("caption is not text", f"{where} is no text but {_kind(value)}")
    try:
        return reading.checked(value).strip()
    except reading.NotText as error:
        raise SampleError("caption is not UTF-8", f"{where} is {error}") from None


def _kind(value: Any) -> str:
    """Its type in JSON's words, and how it begins."""
    names = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    name = "null" if value is None else names.get(type(value), "a text" if isinstance(value, str) else "something else")
    return f"{name} ({str(value)[:40]})"
