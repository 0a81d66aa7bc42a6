"""Puts faults into the rules, one at a time, and sees whether a fast test fails.

    python tests/mutate.py [--seconds N] [--seed N] [--only TEXT]

Each operator, number, beta or extreme of the functions in `FUNCTIONS` is changed
(`mutants.py`) in a copy of the package, against which `TESTS` run in a fork of a
process that has TensorFlow loaded. A mutant that they pass has survived; the exit
status is 1 if one did that is not in `equivalent.py`, with the reason why it is no
fault. `--seconds` takes mutants at random until the time is up.
"""

import argparse
import importlib
import math
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback

import keras  # noqa: F401
import ml_dtypes  # noqa: F401
import mutants
import numpy as np  # noqa: F401
import pytest
import tensorflow as tf
from equivalent import EQUIVALENT

TESTS = pathlib.Path(__file__).parent
PACKAGE = TESTS.parent / "keras_adam"
# Arguments that stand for what a child makes.
UNSWEPT, MONKEYPATCH, ADAM = "unswept", "monkeypatch", "keras_adam.Adam"
AS_ROWS = "as_rows"
LIMIT = 300  # seconds for a mutant, such as one whose loop does not end

# What computes weights, state and averages; not what checks arguments, chooses
# the faster of two ways or saves memory.
FUNCTIONS = {
    "adam.py": (),
    "adamax.py": (),
    "base.py": (
        *("one_minus_power", "moving_average", "share", "_step", "_count_beta_1"),
        *("state_dtype", "rounded"),
    ),
    "checks.py": ("check_range",),
    "tails.py": (
        *("power", "tail", "owed", "column", "advance", "add_log", "log_s", "columns"),
        *("logs", "add_decay", "_averaged"),
    ),
    "exact.py": (
        *(
            "_rounded_plan",
            "_owes",
            "_kind",
            "_debts",
            "_settled_rows",
            "average_rows",
        ),
        *("_end_step", "_settle", "_settle_all"),
    ),
    "ledger.py": (
        *("_theta", "_paid", "_state", "_average", "advance", "settled", "theta"),
        *("state",),
        *("average", "_of", "settle_average", "settle_theta", "settle_state", "mark"),
        *("sweep", "__init__"),
    ),
    "rows.py": ("distinct", "sum_repeats", "_segment_sum", "note", "listed", "scatter"),
    "accumulation.py": ("_load_touched", "_accumulate", "step"),
    "averaging.py": ("_average", "_settle_in_step", "_overwrite_in_step", "_overwrite"),
    "update.py": ("takes_kernel", "update", "_decayed"),
}

NAMES = (
    *("adam", "adam_hat", "adam_betas", "adam_beta_1_0", "adam_uncorrected"),
    *("adam_beta_1_schedule", "amsgrad", "adamax", "adamax_betas"),
    "adamax_beta_1_schedule",
)


def trajectory(test, mode, last, names=("adam",), execution="eager"):
    name = f"test_{test}"
    return [("test_trajectory", name, (n, mode, execution, last)) for n in names]


