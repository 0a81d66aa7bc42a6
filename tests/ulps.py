"""The oracle of a random training, and errors in ulps."""

import ml_dtypes
import numpy as np
import reference
from cases import DTYPES, halving

TAIL = 1e-5  # what the README promises of exact mode, as a share of what is owed
# Options that a weight's `reach` does without.
WITHOUT = (
    *("weight_decay", "ema_momentum", "ema_overwrite_frequency"),
    "gradient_accumulation_steps",
)


class Oracle:
    """The oracle, and beside it what sets the unit of an error.

    `reach` is how far a weight would have gone had its gradients all pulled one
    way: what float sums of m round to is a digit of that. `owed` is the part of it
    in steps that skipped the weight's row.
    """

    def __init__(self, program, thetas):
        p = self.program = program
        rule = dict(p.rule)
        if p.factor is not None:
            rule["beta_1"] = halving(rule["beta_1"], p.factor)
        rule = getattr(reference, p.cls)(**rule)
        rate = p.rate if p.fall is None else halving(p.rate, p.fall)
        options = {k: v for k, v in p.base.items() if k != "use_ema"}
        n = options.get("gradient_accumulation_steps", 1)
        exact, dtype = p.mode == "exact", DTYPES[p.dtype]
        # Exact rows are rounded when they are updated, and not when skipped.
        self.by_rows = exact
        self.training = reference.Training(
            rule,
            thetas,
            [np.float64 if self.by_rows else dtype, dtype],
            lazy=p.mode == "lazy",
            learning_rate=rate,
            **options,
        )
        self.one_way = reference.Training(
            rule,
            [np.zeros(x.shape) for x in thetas],
            [np.float64] * 2,
            lazy=p.mode == "lazy",
            # Which counts updates, and not micro-steps.
            learning_rate=lambda step: self.training.learning_rate(n * step + n - 1),
            **{k: v for k, v in options.items() if k not in WITHOUT},
        )
        self.largest = [np.abs(x) for x in self.training.thetas]
        self.owed = [np.zeros(x.shape) for x in thetas]
        self._start_sum()

    def _start_sum(self):
        self.sums = [np.zeros(x.shape) for x in self.training.thetas]
        self.touched = np.zeros(self.program.shape[0], bool)

    def apply(self, gradients):
        p, training = self.program, self.training
        training.apply(gradients)
        for i, g in enumerate(gradients):
            dense, touched = reference.densify(g, self.sums[i].shape)
            self.sums[i] += dense / training.accumulate
            if i == 0:
                self.touched |= touched
        if training.calls % training.accumulate:
            return
        before = self.one_way.thetas[0]
        table, vector = map(np.abs, self.sums)
        [ids] = np.nonzero(self.touched)
        self.one_way.apply([(table[ids], ids), vector])
        went = np.abs(self.one_way.thetas[0] - before)
        went[ids] = 0
        if self.by_rows:
            self.owed[0] += went
            if p.swept:
                self.touched[
                    (training.calls // training.accumulate - 1) % len(went)
                ] = 1
            every = training.ema_overwrite_frequency
            if every and training.calls // training.accumulate % every == 0:
                self.touched[:] = True
            theta, written = training.thetas[0], self.touched
            theta[written] = theta[written].astype(DTYPES[p.dtype])
        self.largest = [
            np.maximum(a, np.abs(b)) for a, b in zip(self.largest, training.thetas)
        ]
        self._start_sum()

    def units(self):
        """What one ulp is, for each weight.

        The spacing of its dtype at the largest size it has had, or of the state's
        at `reach`, whichever is larger.
        """
        dtype = DTYPES[self.program.dtype]
        state = np.float64 if dtype == np.float64 else np.float32
        reach = (np.abs(x) for x in self.one_way.thetas)
        return [
            np.maximum(_ulp(a, dtype), _ulp(b, state))
            for a, b in zip(self.largest, reach)
        ]


def _ulp(x, dtype):
    info = ml_dtypes.finfo(dtype)
    x = np.maximum(x, float(info.smallest_normal))
    return float(info.eps) * 2.0 ** np.floor(np.log2(x))


def largest_error(program, found, oracle):
    """The largest error of some weights and their averages, in ulps of the weights.

    Taken off first is what is promised: `TAIL` of what was owed, and of `reach` the
    oracle's own error, whose 1 - beta^t is as exact as beta^t near 1 is.
    """
    own = 1e-15 / (1 - max(program.rule["beta_1"], program.rule["beta_2"]))
    # Of averages, and of weights that they overwrite, 1 - momentum^t likewise.
    average = 1e-15 / (1 - program.base.get("ema_momentum", 0))
    overwritten = "ema_overwrite_frequency" in program.base
    training, units = oracle.training, oracle.units()
    truths = [*training.thetas, *(training.averages or [])]
    if training.averages is None:  # before a step, too
        found = found[: len(units)]
    worst = 0.0
    for k, (x, truth) in enumerate(zip(found, truths, strict=True)):
        i = k % len(units)
        error = np.abs(x - truth)
        error = error - TAIL * oracle.owed[i] - own * np.abs(oracle.one_way.thetas[i])
        if k != i or overwritten:
            error = error - average * oracle.largest[i]
        worst = np.maximum(worst, np.max(error / units[i]))  # NaN, if there is one
    return float(worst)
