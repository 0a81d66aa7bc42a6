"""What the steps that skipped a row owe it, in closed form; pure functions.

A row last updated at step t0 holds theta, m and v (or u). At a skipped step t its
gradient is 0, so m and v decay and theta moves by

    c * m / (s * r + epsilon),    r = sqrt(v),

where c and s are scalars of t0 and t alone. For Adam, with j = t - t0,

    c = alpha_t * beta_1^j / (1 - beta_1^t)    s = sqrt(beta_2^j / (1 - beta_2^t)).

c / s falls like (beta_1 / sqrt(beta_2))^j: after a window of steps nothing is left.
With x near s, p = 1 / (x * r + epsilon), w = x * r * p and eta = s / x - 1,

    c * m / (s * r + epsilon) = m * p * c / (1 + eta * w),    0 <= w < 1,

so the sum over all skipped steps is m * p * F(w), and F a smooth function of w that
only t0 and t decide. It is kept as the polynomial that equals it at n Chebyshev
nodes. There 1 / (1 + eta * w) is off by T_n(2w - 1) / T_n(-1 - 2 / eta) of itself,
which gives the number of nodes for any betas. (A range of s too wide for one x is
cut in pieces, each with its own.) Learning rates come in as they were at each step.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from keras_adam.base import share

# A tail's error as a share of itself: of the polynomial, and of the window.
POLYNOMIAL = 1e-6
FORGOTTEN = 1e-8
# A row pays for coefficients, a step for the window; powers of z want few nodes.
MOST_COEFFICIENTS = 128
MOST_NODES = 16
LONGEST_WINDOW = 32768


def power(beta: float, t: tf.Tensor) -> tf.Tensor:
    """beta^t, 0^0 = 1."""
    if beta:
        return tf.exp(t * math.log(beta))
    return tf.where(t > 0, tf.zeros_like(t), tf.ones_like(t))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of the tails before the first step.

    Args:
        beta_1: Decay rate of m a step; with a schedule its bound.
        beta_2: Decay rate of v, or of u.
        ratio: How the steps of a skipped row fall: c / s a step.
        grows: Whether c grows by 1 / beta_2 a step, beside beta_1.
        decays: Whether r falls with v.
        corrected: Whether s has the bias correction of v.
        schedule: Whether beta_1 is one.
        epsilon: Added to s * r.
        momentum: That of the weights' average, if there is one.
    """

    beta_1: float
    beta_2: float
    ratio: float
    grows: bool = False
    decays: bool = True
    corrected: bool = True
    schedule: bool = False
    epsilon: float = 0.0
    momentum: float | None = None

    window: int = dataclasses.field(init=False)  # steps until a row is at rest
    pieces: int = dataclasses.field(init=False)
    nodes: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        received = f"Received: beta_1={self.beta_1!r}, beta_2={self.beta_2!r}."
        remedy = 'Use a smaller `beta_1`, or `sparse_updates="dense"`.'
        if not self.ratio < 1:
            raise ValueError(
                '`sparse_updates="exact"` needs steps that fall while a row has no '
                "gradient: beta_1 below sqrt(beta_2) in Adam, below 1 with amsgrad, "
                f"below beta_2 in AdaMax. {received} {remedy}"
            )
        steps = math.log(FORGOTTEN) / math.log(self.ratio) if self.ratio else 1
        object.__setattr__(self, "window", max(1, math.ceil(steps)))
        options = [(q, self._count(q)) for q in range(1, 65)]
        pieces, nodes = min(
            (pair for pair in options if pair[1] <= MOST_NODES),
            key=lambda pair: pair[0] * (6 + pair[1]),
            default=(1, MOST_COEFFICIENTS + 1),
        )
        if self.window > LONGEST_WINDOW or pieces * nodes > MOST_COEFFICIENTS:
            raise ValueError(
                '`sparse_updates="exact"` costs too much with these betas: a row '
                f"moves for {self.window} steps after its last gradient. "
                f"{received} {remedy}"
            )
        object.__setattr__(self, "pieces", pieces)
        object.__setattr__(self, "nodes", nodes)

    def _count(self, pieces: int) -> int:
        # s has its widest range after the first step.
        t = np.array([2.0, 1.0 + self.window])
        h = float(np.ptp(self.log_s(t, t - 1, np))) / 2 / pieces
        if h < 1e-6:
            return 1
        if h > 8:
            return MOST_NODES + 1
        return math.ceil(math.log(2 / POLYNOMIAL) / math.log(1 / math.tanh(h / 4)))

    def log_s(self, t: Any, j: Any, np_or_tf: Any = tf) -> Any:
        """log s at step t, j steps after the last update."""
        y = 0 * t
        if self.decays:
            y = y + j * math.log(self.beta_2)
        if self.corrected:
            log = np.log if np_or_tf is np else tf.math.log
            expm1 = np.expm1 if np_or_tf is np else tf.math.expm1
            beta_2 = max(self.beta_2, 1e-30)  # 1 - 0^t, too, is 1
            y = y - log(-expm1(t * math.log(beta_2)))
        return y / 2

    @property
    def growth(self) -> float:
        return 1 / self.beta_2 if self.grows else 1.0

    @property
    def columns(self) -> int:
        """Of the history: polynomials, their x, beta_1's product, the averages'.

        That product is of a schedule, and of beta_1 * growth: alone it underflows.
        """
        averages = self.pieces * self.nodes * (self.momentum is not None)
        return self.pieces * (self.nodes + 1) + self.schedule + averages

    @property
    def logs(self) -> int:
        """Of weight decay: the numbers that are known of it at a step."""
        return 2 if self.momentum is None else 4


