"""Configurations that want to run code, and a watch that sees whether anything of the kind happened."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

# A file is removed, a program started, a pickle read: what reading a configuration never does.
FORBIDDEN = {"os.remove", "os.rmdir", "os.rename", "os.system", "os.exec", "os.posix_spawn"}
FORBIDDEN |= {"shutil.rmtree", "shutil.move", "subprocess.Popen", "pickle.find_class", "socket.connect"}
MODULE = "evil_module_of_the_working_directory"
_seen: list[str] | None = None


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if _seen is None:
        return
    if event in FORBIDDEN:
        _seen.append(f"{event} {arguments!r}"[:200])
    elif event == "import" and MODULE in str(arguments[0]):
        _seen.append(f"import {arguments[0]}")
    elif event == "open" and isinstance(arguments[1], str) and set("wax+") & set(arguments[1]):
        _seen.append(f"open for writing {arguments[0]}")


sys.addaudithook(_hook)


@contextmanager
def watched(folder: Path) -> Iterator[list[str]]:
    """What was run, deleted, written or resolved inside the block; `folder` gets a module that marks its import."""
    global _seen
    (folder / f"{MODULE}.py").write_text("open('imported', 'w')\nclass X: pass\n")
    sys.path.insert(0, str(folder))
    seen: list[str] = []
    before = dict(BaseContainer._resolvers)
    for name in ("oc.env", "oc.decode", "oc.create", "oc.select", "now"):
        OmegaConf.register_new_resolver(name, lambda *a, _name=name: seen.append(f"resolver {_name}"), replace=True)
    _seen = seen
    try:
        yield seen
    finally:
        _seen = None
        BaseContainer._resolvers = before
        sys.path.remove(str(folder))
        sys.modules.pop(MODULE, None)


def kinds(folder: Path) -> dict[str, Any]:
    """Twelve kinds and more: name -> what stands in the place of a group's own node."""
    prey, pickled = str(folder / "prey"), str(folder / "evil.pt")
    unet = {"_target_": "ldm.models.unet.UNet"}
    loader = {"_target_": "lightning.fabric.utilities.cloud_io._load", "path_or_url": pickled, "weights_only": False}
    class_method = {"_target_": "lightning.pytorch.LightningModule.load_from_checkpoint", "checkpoint_path": pickled}
    command = {"_target_": "os.system", "command": "touch ran"}
    return {
        "a loader of an allowed package": {"autoencoder": loader},
        "a deleter of the standard library": {"model": {"_target_": "shutil.rmtree", "path": prey}},
        "a deleter through a package": {"model": {"_target_": "ldm.tasks.work.runs.shutil.rmtree", "path": prey}},
        "a writer of ours": {"model": {"_target_": "ldm.training.run.directory.write_json", "path": prey, "value": 1}},
        "a task": {"model": {"_target_": "ldm.tasks.work.prepare.prepare", "config": {}}},
        "an unbound method": {"scheduler": {"_target_": "lightning.pytorch.Trainer.test", "self": None}},
        "a static method": {"model": {"_target_": "torch.nn.Module.__new__", "cls": "x"}},
        "a class method": {"model": class_method},
        "torch.load": {"model": {"_target_": "torch.load", "f": pickled, "weights_only": False}},
        "builtins": {"text_encoder": {"_target_": "builtins.exec", "_args_": ["open('ran', 'w')"]}},
        "a module of the working directory": {"model": {"_target_": f"{MODULE}.X"}},
        "a module of the working directory, below": {"model": {**unet, "in_channels": {"_target_": f"{MODULE}.X"}}},
        "within a list": {"model": {**unet, "block_out_channels": [[command]]}},
        "hydra's own doors": {"model": {"_target_": "hydra.utils.get_method", "path": f"{MODULE}.X"}},
        "hydra's own, partial": {"model": {"_target_": "hydra.utils.instantiate", "_partial_": True, "f": command}},
        "positional arguments": {"model": {**unet, "_args_": [command]}},
        "an option of no target": {"guider": {"interval": command}},
        "an adapter": {"adapter": {"lora": command}},
        "a class of another group": {"model": {"_target_": "ldm.autoencoders.kl.AutoencoderKL"}},
        "a class of another place": {"model": {**unet, "in_channels": unet}},
        "a partial": {"autoencoder": {"_target_": "ldm.autoencoders.kl.AutoencoderKL", "_partial_": True}},
        "a target that is an interpolation": {"model": {"_target_": "${oc.env:LDM_SECRET}"}},
        "an argument that is an interpolation": {"model": {**unet, "in_channels": "${oc.env:LDM_SECRET}"}},
        "a target that is a list": {"model": {"_target_": ["os.system"]}},
        "no target": {"model": {"in_channels": 4}},
        "a text": {"model": "ldm.models.unet.UNet"},
        "a key that is a number": {"model": {**unet, 3: 4}},
    }


TARGETS = [
    *("os.system", "os.remove", "shutil.rmtree", "builtins.eval", "subprocess.Popen", "torch.load", "pickle.loads"),
    *("lightning.fabric.utilities.cloud_io._load", "lightning.pytorch.Trainer", "torch.nn.Linear", "torch.hub.load"),
    *("torchmetrics.MeanMetric", "torch.optim.AdamW", f"{MODULE}.X", "hydra.utils.instantiate", "ldm.build.build"),
    *("ldm.training.run.directory.write_json", "ldm.tasks.work.runs.shutil.rmtree", "ldm", ""),
    "ldm.models.unet.UNet",
    *("ldm.models.unet.UNet.forward", "ldm.diffusion.schedulers.Cosine", "ldm.text.small.SmallTextEncoder", None, 3),
    *("ldm.adapters.lora.LoRA", "ldm.data.sources.folder.FolderSource", "ldm.checkpoints.folder.find", [], "${x}"),
]
VALUES = [None, True, -1, 0, 1, 2.5, float("nan"), "", "text", "${oc.env:LDM_SECRET}", "${now:%Y}", [], {}, [[]]]
KEYS = ["_target_", "_partial_", "_args_", "_recursive_", "extra", "${oc.env:X}"]


def fuzzed(config: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """The configuration with one to three places in it replaced by evil nodes, odd values or odd keys."""
    config = copy.deepcopy(config)
    for _ in range(draw.randint(1, 3)):
        owner: Any = config
        key = draw.choice(list(owner))
        while isinstance(owner[key], (dict, list)) and owner[key] and draw.random() < 0.8:
            owner = owner[key]
            key = draw.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        owner[key] = _odd(draw, owner[key])
        if isinstance(owner, dict) and draw.random() < 0.2:
            owner[draw.choice(KEYS)] = _odd(draw, 1)
    return config


def _odd(draw: random.Random, before: Any) -> Any:
    made: Any = draw.choice(VALUES)
    if draw.random() < 0.6:
        made = {"_target_": draw.choice(TARGETS), draw.choice(["path", "f", "x"]): draw.choice(VALUES)}
        if draw.random() < 0.3:
            made["_partial_"] = draw.choice([True, False, "yes"])
        if draw.random() < 0.2:
            made["_args_"] = ["ran"]
    if draw.random() < 0.2:
        made = [made, before]
    return {"deeper": made} if draw.random() < 0.1 else made
