"""What the paper's experiments share: optimizers, flags, curves, table, picture."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import devices
import keras
import matplotlib
import numpy as np
from absl import flags

import keras_adam

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS


class Method(NamedTuple):
    """An optimizer, its usual learning rate, and whether it lowers it by itself."""

    make: Callable[[Any], keras.optimizers.Optimizer]
    rate: float
    lowers: bool = False


METHODS = {
    "Adam": Method(keras_adam.Adam, 0.001),
    "AdaMax": Method(keras_adam.AdaMax, 0.002),
    "SGDNesterov": Method(
        functools.partial(keras.optimizers.SGD, momentum=0.9, nesterov=True), 0.01
    ),
    # Keras starts Adagrad's sums at 0.1, the paper's at 0.
    "AdaGrad": Method(
        functools.partial(
            keras.optimizers.Adagrad, initial_accumulator_value=0.0, epsilon=1e-8
        ),
        0.01,
        lowers=True,
    ),
    "RMSProp": Method(keras.optimizers.RMSprop, 0.001),
    "AdaDelta": Method(
        functools.partial(keras.optimizers.Adadelta, epsilon=1e-6), 1.0, lowers=True
    ),
}
XLABELS = {"epoch": "passes over the data", "seconds": "seconds of training"}

# Of each setting, of each optimizer: the rows of its curve, an epoch each.
Panels = dict[str, dict[str, list[dict[str, float]]]]


def define_common(values: flags.FlagValues = FLAGS, *, epochs: int) -> None:
    """Flags of all; not at import, since several examples may be imported at once."""
    to = {"flag_values": values}
    flags.DEFINE_integer("epochs", epochs, "Passes over the data.", 1, **to)
    flags.DEFINE_integer("batch_size", 128, "Examples a step.", 1, **to)
    flags.DEFINE_integer("limit", None, "Examples to train on. None: all.", 1, **to)
    devices.define_flags(values)
    flags.DEFINE_integer("seed", 0, "Of weights, batches and dropout.", **to)
    flags.DEFINE_string("output", "results", "Folder for table and picture.", **to)


def define_optimizers(values: flags.FlagValues, optimizers: Iterable[str]) -> None:
    names = ", ".join(METHODS)
    flags.DEFINE_list(
        "optimizers", list(optimizers), f"Of {names}.", flag_values=values
    )
    flags.register_validator(
        "optimizers",
        lambda chosen: chosen and set(chosen) <= set(METHODS),
        f"must be some of {names}",
        flag_values=values,
    )


def define_flags(
    values: flags.FlagValues = FLAGS,
    *,
    epochs: int,
    tune_epochs: int,
    grid: Iterable[float] = (0.1, 0.3, 1, 3, 10),
    optimizers: Iterable[str] = METHODS,
) -> None:
    """Flags of those that compare optimizers."""
    define_common(values, epochs=epochs)
    define_optimizers(values, optimizers)
    to = {"flag_values": values}
    flags.DEFINE_list(
        "grid",
        [str(x) for x in grid],
        "Learning rates to try, as multiples of each optimizer's usual one.",
        **to,
    )
    flags.DEFINE_integer(
        "tune_epochs",
        tune_epochs,
        "Passes after which the rate of the grid with the least training loss is "
        "chosen; it then starts anew.",
        1,
        **to,
    )
    flags.register_validator(
        "grid",
        lambda grid: grid and all(_positive(x) for x in grid),
        "must be positive numbers",
        flag_values=values,
    )


def _positive(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


@dataclasses.dataclass(frozen=True)
class Curve:
    """What tells a training run from others; it has a row an epoch in the table."""

    setting: str
    method: str
    learning_rate: float
    epochs: int
    batch_size: int
    limit: int
    seed: int


def open_table(name: str, *sizes: str) -> Table:
    """That of this name in --output.

    Args:
        sizes: Flags that say which model it is. Of one that is not as it comes, the
            table knows the curves of this model only.
    """
    changed = [FLAGS[x] for x in sizes if FLAGS[x].value != FLAGS[x].default]
    model = "".join(f" {x.name}={x.value}" for x in changed)
    return Table(pathlib.Path(FLAGS.output) / f"{name}.csv", model)


class Table:
    """All curves of an experiment, in a CSV file; those there are not trained again.

    Args:
        path: Of the file.
        model: Stands behind each setting there, after a bar.
    """

    def __init__(self, path: pathlib.Path, model: str = "") -> None:
        self.path, self.model = path, model and f" |{model}"
        self.curves: dict[Curve, list[dict[str, float]]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            with open(path, newline="") as file:
                for row in csv.DictReader(file):
                    setting, bar, other = row["setting"].partition(" |")
                    if bar + other != self.model:
                        continue
                    row["setting"] = setting
                    curve = Curve(
                        *(
                            {"int": int, "float": float}.get(f.type, str)(
                                row.pop(f.name)
                            )
                            for f in dataclasses.fields(Curve)
                        )
                    )
                    numbers = {k: float(x) for k, x in row.items()}
                    self.curves.setdefault(curve, []).append(numbers)

    def get(
        self, curve: Curve, train: Callable[[], list[dict[str, float]]]
    ) -> list[dict[str, float]]:
        """The curve's epochs: from the table, or else trained and written there."""
        if curve not in self.curves:
            rows = [{"epoch": i + 1, **row} for i, row in enumerate(train())]
            new = not self.path.exists()
            with open(self.path, "a", newline="") as file:
                writer = csv.writer(file)
                if new:
                    names = [f.name for f in dataclasses.fields(Curve)]
                    writer.writerow([*names, *rows[0]])
                setting, *others = dataclasses.astuple(curve)
                for row in rows:
                    writer.writerow([setting + self.model, *others, *row.values()])
            self.curves[curve] = rows
            print(
                f"{curve.setting:24}{curve.method:12}"
                f"{curve.learning_rate:<10.4g}{len(rows):4} epochs  "
                f"loss {rows[-1]['loss']:.5f}  {rows[-1]['seconds']:.0f} s",
                flush=True,
            )
        return self.curves[curve]


