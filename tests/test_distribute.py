"""Several replicas train as one device does on the whole batch."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

import keras_adam

SCRIPT = pathlib.Path(__file__).with_name("replicas.py")


def check(results):
    assert len(results) > 3
    for name, (difference, apart) in results.items():
        assert difference <= 1e-6, name
        assert apart == 0, name


def start(*args, **environment):
    root = SCRIPT.parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), **environment}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *args],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err[-3000:]
    return json.loads(out)


@pytest.mark.parametrize("replicas", ["2", "4"])
def test_mirrored_strategy(replicas):
    check(finish(start(replicas)))


def test_two_workers():
    with socket.socket() as a, socket.socket() as b:
        for s in (a, b):
            s.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (a, b)]
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    processes = [
        start(
            "workers",
            TF_CONFIG=json.dumps(
                {"cluster": cluster, "task": {"type": "worker", "index": i}}
            ),
        )
        for i in range(2)
    ]
    for process in processes:
        check(finish(process))


def test_other_strategies_are_refused(monkeypatch):
    optimizer = keras_adam.Adam()
    monkeypatch.setattr(optimizer, "_replicas", True)
    with pytest.raises(NotImplementedError, match=r"MirroredStrategy.*Received"):
        optimizer.build([keras.Variable([1.0])])


def test_tpu_strategy_is_refused(monkeypatch):
    """Also of one replica: its variables are no variables while a step is traced."""
    optimizer = keras_adam.Adam()
    strategy = object.__new__(tf.distribute.TPUStrategy)
    monkeypatch.setattr(optimizer, "_distribution_strategy", strategy)
    with pytest.raises(NotImplementedError, match=r'OneDeviceStrategy\("/TPU:0"\)'):
        optimizer.build([keras.Variable([1.0])])


def test_a_strategy_of_one_replica():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        variable = keras.Variable([[1.0], [2.0]])
        optimizer = keras_adam.Adam(0.1)
        optimizer.build([variable])
    slices = tf.IndexedSlices(tf.ones((1, 1)), tf.constant([1]), tf.constant([2, 1]))
    strategy.run(lambda: optimizer.apply([slices], [variable]))
    assert variable.numpy().ravel().tolist() == pytest.approx([1.0, 1.9])
