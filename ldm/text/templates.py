"""Captions from templates: fixed sentences around the name of what is learnt (Gal et al. 2022, Ruiz et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from ldm.errors import ConfigError

_SLOT = re.compile(r"\{([^{}]*)\}")


class Templates:
    """Each text is a caption in which {} stands for `subject`, and {caption} for the picture's own caption.

    learns, usual: what such captions are for, and how many pictures of it people usually have.
    """

    def __init__(
        self,
        texts: Sequence[str],
        subject: str | None,
        learns: str = "subject",
        usual: tuple[int, int] = (5, 8),
    ):
        if not texts:
            raise ConfigError('templates.texts=[] holds no template: give one, templates.texts=["a photo of a {}"].')
        if not subject:
            raise ConfigError(
                'templates= speak of a subject, and there is none: give subject="sks dog" (a rare word and what it is).'
            )
        for text in texts:
            slots = set(_SLOT.findall(text))
            if "" not in slots:
                raise ConfigError(
                    f"template '{text}' has no {{}}, the place of the subject: write 'a photo of a {{}}', or "
                    f'instance_prompt="{text}" for one caption without templates.'
                )
            if unknown := sorted(slots - {"", "caption"}):
                raise ConfigError(
                    f"template '{text}' holds {{{unknown[0]}}}, which stands for nothing: {{}} is the subject, "
                    "{caption} the picture's own caption."
                )
        self.texts, self.subject, self.learns, self.usual = list(texts), subject, learns, tuple(usual)

    @property
    def needs_captions(self) -> bool:
        """Whether a template holds the picture's own caption."""
        return any("{caption}" in text for text in self.texts)

    @property
    def identity(self) -> dict[str, object]:
        """What decides the captions."""
        return {"texts": self.texts, "subject": self.subject}

    def drawn(self, captions: Sequence[str], draws: Iterable[float]) -> list[str]:
        """Each caption in the template that its draw in (0, 1) falls on."""
        chosen = (self.texts[int(u * len(self.texts))] for u in draws)
        return [self._filled(text, caption) for text, caption in zip(chosen, captions, strict=True)]

    def first(self, captions: Sequence[str]) -> list[str]:
        """Each caption in the first template: what is looked at while it trains."""
        return self.drawn(captions, [0.0] * len(captions))

    def all(self, captions: Iterable[str]) -> Iterator[str]:
        """Every caption that may be drawn; a template without {caption} gives one."""
        fixed = [text for text in self.texts if "{caption}" not in text]
        yield from (self._filled(text, "") for text in fixed)
        for caption in captions if self.needs_captions else ():
            yield from (self._filled(text, caption) for text in self.texts if text not in fixed)

    def _filled(self, text: str, caption: str) -> str:
        # In one pass, so that braces in a subject or caption are text.
        return _SLOT.sub(lambda slot: caption if slot[1] else self.subject, text).strip()


def one_caption(text: str) -> Templates:
    """The same caption for every picture, DreamBooth's "a photo of sks dog"."""
    return Templates(["{}"], text)
