"""Mutants that are no faults: (file, function, before, after), and why."""

SLOWER = "as right, but slower"
REFUSED = "a ratio of 1 or above is refused, whatever it is"
NEVER_UPDATED = "a row that was never updated has m = 0, and owes nothing of anything"
MORE = "reads more than it uses"
OWES_NOTHING = "multiplied by coefficients that are 0 where no step was skipped"

EITHER = "there both ways are right"
PRECISION = "moves the nodes by less than the distance of two steps"

LARGE = "self._trainable_variables[i].shape.num_elements()"

EQUIVALENT = {
    **{
        ("exact.py", "_settle", f"{LARGE} > 1000000.0", f"{LARGE} {after}"): EITHER
        for after in (">= 1000000.0", "> 1500000.0")
    },
    **{
        ("base.py", "moving_average", "beta >= 0.5", after): EITHER
        for after in ("beta > 0.5", "beta >= 0.75")
    },
    **{
        (*(file, "_has_kernel"), "self.beta_2 >= 0.5", after): EITHER
        for file in ("adam.py", "adamax.py")
        for after in ("self.beta_2 > 0.5", "self.beta_2 >= 0.75")
    },
    (
        *("adamax.py", "_has_kernel"),
        "beta_1 < self.beta_2",
        "beta_1 <= self.beta_2",
    ): EITHER,
    ("adamax.py", "_has_kernel", "self.beta_1", "self.beta_2"): SLOWER,
    ("adamax.py", "_has_kernel", "self.beta_2", "self.beta_1"): SLOWER,
    ("tails.py", "owed", "gap > plan.window", "gap >= plan.window"): "below 1e-8 of m",
    ("tails.py", "advance", "0 * j", "0 / j"): "gives a shape",
    **{
        ("tails.py", "add_log", "high + x", after): "the rest goes to the other part"
        for after in ("high - x", "high")
    },
    ("tails.py", "log_s", "0 * t", "0 / t"): "gives a shape; t is at least 1",
    ("tails.py", "advance", "t0 + 1", "t0 + 2"): PRECISION,
    **{
        ("tails.py", "advance", "np.arange(n) + 0.5", after): (
            "other nodes, between which tails are still right to 1e-5"
        )
        for after in ("np.arange(n) + 0.75", "np.arange(n)")
    },
    ("rows.py", "distinct", "-1", "-2"): "whatever is negative is dropped",
    ("ledger.py", "sweep", "LENGTH - 1", "LENGTH"): "sweeps just in time",
    **{
        ("ledger.py", "sweep", before, after): "sweeps all rows, from another one on"
        for before, after in (
            ("-(-table_rows // n)", "-table_rows // n"),
            ("t % steps * n + tf.range(n)", "t % steps * n - tf.range(n)"),
        )
    },
    (
        *("exact.py", "_kind"),
        "tables[0]",
        "tables[1]",
    ): "float64 tables with narrower moments only, by less than these have lost",
    (
        *("exact.py", "_owes"),
        "len(variable.shape) > 0",
        "len(variable.shape) >= 0",
    ): "a scalar has no sparse gradient",
    (
        *("exact.py", "_settle_all"),
        "tf.reduce_min(last) < t",
        "tf.reduce_min(last) <= t",
    ): "settles what owes nothing",
    (
        *("update.py", "update"),
        "rows.in_xla() or tf.executing_eagerly()",
        "rows.in_xla() and tf.executing_eagerly()",
    ): SLOWER,
    (
        *("tails.py", "log_s"),
        "max(self.beta_2, 1e-30)",
        "max(self.beta_2, 1.5000000000000001e-30)",
    ): "stands for 0",
    (
        *("exact.py", "_end_step"),
        "exact - by_rows",
        "exact",
    ): "who is in by_rows stays there, and is asked first",
    ("ledger.py", "settle_state", "1:3", "1:4"): "writes amsgrad's as it is",
    (
        *("ledger.py", "__init__"),
        "plan.logs if decays else 2",
        "plan.logs if decays else 3",
    ): "not read where nothing decays",
    ("rows.py", "listed", "tf.minimum", "tf.maximum"): SLOWER,
    ("accumulation.py", "_accumulate", "not rows.in_xla()", "rows.in_xla()"): SLOWER,
    ("accumulation.py", "_accumulate", "not most", "most"): SLOWER,
    ("accumulation.py", "step", "i + 1", "i + 2"): "all marks start anew then",
    (
        *("tails.py", "advance"),
        "plan.log_s(t0 + 1, 1.0)",
        "plan.log_s(t0 + 1, 1.5)",
    ): PRECISION,
    ("adam.py", "_make_plan", "beta_1 < root", "beta_1 <= root"): REFUSED,
    (
        *("adam.py", "_make_plan"),
        "beta_1 / root if beta_1 < root else 1.0",
        "beta_1 / root if beta_1 < root else 1.5",
    ): REFUSED,
    (
        *("adamax.py", "_make_plan"),
        "beta_1 < self.beta_2",
        "beta_1 <= self.beta_2",
    ): REFUSED,
    (
        *("adamax.py", "_make_plan"),
        "beta_1 / self.beta_2 if beta_1 < self.beta_2 else 1.0",
        "beta_1 / self.beta_2 if beta_1 < self.beta_2 else 1.5",
    ): REFUSED,
    (
        *("tails.py", "advance"),
        "plan.log_s(t, j) + 0 * j",
        "plan.log_s(t, j) - 0 * j",
    ): "0 * j gives a shape",
    (
        *("tails.py", "advance"),
        "tf.maximum(t - j, 0)",
        "tf.maximum(t - j, 1)",
    ): NEVER_UPDATED,
    (
        *("tails.py", "owed"),
        "tf.where(skipped[:, None], history[:, q * n:end], 1)",
        "tf.where(skipped[:, None], history[:, q * n:end], 2)",
    ): OWES_NOTHING,
    **{
        ("averaging.py", "_average", "history.log_decay[2] > 64", after): EITHER
        for after in ("history.log_decay[2] >= 64", "history.log_decay[2] > 65")
    },
    ("accumulation.py", "_accumulate", "counts[i] <= n", "counts[i] < n"): EITHER,
    (
        *("ledger.py", "settle_average"),
        "None if debts.history else 1",
        "None if debts.history else 2",
    ): MORE,
}
