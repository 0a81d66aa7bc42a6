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


def curves(path: pathlib.Path) -> dict[experiment.Curve, float]:
    """The last loss of each curve with all epochs; infinite where it diverged."""
    if not path.exists():
        sys.exit(f"There is no table {path}. See examples/README.md for its command.")
    table = experiment.Table(path).curves
    epochs = max(curve.epochs for curve in table)
    return {
        curve: experiment.last_loss(rows)
        for curve, rows in table.items()
        if curve.epochs == epochs
    }


def imdb(folder: pathlib.Path) -> Iterator[Claim]:
    """Section 6.1: Adam converges as fast as AdaGrad, and faster than Nesterov's."""
    ends: dict[str, dict[str, float]] = {}
    for curve, loss in curves(folder / "imdb_bow.csv").items():
        ends.setdefault(curve.setting, {})[curve.method] = loss
    for setting, of in ends.items():
        for other, at_most in (("AdaGrad", 1.05), ("SGDNesterov", 0.8)):
            says = f"IMDB, {setting}: last loss of Adam over {other}'s"
            yield Claim(says, of["Adam"] / of[other], at_most)


def vae(folder: pathlib.Path) -> Iterator[Claim]:
    """Section 6.4: without bias correction training is unstable for beta_2 near 1."""
    ends: dict[str, dict[float, dict[str, float]]] = {}
    for curve, loss in curves(folder / "mnist_vae.csv").items():
        if "beta_2=0.9999" in curve.setting and curve.learning_rate >= 1e-3:
            of_rate = ends.setdefault(curve.setting, {})
            of_rate.setdefault(curve.learning_rate, {})[curve.method] = loss
    for setting, of_rate in ends.items():
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
        says = f"Regret, {name}: slope of its log over log T"
        yield Claim(says, regret.slope(*np.transpose(line)), 0.55)


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
