"""The caption of a sample."""

import json
from collections.abc import Mapping
from typing import Any

JSON_NAMES = ("caption", "text")


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


def caption_of(sample: Mapping[str, Any], choice: float = 0.0) -> str:
    """The caption: from .txt, else `caption` or `text` of .json, else SampleError naming the fields present.

    A json may hold a list of captions: `choice` in [0, 1) picks one.
    """
    if "txt" in sample:
        return decode_text(sample["txt"], "txt")
    names: list[str] = []
    if "json" in sample:
        record = json_of(sample["json"])
        for name in JSON_NAMES:
            text = record.get(name)
            if isinstance(text, list) and text and all(isinstance(t, str) for t in text):
                text = text[int(choice * len(text))]
            if isinstance(text, str):
                return text.strip()
        names = [f"json:{name}" for name in record]
    present = [name for name in sample if not name.startswith("__")] + names
    raise SampleError("no caption", f"no caption: neither .txt nor json caption/text; present: {', '.join(present)}")


def decode_text(data: bytes, what: str) -> str:
    """UTF-8 with or without a byte order mark, stripped; never guessed: a wrong guess would train on garbage."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise SampleError("caption is not UTF-8", f"the {what} is not UTF-8 ({error.reason})") from None


def json_of(data: bytes) -> dict[str, Any]:
    """The json of a sample: an object, else SampleError."""
    try:
        record = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SampleError("unreadable json", f"the json is unreadable: {error}") from None
    if not isinstance(record, dict):
        raise SampleError("unreadable json", f"the json is no object but {type(record).__name__}")
    return record
