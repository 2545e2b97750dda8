"""What the text encoder reads while a run trains: the pictures' own captions, templates', or none."""

from __future__ import annotations

from collections.abc import Iterable

from ldm.build import build
from ldm.checkpoints.components import Config
from ldm.errors import ConfigError
from ldm.text.templates import Templates, one_caption


def caption_templates(config: Config) -> Templates | None:
    """What captions are drawn from in place of the pictures' own; None: those. ConfigError for what cannot be both."""
    prompt, templates = config.get("instance_prompt"), config.get("templates")
    if prompt and templates:
        raise ConfigError(
            "instance_prompt= is one caption for all pictures, templates= draw it: leave one of them out."
        )
    if config.get("subject") and not templates:
        raise ConfigError(
            f"subject={config['subject']} is what templates speak of: add templates=object or templates=style, or give "
            "the whole caption as instance_prompt=."
        )
    word = ((config.get("adapter") or {}).get("textual_inversion") or {}).get("placeholder")
    if templates and not templates.get("subject") and word:
        templates = {**templates, "subject": word}  # what is learnt is what templates speak of
    return one_caption(prompt) if prompt else build(templates, "templates")


def reads_captions(config: Config) -> bool:
    """Whether the data's own captions are read: not by an autoencoder, a model without text, or beneath templates."""
    templates = caption_templates(config)
    return (
        config["module"] == "latent_diffusion"
        and (config["text_encoder"] or {}).get("_target_") != "ldm.text.null.NullText"
        and (templates is None or templates.needs_captions)
    )


def refuse_unsaid(word: str, captions: Iterable[str]) -> None:
    """ConfigError where no caption has the new word: its vectors would never see a gradient."""
    if not any(word.lower() in caption.lower() for caption in captions):
        raise ConfigError(
            f"no caption says {word}, the word that is to be learnt: train with templates=object (a thing) or "
            f'templates=style (a manner), with instance_prompt="a photo of {word}", or write it into the captions.'
        )
