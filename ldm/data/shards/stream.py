"""data.mode=stream: webdataset's own sequential reader, for shards that are elsewhere or must be read front to back."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import webdataset as wds
from braceexpand import braceexpand

from ldm.data.order import Geometry
from ldm.data.samples import Bad, Errors, Stage, careful, collate
from ldm.data.shards.splits import find_tars
from ldm.data.threads import in_order
from ldm.errors import ConfigError

# webdataset hands addresses to a shell (curl): only what no shell reads as anything else may pass
_SAFE_ADDRESS = re.compile(r"https?://[A-Za-z0-9._~:/?@%=+-]+")


class StreamLoader:
    """Batches from webdataset's reader: shards and samples shuffled by (seed, epoch), a fixed number an epoch.

    Approximate where `mode=index` is exact: the shuffle mixes within a buffer only, a resume reads and throws away what
    had been read, a bad sample is left out and the next one moves up, and damage in a tar may pass unseen.
    """

    def __init__(
        self,
        shards: str,
        stages: Sequence[Stage],
        geometry: Geometry,
        epoch_samples: int,
        seed: int = 0,
        buffer: int = 2000,
        max_bad: int | None = None,
        threads: int = 2,
    ) -> None:
        self.urls, self.stages, self.geometry = addresses(shards), [careful(s) for s in stages], geometry
        self.epoch_samples, self.seed, self.buffer, self.threads = epoch_samples, seed, buffer, threads
        self.errors = Errors(epoch_samples, max_bad)
        self.epoch, self.done, self._fresh = 0, 0, True

    def __len__(self) -> int:
        return self.geometry.batches(self.epoch_samples)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if not self._fresh or self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        self._fresh = False
        rows = self._good(self.epoch, skip=self.done * self.geometry.batch_size)
        while self.done < len(self):
            batch = collate([next(rows) for _ in range(self.geometry.batch_size)])
            self.done += 1
            yield batch

    def _good(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        """This rank's usable samples without end, decoded by threads."""
        ahead = 2 * self.geometry.batch_size
        for row in in_order(self._decoded, self._mine(epoch, skip), self.threads, ahead):
            self.errors.saw(1)
            if isinstance(row, Bad):
                self.errors.add(row)
            else:
                yield row

    def _decoded(self, raw: dict[str, Any]) -> Any:
        row: Any = raw
        for stage in self.stages:
            row = stage(row)
        return row

    def _mine(self, epoch: int, skip: int) -> Iterator[dict[str, Any]]:
        """This rank's raw samples: the stream's blocks of a batch are dealt to the ranks in turn."""
        turn, count, repeat = 0, 0, 0
        while True:
            start = turn
            for raw in self._raw(epoch, repeat):
                mine = turn // self.geometry.batch_size % self.geometry.world_size == self.geometry.rank
                turn, count = turn + 1, count + mine
                if mine and count > skip:
                    yield raw | {"__index__": turn - 1, "__epoch__": epoch}
            repeat += 1
            if turn == start:
                raise ConfigError(f"{self.urls[0]} and the others hold no samples. Give `shards=` another path.")

    def _raw(self, epoch: int, repeat: int) -> Iterator[dict[str, Any]]:
        text = f"stream {self.seed} {epoch} {repeat}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")
        return iter(
            wds.DataPipeline(
                wds.SimpleShardList(self.urls),
                wds.detshuffle(bufsize=len(self.urls), initial=len(self.urls), seed=seed),
                wds.tarfile_to_samples(),
                wds.detshuffle(bufsize=self.buffer, initial=self.buffer // 2, seed=seed),
            )
        )

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self.epoch, "batches": self.done, "seed": self.seed, "shards": len(self.urls)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue about where it was; refuses another seed or number of shards."""
        now = self.state_dict()
        for what in ("seed", "shards"):
            if state.get(what) != now[what]:
                raise ConfigError(
                    f"cannot continue the stream: {what} was {state.get(what)} and is {now[what]} now. Restore it,"
                    " or start a new run with name=OTHER."
                )
        self.epoch, self.done, self._fresh = state["epoch"], state["batches"], True


def addresses(shards: str) -> list[str]:
    """Files or https addresses; `pipe:` and anything a shell could misread are refused."""
    if "://" not in shards and not shards.startswith("pipe:"):
        return [str(path) for path in find_tars(shards)]
    urls = list(braceexpand(shards))
    for url in urls:
        if not _SAFE_ADDRESS.fullmatch(url):
            raise ConfigError(
                f"shards={url}: only plain https addresses can be streamed. Download it and give the folder."
            )
    return urls
