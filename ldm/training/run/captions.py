"""What the text encoder reads while a run trains, and the words and classes that it knows by that."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import CLIPTokenizer

from ldm.build import build
from ldm.checkpoints.components import Config
from ldm.checkpoints.folder import read_config
from ldm.config.check import module_kind
from ldm.data.datamodule import ShardDataModule
from ldm.errors import ConfigError
from ldm.text.templates import Templates, one_caption
from ldm.text.tokenizer import build_tokenizer, load_tokenizer

CAPTIONS_READ = 200_000  # captions that a vocabulary is built from
MOST_CLASSES = 20_000  # more different captions than that are sentences (ImageNet-21k has 21,841 classes; name those)


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
        module_kind(config) == "latent_diffusion"
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


def captions_read(data: ShardDataModule, templates: Templates | None, split: str = "train") -> Iterator[str]:
    """What the text encoder will read."""
    return islice(data.captions(split) if templates is None else templates.all(data.captions(split)), CAPTIONS_READ)


def words_of(
    node: dict[str, Any], captions: Iterable[str], given: Path | None
) -> tuple[CLIPTokenizer | None, dict[str, Any]]:
    """The tokenizer of a text encoder's node, and what the node becomes by it; None where it has its own.

    given: the checkpoint folder that is started from: its embeddings belong to its words.
    """
    if given is not None and (given / "tokenizer").is_dir():
        saved = read_config(given)["text_encoder"]
        kept = {k: saved[k] for k in ("vocab_size", "max_length") if k in saved and k in node}
        return load_tokenizer(given / "tokenizer"), node | kept
    if "vocab_size" not in node or node.get("pretrained") or node.get("tokenizer"):
        return None, node
    read = list(captions)
    tokenizer = build_tokenizer(read, node["vocab_size"])
    longest = max((len(ids) for ids in tokenizer(read)["input_ids"]), default=2)
    size = {"vocab_size": len(tokenizer), "max_length": min(node["max_length"], -(-longest // 8) * 8)}
    return tokenizer, node | size


def class_names(data: ShardDataModule, templates: Templates | None, given: list[str] | None) -> list[str]:
    """The class names: those given, or the distinct captions of the training data; no caption may be another."""
    captions = {c for c in captions_read(data, templates) if c}
    classes = sorted(captions) if given is None else given
    if len(classes) > MOST_CLASSES:
        raise ConfigError(
            f"text_encoder=classes takes captions for class names, and there are {len(classes)} different ones: "
            "choose text_encoder=small, which reads their words, or name text_encoder.classes=[...]."
        )
    if data.mode == "index":
        captions |= {c for c in captions_read(data, templates, "val") if c}
    strangers = sorted(captions - set(classes))
    if strangers:
        raise ConfigError(
            f"{len(strangers)} captions of the data are none of the {len(classes)} classes, such as '{strangers[0]}': "
            "name all classes, text_encoder.classes=[...], or choose text_encoder=small, which reads sentences."
        )
    return classes
