"""Truncated and mismatched files of a saved state, and those that only look so."""

import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from cases import make_model

import keras_adam


def trained(optimizer=None, layer=keras_adam.Embedding, frozen=False):
    model = make_model(layer=layer)
    model.layers[-1].trainable = not frozen
    model.compile(optimizer=optimizer or keras_adam.Adam(0.01), loss="mse")
    model.optimizer.build(model.trainable_variables)
    step(model)
    return model


def step(model):
    """Some rows of the table, and all else."""
    table, *others = model.optimizer._trainable_variables
    slices = tf.IndexedSlices(
        tf.ones((3, table.shape[1])), tf.constant([0, 3, 3]), tf.constant(table.shape)
    )
    model.optimizer.apply([slices, *(tf.ones(v.shape) for v in others)])


def state(model):
    return [*(v.numpy() for v in model.variables), *own(model)]


def own(model):
    """The optimizer's; to date, as they are after Keras has loaded the layers'."""
    model.optimizer.settle()
    return [v.numpy() for v in model.optimizer.variables]


def assert_same(old, new):
    for a, b in zip(old, new, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
@pytest.mark.parametrize("kind", ["weights.h5", "keras"])
def test_truncated_files(tmp_path, kind, share):
    """Keras finds them before it loads anything."""
    model = trained()
    path = tmp_path / f"model.{kind}"
    (model.save if kind == "keras" else model.save_weights)(path)
    step(model)
    before = state(model)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((OSError, zipfile.BadZipFile)):
        model.load_weights(path)
    assert_same(before, state(model))
    if kind == "keras":
        with pytest.raises(ValueError, match=r"accessible `\.keras` zip file"):
            keras.models.load_model(path)


class Wider(keras_adam.Embedding):
    def __init__(self, rows, width, **kwargs):
        super().__init__(rows, width + 1, **kwargs)


# name: (whose state it is, what the error says of it)
MISFITS = {
    "another_width": (
        lambda: trained(layer=Wider),
        r"embeddings_momentum has the shape \(20, 8\).*saved for it \(20, 9\)",
    ),
    "frozen": (
        lambda: trained(frozen=True),
        r"nothing was saved for .*dense.*kernel_momentum",
    ),
    "amsgrad": (
        lambda: trained(keras_adam.Adam(amsgrad=True)),
        r"after .*bias_velocity it has .*saved were \[\(20, 8\), \(8, 1\), \(1,\)\]",
    ),
    "averages": (
        lambda: trained(keras_adam.Adam(use_ema=True)),
        r"shape \(20, 8\).*saved for it \(8, 1\)",
    ),
    "a_schedule": (
        lambda: trained(
            keras_adam.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9))
        ),
        r"learning_rate has the shape \(\).*saved for it \(20, 8\)",
    ),
    "momentum": (
        lambda: trained(keras.optimizers.SGD(momentum=0.9)),
        r"embeddings_velocity has the shape \(20, 8\).*saved for it \(8, 1\)",
    ),
}


@pytest.mark.parametrize("mode", ["exact", "dense"])
@pytest.mark.parametrize("name", MISFITS)
def test_mismatched_states(tmp_path, name, mode):
    """An error says what does not fit, and the optimizer goes on as it was."""
    make, message = MISFITS[name]
    other = make()
    path = tmp_path / "model.weights.h5"
    other.save_weights(path)
    model = trained(keras_adam.Adam(0.01, sparse_updates=mode, name="mine"))
    before = own(model)
    remedy = r"another optimizer.*compile=False"
    store = {}
    other.optimizer.save_own_variables(store)
    with pytest.raises(ValueError, match=f"'mine'.*{message}.*{remedy}"):
        model.optimizer.load_own_variables(store)
    assert_same(before, own(model))
    if name != "another_width":  # where Keras's own error is the first
        with pytest.raises(ValueError, match=f"'mine'.*{message}.*{remedy}"):
            model.load_weights(path)  # Keras has loaded the layers before
        assert_same(before, own(model))
        with pytest.warns(UserWarning, match=f"'mine'.*{message}"):
            model.load_weights(path, skip_mismatch=True)
        assert_same(other.get_weights(), model.get_weights())
    assert_same(before, own(model))
    fresh = make_model(layer=Wider if name == "another_width" else keras_adam.Embedding)
    fresh.load_weights(path)  # the remedy
    assert_same(other.get_weights(), fresh.get_weights())


