"""Interleaved medians."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def medians(
    contenders: dict[str, Callable[[], object]], rounds: int, calls: int = 30
) -> dict[str, float]:
    """Milliseconds a call: the median over all rounds.

    In each round each contender first makes calls that do not count, so that
    none is timed with another's data in the caches, then `calls` that do. A
    call must wait for its work.
    """
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            for i in range(-5, calls):
                start = time.perf_counter()
                call()
                if i >= 0:
                    times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(t)) for name, t in times.items()}
