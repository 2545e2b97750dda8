"""The exceptions that are meant for the person at the keyboard."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class ConfigError(ValueError):
    """Something that was asked for cannot be: the message says what, why, and what to type instead.

    `ldm.run` prints it as one line without a traceback and exits with code 2; in a sweep the arm is marked refused.
    """


class NotFinite(ConfigError):
    """Numbers that are NaN or infinite where a picture or weights should be: the message says where they come from."""


class SweepError(ConfigError):
    """What is wrong with every arm of a sweep alike: it ends the sweep instead of marking an arm refused."""


class Ended(BaseException):
    """Carries an error past Hydra to `ldm.run`: Hydra catches every Exception, prints it, and goes on with a sweep."""

    def __init__(self, error: BaseException):
        super().__init__(error)
        self.error = error


def nearest(word: str, known: Sequence[str]) -> str:
    """' Did you mean 'x'?' with a second candidate where it is nearly as near; '' where nothing is."""
    close = difflib.get_close_matches(word, list(known), n=2, cutoff=0.6)
    ratio = [difflib.SequenceMatcher(None, word, c).ratio() for c in close]
    close = [c for c, r in zip(close, ratio, strict=True) if r > 0.85 * ratio[0]]
    return f" Did you mean {' or '.join(repr(c) for c in close)}?" if close else ""