@pytest.mark.parametrize("names", [["0", "1", "2", "4"], ["a", "b", "c"]])
def test_misnamed_arrays(names):
    model = trained()
    before = state(model)
    with pytest.raises(ValueError, match=f"is named .*{names[-1]}"):
        model.optimizer.load_own_variables(dict.fromkeys(names, np.zeros(())))
    assert_same(before, state(model))


def test_a_model_frozen_after_its_training(tmp_path):
    """`load_model` builds the optimizer for fewer variables than were saved."""
    model = trained()
    model.layers[-1].trainable = False
    model.save(tmp_path / "model.keras")
    with pytest.raises(ValueError, match=r"saved were.*load_model\(path, compile=Fal"):
        keras.models.load_model(tmp_path / "model.keras")
    copy = keras.models.load_model(tmp_path / "model.keras", compile=False)
    assert_same(model.get_weights(), copy.get_weights())


def test_states_that_only_seem_not_to_fit(tmp_path):
    """Keras skips these with a warning, and so do we."""
    path = tmp_path / "model.weights.h5"
    bare = make_model(layer=keras_adam.Embedding)
    bare.save_weights(path)  # without an optimizer
    model = trained()
    before = own(model)
    with pytest.warns(UserWarning, match="Skipping.*has 0 variables"):
        model.load_weights(path)
    assert_same(before, own(model))

    bare.compile(optimizer=keras_adam.Adam(0.5), loss="mse")
    bare.save_weights(path)  # of an optimizer that was not built
    with pytest.warns(UserWarning, match="Skipping.*has 2 variables"):
        model.load_weights(path)
    assert_same(before, own(model))
    bare.save(tmp_path / "model.keras")
    with pytest.warns(UserWarning, match="Skipping.*has 2 variables"):
        copy = keras.models.load_model(tmp_path / "model.keras")
    step(copy)

    model.save_weights(path)  # into an optimizer that was not built
    bare = make_model(layer=keras_adam.Embedding)
    bare.compile(optimizer=keras_adam.Adam(0.01), loss="mse")
    with pytest.warns(UserWarning, match="Skipping.*has 2 variables whereas"):
        bare.load_weights(path)
    assert_same(model.get_weights(), bare.get_weights())


def test_a_state_not_built_of_another_rate():
    """One with a learning rate, where this optimizer has a schedule."""
    model = trained(
        keras_adam.Adam(keras.optimizers.schedules.CosineDecay(0.1, 9), name="mine")
    )
    before, store = own(model), {}
    keras_adam.Adam(0.5).save_own_variables(store)
    with pytest.warns(UserWarning, match="Skipping.*mine"):
        model.optimizer.load_own_variables(store)
    assert_same(before, own(model))


def test_another_layout_of_the_same_shapes():
    """Of vectors only: m, v and the rows' last steps, or the sums, m and v."""
    vector, store = keras.Variable(np.ones(4, np.float32)), {}
    exact = keras_adam.Adam(0.01)
    exact.build([vector])
    exact.apply([tf.IndexedSlices(tf.ones(2), tf.constant([0, 1]), tf.constant([4]))])
    exact.save_own_variables(store)
    dense = keras_adam.Adam(
        0.01, sparse_updates="dense", gradient_accumulation_steps=2, name="mine"
    )
    dense.build([vector])
    assert [v.shape for v in dense.variables] == [v.shape for v in exact.variables]
    before = [v.numpy() for v in dense.variables]
    with pytest.raises(ValueError, match=r"'mine': nothing was saved for .*velocity"):
        dense.load_own_variables(store)
    assert_same(before, [v.numpy() for v in dense.variables])


def checkpoint(model):
    return tf.train.Checkpoint(model=model, optimizer=model.optimizer)


def test_checkpoints_of_other_shapes(tmp_path):
    """TensorFlow's own errors: they name both shapes."""
    other = trained(layer=Wider)
    other.optimizer.settle()
    path = checkpoint(other).write(str(tmp_path / "checkpoint"))
    model = trained()
    before = own(model)
    with pytest.raises(ValueError, match=r"\(20, 9\).*\(20, 8\)"):
        checkpoint(model).restore(path)
    assert_same(before, own(model))


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_truncated_checkpoints(tmp_path, part, share):
    model = trained()
    path = checkpoint(model).write(str(tmp_path / "checkpoint"))
    step(model)
    before = state(model)
    file = tmp_path / f"checkpoint.{part}"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises((tf.errors.OpError, IndexError)):
        checkpoint(model).restore(path)
    assert_same(before, state(model))
