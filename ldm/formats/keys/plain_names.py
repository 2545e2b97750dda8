"""CompVis' names without what training put before them: wrappers' levels, or a module around the model.

DistributedDataParallel and DeepSpeed put `module.` before names, torch.compile `_orig_mod.`, FSDP and checkpointing
theirs, at whatever level they wrap; programs that hold the whole model as an attribute put that attribute's name there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ldm.errors import ConfigError
from ldm.formats.files.open import Opened

_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_forward_module)"
_LEVEL = re.compile(rf"(?:(?<=\.)|^){_WRAPPER}\.")
_ROOT = re.compile(
    r"(?P<before>(?:(?:model|ldm|net|network|pl_module|latent_diffusion|state_dict)\.)*?)"
    r"(?:model\.diffusion_model|first_stage_model|cond_stage_model|model_ema)\."
)
_AVERAGE = re.compile(r"model_ema\.(?:module|_orig_mod)?(?=diffusion_model)")  # names that have lost their dots
_UNET = re.compile(r"(?:diffusion_model\.)?(?=(?:input_blocks|middle_block|output_blocks|time_embed|out|label_emb)\.)")


def unwrapped(name: str) -> str:
    """A name without wrappers' levels."""
    name = _LEVEL.sub("", name)
    if average := _AVERAGE.match(name):
        return "model_ema." + name[average.end() :].replace("_orig_mod", "")
    return name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Each name of a file -> what CompVis' programs call it. Other files' names lose wrappers' levels only."""
    found = {name: unwrapped(name) for name in names}
    before = {root["before"] for name in found.values() if (root := _ROOT.match(name))} - {""}
    for name, plain in found.items():
        root = _ROOT.match(plain)
        start = root["before"] if root else next((b for b in before if plain.startswith(b)), "")
        found[name] = plain.removeprefix(start)
    if any(re.match(r"(diffusion_model\.)?input_blocks\.", plain) for plain in found.values()):
        found = {name: _UNET.sub("model.diffusion_model.", plain, count=1) for name, plain in found.items()}
    return found


def plain(opened: Opened, source: Path) -> Opened:
    """A file's tensors by their plain names. ConfigError where two would have one name: which holds cannot be told."""
    names = plain_names(opened.names)
    tensors = {names[name]: tensor for name, tensor in opened.tensors.items()}
    if len(tensors) < len(opened.tensors):
        twice = next(n for n in opened.tensors if sum(names[n] == names[other] for other in opened.tensors) > 1)
        raise ConfigError(
            f"{source} has {names[twice]} twice, once as {twice}: which holds cannot be told. Save one of them alone."
        )
    return replace(opened, tensors=tensors, names=tuple(dict.fromkeys(names.values())))
