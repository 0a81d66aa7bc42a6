"""Kills trainings with SIGKILL at random moments, and looks how they end.

    python tests/faulty_training.py --kills 50 --seed 0

A training runs in a process of its own, under `model.fit` with ModelCheckpoint,
tf.train.Checkpoint and BackupAndRestore, all three every few steps. It is killed at a
random moment of its life, started again, which may be killed too, until it ends. Its
last weights and the optimizer's whole state must be, bit for bit, those of the same
training that nobody killed. What Keras leaves to its user (`batches`, `mend`,
`newest_model`) says what a script must do for that.
"""

import argparse
import collections
import itertools
import json
import mmap
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings

import h5py
import keras
import numpy as np
import tensorflow as tf

import keras_adam

# Importing TensorFlow takes longer than all the rest, so that is done once: until
# the fork nothing here may run an operation or ask for a device.

STEPS, EVERY, ROWS, IDS = 32, 4, 300, 8
MODES = ("exact", "lazy")
WAYS = ("backup", "model", "checkpoint")
MOMENTS = ("start", "steps", "model", "checkpoint", "backup", "end")


def make_model(mode):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input([IDS], dtype="int32"),
            keras_adam.Embedding(ROWS, 16),
            keras.layers.GlobalAveragePooling1D(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = keras_adam.Adam(0.01, sparse_updates=mode, weight_decay=0.01)
    model.compile(optimizer=optimizer, loss="mse")
    return model


def batches(model):
    """Step by step, from the step the optimizer is at.

    Keras's BackupAndRestore brings back the weights of a step, but of the data only
    the epoch, whose first batches a resumed `fit` would see again. So the data ask
    for the step, and there is one epoch. (`fit` opens the data after the callbacks'
    `on_train_begin`.)
    """

    def rest():
        for step in range(int(model.optimizer.iterations), STEPS):
            rng = np.random.default_rng(step)
            ids = rng.integers(0, ROWS, [4, IDS]) * rng.integers(0, 2, [4, IDS])
            yield ids.astype(np.int32), rng.standard_normal([4, 1]).astype(np.float32)

    return tf.data.Dataset.from_generator(
        rest,
        output_signature=(
            tf.TensorSpec([4, IDS], tf.int32),
            tf.TensorSpec([4, 1], tf.float32),
        ),
    )


def readable(path):
    try:
        if path.suffix == ".json" or path.suffixes[-2:] == [".json", ".bkp"]:
            json.loads(path.read_text())
        else:
            h5py.File(path).close()
    # HDF5 has a RuntimeError for some files that were being written.
    except (OSError, ValueError, RuntimeError):
        return False
    return True


def mend(folder):
    """Puts BackupAndRestore's copy back where a kill hit its writing.

    It writes in place, and `double_checkpoint=True` keeps a copy of what was there.
    Keras takes the copy by itself, but on an OSError only, and JSON that breaks off
    is another error; and without a copy, killed at the first save, it only raises.
    """
    files = [folder / "latest.weights.h5", folder / "training_metadata.json"]
    if not folder.exists() or all(map(readable, files)):
        return
    copies = [file.with_name(file.name + ".bkp") for file in files]
    if not all(map(readable, copies)):
        shutil.rmtree(folder)
        return
    for file, copy in zip(files, copies):
        shutil.copy(copy, file)


def newest_model(folder):
    """ModelCheckpoint's newest file that opens: it writes in place too."""
    for path in sorted(folder.glob("*.keras"), reverse=True):
        try:
            return keras.models.load_model(path)
        except ValueError as e:
            if "accessible `.keras` zip file" not in str(e):
                raise
    return None


def write_note(note, moment, count=0):
    note[:] = bytes([MOMENTS.index(moment), count])


class Moment(keras.callbacks.Callback):
    """Notes what comes next, for who kills."""

    def __init__(self, note, name):
        super().__init__()
        self.note = note
        self.name = name

    def on_train_batch_end(self, batch, logs=None):
        write_note(self.note, self.name, self.note[1] + 1)


class Checkpoints(keras.callbacks.Callback):
    """tf.train.Checkpoint, which writes elsewhere and renames: always whole."""

    def __init__(self, manager):
        super().__init__()
        self.manager = manager

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step % EVERY == 0:
            self.model.optimizer.settle()
            self.manager.save(step)


def train(folder, mode, way, note):
    """A training from where it stands, to its end."""
    model = (way == "model" and newest_model(folder)) or make_model(mode)
    model.optimizer.build(model.trainable_variables)
    manager = tf.train.CheckpointManager(
        tf.train.Checkpoint(model=model, optimizer=model.optimizer),
        str(folder / "checkpoints"),
        max_to_keep=2,
    )
    if way == "checkpoint":
        manager.restore_or_initialize()
    backup = folder / "backup"
    if way == "backup":
        mend(backup)
    else:
        shutil.rmtree(backup, ignore_errors=True)
    start = int(model.optimizer.iterations)
    model.fit(
        batches(model),
        shuffle=False,
        verbose=0,
        callbacks=[
            Moment(note, "model"),
            keras.callbacks.ModelCheckpoint(
                str(folder / f"{start:04d}-{{batch:04d}}.keras"), save_freq=EVERY
            ),
            Moment(note, "checkpoint"),
            Checkpoints(manager),
            Moment(note, "backup"),
            keras.callbacks.BackupAndRestore(
                backup, save_freq=EVERY, double_checkpoint=True
            ),
            Moment(note, "steps"),
        ],
    )
    write_note(note, "end", note[1] + 1)
    values = [v.numpy() for v in (*model.variables, *model.optimizer.variables)]
    np.savez(folder / "partial.npz", *values)
    (folder / "partial.npz").rename(folder / "last.npz")


def run(folder, mode, way, note, moments=None, seconds=0.0):
    """One process of a training; whether it ended before it was killed.

    It is killed so many seconds after so many of its moments, if any are given.
    """
    write_note(note, "start")
    pid = os.fork()
    if not pid:
        warnings.filterwarnings("ignore", "Your input ran out of data")
        try:
            train(folder, mode, way, note)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    ended, status = 0, 0
    if moments is not None:
        while note[1] < moments and not ended:
            time.sleep(0.001)
            ended, status = os.waitpid(pid, os.WNOHANG)
        if not ended:
            time.sleep(seconds)
            os.kill(pid, signal.SIGKILL)
    if not ended:
        ended, status = os.waitpid(pid, 0)
    code = os.waitstatus_to_exitcode(status)
    if code not in (0, -signal.SIGKILL):
        sys.exit(f"A training failed by itself, with {code}, in {folder}.")
    return code == 0


def random_moment(rng, length):
    """One of the steps or writings, or of the time before the first."""
    if rng.random() < 0.2:
        return 0, rng.uniform(0, length)
    return rng.randrange(1, 4 * STEPS), rng.uniform(0, 0.03)


def last(folder):
    with np.load(folder / "last.npz") as values:
        return [values[name] for name in values.files]


def same(a, b):
    return len(a) == len(b) and all(map(np.array_equal, a, b))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=None)
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(10**6) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    note = mmap.mmap(-1, 2)  # the moment, and how many there were
    whole, length = {}, {}
    hit = collections.Counter()
    endings = collections.Counter()
    kinds = [(mode, way) for way in WAYS for mode in MODES]
    for mode, way in itertools.cycle(kinds):
        if hit.total() >= args.kills:
            break
        if mode not in whole:
            with tempfile.TemporaryDirectory() as folder:
                begun = time.monotonic()
                run(pathlib.Path(folder), mode, way, note)
                length[mode] = time.monotonic() - begun
                whole[mode] = last(pathlib.Path(folder))
        with tempfile.TemporaryDirectory() as folder:
            moments, when = [], random_moment(rng, length[mode])
            while not run(pathlib.Path(folder), mode, way, note, *when):
                moments.append(MOMENTS[note[0]])
                again = rng.random() < 0.5
                when = random_moment(rng, length[mode]) if again else ()
            equal = same(last(pathlib.Path(folder)), whole[mode])
        hit.update(moments)
        if moments:
            endings[equal] += 1
        print(f"{mode}, {way}: killed at {moments}, equal: {equal}", flush=True)
    print(
        f"{hit.total()} kills ({dict(hit)}) of {endings.total()} trainings, of which "
        f"{endings[True]} ended equal"
    )
    sys.exit(0 if endings[False] == 0 else 1)


if __name__ == "__main__":
    main()
