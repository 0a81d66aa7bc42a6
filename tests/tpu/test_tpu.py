"""Every step compiles for TPUs, where its state is, and copies no table.

    pip install ".[tpu]"
    pytest -o addopts= tests/tpu

Of a machine without a TPU this is all that can be asked; `python tests/tpu/report.py`
writes what comes out as a table.
"""

import pytest

pytest.importorskip("libtpu", reason='needs `pip install ".[tpu]"`')

import aot
import jax_steps
import steps
import tensorflow as tf

from keras_adam import rows

CHIPS = pytest.mark.parametrize("chip", aot.CHIPS)


@pytest.fixture(autouse=True)
def tpu(monkeypatch):
    """`keras_adam` is told that there is a TPU."""
    monkeypatch.setattr(rows, "on_tpu", lambda: True)


def compile_step(name, chip):
    program = steps.STEPS[name]()
    compiled = aot.compile_for(chip, program.f, *program.args)
    # Layouts may pad, so there may be more.
    assert compiled.alias_bytes >= program.state_bytes
    assert len(compiled.new_results) == program.results
    return program, compiled


@CHIPS
@pytest.mark.parametrize("name", steps.DENSE)
def test_dense(name, chip):
    program, compiled = compile_step(name, chip)
    for shape in program.tables:
        assert compiled.fusions(*shape) == 1
        assert compiled.copies(*shape) == 0
    # What is fetched ahead into the chip's fast memory.
    assert compiled.temporary_bytes < 2e6


@CHIPS
@pytest.mark.parametrize("name", steps.ROW_STEPS)
def test_rows(name, chip):
    program, compiled = compile_step(name, chip)
    assert [compiled.copies(*shape) for shape in program.tables] == [0]
    assert compiled.temporary_bytes < 2e6  # the table: 128 MB


@CHIPS
@pytest.mark.parametrize("name", steps.NARROW)
def test_rows_of_other_widths(name, chip):
    """At most what README tells of them, and no table of temporaries more than that."""
    program, compiled = compile_step(name, chip)
    [shape] = program.tables
    best = name in ("rows of 64, Adam, exact", "rows of 200, Adam, exact")
    assert compiled.copies(*shape) <= (1 if best else 6)


def test_on_jax():
    """A whole train step of Keras on JAX: all is donated; no table is copied."""
    lines = jax_steps.run()
    assert len(lines) == 3 * len(aot.CHIPS)
    for line in lines:
        assert line["alias_bytes"] >= line["state_bytes"], line
        assert line["new_results"] == 1, line  # the loss
        assert line["copies"] == 0, line
        # The gradient, which JAX makes as large as the table, and the update.
        assert line["fusions"] == 2, line
        assert line["temporary_bytes"] < jax_steps.TABLE_BYTES + 2e6, line


@CHIPS
def test_copies_are_seen(chip):
    """A function that copies a table: the test that there is none could fail."""
    table = tf.Variable(tf.zeros((steps.ROWS, 64)))

    @tf.function(jit_compile=True, autograph=False)
    def step(values, ids):
        table.scatter_add(tf.IndexedSlices(values, ids))
        return tf.gather(table, ids)

    args = tf.zeros((8, 64)), tf.zeros((8,), tf.int32)
    assert aot.compile_for(chip, step, *args).copies(steps.ROWS, 64) > 0


@CHIPS
def test_what_cannot_be_compiled_is_refused(chip):
    @tf.function(jit_compile=True, autograph=False)
    def step(x):
        x = tf.random.stateless_uniform((40_000, 40_000, 8), x)  # 51 GB
        return tf.reduce_sum(tf.sort(x, axis=0)[1])

    with pytest.raises(Exception, match="RESOURCE_EXHAUSTED"):
        aot.compile_for(chip, step, tf.zeros((2,), tf.int32))
