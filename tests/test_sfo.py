"""The Sum of Functions Optimizer: where it arrives, how fast, and its single parts."""

import math

import numpy as np
import pytest
from sfo import SFO


def quadratics(size, number, seed=0):
    """Least squares in minibatches, with L2: f_df, minibatches, and the optimum."""
    rng = np.random.default_rng(seed)
    scales = 10 ** rng.uniform(-1, 1, size)
    rows = max(size // 4, 5)
    parts = []
    for _ in range(number):
        x = rng.standard_normal([rows, size]) * np.sqrt(scales / rows)
        parts.append((x.T @ x + 0.05 * np.eye(size), rng.normal(1, 0.3, size)))

    def f_df(theta, part):
        a, target = part
        gradient = a @ (theta - target)
        return (theta - target) @ gradient / 2, gradient

    optimum = np.linalg.solve(sum(a for a, _ in parts), sum(a @ b for a, b in parts))
    return f_df, parts, optimum


def first_below(errors, tolerance):
    """The number of the first one, from 1, or infinity."""
    return next((i for i, e in enumerate(errors, 1) if e < tolerance), math.inf)


def adam(f_df, theta, parts, alpha, decay, passes):
    """Theta after each pass; the letters of arXiv 1412.6980, algorithm 1."""
    rng = np.random.default_rng(0)
    m, v, t = np.zeros(theta.shape), np.zeros(theta.shape), 0
    for _ in range(passes):
        for i in rng.permutation(len(parts)):
            t += 1
            g = f_df(theta, parts[i])[1]
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
            m_hat, v_hat = m / (1 - 0.9**t), v / (1 - 0.999**t)
            theta = theta - alpha * t**-decay * m_hat / (np.sqrt(v_hat) + 1e-8)
        yield theta


def test_fewer_passes_than_adam():
    f_df, parts, optimum = quadratics(50, 30)
    start = np.zeros(50)

    def errors(thetas):
        return [np.abs(theta - optimum).max() for theta in thetas]

    sfo = errors(SFO(f_df, start, parts, dtype=np.float64).iterate(30))
    adams = [
        errors(adam(f_df, start, parts, alpha, decay, 60))
        for alpha in (0.003, 0.01, 0.03, 0.1, 0.3, 1)
        for decay in (0, 0.5, 1)
    ]
    for tol in (.1,.05,1e-2,1e-3,1e-4,1e-6): print(tol, first_below(sfo,tol),[first_below(a,tol) for a in adams])
    print(min(map(min,adams)))
