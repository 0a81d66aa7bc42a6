"""Every step compiles for TPUs and a GPU, where its state is, and copies no table.

    pip install ".[accelerators]"
    pytest -o addopts= tests/accelerators

Of a machine with neither this is all that can be asked; `python
tests/accelerators/report.py` writes what comes out as a table.
"""

import pytest

pytest.importorskip("libtpu", reason='needs `pip install ".[accelerators]"`')
pytest.importorskip("jax_cuda12_plugin", reason='needs `pip install ".[accelerators]"`')

import aot
import jax_steps
import steps
import tensorflow as tf

from keras_adam import rows


@pytest.fixture(params=aot.CHIPS)
def chip(request, monkeypatch):
    """`keras_adam` is told that it is there."""
    monkeypatch.setattr(rows, "on_tpu", lambda: request.param in aot.TPUS)
    monkeypatch.setattr(rows, "on_accelerator", lambda: True)
    return request.param


def compile_step(name, chip):
    program = steps.STEPS[name]()
    compiled = aot.compile_for(chip, program.f, *program.args)
    # Layouts may pad, so there may be more.
    assert compiled.alias_bytes >= program.state_bytes
    assert len(compiled.new_results) == program.results
    return program, compiled


@pytest.mark.parametrize("name", steps.DENSE)
def test_dense(name, chip):
    program, compiled = compile_step(name, chip)
    for shape in program.tables:
        assert compiled.fusions(*shape) == 1
        assert compiled.copies(*shape) == 0
    # What is fetched ahead into a TPU's fast memory.
    assert compiled.temporary_bytes < 2e6


@pytest.mark.parametrize("name", steps.ROW_STEPS)
def test_rows(name, chip):
    program, compiled = compile_step(name, chip)
    assert [compiled.copies(*shape) for shape in program.tables] == [0]
    assert compiled.temporary_bytes < room(program, chip, compiled.text)


def room(program, chip, text):
    """For what is no state: far less than the table, of 128 MB."""
    if chip in aot.TPUS:
        return 2e6
    # A GPU keeps the batch's rows in memory: gradients, theta, moments, what is new.
    [(_, width)] = program.tables
    workspace = 33_554_432 if "cublas" in text else 0
    return 6 * 4 * steps.IDS * width + workspace


@pytest.mark.parametrize("name", steps.NARROW)
def test_rows_of_other_widths(name, chip):
    """A GPU copies no table; a TPU at most as README tells."""
    program, compiled = compile_step(name, chip)
    [shape] = program.tables
    if chip not in aot.TPUS:
        assert compiled.copies(*shape) == 0
        assert compiled.temporary_bytes < room(program, chip, compiled.text)
        return
    best = name in ("rows of 64, Adam, exact", "rows of 200, Adam, exact")
    assert compiled.copies(*shape) <= (1 if best else 6)


def test_on_jax():
    """A whole train step of Keras on JAX: all is donated; no state is copied."""
    lines = jax_steps.run()
    assert len(lines) == 3 * len(aot.CHIPS)
    for line in lines:
        assert line["alias_bytes"] >= line["state_bytes"], line
        assert line["new_results"] == 1, line  # the loss
        on_tpu = line["chip"] in aot.TPUS
        # XLA finds the zeros that u is compared with in those that the gradient starts
        # from, and fills a second table with them on a GPU.
        zeros = not on_tpu and line["name"].endswith("AdaMax")
        assert line["copies"] == zeros, line
        # The gradient, which JAX makes as large as the table, on a GPU by filling it
        # first; and the update.
        assert line["fusions"] == (2 if on_tpu else 3), line
        tables = (1 + zeros) * jax_steps.TABLE_BYTES
        assert line["temporary_bytes"] < tables + 2e6, line


def test_copies_are_seen(chip):
    """A function that copies a table: the test that there is none could fail."""
    table = tf.Variable(tf.zeros((steps.ROWS, 64)))

    @tf.function(jit_compile=True, autograph=False)
    def step(values, ids):
        old = table.read_value()
        table.scatter_add(tf.IndexedSlices(values, ids))
        return tf.gather(old, tf.cast(tf.gather(table, ids)[:, 0], tf.int32))

    args = tf.zeros((8, 64)), tf.zeros((8,), tf.int32)
    assert aot.compile_for(chip, step, *args).copies(steps.ROWS, 64) > 0


@pytest.mark.parametrize("chip", aot.TPUS, indirect=True)
def test_what_cannot_be_compiled_is_refused(chip):
    @tf.function(jit_compile=True, autograph=False)
    def step(x):
        x = tf.random.stateless_uniform((40_000, 40_000, 8), x)  # 51 GB
        return tf.reduce_sum(tf.sort(x, axis=0)[1])

    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        aot.compile_for(chip, step, tf.zeros((2,), tf.int32))