class Owed(NamedTuple):
    """What some rows owe: tensors that broadcast against the rows."""

    polynomials: list[list[tf.Tensor]]  # lowest power first, a list a piece
    x: list[tf.Tensor]
    decay: tf.Tensor | None  # the share of theta that weight decay has taken of it
    m: tf.Tensor  # what is left of m
    v: tf.Tensor  # of v, or of u


def tail(owed: Owed, m: tf.Tensor, r: tf.Tensor, epsilon: float) -> tf.Tensor:
    """The sum over the skipped steps of c * m / (s * r + epsilon)."""
    total = tf.zeros_like(m)
    for polynomial, x in zip(owed.polynomials, owed.x, strict=True):
        p = 1 / (x * r + epsilon)
        z = 1 - (2 * epsilon) * p  # 2w - 1
        f = polynomial[-1]
        for coefficient in polynomial[-2::-1]:
            f = f * z + coefficient
        total += p * f
    return m * total


def owed(
    plan: Plan,
    history: tf.Tensor,
    gap: tf.Tensor,
    log_decay: tf.Tensor | None,
    rank: int,
    dtype: tf.DType,
    t: tf.Tensor | None = None,
) -> Owed:
    """What rows owe.

    Args:
        plan: The plan.
        history: `[n, plan.columns]`, the history at the step each was last updated;
            with weight decay `2 * plan.logs` columns more.
        gap: `[n]`, the steps since.
        log_decay: `[plan.logs]`, as `add_decay` gives it; None without weight decay.
        rank: Of the table.
        dtype: Of its state.
        t: The steps done, for what the average of the weights owes.
    """

    def column(x: tf.Tensor) -> tf.Tensor:
        return tf.cast(tf.reshape(x, [-1] + [1] * (rank - 1)), dtype)

    skipped = gap > 0
    q, n = plan.pieces, plan.nodes
    f = history[:, : q * n]
    taken = since = None
    if log_decay is not None:
        start, end = tf.split(history[:, -2 * plan.logs :], 2, axis=1)
        # The polynomials have decayed up to the end of their window.
        since = tf.exp(tf.reduce_sum((log_decay - end)[:, :2], axis=1))
        taken = -tf.math.expm1(tf.reduce_sum((log_decay - start)[:, :2], axis=1))
    if t is not None:
        assert plan.momentum is not None
        past = tf.maximum(gap - plan.window, 0)
        rest = share(plan.momentum, past, t)
        since = rest
        if log_decay is not None:
            since = _averaged(plan.momentum, log_decay, end, past, t)
            taken = share(plan.momentum, gap, t)
            taken -= _averaged(plan.momentum, log_decay, start, gap, t)
        average = history[:, plan.columns - q * n : plan.columns]
        f = average - average * rest[:, None] + f * since[:, None]
    elif since is not None:
        f *= since[:, None]
    f = tf.where(skipped[:, None], f, 0)
    if taken is not None:
        taken = column(tf.where(skipped, taken, tf.zeros_like(taken)))
    end = q * (n + 1)
    x = tf.where(skipped[:, None], history[:, q * n : end], 1)
    if plan.schedule:
        b = history[:, end]
        m = tf.where(gap > plan.window, tf.zeros_like(b), b)
        m = tf.where(skipped, m * power(1 / plan.growth, gap), tf.ones_like(b))
    else:
        m = power(plan.beta_1, gap)
    return Owed(
        [[column(f[:, i * n + k]) for k in range(n)] for i in range(q)],
        [column(x[:, i]) for i in range(q)],
        taken,
        column(m),
        column(power(plan.beta_2, gap)),
    )


