"""The slow oracle: NumPy float64, every row, every step, from the paper.

Nothing here is shared with keras_adam. Letters are those of arXiv 1412.6980.
"""

import ml_dtypes  # noqa: F401  (gives NumPy its bfloat16)
import numpy as np


def densify(gradient, shape):
    """A dense gradient, and which rows it has, from an array or (values, ids)."""
    if not isinstance(gradient, tuple):
        return np.asarray(gradient, np.float64), np.ones(shape[:1], bool)
    values, ids = gradient
    g = np.zeros(shape)
    np.add.at(g, np.asarray(ids), np.asarray(values, np.float64))
    touched = np.zeros(shape[:1], bool)
    touched[np.asarray(ids)] = True
    return g, touched


class Rule:
    """What both algorithms have: beta_1, or a schedule of it (section 4)."""

    def __init__(self, beta_1, beta_2):
        self.beta_1 = beta_1 if callable(beta_1) else lambda step: beta_1
        self.beta_2 = beta_2
        self.products = [1.0]

    def correction_1(self, t):
        """1 - prod(beta_1,i) over the first t steps."""
        while len(self.products) <= t:
            beta_1 = self.beta_1(len(self.products) - 1)
            self.products.append(self.products[-1] * beta_1)
        return 1 - self.products[t]


class Adam(Rule):
    """Algorithm 1."""

    def __init__(
        self,
        beta_1=0.9,
        beta_2=0.999,
        epsilon=1e-8,
        epsilon_hat=False,
        bias_correction=True,
        amsgrad=False,
    ):
        super().__init__(beta_1, beta_2)
        self.epsilon = epsilon
        self.epsilon_hat = epsilon_hat
        self.bias_correction = bias_correction
        self.amsgrad = amsgrad

    def init(self, theta):
        return {"m": np.zeros(theta.shape), "v": np.zeros(theta.shape)} | (
            {"v_max": np.zeros(theta.shape)} if self.amsgrad else {}
        )

    def step(self, s, g, alpha, t):
        """Changes the state in place; returns what to subtract from theta."""
        beta_1, beta_2 = self.beta_1(t - 1), self.beta_2
        s["m"] = beta_1 * s["m"] + (1 - beta_1) * g
        s["v"] = beta_2 * s["v"] + (1 - beta_2) * g**2
        v = s["v"]
        if self.amsgrad:
            v = s["v_max"] = np.maximum(s["v_max"], v)
        c_1 = self.correction_1(t)
        c_2 = 1 - beta_2**t
        if not self.bias_correction:
            c_1 = c_2 = 1.0
        if self.epsilon_hat:  # the formula before section 2.1
            alpha_t = alpha * np.sqrt(c_2) / c_1
            return alpha_t * s["m"] / (np.sqrt(v) + self.epsilon)
        m_hat, v_hat = s["m"] / c_1, v / c_2
        return alpha * m_hat / (np.sqrt(v_hat) + self.epsilon)


class AdaMax(Rule):
    """Algorithm 2."""

    def __init__(self, beta_1=0.9, beta_2=0.999):
        super().__init__(beta_1, beta_2)

    def init(self, theta):
        return {"m": np.zeros(theta.shape), "u": np.zeros(theta.shape)}

    def step(self, s, g, alpha, t):
        beta_1 = self.beta_1(t - 1)
        s["m"] = beta_1 * s["m"] + (1 - beta_1) * g
        s["u"] = np.maximum(self.beta_2 * s["u"], np.abs(g))
        c_1 = self.correction_1(t)
        m, u = s["m"], s["u"]
        return (alpha / c_1) * np.divide(m, u, out=np.zeros(m.shape), where=u != 0)


