"""Lightning's checkpoint dictionary as a checkpoint folder of ours, and back."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO

from ldm.checkpoints.folder import Content, State, load_parts, write
from ldm.checkpoints.state import FILE as STATE
from ldm.checkpoints.state import joined
from ldm.errors import ConfigError
from ldm.formats.files import torch_file
from ldm.formats.files.open import load
from ldm.training.run.background import Background, Copies


class FolderCheckpointIO(CheckpointIO):
    """Lightning's checkpoint dictionary as a checkpoint folder, and back.

    in_background: `save_checkpoint` copies, and a thread writes; `check` and `wait` raise what failed there.
    """

    in_background = False

    def __init__(
        self,
        parts: Mapping[str, str],  # part -> attribute of the module
        trained: list[str],
        config: str,
        save_tokenizer: Callable[[Path], None] | None = None,
        previous: Path | None = None,  # newest checkpoint of the run so far
    ):
        self.parts, self.trained, self.config = parts, trained, config
        self.save_tokenizer, self.previous = save_tokenizer, previous
        self._background, self._copies = Background(), Copies()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        content = self.content(checkpoint)
        if not self.in_background:
            self.write(content, path)
            return
        self.wait()  # for the one before: there is one set of copies
        content.take_copies(self._copies.take)

        def write_copies() -> None:
            self._copies.wait()
            self.write(content, path)

        self._background.submit(write_copies)

    def afterwards(self, act: Callable[[], None]) -> None:
        """Once what was saved last is written, and only then."""
        if self.in_background:
            self._background.submit(act)
        else:
            act()

    def check(self) -> None:
        self._background.check()

    def wait(self) -> None:
        self._background.wait()

    def write(self, content: Content, path: Any) -> None:
        write(Path(path), content, content.state["global_step"], self.previous)
        self.previous = Path(path)

    def content(self, checkpoint: dict[str, Any]) -> Content:
        """What goes into the folder."""
        state = dict(checkpoint)
        tensors, averages = state.pop("state_dict"), state.pop("ema", {})
        return Content(
            parts={part: under(tensors, attribute) for part, attribute in self.parts.items()},
            averages={p: own for p in self.trained if (own := under(averages, self.parts[p]))},
            state=state,
            config=self.config,
            frozen=tuple(p for p in self.parts if p not in self.trained),
            save_tokenizer=self.save_tokenizer,
        )

    def load_checkpoint(self, path: Any, map_location: Any | None = None, weights_only: bool | None = None) -> dict:
        folder = Path(path)
        checkpoint = _read_state(folder)
        raw = load_parts(folder, weights="raw")
        checkpoint["state_dict"] = {f"{self.parts[p]}.{k}": v for p, tensors in raw.items() for k, v in tensors.items()}
        averages = {}
        for part in self.trained:
            file = folder / f"{part}.ema.safetensors"
            if file.is_file():
                averages.update({f"{self.parts[part]}.{k}": v for k, v in load(file).tensors.items()})
        if averages:
            checkpoint["ema"] = averages
        self.previous = folder
        return checkpoint

    def remove_checkpoint(self, path: Any) -> None:
        shutil.rmtree(path, ignore_errors=True)


_STATE = {  # what Lightning resumes from
    **dict.fromkeys(("epoch", "global_step"), int),
    **dict.fromkeys(("loops", "callbacks"), dict),
    **dict.fromkeys(("optimizer_states", "lr_schedulers"), list),
}


def _read_state(folder: Path) -> dict[str, Any]:
    """What was written of a trainer. ConfigError for anything else.

    Its tensors are in the file as long as nobody touches them: a process takes the shares that it needs.
    """
    path, tensors = folder / "state.pt", folder / STATE
    state = torch_file.unpickled(path)
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in _STATE.items()):
        raise ConfigError(f"{path} is no trainer's state: the folder was put together by hand. Use another step.")
    return joined(state, load(tensors).tensors) if tensors.is_file() else state


def under(tensors: State, attribute: str) -> State:
    """What belongs to one attribute of a module, by its names within that."""
    prefix = attribute + "."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
