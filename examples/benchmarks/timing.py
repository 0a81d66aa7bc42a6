"""Interleaved medians: each round times every contender once."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np


def medians(
    contenders: dict[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Milliseconds a call, median over rounds; each call must wait for its work."""
    for call in contenders.values():
        for _ in range(warmup):
            call()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: 1e3 * float(np.median(t)) for name, t in times.items()}
