"""Races contenders, each in its own process, in interleaved rounds; writes the results.

A row of results is a contender on a problem: its median step, beside the others' and
beside the time that moving the bytes it must move takes at this machine's bandwidth.
"""

from __future__ import annotations

import concurrent.futures
import csv
import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from absl import flags

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FLAGS = flags.FLAGS
HERE = pathlib.Path(__file__).parent
CONTENDERS = HERE / "contenders.py"


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    to = {"flag_values": values}
    flags.DEFINE_integer("rounds", 9, "To take the median of.", 1, **to)
    flags.DEFINE_float("scale", 1.0, "Of the problems' sizes.", 0, **to)
    flags.DEFINE_multi_string(
        "only", [], "Part of a contender's name; may be given again. None: all.", **to
    )
    flags.DEFINE_string(
        "addons_python", None, "One that has TF Addons: see `legacy.py`.", **to
    )
    flags.DEFINE_string("native", None, "What was built of `native.cc`.", **to)
    flags.DEFINE_string("output", "results", "Folder for tables and pictures.", **to)


def interpreter(name: str) -> str | None:
    return FLAGS.addons_python if name.startswith("TF Addons") else sys.executable


class Worker:
    """A contender's process, warm.

    Attributes:
        peak_bytes: The most memory of the machine, not of a GPU, it has had.
        gpu: The one that it computes on, or nothing.
    """

    def __init__(self, benchmark: str, name: str, problem: dict[str, Any]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")
        path = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [
                interpreter(name),
                str(CONTENDERS),
                json.dumps([benchmark, name, problem]),
            ],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )
        told = self._answer()
        self.peak_bytes, self.gpu = told["peak_bytes"], told["gpu"]

    def _answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            end = self.errors.read()[-3000:]
            self.close()
            sys.exit(f"{self.name} ended with {self.process.returncode}. {end}")
        return json.loads(line)

    def steps(self, n: int) -> list[float]:
        """Takes n steps; the milliseconds of each."""
        print(n, file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


def race(
    benchmark: str,
    entries: dict[str, tuple[str, dict[str, Any]]],
    steps: int | None = None,
) -> dict[str, dict[str, float]]:
    """Median milliseconds, peak bytes and GPU of each entry.

    In a round each entry takes steps that do not count, so that none is timed with
    another's data in the caches, then those that do: of the round they give a median,
    and of all rounds again the median.

    Args:
        benchmark: One of `contenders.MAKERS`.
        entries: Of each label, the contender and its problem.
        steps: In a round. None: as many as take 0.3 seconds, but 3 to 50.
    """
    workers = {}
    try:
        for label, (name, problem) in entries.items():
            workers[label] = Worker(benchmark, name, problem)
        gpus = {label: w.gpu or "the CPU" for label, w in workers.items()}
        if len(set(gpus.values())) > 1:
            sys.exit(f"A race is on one device, and these are on several: {gpus}.")
        counts = {
            label: steps or int(np.clip(300 / np.median(w.steps(3)), 3, 50))
            for label, w in workers.items()
        }
        medians: dict[str, list[float]] = {label: [] for label in workers}
        for _ in range(FLAGS.rounds):
            for label, worker in workers.items():
                if not steps:
                    worker.steps(2 + counts[label] // 10)
                medians[label].append(float(np.median(worker.steps(counts[label]))))
        return {
            label: {
                "ms": float(np.median(ms)),
                "peak_bytes": workers[label].peak_bytes,
                "gpu": workers[label].gpu,
            }
            for label, ms in medians.items()
        }
    finally:
        for worker in workers.values():
            worker.close()


def wanted(names: list[str]) -> list[str]:
    """Those that can be had, and were asked for."""
    return [
        name
        for name in filter(interpreter, names)
        if not FLAGS.only or any(part in name for part in FLAGS.only)
    ]


def bandwidth(gpu: str) -> float:
    """Bytes a second that all cores, or a GPU, read and write, copying large arrays."""
    if gpu:
        sizes = 2**28, 2**30
        copies = {str(n): ("copy", {"bytes": n}) for n in sizes}
        few, many = (x["ms"] for x in race("copy", copies).values())
        # The time to start and to wait is in both.
        return 2 * (sizes[1] - sizes[0]) / (1e-3 * (many - few))
    cores = len(os.sched_getaffinity(0))
    arrays = [(np.ones(2**25), np.ones(2**25)) for _ in range(cores)]
    moved = sum(a.nbytes + b.nbytes for a, b in arrays)
    best = float("inf")
    with concurrent.futures.ThreadPoolExecutor(cores) as pool:
        for _ in range(7):
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), arrays))
            best = min(best, time.perf_counter() - start)
    return moved / best