def advance(
    plan: Plan,
    history: tf.Tensor,
    t: tf.Tensor,
    lead: tf.Tensor,
    beta_1: tf.Tensor | None,
    decay: tf.Tensor | None,
    before: tf.Tensor | None,
) -> tuple[tf.Tensor, tf.Tensor | None]:
    """What step t adds to the history of the steps t - 1, t - 2, ..., t - window.

    Args:
        plan: The plan.
        history: `[plan.window, plan.columns]`, of these steps in this order; with
            weight decay `2 * plan.logs` columns more: `before` of the first step that
            skips a row, and of the first past the window.
        t: The step, counted from 1.
        lead: c without beta_1's product.
        beta_1: This step's, if it is a schedule.
        decay: The share weight decay takes at this step.
        before: `[plan.logs]`, as `add_decay` gives it, of the steps before this one.

    Returns:
        The history, and `before` of the next step.
    """
    q, n, dtype = plan.pieces, plan.nodes, history.dtype
    j = tf.range(1, plan.window + 1, dtype=dtype)
    new = (j == 1)[:, None]
    t0 = tf.maximum(t - j, 0)  # before step 0 there is nothing that would be read
    s = plan.log_s(t, j) + 0 * j
    high, low = plan.log_s(t0 + 1, 1.0), plan.log_s(t0 + plan.window, plan.window)
    width = (high - low) / q
    log_x = high[:, None] - width[:, None] * (np.arange(q) + 0.5)
    piece = tf.clip_by_value(tf.floor(tf.math.divide_no_nan(high - s, width)), 0, q - 1)

    columns = [tf.exp(log_x)]
    if beta_1 is None:
        c = lead * power(plan.beta_1 * plan.growth, j)
    else:
        b = history[:, q * (n + 1)]
        b = tf.where(new[:, 0], tf.ones_like(b), b) * (beta_1 * plan.growth)
        c = lead * b
        columns.append(b[:, None])
    c = tf.where(piece[:, None] == tf.range(q, dtype=dtype), c[:, None], 0)
    eta = tf.math.expm1(s[:, None] - log_x)
    # Values at the nodes, then coefficients. These cancel, so in float64; and not
    # by a matmul, which some devices do in fewer digits.
    z = np.cos(np.pi * (np.arange(n) + 0.5) / n)
    inverse = np.linalg.inv(np.vander(z, increasing=True)).T
    f = c[:, :, None] / (1 + eta[:, :, None] * ((z + 1) / 2).astype(dtype.name))
    f = tf.reduce_sum(tf.cast(f, tf.float64)[:, :, :, None] * inverse, axis=2)
    f = tf.cast(tf.reshape(f, [plan.window, q * n]), dtype)

    old = tf.where(new, tf.zeros_like(f), history[:, : q * n])
    after = None
    if decay is not None:
        old -= old * decay
    if plan.momentum is not None:
        average = history[:, plan.columns - q * n : plan.columns]
        average = tf.where(new, tf.zeros_like(f), average)
        average += (old + f - average) * share(plan.momentum, 1, t)
        columns.append(average)
    if decay is not None:
        after, k = add_decay(before, decay, plan.momentum, t), plan.logs
        columns.append(tf.where(new, before, history[:, -2 * k : -k]))
        columns.append(tf.broadcast_to(after, [plan.window, k]))
    return tf.concat([old + f, *columns], axis=1), after


def add_log(total: tf.Tensor, decay: tf.Tensor) -> tf.Tensor:
    """total + log(1 - decay), where total is the two parts of one number.

    One part would lose the small steps of a long sum.
    """
    high, low = tf.unstack(total)
    x = tf.math.log1p(-decay)
    s = high + x
    y = s - high
    low += (high - (s - y)) + (x - y)
    high = s + low
    return tf.stack([high, low - (high - s)])


def add_decay(
    before: tf.Tensor, decay: tf.Tensor, momentum: float | None, t: tf.Tensor
) -> tf.Tensor:
    """What is known of weight decay after step t, at which it takes this share.

    That is the log of the product D_t of what all steps have left, in two parts; and
    with an average, b_t = sum(w_k * D_k / D_t) over the steps k up to t, w_k being
    what step k weighs in it, in two parts too.
    """
    log = add_log(before[:2], decay)
    if momentum is None:
        return log
    double = tf.float64
    b = tf.reduce_sum(tf.cast(before[2:], double))
    weight = share(momentum, 1, tf.cast(t, double))
    b = b * (1 - weight) * tf.exp(-tf.cast(tf.math.log1p(-decay), double)) + weight
    high = tf.cast(b, log.dtype)
    low = tf.cast(b - tf.cast(high, double), log.dtype)
    return tf.concat([log, [high, low]], axis=0)


def _averaged(
    momentum: float, now: tf.Tensor, start: tf.Tensor, n: tf.Tensor, t: tf.Tensor
) -> tf.Tensor:
    """What the average has of a weight that only decays: sum(w_k * D_k / D_{t-n}).

    Over the last n of t steps, at whose start and end `add_decay` gave these. It is
    the difference of two such sums over all steps, whatever the first one began with.
    """
    dtype = start.dtype
    now, start, n, t = (tf.cast(x, tf.float64) for x in (now, start, n, t))
    left = tf.exp(tf.reduce_sum((now - start)[:, :2], axis=1))
    before = (1 - share(momentum, n, t)) * tf.reduce_sum(start[:, 2:], axis=1)
    return tf.cast(left * tf.reduce_sum(now[2:]) - before, dtype)