ROWS = [
    ("test_rows", "test_sum_repeats", (False,)),
    ("test_rows", "test_sum_repeats", (True,)),
    ("test_tails", "test_sweep_reaches_every_row_in_time", (MONKEYPATCH,)),
]
DENSE = [
    *(
        ("test_bad_input", "test_arguments", (ADAM, name))
        for name in ("beta_1", "beta_2")
    ),
    *trajectory("patterns", "dense", "repeats", NAMES),
    *trajectory("dtypes", "dense", "bfloat16", ("adam", "adamax")),
    *trajectory("options", "dense", "weight_decay"),
    *(
        ("test_trajectory", "test_a_beta_1_that_is_rounded", (name, "graph"))
        for name in ("adam", "adamax")
    ),
    ("test_trajectory", "test_u_of_zero_is_a_step_of_zero", ("eager",)),
    *(
        (
            *("test_trajectory", "test_u_of_zero_beside_momentum_is_a_step_of_zero"),
            (execution, "dense", 0.9),
        )
        for execution in ("eager", "xla")
    ),
    *(
        (
            *("test_trajectory", "test_small_gradients_after_large_ones"),
            (cls, *betas, "dense", execution),
        )
        for cls in ("Adam", "AdaMax")
        for betas in ((0.0, 0.0), (0.25, 0.0), ("falls", 0.0), (0.0, 2.0**-30))
        for execution in ("graph", "xla")
    ),
]
LAZY = [
    *trajectory("patterns", "lazy", "empty", NAMES),
    *trajectory("options", "lazy", "weight_decay", ("adamax",)),
    *trajectory("options", "lazy", "ema_overwrite_accumulation_clip"),
    (
        "test_low_precision",
        "test_moments_are_the_oracle_s_on_average",
        ("adam", "bfloat16", "lazy", "graph"),
    ),
]
AVERAGES = [
    *(("test_averaging", "test_share", (g,)) for g in (0.0, 0.5, 1.0)),
    *trajectory("options", "exact", "ema"),
    *trajectory("options", "lazy", "ema", ("adamax",)),
    *trajectory("options", "exact", "ema_overwrite"),
    (
        "test_trajectory",
        "test_options_of_other_ranks",
        ("exact", "graph", "rank_3", "ema"),
    ),
    *(
        (
            *("test_averaging", "test_steps_without_a_gradient_and_with_a_dense_one"),
            (UNSWEPT, mode, False),
        )
        for mode in ("exact", "lazy")
    ),
    ("test_averaging", "test_constrained_weights_are_averaged", ("lazy", False)),
    *(
        ("test_averaging", "test_long_gaps", (UNSWEPT, x, "adam", "exact", False))
        for x in ({"ema_momentum": 0.9}, {"ema_momentum": 0.999, "weight_decay": 0.5})
    ),
    (
        "test_averaging",
        "test_momentum_1_is_the_mean",
        ("exact", {"weight_decay": 20.0}),
    ),
    (
        *("test_averaging", "test_weights_that_decay_faster_than_the_average_forgets"),
        (UNSWEPT, 10.0, False),
    ),
]
EXACT = [
    *trajectory("patterns", "exact", "repeats", NAMES),
    *trajectory("patterns", "exact", "rank_1"),
    *trajectory("patterns", "exact", "rank_3"),
    *trajectory("dtypes", "exact", "bfloat16"),
    *trajectory("options", "exact", "weight_decay"),
    *trajectory("options", "exact", "accumulation_clip_decay"),
    (
        "test_trajectory",
        "test_options_of_other_ranks",
        ("exact", "graph", "rank_3", "accumulation_clip_decay"),
    ),
    ("test_ledger", "test_settle_pays_once", (UNSWEPT, "eager")),
    ("test_ledger", "test_a_state_just_loaded_is_settled", (UNSWEPT,)),
    (
        "test_low_precision",
        "test_weights_are_the_oracle_s_on_average",
        ("adam", "exact", "graph", 0.5),
    ),
    *(
        ("test_embedding", "test_options_in_fit", (kwargs, False))
        for kwargs in (
            {"gradient_accumulation_steps": 3},
            {"use_ema": True, "ema_momentum": 0.9},
        )
    ),
    ("test_optimizer", "test_a_beta_1_schedule_that_exceeds_what_was_found", (False,)),
    ("test_ledger", "test_dense_and_sparse_gradients_of_one_table", (UNSWEPT, "eager")),
    ("test_ledger", "test_dense_steps_before_the_first_sparse_one", (UNSWEPT,)),
    (
        *("test_ledger", "test_tables_of_several_dtypes"),
        (UNSWEPT, ["float64", "float32"], None, False),
    ),
    (
        "test_ledger",
        "test_a_step_without_the_table_is_no_step_for_it",
        (UNSWEPT, False),
    ),
    (
        "test_ledger",
        "test_a_compiled_dense_step_before_the_first_sparse_one_is_refused",
        (),
    ),
]
PLANS = [
    *(
        ("test_tails", "test_after_the_window_a_row_rests", (name,))
        for name in ("adam", "amsgrad", "adamax")
    ),
    *(
        (
            "test_properties",
            "test_steps_do_not_know_the_scale_of_gradients",
            (c, "dense"),
        )
        for c in ("Adam", "AdaMax")
    ),
]
COMPILED = [
    *(
        ("test_trajectory", "test_betas_near_the_edge", (MONKEYPATCH, n, "graph"))
        for n in ("adam", "adamax")
    ),
    *trajectory("patterns", "exact", "ragged", execution="graph"),
    *trajectory("patterns", "exact", "repeats", execution="xla"),
    *trajectory("options", "exact", "accumulation_clip_decay", execution="xla"),
    *trajectory("options", "lazy", "accumulation_clip_decay", execution="xla"),
    *(
        ("test_rows", "test_ids_outside_the_table_touch_nothing_under_xla", case)
        for case in (("exact", 4), ("exact", 7))
    ),
    ("test_bad_input", "test_scalar_variables", ("eager",)),
    (
        *("test_bad_input", "test_gradients_that_are_not_finite"),
        (math.nan, "xla", "dense", "adamax"),
    ),
    ("test_tails", "test_long_sums_of_logarithms_keep_small_steps", ()),
    (
        *("test_tails", "test_a_scheduled_beta_1_whose_power_leaves_float32"),
        (MONKEYPATCH, 0.49, 0.5, 200, False),
    ),
    ("test_tails", "test_very_long_sums_of_logarithms_stay_in_two_parts", ()),
    ("test_tails", "test_decays_are_known_in_two_parts", ()),
    *(
        ("test_tails", "test_tails_are_right_to_1e_5_of_themselves", case)
        for case in (
            ("adam", "warm_up"),
            ("beta_1_0.99", "constant"),
            ("amsgrad", "constant"),
        )
    ),
]
ACCUMULATION = [
    *(
        (
            "test_trajectory",
            "test_accumulation_of_batches_of_all_sizes",
            (MONKEYPATCH, mode, execution, "accumulation_clip_decay"),
        )
        for mode, execution in (
            *(("lazy", "eager"), ("lazy", "xla"), ("dense", "eager")),
            ("exact", "xla"),
        )
    ),
    ("test_optimizer", "test_mixed_micro_steps_lose_nothing", ()),
    (
        "test_optimizer",
        "test_no_gradient_at_the_last_micro_step_leaves_nothing_behind",
        (AS_ROWS,),
    ),
    *(
        (
            "test_optimizer",
            "test_sums_of_another_mode_are_the_rows_that_lazy_mode_updates",
            ("dense", width),
        )
        for width in ((2,), ())
    ),
    (
        "test_trajectory",
        "test_options_of_other_ranks",
        ("exact", "xla", "rank_3", "accumulation_clip_decay"),
    ),
    *(
        (
            "test_optimizer",
            "test_a_state_in_the_middle_loads_into_another_mode",
            ({"gradient_accumulation_steps": 4}, old, "lazy"),
        )
        for old in ("keras", "lazy")
    ),
]
AVERAGING = ("average_rows", "_average", "average", "settle_average", "_averaged")
FIRST = {
    **dict.fromkeys((*AVERAGING, "add_decay"), AVERAGES),
    "accumulation.py": ACCUMULATION,
    **dict.fromkeys(("tails.py", "ledger.py", "exact.py"), EXACT),
    "averaging.py": AVERAGES,
    "rows.py": ROWS + EXACT[:1] + ACCUMULATION[:2],
}