class Training:
    """An optimizer over several variables, with the options of Keras's base.

    Args:
        rule: `Adam(...)` or `AdaMax(...)`.
        thetas: The first weights.
        dtypes: What each weight is rounded to after each step.
        lazy: Whether a sparse gradient moves its own rows only.
        learning_rate: A float or a callable of the step, counted from 0.
        decayed: Indices of the variables with weight decay.
    """

    def __init__(
        self,
        rule,
        thetas,
        dtypes,
        *,
        lazy,
        learning_rate,
        weight_decay=0.0,
        decayed=None,
        clipnorm=None,
        clipvalue=None,
        global_clipnorm=None,
        loss_scale_factor=1.0,
        gradient_accumulation_steps=1,
        ema_momentum=None,
        ema_overwrite_frequency=None,
        constraint=None,
    ):
        self.rule = rule
        self.thetas = [np.asarray(x, np.float64) for x in thetas]
        self.dtypes = dtypes
        self.states = [rule.init(x) for x in self.thetas]
        self.lazy = lazy
        self.learning_rate = (
            learning_rate if callable(learning_rate) else lambda step: learning_rate
        )
        self.weight_decay = weight_decay
        self.decayed = range(len(thetas)) if decayed is None else decayed
        self.clipnorm = clipnorm
        self.clipvalue = clipvalue
        self.global_clipnorm = global_clipnorm
        self.loss_scale_factor = loss_scale_factor
        self.accumulate = gradient_accumulation_steps
        self.ema_momentum = ema_momentum
        self.ema_overwrite_frequency = ema_overwrite_frequency
        self.constraint = constraint
        self.uncorrected = [np.zeros(x.shape) for x in self.thetas]
        self.averages = None  # section 7.2's, corrected
        self.peaks = [np.zeros(x.shape) for x in self.thetas]
        self.calls = 0
        self.pending = None

    def apply(self, gradients):
        pairs = [densify(g, x.shape) for g, x in zip(gradients, self.thetas)]
        pairs = [(g / self.loss_scale_factor, rows) for g, rows in pairs]
        if self.pending:
            pairs = [
                (g + h, rows | more)
                for (g, rows), (h, more) in zip(pairs, self.pending)
            ]
        self.pending = pairs
        updates = self.calls // self.accumulate
        if (self.calls + 1) % self.accumulate == 0:
            self.pending = None
            self._update([(g / self.accumulate, r) for g, r in pairs], updates)
            if self.constraint:
                self.thetas = [self.constraint(x) for x in self.thetas]
            if self.ema_momentum is not None:
                self._average(updates + 1)
        self.calls += 1

    def _average(self, t):
        """Section 7.2."""
        g, every = self.ema_momentum, self.ema_overwrite_frequency
        self.uncorrected = [
            g * a + (1 - g) * theta for a, theta in zip(self.uncorrected, self.thetas)
        ]
        self.averages = [a / (1 - g**t) for a in self.uncorrected]
        if every and t % every == 0:
            self.thetas = [
                a.astype(d).astype(np.float64)
                for a, d in zip(self.averages, self.dtypes)
            ]

    def _update(self, pairs, updates):
        gs = [g for g, _ in pairs]
        if self.clipnorm:
            gs = [g * min(1, self.clipnorm / max(norm(g), 1e-300)) for g in gs]
        if self.clipvalue:
            gs = [np.clip(g, -self.clipvalue, self.clipvalue) for g in gs]
        if self.global_clipnorm:
            total = np.sqrt(sum(norm(g) ** 2 for g in gs))
            gs = [g * min(1, self.global_clipnorm / max(total, 1e-300)) for g in gs]
        alpha = self.learning_rate(self.calls)
        for i, (g, (_, touched)) in enumerate(zip(gs, pairs)):
            self.peaks[i] = np.maximum(self.peaks[i], np.abs(g))
            new = dict(self.states[i])
            delta = self.rule.step(new, g, alpha, updates + 1)
            if i in self.decayed:
                delta = delta + alpha * self.weight_decay * self.thetas[i]
            rows = touched if self.lazy else np.ones_like(touched)
            for name, value in new.items():
                self.states[i][name] = np.where(
                    expand(rows, value), value, self.states[i][name]
                )
            theta = np.where(expand(rows, g), self.thetas[i] - delta, self.thetas[i])
            self.thetas[i] = theta.astype(self.dtypes[i]).astype(np.float64)


def norm(g):
    return np.sqrt(np.sum(g**2))


def expand(rows, like):
    return rows.reshape(rows.shape + (1,) * (like.ndim - rows.ndim))
