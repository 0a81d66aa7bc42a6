"""Puts faults into the rules, one at a time, and sees whether a fast test fails.

    python tests/mutate.py [--seconds N] [--seed N] [--only TEXT]

Each operator, number, beta or extreme of the functions in `FUNCTIONS` is changed
(`mutants.py`) in a copy of the package, against which `TESTS` run in a fork of a
process that has TensorFlow loaded. A mutant that they pass has survived; the exit
status is 1 if one did that is not in `equivalent.py`, with the reason why it is no
fault. `--seconds` takes mutants at random until the time is up.
"""

import argparse
import contextlib
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

import hypothesis  # noqa: F401
import keras  # noqa: F401
import ml_dtypes  # noqa: F401
import mutants
import numpy as np  # noqa: F401
import pytest
import tensorflow as tf  # noqa: F401
from equivalent import EQUIVALENT

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "keras_adam"
LIMIT = 300  # seconds for a mutant, such as one whose loop does not end

# What computes weights, state and averages; not what checks arguments, chooses
# the faster of two ways or saves memory.
FUNCTIONS = {
    "adam.py": (),
    "adamax.py": (),
    "base.py": (
        *("one_minus_power", "share", "_step", "_count_beta_1"),
        *("state_dtype", "rounded", "check_range"),
    ),
    "tails.py": (
        *("power", "tail", "owed", "column", "advance", "add_log", "log_s", "columns"),
    ),
    "exact.py": (
        *(
            "_rounded_plan",
            "_owes",
            "_written",
            "_debts",
            "_settled_rows",
            "average_rows",
        ),
        *("_end_step", "_settle", "_settle_all"),
    ),
    "ledger.py": (
        *("_theta", "_state", "_average", "advance", "settled", "theta", "state"),
        *("average", "_of", "settle_average", "settle_theta", "settle_state", "mark"),
        *("sweep", "__init__"),
    ),
    "rows.py": ("distinct", "sum_repeats", "_segment_sum", "marked", "scatter"),
    "averaging.py": ("_average", "_overwrite_in_step", "_overwrite"),
    "update.py": ("takes_kernel", "update", "_decayed"),
}

NAMES = (
    *("adam", "adam_hat", "adam_betas", "adam_beta_1_0", "adam_uncorrected"),
    *("adam_beta_1_schedule", "amsgrad", "adamax", "adamax_betas"),
)
PATTERNS = "test_trajectory.py::test_patterns[{}-{}-{}-{}]"
OPTIONS = "test_trajectory.py::test_options[{}-{}-eager-{}]"
# Those that find most, in the least time, first.
NODES = [
    "test_rows.py::test_sum_repeats",
    "test_tails.py::test_sweep_reaches_every_row_in_time",
    "test_averaging.py::test_share",
    *(PATTERNS.format(n, "dense", "eager", "repeats") for n in NAMES),
    *(PATTERNS.format(n, "lazy", "eager", "empty") for n in NAMES),
    "test_trajectory.py::test_dtypes[adam-dense-eager-bfloat16]",
    "test_trajectory.py::test_dtypes[adamax-dense-eager-bfloat16]",
    *(PATTERNS.format(n, "exact", "eager", "repeats") for n in NAMES),
    *(OPTIONS.format("adam", "exact", o) for o in ("weight_decay", "ema")),
    *(OPTIONS.format("adamax", "lazy", o) for o in ("weight_decay", "ema")),
    OPTIONS.format("adam", "dense", "weight_decay"),
    OPTIONS.format("adam", "exact", "ema_overwrite"),
    OPTIONS.format("adam", "exact", "accumulation_clip_decay"),
    OPTIONS.format("adam", "lazy", "ema_overwrite_accumulation_clip"),
    "test_trajectory.py::test_u_of_zero_is_a_step_of_zero[eager]",
    "test_ledger.py::test_settle_pays_once[eager]",
    "test_ledger.py::test_dense_and_sparse_gradients_of_one_table[eager]",
    "test_ledger.py::test_dense_steps_before_the_first_sparse_one",
    PATTERNS.format("adam", "exact", "graph", "ragged"),
    PATTERNS.format("adam", "exact", "xla", "repeats"),
    "test_tails.py::test_long_sums_of_logarithms_keep_small_steps",
    "test_tails.py::test_tails_are_right_to_1e_5_of_themselves[adam-warm_up]",
]


def run(source, file, folder, quiet=True):
    """Whether the tests pass, in a fork; None for no answer within `LIMIT`."""
    package = folder / "keras_adam"
    original = (PACKAGE / file).read_text()
    (package / file).write_text(source or original)
    pid = os.fork()
    if pid == 0:
        status = 1
        with contextlib.suppress(BaseException):
            if quiet:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            sys.path.insert(0, str(folder))
            import keras_adam

            assert pathlib.Path(keras_adam.__file__).parent == package
            options = ["-x", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
            if not quiet:
                options += ["--durations=50", "--durations-min=0"]
            nodes = [f"{TESTS}/{node}" for node in NODES]
            status = int(pytest.main([*options, f"--rootdir={TESTS.parent}", *nodes]))
        os._exit(status)
    end = time.monotonic() + LIMIT
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        time.sleep(0.02)
    else:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        status = None
    (package / file).write_text(original)
    return None if status is None else status == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, help="of the order, with --seconds")
    parser.add_argument("--only", default="", help="mutants whose line has this text")
    args = parser.parse_args()
    sys.dont_write_bytecode = True  # else a file changed twice a second may be stale
    todo = [
        m
        for file, names in FUNCTIONS.items()
        for m in mutants.mutants(PACKAGE / file, names)
        if args.only in str(m)
    ]
    total = len(todo)
    todo = [m for m in todo if m.key not in EQUIVALENT]
    if args.seconds:
        seed = args.seed if args.seed is not None else random.randrange(10**6)
        print(f"--seed {seed}")
        random.Random(seed).shuffle(todo)
    start = time.monotonic()
    killed, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "keras_adam", ignore=ignore)
        if not run(None, "adam.py", folder, quiet=False):
            sys.exit("The tests fail without a mutant.")
        for mutant in todo:
            if args.seconds and time.monotonic() - start > args.seconds:
                break
            since = time.monotonic()
            passed = run(mutant.source, mutant.file, folder)
            word = {True: "SURVIVED", False: "killed", None: "killed (time)"}[passed]
            print(f"{word} {mutant} ({time.monotonic() - since:.1f} s)", flush=True)
            if passed:
                survivors.append(mutant)
            else:
                killed += 1
    print(
        f"{killed} killed, {len(survivors)} survived, of {total} mutants, of which "
        f"{total - len(todo)} are known to be equivalent; "
        f"{time.monotonic() - start:.0f} s"
    )
    for mutant in survivors:
        print(f"SURVIVED {mutant}")
    sys.exit(bool(survivors))


if __name__ == "__main__":
    main()
