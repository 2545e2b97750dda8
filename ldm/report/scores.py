"""The scores of an evaluation as rows of a table, their intervals drawn as bars."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from ldm.analysis.logged import scores_of
from ldm.analysis.scores import cards_of
from ldm.report.page import bar, number

QUANTILES = ("min", "q05", "q25", "median", "q75", "q95")  # of a distribution: one row
GROUPS = {
    "seen": "captions like those trained on",
    "unseen": "captions that combine words never seen together",
    "val": "captions that were held out",
    "reconstruction": "the autoencoder alone, whose losses no sample can make good",
    "held_out_val": "real pictures that were not trained on, for comparison",
    "held_out_unseen": "real pictures of unseen combinations, for comparison",
}
WORDS = {"nearest": "distance to the nearest training picture", "psnr": "PSNR, dB", "ssim": "SSIM", "n": "pictures"}


@dataclass
class Row:
    """One score, or one distribution. n: pictures that it is of. card: how it was measured."""

    name: str
    value: str
    drawn: Markup | None
    interval: str
    n: Any = None
    card: dict[str, str] = field(default_factory=dict)


@dataclass
class Group:
    name: str
    about: str
    rows: list[Row]


def groups(evaluation: Mapping[str, Any]) -> list[Group]:
    """The scores by the first part of their names, in the order in which they were measured."""
    scores = {name: rest for name, *rest in scores_of(dict(evaluation))}
    cards = cards_of(evaluation)
    families = _families(list(scores))
    found: dict[str, Group] = {}
    for name, members in families.items():
        group, _, short = name.partition("/")
        group, short = (group, short) if short else ("", group)
        scale = _scale(
            [v for n, of in families.items() if _short(n) == _short(name) for m in of for v in scores[m][:3]]
        )
        row = _distribution(members, scores, scale) if len(members) > 1 else _score(members[0], scores, scale)
        row.name = ", ".join(WORDS.get(part, part.replace("_", " ")) for part in short.split("/"))
        row.card = next((_card(cards[key]) for key in (*members, name) if key in cards), {})
        words = group.replace("_", " ")
        found.setdefault(group, Group(words, GROUPS.get(group, ""), [])).rows.append(row)
    for part in found.values():
        _say_n(part)
    return list(found.values())


def numbers(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Every number of the evaluation, as it is."""
    metrics = evaluation.get("metrics")
    return [(k, number(v)) for k, v in metrics.items()] if isinstance(metrics, dict) else []


def _families(names: Sequence[str]) -> dict[str, list[str]]:
    """Names that are quantiles of one distribution together, all others alone."""
    found: dict[str, list[str]] = {}
    for name in names:
        base, _, last = name.rpartition("/")
        whole = last in QUANTILES and {f"{base}/{q}" for q in ("q05", "median", "q95")} <= set(names)
        found.setdefault(base if whole else name, []).append(name)
    return found


def _say_n(group: Group) -> None:
    """How many pictures: once where it is the same for all of a group."""
    counts = {row.n for row in group.rows}
    if len(counts) == 1 and None not in counts:
        group.about += f"{', ' if group.about else ''}{number(counts.pop())} pictures"
        return
    for row in group.rows:
        row.interval += f"{', ' if row.interval else ''}{number(row.n)} pictures" if row.n is not None else ""


def _short(name: str) -> str:
    return name.partition("/")[2] or name


def _scale(values: Sequence[float | None]) -> tuple[float, float]:
    """From 0 to 1 for shares, else from 0, or the least, to a little above the largest."""
    known = [v for v in values if v is not None and v == v] or [0.0, 1.0]
    low, high = min(0.0, *known, 0.0), max(known)
    return (0.0, 1.0) if (low == 0 and 0.5 < high <= 1) or high <= low else (low, high * 1.05)


def _score(name: str, scores: Mapping[str, Sequence[Any]], scale: tuple[float, float]) -> Row:
    value, low, high, chance, n = scores[name]
    said = [f"{number(low)} to {number(high)}"] if low is not None and high is not None else []
    said += [f"chance {number(chance)}"] if chance is not None else []
    return Row("", number(value), bar(value, low, high, scale, chance), ", ".join(said), n)


def _distribution(members: Sequence[str], scores: Mapping[str, Sequence[Any]], scale: tuple[float, float]) -> Row:
    of = {name.rpartition("/")[2]: scores[name][0] for name in members}
    inner = (of["q25"], of["q75"]) if of.get("q25") is not None and of.get("q75") is not None else None
    drawn = bar(of["median"], of["q05"], of["q95"], scale, inner=inner)
    said = f"90 % in {number(of['q05'])} to {number(of['q95'])}" + (
        f", least {number(of['min'])}" if "min" in of else ""
    )
    return Row("", number(of["median"]), drawn, said, scores[members[0]][4])


def _card(said: Mapping[str, Any]) -> dict[str, str]:
    return {str(k): str(v) for k, v in said.items()}
