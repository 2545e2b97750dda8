"""The layers that a LoRA changes, by the names that other programs give them, in ours."""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import cached_property

from ldm.errors import ConfigError
from ldm.formats.keys.unet import compvis_names

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_"}  # our parts -> kohya's, whose names have no dots
TEXT = "text_encoder.text_model."
# Names of modules with an underscore in them: all others in kohya's paths stand for dots.
_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks time_embedding time_emb_proj linear_1 linear_2 conv_shortcut "
    "conv_in conv_out proj_in proj_out to_q to_k to_v to_out text_model self_attn q_proj k_proj v_proj out_proj"
)
_SPLIT = re.compile(rf"(?<![^_])({'|'.join(_WORDS.split())})(?![^_])|_")
_COMPVIS = re.compile(r"lora_unet_(input_blocks|middle_block|output_blocks|time_embed_\d|out_\d)")
_OF_UNET = re.compile(r"lora_unet_(down_blocks|mid_block|up_blocks|conv_in|conv_out|time_embedding)_?")
_OLD_TEXT = {f"self_attn.to_{x}": f"self_attn.{x}_proj" for x in ("q", "k", "v", "out")}


class LayerNames:
    """Finds the layers of one base, or with names=None of any Stable Diffusion 1 or 2.

    names: the base's weights, as "unet.conv_in.weight".
    """

    def __init__(self, names: Collection[str] | None):
        self.layers = None if names is None else {n.removesuffix(".weight") for n in names if n.endswith(".weight")}

    def ours(self, theirs: str) -> str | None:
        """Our name of a layer ("unet.conv_in"); None if the base has no such layer."""
        name = self._without_dots(theirs) if theirs.startswith(tuple(PREFIXES.values())) else self._dotted(theirs)
        return name if self.layers is None or name in self.layers else None

    def _without_dots(self, theirs: str) -> str | None:
        if self.layers is not None:
            return self._table.get(theirs)
        if _COMPVIS.match(theirs):
            raise ConfigError(
                f"{theirs} is CompVis' name of a layer: only with the base at hand (names=) can it be found."
            )
        if theirs.startswith(PREFIXES["unet"]) and not _OF_UNET.match(theirs):
            raise ConfigError(
                f"{theirs} is no layer of Stable Diffusion's U-Net: only with the base at hand (Pipeline.load_adapter, "
                "or checkpoint=RUN of the run that made it) can it be found."
            )
        if theirs.startswith(PREFIXES["unet"]):
            return "unet." + _SPLIT.sub(_dot, theirs.removeprefix(PREFIXES["unet"]))
        return TEXT + _SPLIT.sub(_dot, theirs.removeprefix(PREFIXES["text_encoder"])).removeprefix("text_model.")

    def _dotted(self, theirs: str) -> str:
        """peft's and diffusers' names, in which attention's own may be old, and the part may go without saying."""
        path = theirs.removeprefix("base_model.model.").replace(".processor.", ".")
        if path.startswith(("text_model.", "encoder.layers.")):
            path = f"text_encoder.{path}"
        elif not path.startswith(("unet.", "text_encoder.")):
            path = f"unet.{path}"
        if path.startswith("unet."):
            return path + ".0" if path.endswith(".to_out") else path
        for old, new in _OLD_TEXT.items():
            path = path[: -len(old)] + new if path.endswith(f".{old}") else path
        if self._has(path) or not path.startswith("text_encoder.encoder."):
            return path
        return TEXT + path.removeprefix("text_encoder.")

    def _has(self, layer: str) -> bool:
        return self.layers is not None and layer in self.layers

    @cached_property
    def _table(self) -> dict[str, str]:
        """kohya's name of every layer -> ours: transformers' levels in either spelling, CompVis' names of a U-Net."""
        table: dict[str, str] = {}
        for layer in self.layers or ():
            part, path = layer.split(".", 1)
            for spelling in (path, path.removeprefix("text_model.")):
                table[PREFIXES.get(part, f"{part}_") + spelling.replace(".", "_")] = layer
        unet = [f"{layer.removeprefix('unet.')}.weight" for layer in self.layers or () if layer.startswith("unet.")]
        if any(name.startswith("down_blocks.") for name in unet):
            for ours, theirs in compvis_names(unet).items():
                underscored = theirs.removesuffix(".weight").replace(".", "_")
                table.setdefault(PREFIXES["unet"] + underscored, f"unet.{ours.removesuffix('.weight')}")
        return table


def _dot(found: re.Match[str]) -> str:
    return found[1] or "."