class Clock(keras.callbacks.Callback):
    """Adds to each epoch's logs the seconds of training up to its end."""

    def on_train_begin(self, logs=None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None) -> None:
        logs["seconds"] = round(time.perf_counter() - self._start, 3)


def fit(
    model: keras.Model,
    optimizer: keras.optimizers.Optimizer,
    loss: Any,
    x: np.ndarray,
    y: np.ndarray,
    epochs: int,
    callbacks: Iterable[keras.callbacks.Callback] = (),
) -> list[dict[str, float]]:
    """Loss and seconds of each epoch; the last may be NaN, where training ended."""
    model.compile(optimizer=optimizer, loss=loss, jit_compile=devices.jit_compile())
    history = model.fit(
        x,
        y,
        batch_size=FLAGS.batch_size,
        epochs=epochs,
        callbacks=[Clock(), keras.callbacks.TerminateOnNaN(), *callbacks],
        verbose=0,
    ).history
    return [
        {"loss": loss, "seconds": seconds}
        for loss, seconds in zip(history["loss"], history["seconds"], strict=True)
    ]


def last_loss(rows: list[dict[str, float]]) -> float:
    """Of a curve; infinite, if training ended in NaN."""
    return rows[-1]["loss"] if math.isfinite(rows[-1]["loss"]) else math.inf


def compare(
    table: Table,
    settings: Iterable[str],
    train: Callable[[str, keras.optimizers.Optimizer, int], list[dict[str, float]]],
    *,
    size: int,
    schedule: Callable[[float], Any] | None = None,
) -> Panels:
    """The best curve of each optimizer in each setting, by the paper's tuning.

    Args:
        table: Keeps all curves.
        settings: What `train` is told.
        train: Trains a new model, by setting, optimizer and epochs.
        size: Number of examples.
        schedule: Makes a schedule of a rate, for optimizers that do not lower their
            steps by themselves.
    """

    def curve(setting: str, name: str, rate: float, epochs: int) -> Curve:
        return Curve(setting, name, rate, epochs, FLAGS.batch_size, size, FLAGS.seed)

    def run(c: Curve) -> list[dict[str, float]]:
        def train_it() -> list[dict[str, float]]:
            keras.utils.set_random_seed(c.seed)
            method = METHODS[c.method]
            lowered = schedule and not method.lowers
            rate = schedule(c.learning_rate) if lowered else c.learning_rate
            return train(c.setting, method.make(rate), c.epochs)

        return table.get(c, train_it)

    best: Panels = {}
    for setting in settings:
        curves = best.setdefault(setting, {})
        for name in FLAGS.optimizers:
            rates = sorted(
                float(f"{METHODS[name].rate * float(x):.4g}") for x in FLAGS.grid
            )
            if len(rates) > 1:
                tried = [
                    last_loss(run(curve(setting, name, r, FLAGS.tune_epochs)))
                    for r in rates
                ]
                rates = [rates[int(np.argmin(tried))]]
            curves[name] = run(curve(setting, name, rates[0], FLAGS.epochs))
    return best


def plot(
    panels: Panels, path: pathlib.Path, title: str, by: str = "epoch", **axes: Any
) -> None:
    """Training loss of each curve of each panel, by "epoch" or by "seconds"."""
    lines = {
        name: {
            label: [(r[by], r["loss"]) for r in rows] for label, rows in curves.items()
        }
        for name, curves in panels.items()
    }
    draw(lines, path, title, xlabel=XLABELS[by], **axes)


def draw(
    panels: dict[str, dict[str, list[tuple[float, float]]]],
    path: pathlib.Path,
    title: str,
    **axes: Any,
) -> None:
    """The lines of each panel; `axes` are those of all panels."""
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, all_axes = plt.subplots(
        rows,
        columns,
        figsize=(1 + 4 * columns, 4 * rows),
        squeeze=False,
        layout="constrained",
    )
    for ax, (name, lines) in zip(all_axes.flat, panels.items()):
        for label, points in lines.items():
            ax.plot(*zip(*points), label=label)
        ax.set(**{"title": name, "ylabel": "training loss", **axes})
        ax.grid(alpha=0.3)
        ax.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def run(
    table: Table,
    title: str,
    settings: Iterable[str],
    train: Any,
    yscale: str = "linear",
    **kwargs: Any,
):
    """`compare`, with a picture beside the table."""
    panels = compare(table, settings, train, **kwargs)
    plot(panels, table.path.with_suffix(".png"), title, yscale=yscale)
