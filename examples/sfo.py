"""Sum of Functions Optimizer (SFO), the baseline of figure 2(b) of the Adam paper."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

TINY = 1e-12  # Shorter changes of position or gradient tell nothing.
HISTORY = 10  # Changes of each subfunction that make its Hessian.
MAX_CONDITION = 1e8  # Largest ratio of a Hessian's eigenvalues.
MAX_STEP_RATIO = 10  # A step's longest length, in mean lengths of those before.


class SFO:
    """Minimizes a sum of N functions ("subfunctions"), evaluating one a step.

    Sohl-Dickstein, Poole & Ganguli (2014), arXiv 1311.2115; by its sections' titles:
    *Approximating functions*: each subfunction has a quadratic model around its last
    evaluation; a step renews one, and goes to the minimum of the sum of all.
    *A shared, adaptive, low-dimensional representation*: coordinates in a basis of past
    gradients; full, it collapses to the active ones' last gradients and positions.
    *Online Hessian approximation*: BFGS over a subfunction's last changes of position
    and gradient, from their smallest curvature; without any, the median eigenvalue of
    the mean Hessian. Too small eigenvalues are set to the median positive one.
    *Choosing a target subfunction*: the farthest from its last position, by the total
    Hessian or its own, as a coin falls; before, those evaluated less than twice.
    *Growing the number of active subfunctions*, from two: when the standard error of
    the mean gradient exceeds its length, after a bad update, and after a pass.
    *Detecting bad updates*: a value not finite, or above its prediction by more than
    others should gain, takes theta back, unless worse there, and shortens steps.

    Unlike in the authors' sfo.py, positions count from the first theta; older changes,
    not noise, fill up a collapsed basis; a first evaluation undone makes no change out
    of nothing; no finite value to go back to is an error. Left out: rank-1 updates;
    random and cyclic choice; growth since all were evaluated here; less hessian_init if
    steps change nothing; QR of all the basis; new subfunctions; nested theta; messages.

    Args:
        f_df: Called with theta (`[M]`, float64, not to be changed) and a subfunction;
            returns value and gradient (`[M]`), always the same for the same.
        theta: The first parameters, `[M]`; as attribute, those after the last step.
        subfunctions: N things for `f_df`; the authors advise 25 or more.
        dtype: Of the basis; float64 for an optimum to more than about five digits.
        max_dimension: Of the basis: 2 N + 3 or more; None: 3 N + 3. Memory is that
            times M: for M = 1.8 million in float32, 1.1 GB with N = 50, 2.2 with 100.
        hessian_init: Times the identity, the first Hessians, for a short first step.
        min_step: Length of the shortest step. Neither must be lost in rounding.
        seed: Of all random choices.
    """

    def __init__(
        self,
        f_df: Callable[..., tuple[float, np.ndarray]],
        theta: np.ndarray,
        subfunctions: Sequence,
        dtype: type = np.float32,
        max_dimension: int | None = None,
        hessian_init: float = 1e5,
        min_step: float = 1e-8,
        seed: int = 0,
    ) -> None:
        theta, n = np.array(theta, np.float64), len(subfunctions)
        k = min(max_dimension or 3 * n + 3, theta.size)
        if not n:
            raise ValueError("subfunctions is empty: give at least one.")
        if theta.ndim != 1 or not theta.size or not np.isfinite(theta).all():
            raise ValueError(f"theta={theta} must be flat and finite: flatten it.")
        if k < min(2 * n + 3, theta.size):
            raise ValueError(f"{max_dimension=} is below {2 * n + 3}: raise it.")
        self.f_df, self.subfunctions, self.min_step = f_df, subfunctions, min_step
        self.theta, self._x = self._theta_before, self._x_before = theta, np.zeros(k)
        self.evaluations = self.bad_updates = self.collapses = 0
        self.max_dimension, self._rng = k, np.random.default_rng(seed)
        self._basis, self._rows = np.empty([k, theta.size], dtype), 0
        self._blocks = np.array_split(self._basis, theta.size // 4096 + 1, axis=1)
        self._f, self._count = np.full(n, np.nan), np.zeros(n, int)
        self._last = np.zeros([2, n, k])  # positions and gradients
        self._pairs = np.zeros([2, n, HISTORY, k])  # their changes, the newest first
        self._hessians, self._diagonal = np.zeros([n, k, k]), np.zeros(n)  # to be added
        self._active = np.isin(np.arange(n), self._rng.permutation(n)[:2])
        self._diagonal[self._active] = hessian_init
        self._scale, self._gain, self._distance, self._since_growth = 1.0, 0.0, 0.0, 0

    def iterate(self, passes: int) -> Iterator[np.ndarray]:
        """Theta (a new array) after each N evaluations, bad updates' included."""
        for end in self.evaluations + len(self._f) * np.arange(1, passes + 1):
            while self.evaluations < end:
                self.step()
            yield self.theta

    def step(self) -> None:
        """Evaluates a subfunction, again where that shows a bad update; moves theta."""
        if self._rows + 2 > self.max_dimension < len(self.theta):
            self._collapse()  # a step adds up to two
        i = self._choose()
        d, change, _ = self._models()
        predicted = self._f[i] + d[i] @ (self._last[1, i] + change[i] / 2)
        limit = max(self._f[i], 2 * predicted - self._f[i] + self._gain)
        if np.isnan(self._f[i]):  # its first evaluation
            others = self._f[self._count > 1]
            limit = others.mean() + 3 * others.std() if len(others) else np.inf
        f, g = self._evaluate(i, self.theta)
        bad = not f <= limit
        if bad:
            f, g = self._undo(i, f, g, abs(predicted - self._f[i]))
        self._scale += 0 if bad else (1 - self._scale) / len(self._f)
        self._record(i, self._x, f, g)
        self._distance += np.linalg.norm(self._x - self._x_before)
        self._update_hessian(i)
        self._move(bad)

    def _evaluate(self, i: int, theta: np.ndarray) -> tuple[float, np.ndarray]:
        f, g = self.f_df(theta, self.subfunctions[i])
        if np.shape(g) != theta.shape:
            raise ValueError(f"f_df: gradient {np.shape(g)}, not flat {theta.shape}.")
        self.evaluations += 1
        self._count[i] += 1
        return float(f) if np.isfinite(f) & np.isfinite(g).all() else np.nan, g

    def _project(self, g: np.ndarray) -> np.ndarray:
        """Coordinates of a gradient; the basis gets a row for what it lacks of it."""
        c, basis = np.zeros(self.max_dimension), self._basis[: self._rows]
        norm = max(np.linalg.norm(g.astype(np.float64)), np.finfo(float).tiny)
        rest = (g / norm).astype(basis.dtype)
        for _ in range(2):
            # Sums of millions of float32 would be known to five digits only.
            blocks = zip(self._blocks, np.array_split(rest, len(self._blocks)))
            part = sum((b[: len(basis)] @ r).astype(np.float64) for b, r in blocks)
            rest -= part.astype(basis.dtype) @ basis
            c[: len(basis)] += part
            length = np.linalg.norm(rest.astype(np.float64))
            if length > 0.7:  # a shorter one is less accurate, so less orthogonal
                break
        if length > 16 * np.finfo(basis.dtype).eps and len(basis) < len(g):
            self._basis[len(basis)], c[len(basis)] = rest / length, length
            self._rows += 1
        return norm * c

    def _collapse(self) -> None:
        rows, k = self._rows, self.max_dimension
        last = self._last[:, self._active].reshape(-1, k)
        older = self._pairs[:, self._active].transpose(2, 0, 1, 3).reshape(-1, k)
        keep = np.vstack([last, self._x, older])[: min(2 * len(self._f) + 2, k - 2)]
        turn, _ = np.linalg.qr(keep[:, :rows].T)
        change = np.pad(turn, [(0, k - rows), (0, k - turn.shape[1])])
        for name in "_x", "_x_before", "_last", "_pairs", "_hessians":
            setattr(self, name, getattr(self, name) @ change)
        self._hessians = change.T @ self._hessians
        for block in self._blocks:  # a second basis may not fit into memory
            block[: turn.shape[1]] = turn.T.astype(block.dtype) @ block[:rows]
        self._rows = turn.shape[1]
        self.collapses += 1

    def _models(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Changes of positions and, as modelled, gradients; and the total Hessian."""
        d = self._x - self._last[0]
        change = (self._hessians @ d[..., None])[..., 0] + self._diagonal[:, None] * d
        total = self._hessians.sum(0) + self._diagonal.sum() * np.eye(len(self._x))
        return d, change, total

    def _choose(self) -> int:
        on = np.flatnonzero(self._active)
        for count in 1, 0:
            if (self._count[on] == count).any():
                return self._rng.choice(on[self._count[on] == count])
        d, change, hessian = self._models()
        change = d @ hessian if self._rng.random() < 0.5 else change
        return on[np.sum(d * change, axis=1)[on].argmax()]

    def _undo(self, i: int, f: float, g: np.ndarray, expected: float) -> tuple:
        """Takes theta back, if it was better there; value and gradient where it is."""
        self.bad_updates += 1
        self._scale = max(self._scale / 2, 1e-5)
        theta, x = self._theta_before, self._x_before
        f_before, g_before = self._evaluate(i, theta)
        if np.isnan(f_before):
            where = f"f_df of subfunctions[{i}] is not finite at theta={theta}"
            raise ValueError(f"{where}: start elsewhere, or raise hessian_init.")
        expected = np.nanmax(
            [TINY, abs(f - f_before) if np.isnan(expected) else expected]
        )
        for _ in range(10):
            if f - f_before < 10 * expected:
                break
            # Where the function explodes, its curvature says nothing about here.
            self.theta = 0.99 * theta + 0.01 * self.theta
            self._x = 0.99 * x + 0.01 * self._x
            f, g = self._evaluate(i, self.theta)
        points = (self.theta, self._x, f, g), (theta, x, f_before, g_before)
        better, worse = points if f < f_before else points[::-1]
        if np.isfinite(worse[2]):
            self._record(i, *worse[1:])
        self.theta, self._x, f, g = better
        return f, g

    def _record(self, i: int, x: np.ndarray, f: float, g: np.ndarray) -> None:
        point = np.stack([x, self._project(g)])
        dx, dg = change = point - self._last[:, i]
        a, b = np.linalg.norm(change, axis=1) * np.isfinite(self._f[i])
        if min(a, b) > TINY and abs(dx @ dg) > TINY * a * b:
            self._pairs[:, i] = np.insert(self._pairs[:, i, :-1], 0, change, axis=1)
        self._last[:, i], self._f[i] = point, f

    def _update_hessian(self, i: int) -> None:
        self._hessians[i] = 0
        used = self._pairs[0, i].any(axis=1)
        if not used.any():
            median = np.median(np.linalg.eigvalsh(self._models()[2]))
            self._diagonal[i] = median / self._active.sum()
            return
        dx, dg = self._pairs[:, i, used]
        lengths = np.linalg.norm(dx, axis=1)
        q, _ = np.linalg.qr(np.vstack([dx, dg]).T)
        s, y = q.T @ dx.T / lengths, q.T @ dg.T / lengths
        # The curvatures in the changes, by least squares of y = H s.
        sizes = np.linalg.svd(y @ np.linalg.pinv(s), compute_uv=False)[: len(lengths)]
        if not sizes.min() > 0:
            sizes[:] = self._diagonal[self._active].max()
        start = max(sizes.min(), sizes.max() / MAX_CONDITION)
        h = start * np.eye(len(s))
        for s_j, y_j in zip(s.T[::-1], y.T[::-1]):
            hs = h @ s_j
            if s_j @ hs and s_j @ y_j:
                h += np.outer(y_j, y_j) / (s_j @ y_j) - np.outer(hs, hs) / (s_j @ hs)
        values, vectors = np.linalg.eigh(h)
        usual = np.median(values[values > 0]) if values.max() > 0 else sizes.max()
        values[values < np.abs(values).max() / MAX_CONDITION] = usual
        q = q @ vectors
        self._hessians[i], self._diagonal[i] = (q * (values - start)) @ q.T, start

    def _move(self, bad: bool) -> None:
        """To the minimum of the sum of the models; may activate a subfunction."""
        _, change, hessian = self._models()
        gs = self._last[1, self._active]
        gradient = (self._last[1] + change).sum(0)
        solved = np.linalg.solve(hessian, np.vstack([gradient, gs]).T)
        step = -self._scale * solved[:, 0]
        length = max(np.linalg.norm(step), np.finfo(float).tiny)
        longest = MAX_STEP_RATIO * self._distance / self.evaluations
        longest = longest if self.evaluations > len(self._f) else np.inf
        step *= min(max(length, self.min_step), longest) / length
        self._gain = step @ hessian @ step / 2
        self._theta_before, self._x_before = self.theta, self._x
        basis = self._basis[: self._rows]
        self.theta = self.theta + step[: self._rows].astype(basis.dtype) @ basis
        self._x = self._x + step
        # Mean and standard error compare like square of the sum and sum of squares.
        squares = gs @ solved[:, 1:]
        wanted = bad or squares.trace() >= squares.sum() or self._since_growth > len(gs)
        self._since_growth += 1
        if wanted and not self._active.all() and self._count[self._active].min() > 1:
            self._active[self._rng.choice(np.flatnonzero(~self._active))] = True
            self._since_growth = 0
