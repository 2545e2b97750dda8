"""How often a table of settings names a difference: where there is none (A/A), and where there is one (A/B).

python experiments/016_sweeps/aa.py writes aa.csv, in three minutes on one core; nothing is trained. A seed does the
same to all settings (standard deviation 1), the rest is chance (0.3; or 0.1 in the first setting to 1 in the last).
"""

import csv
import math
from pathlib import Path

import numpy as np
import pandas as pd

from ldm.analysis import settings
from ldm.analysis.replicates import interval

TABLES = 200
CASES = [(k, n) for k in (2, 3, 5, 10) for n in (2, 3, 5, 10)]
KINDS = {  # name -> (standard deviation of the rest per setting, share of arms that fail, effect on the last setting)
    "A/A": (0.3, 0.0, 0.0),
    "A/A, 10 % of arms failed": (0.3, 0.1, 0.0),
    "A/A, unequal noise": (None, 0.0, 0.0),
    "A/B, effect 0.6": (0.3, 0.0, 0.6),
}


def main() -> None:
    rows = []
    for kind, (rest, failed, effect) in KINDS.items():
        for n_settings, n_seeds in CASES:
            rng = np.random.default_rng([n_settings, n_seeds])
            found = [one(rng, n_settings, n_seeds, rest, failed, effect) for _ in range(TABLES)]
            distinct, plain, apart = np.mean(found, axis=0)
            rows.append([kind, n_settings, n_seeds, TABLES, distinct, plain, apart])
            print(*rows[-1], flush=True)
    with (Path(__file__).parent / "aa.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["kind", "settings", "seeds", "tables", "named", "uncorrected", "unpaired"])
        table.writerows(rows)


def one(rng, n_settings, n_seeds, rest, failed, effect) -> tuple[bool, bool, bool]:
    """Whether a table names any setting: as it does, without the correction, and by intervals of means that part.

    With an effect: whether it names the setting that has it.
    """
    spread = np.linspace(0.1, 1.0, n_settings) if rest is None else np.full(n_settings, rest)
    values = rng.normal(size=n_seeds) + spread[:, None] * rng.normal(size=(n_settings, n_seeds))
    values[-1] += effect
    values[rng.random(values.shape) < failed] = math.nan
    arms = [
        (str(i), s, "finished" if math.isfinite(v) else "failed", v, "", "")
        for i, of_seeds in enumerate(values)
        for s, v in enumerate(of_seeds)
    ]
    table = settings(pd.DataFrame(arms, columns=["x", "seed", "state", "m", "message", "directory"]), "m")
    others, first = (table.iloc[-1:] if effect else table.iloc[1:]), table.iloc[0]
    apart = (others["low"] > first["high"]) | (others["high"] < first["low"])
    alone = [interval((values[int(i)] - values[0])[np.isfinite(values[int(i)] - values[0])]) for i in others["x"]]
    plain = any(low > 0 or high < 0 for _, low, high in alone)
    return bool(others["distinct"].any()), plain, bool(apart.any())


if __name__ == "__main__":
    main()