def machine(gpu: str) -> str:
    models = [
        line.split(":")[1].strip()
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cores = f"{len(models)} cores of {models[0] if models else platform.machine()}"
    return f"{gpu}, {cores}" if gpu else cores


class Results:
    """Printed as they come, then written as a table and a picture."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.rows: list[dict[str, Any]] = []
        self.gpu: str | None = None  # not known before the first race

    def _start(self, gpu: str) -> None:
        self.gpu, self.bandwidth = gpu, bandwidth(gpu)
        where, speed = machine(gpu), self.bandwidth / 1e9
        print(f"{where}; copies move {speed:.1f} GB/s", flush=True)

    def add(
        self,
        title: str,
        results: dict[str, dict[str, float]],
        baseline: str,
        must_move: float | None = None,
    ) -> None:
        """Results of a race; ratios are to the baseline's time.

        Args:
            title: The problem's.
            results: What `race` gave.
            baseline: A label.
            must_move: Bytes that every contender's step has to read and write.
        """
        gpu = results[baseline]["gpu"]  # of all, or `race` had ended
        if self.gpu is None:
            self._start(gpu)
        if gpu != self.gpu:
            sys.exit(f"Copies were timed on {self.gpu or 'the CPU'}, and {title} not.")
        print(f"\n{title}", flush=True)
        for label, result in results.items():
            ms = result["ms"]
            row = {
                "problem": title,
                "contender": label,
                "ms": round(ms, 4),
                "of": baseline,
                "ratio": round(ms / results[baseline]["ms"], 4),
                "of the bandwidth": "",
                "peak MB": "" if self.gpu else round(result["peak_bytes"] / 1e6),
            }
            if must_move:
                least = 1e3 * must_move / self.bandwidth
                row["of the bandwidth"] = round(least / ms, 4)
            self.rows.append(row)
            share = row["of the bandwidth"]
            print(
                f"{label:28}{ms:10.3f} ms{row['ratio']:9.3f}x"
                + (f"{100 * share:8.0f}% of the bandwidth" if must_move else ""),
                flush=True,
            )

    def write(self) -> None:
        folder = pathlib.Path(FLAGS.output)
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f"{self.name}.csv", "w", newline="") as file:
            table = csv.DictWriter(file, list(self.rows[0]))
            table.writeheader()
            table.writerows(self.rows)
        titles = list(dict.fromkeys(row["problem"] for row in self.rows))
        height = 0.6 * len(titles) + 0.22 * len(self.rows)
        figure, panels = plt.subplots(
            len(titles), 1, figsize=(8, 1 + height), squeeze=False, layout="constrained"
        )
        for panel, title in zip(panels[:, 0], titles):
            rows = [row for row in self.rows if row["problem"] == title][::-1]
            names, ms = [r["contender"] for r in rows], [r["ms"] for r in rows]
            panel.set_title(title, fontsize=9)
            if max(ms) > 10 * min(ms):  # a bar's length would say nothing
                panel.plot(ms, names, "o")
                panel.set_xscale("log")
                panel.grid(axis="x", which="both", alpha=0.3)
            else:
                panel.barh(names, ms)
            panel.tick_params(labelsize=7)
        panels[-1, 0].set_xlabel("milliseconds a step")
        figure.savefig(folder / f"{self.name}.png", dpi=100)
        plt.close(figure)


def run(name: str, measure: Callable[[Results], None]) -> None:
    results = Results(name)
    measure(results)
    results.write()
