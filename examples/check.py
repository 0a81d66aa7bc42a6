"""What the paper says and the tables of its experiments show, side by side.

    python examples/check.py
    python examples/check.py --tables=results

Prints each claim with its figure and whether it holds; ends with an error if one does
not. `last` loss is that after the last epoch, at the tuned learning rate.
"""

from __future__ import annotations

import csv
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import NamedTuple

import experiment
import numpy as np
import regret
from absl import app, flags

FLAGS = flags.FLAGS


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    paper = str(pathlib.Path(__file__).with_name("paper"))
    flags.DEFINE_string("tables", paper, "Folder of the tables.", flag_values=values)


class Claim(NamedTuple):
    says: str
    figure: float
    at_most: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.at_most


# The last loss, infinite where it diverged, by setting, method and rate.
Ends = dict[tuple[str, str, float], float]


def ends(path: pathlib.Path, model: str = "") -> tuple[Ends, Ends]:
    """Of the curves with all epochs, and of those that a rate was tuned by."""
    if not path.exists():
        sys.exit(f"There is no table {path}. See examples/README.md for its command.")
    table = experiment.Table(path, model).curves
    runs = sorted({(c.batch_size, c.limit, c.seed) for c in table})
    if len(runs) != 1:
        sys.exit(
            f"{path} must have curves of one batch size, limit and seed, and of the "
            f"model as it comes. Received: {runs}. Keep one --output for each."
        )
    epochs = max(curve.epochs for curve in table)
    all_epochs: Ends = {}
    tuning: Ends = {}
    for c, rows in table.items():
        found = all_epochs if c.epochs == epochs else tuning
        found[c.setting, c.method, c.learning_rate] = experiment.last_loss(rows)
    return all_epochs, tuning


def imdb(folder: pathlib.Path) -> Iterator[Claim]:
    """Section 6.1: Adam converges as fast as AdaGrad, and faster than Nesterov's, both
    with dropout and without."""
    path = folder / "imdb_bow.csv"
    yield from _imdb("", *ends(path))
    if experiment.Table(path, " dropout=0.0").curves:
        yield from _imdb(" without dropout", *ends(path, " dropout=0.0"))


def _imdb(which: str, all_epochs: Ends, tuning: Ends) -> Iterator[Claim]:
    def tuned(setting: str, method: str) -> float:
        rates = [x for x in all_epochs if x[:2] == (setting, method)]
        return all_epochs[min(rates, key=lambda x: tuning.get(x, math.inf))]

    for setting in dict.fromkeys(setting for setting, *_ in all_epochs):
        for other, at_most in (("AdaGrad", 1.05), ("SGDNesterov", 0.8)):
            says = f"IMDB, {setting}{which}: last loss of Adam over {other}'s"
            yield Claim(says, tuned(setting, "Adam") / tuned(setting, other), at_most)


def vae(folder: pathlib.Path) -> Iterator[Claim]:
    """Section 6.4: without bias correction training is unstable for beta_2 near 1."""
    of_settings: dict[str, dict[float, dict[str, float]]] = {}
    all_epochs, _ = ends(folder / "mnist_vae.csv")
    for (setting, method, rate), loss in all_epochs.items():
        if "beta_2=0.9999" in setting.split() and rate >= 1e-3:
            of_rate = of_settings.setdefault(setting, {})
            of_rate.setdefault(rate, {})[method] = loss
    for setting, of_rate in of_settings.items():
        # Rates that diverge either way tell nothing.
        told = [of for of in of_rate.values() if of["Adam"] < math.inf]
        better = [of["Adam, uncorrected"] <= of["Adam"] for of in told]
        says = f"VAE, {setting}: share of rates from 1e-3 as good uncorrected"
        yield Claim(says, float(np.mean(better)), 0)


def regrets(folder: pathlib.Path) -> Iterator[Claim]:
    """Theorem 4.1 and its corollary: regret is O(sqrt(T))."""
    lines: dict[str, list[tuple[float, float]]] = {}
    with open(folder / "regret.csv", newline="") as file:
        for row in csv.DictReader(file):
            line = lines.setdefault(f"{row['problem']}, {row['method']}", [])
            line.append((float(row["steps"]), float(row["regret"])))
    for name, line in lines.items():
        at, values = np.transpose(line)
        says = f"Regret, {name}: slope of its log over log T"
        yield Claim(says, regret.slope(at, values), 0.55)
        # What the first steps have cost does not flatten this.
        says = f"Regret, {name}: growth per sqrt(T), late over before"
        yield Claim(says, late_growth(at, values), 1.1)


def late_growth(at: np.ndarray, values: np.ndarray) -> float:
    """Of regret, for each unit of sqrt(T), in the last half of a decade of T, over
    that in the half before."""
    marks = [np.abs(at - at[-1] / 10**x).argmin() for x in (1, 0.5, 0)]
    before, late = np.diff(values[marks]) / np.diff(np.sqrt(at[marks]))
    return float(late / before)


def claims(folder: pathlib.Path) -> list[Claim]:
    return [*imdb(folder), *vae(folder), *regrets(folder)]


def main(_) -> None:
    all_claims = claims(pathlib.Path(FLAGS.tables))
    for claim in all_claims:
        mark = "" if claim.holds else "  DOES NOT HOLD"
        print(f"{claim.says:72}{claim.figure:6.3f} <= {claim.at_most:g}{mark}")
    wrong = sum(not claim.holds for claim in all_claims)
    if wrong:
        sys.exit(f"{wrong} of {len(all_claims)} claims do not hold.")


if __name__ == "__main__":
    define_flags()
    app.run(main)