def tests(file, function=""):
    """Those that find most faults of a function, in the least time, first."""
    every = [*PLANS, *DENSE, *LAZY, *EXACT, *AVERAGES, *ROWS, *COMPILED, *ACCUMULATION]
    first = FIRST.get(function, FIRST.get(file, []))
    return [*first, *(test for test in every if test not in first)]


def call(module, name, args):
    """Runs a test without pytest, whose collecting takes longer than most tests."""
    importlib.import_module("conftest")
    with pytest.MonkeyPatch.context() as monkeypatch:
        if UNSWEPT in args:
            ledger = importlib.import_module("keras_adam.ledger")
            none = tf.zeros([0], tf.int32)
            monkeypatch.setattr(ledger, "sweep", lambda rows, t: none)
        stand = {MONKEYPATCH: monkeypatch, ADAM: sys.modules["keras_adam"].Adam}
        if AS_ROWS in args:
            stand[AS_ROWS] = importlib.import_module(module).as_rows
        args = [stand.get(x, x) if isinstance(x, str) else x for x in args]
        getattr(importlib.import_module(module), name)(*args)


def child(file, function, folder, verbose):
    sys.path.insert(0, str(folder))
    import keras_adam

    assert pathlib.Path(keras_adam.__file__).parent == folder / "keras_adam"
    for test in tests(file, function):
        since = time.monotonic()
        try:
            call(*test)
        except Exception:
            if verbose:
                traceback.print_exc()
            return 1
        if verbose:
            print(f"{time.monotonic() - since:6.2f} s {test}", flush=True)
    return 0


def run(source, file, function, folder, verbose=False):
    """Whether the tests pass, in a fork; None for no answer within `LIMIT`."""
    target = folder / "keras_adam" / file
    original = (PACKAGE / file).read_text()
    target.write_text(source or original)
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if not verbose:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, 1)
                os.dup2(null, 2)
            status = child(file, function, folder, verbose)
        finally:
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
    target.write_text(original)
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
    gone = EQUIVALENT.keys() - {m.key for m in todo}
    if gone and not args.only:
        sys.exit(f"equivalent.py lists what is no mutant any more: {gone}")
    if args.seconds:
        seed = args.seed if args.seed is not None else random.randrange(10**6)
        print(f"--seed {seed}")
        random.Random(seed).shuffle(todo)
    todo = [m for m in todo if m.key not in EQUIVALENT]
    killed, survivors = 0, []
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "keras_adam", ignore=ignore)
        if not run(None, "adam.py", "", folder, verbose=True):
            sys.exit("The tests fail without a mutant.")
        start = time.monotonic()
        for mutant in todo:
            if args.seconds and time.monotonic() - start > args.seconds:
                break
            since = time.monotonic()
            passed = run(mutant.source, mutant.file, mutant.function, folder)
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
