"""What a sweep's command line spans: parameters, seeds, and what is the same in all arms."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.types import IntervalSweep, Override

from ldm.errors import ConfigError


@dataclass(frozen=True)
class Parameter:
    """A key and what it may be: texts as typed, or numbers of an interval.

    log: numbers are drawn evenly by their logarithm. whole: integers, both ends among them.
    """

    key: str
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    whole: bool = False

    @classmethod
    def of(cls, override: Override) -> Parameter:
        key, value = override.get_key_element(), override.value()
        if not isinstance(value, IntervalSweep):
            return cls(key, tuple(dict.fromkeys(override.sweep_string_iterator())))
        low, high = value.start, value.end
        assert low is not None and high is not None
        log, whole = "log" in value.tags, isinstance(low, int) and isinstance(high, int)
        if not low < high or not math.isfinite(high - low) or (log and low <= 0):
            wanted = "finite, the lower end first" + (", and above 0 for tag(log, ...)" if log else "")
            raise ConfigError(f"{override.input_line}: an interval's ends are {wanted}.")
        return cls(key, (), low, high, log, whole)

    def draw(self, rng: random.Random) -> str | float | int:
        if self.choices:
            return rng.choice(self.choices)
        if self.log:
            half = 0.5 if self.whole else 0.0
            drawn = math.exp(rng.uniform(math.log(self.low - half), math.log(self.high + half)))
            return min(max(round(drawn), int(self.low)), int(self.high)) if self.whole else drawn
        return rng.randint(int(self.low), int(self.high)) if self.whole else rng.uniform(self.low, self.high)

    @property
    def size(self) -> float:
        """How many values there are."""
        return len(self.choices) if self.choices else self.high - self.low + 1 if self.whole else math.inf


Point = Mapping[str, Any]  # key -> value


@dataclass(frozen=True)
class Space:
    """parameters: what is searched. seeds: of each point, the replicates. given: the overrides, in order as typed;
    those that are searched have no value."""

    parameters: tuple[Parameter, ...]
    seeds: tuple[str, ...]
    given: tuple[tuple[str, str | None], ...]

    @classmethod
    def of(cls, overrides: Sequence[Override]) -> Space:
        """ConfigError for an interval that has no numbers in it, or of seeds."""
        given: dict[str, str | None] = {}
        swept: dict[str, Parameter] = {}
        for override in overrides:  # a later one of a key replaces
            key = override.get_key_element()
            swept.pop(key, None)
            given[key] = None if override.is_sweep_override() else str(override.get_value_element_as_str())
            if override.is_sweep_override():
                swept[key] = Parameter.of(override)
        seeds = swept.pop("seed", Parameter("seed"))
        if not seeds.choices and "seed" in given and given["seed"] is None:
            raise ConfigError("seed=interval(...): seeds are replicates of every setting, so name them: seed=0,1,2.")
        return cls(tuple(swept.values()), seeds.choices, tuple(given.items()))

    @property
    def size(self) -> float:
        """How many points there are."""
        return math.prod(p.size for p in self.parameters)

    def draw(self, rng: random.Random) -> dict[str, Any]:
        return {p.key: p.draw(rng) for p in self.parameters}

    def arms(self, point: Point) -> list[list[str]]:
        """The overrides of every replicate of a point."""
        typed = {key: value if isinstance(value, str) else repr(value) for key, value in point.items()}
        fixed = {key: value for key, value in self.given if value is not None}
        found = []
        for seed in self.seeds or (None,):
            values = {**fixed, **typed, **({} if seed is None else {"seed": seed})}
            found.append([f"{key}={values[key]}" for key, _ in self.given])
        return found


def intervals(overrides: Sequence[Override]) -> list[Override]:
    """Those that have no end of values."""
    return [o for o in overrides if o.is_sweep_override() and isinstance(o.value(), IntervalSweep)]
