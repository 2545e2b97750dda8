"""Scores of several runs side by side, as far as they were measured alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from ldm.analysis.logged import Logged, Scalars, scores_of
from ldm.analysis.sources import find
from ldm.errors import ConfigError


def scores(pattern: str | Path = "outputs/*") -> pd.DataFrame:
    """One row a run that was evaluated, a column a score: only numbers of equal cards stand in one column.

    Where cards differ, a column's name says in what: "val/fid [num_steps=10]" beside "val/fid [num_steps=50]".

    >>> scores("outputs/*")
    """
    runs = [run for run in find(pattern).runs if _has_scores(run)]
    if not runs:
        raise ConfigError(f"no run at {pattern} has an evaluation: python -m ldm.run task=evaluate checkpoint=RUN.")
    rows = alike([run.evaluation for run in runs])
    return pd.DataFrame(rows, index=pd.Index([run.name for run in runs], name="run"))


def alike(evaluations: Sequence[dict[str, Any]]) -> list[Scalars]:
    """The scores of each, under names that say in what their cards differ, where they do."""
    found = [{name: value for name, value, *_ in scores_of(e)} for e in evaluations]
    made: list[Scalars] = [{} for _ in found]
    for name in dict.fromkeys(n for row in found for n in row):
        cards = {str(i): cards_of(evaluations[i]).get(name, {}) for i, row in enumerate(found) if name in row}
        apart = differing(cards)
        for whose in cards:
            said = ", ".join(f"{field}={values[whose]}" for field, values in apart.items())
            made[int(whose)][f"{name} [{said}]" if said else name] = found[int(whose)][name]
    return made


def differing(cards: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """{field: {whose: its value}} of the fields in which some cards differ; {} where all compare."""
    fields = dict.fromkeys(field for card in cards.values() for field in card)
    found = {field: {whose: card.get(field) for whose, card in cards.items()} for field in fields}
    return {field: values for field, values in found.items() if len({repr(v) for v in values.values()}) > 1}


def cards_of(evaluation: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{score: what it was measured with}; {} of an evaluation without cards, or with something else in their place."""
    given = evaluation.get("cards")
    return {k: v for k, v in given.items() if isinstance(v, dict)} if isinstance(given, dict) else {}


def _has_scores(run: Logged) -> bool:
    try:
        return bool(scores_of(run.evaluation))
    except ConfigError:
        return False
