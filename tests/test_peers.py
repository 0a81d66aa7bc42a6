"""Second opinions: torch and optax on the same gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_adam

STEPS = 200
SHAPE = (6, 5)


def gradients(sparse=False):
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-6, 1, SHAPE[1])
    if not sparse:
        return [
            (scale * rng.standard_normal(SHAPE)).astype(np.float32)
            for _ in range(STEPS)
        ]
    return [
        (
            (scale * rng.standard_normal((4, SHAPE[1]))).astype(np.float32),
            rng.integers(0, SHAPE[0], 4),
        )
        for _ in range(STEPS)
    ]


def first():
    return np.random.default_rng(1).standard_normal(SHAPE).astype(np.float32)


def ours(optimizer, stream, jit):
    variable = keras.Variable(first())
    optimizer.build([variable])
    apply = tf.function(optimizer.apply, jit_compile=jit)
    for g in stream:
        if isinstance(g, tuple):
            values, ids = map(tf.constant, g)
            g = tf.IndexedSlices(values, ids, tf.constant(SHAPE))
        apply([tf.convert_to_tensor(g) if isinstance(g, np.ndarray) else g])
    return variable.numpy()


TORCH = {
    "adam": (lambda: keras_adam.Adam(0.01), "Adam", {"eps": 1e-8}),
    "amsgrad": (
        lambda: keras_adam.Adam(0.01, beta_2=0.9, amsgrad=True),
        "Adam",
        {"betas": (0.9, 0.9), "amsgrad": True},
    ),
    "adamw": (
        lambda: keras_adam.Adam(0.01, weight_decay=0.1),
        "AdamW",
        {"weight_decay": 0.1},
    ),
    "adamax": (lambda: keras_adam.AdaMax(0.01), "Adamax", {"eps": 0}),
    "sparse_adam": (
        lambda: keras_adam.Adam(0.01, epsilon_hat=True, sparse_updates="lazy"),
        "SparseAdam",
        {},
    ),
}


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", TORCH)
def test_torch(name, jit):
    torch = pytest.importorskip("torch", reason="second opinion not installed")
    make, theirs, kwargs = TORCH[name]
    stream = gradients(sparse=name == "sparse_adam")
    weight = torch.nn.Parameter(torch.tensor(first()))
    optimizer = getattr(torch.optim, theirs)([weight], lr=0.01, **kwargs)
    for g in stream:
        if isinstance(g, tuple):
            values, ids = map(torch.tensor, g)
            weight.grad = torch.sparse_coo_tensor(ids[None], values, SHAPE)
        else:
            weight.grad = torch.tensor(g)
        optimizer.step()
    np.testing.assert_allclose(
        ours(make(), stream, jit), weight.detach().numpy(), rtol=1e-4, atol=2e-5
    )


OPTAX = {
    "adam": (lambda: keras_adam.Adam(0.01), lambda o: o.adam(0.01)),
    "adam_betas": (
        lambda: keras_adam.Adam(0.01, beta_1=0.5, beta_2=0.95, epsilon=1e-3),
        lambda o: o.adam(0.01, b1=0.5, b2=0.95, eps=1e-3),
    ),
    "adamax": (lambda: keras_adam.AdaMax(0.01), lambda o: o.adamax(0.01, eps=0)),
}


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", OPTAX)
def test_optax(name, jit):
    optax = pytest.importorskip("optax", reason="second opinion not installed")
    make, theirs = OPTAX[name]
    stream = gradients()
    optimizer = theirs(optax)
    weight = first()
    state = optimizer.init(weight)
    for g in stream:
        delta, state = optimizer.update(g, state, weight)
        weight = np.asarray(optax.apply_updates(weight, delta))
    np.testing.assert_allclose(ours(make(), stream, jit), weight, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("jit", [False, True], ids=["graph", "xla"])
@pytest.mark.parametrize("name", ["adam", "adam_betas"])
def test_optax_on_the_gradient_in_dense_form(name, jit):
    """Exact rows, against an Adam that moves every row at every step."""
    optax = pytest.importorskip("optax", reason="second opinion not installed")
    make, theirs = OPTAX[name]
    stream = gradients(sparse=True)
    optimizer = theirs(optax)
    weight = first()
    state = optimizer.init(weight)
    for values, ids in stream:
        g = np.zeros_like(weight)
        np.add.at(g, ids, values)
        delta, state = optimizer.update(g, state, weight)
        weight = np.asarray(optax.apply_updates(weight, delta))
    np.testing.assert_allclose(ours(make(), stream, jit), weight, rtol=1e-4, atol=2e-5)
