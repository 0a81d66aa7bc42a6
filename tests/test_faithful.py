"""What the scripts of examples/ train is what the paper says, at its sizes."""

import itertools

import cifar10_cnn
import data
import experiment
import imdb_bow
import keras
import mnist_logistic
import mnist_mlp
import mnist_vae
import numpy as np
import pytest
import reference
import regret
import tensorflow_datasets as tfds
from test_paper import set_flags

import keras_adam


@pytest.fixture
def fits(monkeypatch, tmp_path):
    """Runs a script without training; gives the arguments of each training."""

    def call(module, *args):
        calls = []

        def fit(*args):
            calls.append(args[:6])
            return [{"loss": 1.0, "seconds": 1.0}] * args[5]

        monkeypatch.setattr(experiment, "fit", fit)
        values = set_flags(monkeypatch, module, *args, f"--output={tmp_path}")
        assert values.batch_size == 128
        with tfds.testing.mock_data(num_examples=50):
            module.main([])
        return calls

    return call


def layers(model):
    """Each layer that does something: (its kind, what there is to say of it)."""
    found = []
    for layer in model.layers:
        config, name = layer.get_config(), type(layer).__name__
        if name == "Dense":
            said = layer.units, config["activation"]
        elif name == "Conv2D":
            said = layer.filters, layer.kernel_size, layer.strides
            assert config["activation"] == "relu"
        elif name == "MaxPooling2D":
            said = layer.pool_size, layer.strides
        elif name == "Dropout":
            said = (layer.rate,)
        else:
            continue
        found.append((name, *said))
    return found


def l2s(model):
    """Of the layers with weights."""
    regularizers = [x.kernel_regularizer for x in model.layers if hasattr(x, "kernel")]
    return [x and pytest.approx(float(x.l2)) for x in regularizers]


def lowers(optimizer):
    """Whether alpha / sqrt(t) lowers its rate."""
    rates = []
    for step in (0, 99):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    assert rates[1] in (pytest.approx(rates[0]), pytest.approx(rates[0] / 10))
    return rates[1] < rates[0]


SCHEDULED = {keras_adam.Adam, keras_adam.AdaMax, keras.optimizers.SGD}
SCHEDULED |= {keras.optimizers.RMSprop}
BY_THEMSELVES = {keras.optimizers.Adagrad, keras.optimizers.Adadelta}


def check_optimizers(calls, scheduled):
    optimizers = [optimizer for _, optimizer, *_ in calls]
    assert {*map(type, optimizers)} == SCHEDULED | BY_THEMSELVES
    for optimizer in optimizers:
        assert lowers(optimizer) == (scheduled and type(optimizer) in SCHEDULED)
        if isinstance(optimizer, keras.optimizers.SGD):
            assert optimizer.momentum == 0.9 and optimizer.nesterov
        if isinstance(optimizer, keras.optimizers.Adagrad):
            assert optimizer.initial_accumulator_value == 0


def test_figure_1_left(fits):
    calls = fits(mnist_logistic, "--grid=1")
    check_optimizers(calls, True)
    for model, _, loss, x, _, epochs in calls:
        assert layers(model) == [("Dense", 10, "linear")] and l2s(model) == [1e-4]
        assert isinstance(loss, keras.losses.SparseCategoricalCrossentropy)
        assert x.shape == (50, 784) and 0 <= x.min() and 0.5 < x.max() <= 1
        assert epochs == 45


@pytest.mark.parametrize("dropout", [0.5, 0.0])
def test_figure_1_right(fits, monkeypatch, dropout):
    texts = np.array(["a film a film", "the film the film", "a the"], object)
    monkeypatch.setattr(data, "load", lambda *_: ((texts, np.array([0, 1, 1])),))
    args = "--vocabulary=3", *([f"--dropout={dropout}"] if dropout != 0.5 else ())
    calls = fits(imdb_bow, "--grid=1", *args)
    check_optimizers(calls, True)
    forms = [calls[i : i + 6] for i in (0, 6, 12)]  # dense, words, counts
    # Of film, a, the, or of film, the, a.
    assert sorted(map(tuple, forms[2][0][3])) == [(0, 1, 1), (2, 0, 2), (2, 2, 0)]
    for dense, words, many in zip(*forms):
        np.testing.assert_array_equal(dense[3], many[3] > 0)
        assert words[0].layers[1].embeddings.shape == (4, 1)
        for model, _, loss, _, y, epochs in (dense, words, many):
            rates = [x.rate for x in model.layers if hasattr(x, "rate")]
            assert rates == [dropout] and epochs == 160
            assert y.shape == (3, 1) and loss.get_config()["from_logits"]
    assert imdb_bow.FLAGS["vocabulary"].default == 10_000


def test_figure_2(fits):
    calls = fits(mnist_mlp, "--grid=1", "--nosfo")
    check_optimizers(calls, False)
    for i, (model, *_, x, _, epochs) in enumerate(calls):
        hidden = [("Dense", 1000, "relu"), ("Dropout", 0.5 if i < 6 else 0)] * 2
        assert layers(model) == [*hidden, ("Dense", 10, "linear")]
        assert l2s(model) == [1e-4] * 3
        assert x.shape == (50, 784) and epochs == 20


def test_sfo_sees_the_loss_that_others_do(monkeypatch):
    """With L2; of one part, which is all of the data, before the first step."""
    set_flags(monkeypatch, mnist_mlp)
    rng = np.random.default_rng(0)
    x, y = rng.random((20, 784), np.float32), rng.integers(0, 10, 20)
    model = mnist_mlp.make_model(0.0, 8, l2=0.1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(loss=loss)
    before = model.evaluate(x, y, verbose=0)
    assert sum(map(float, model.losses)) > 0.1
    (row,) = mnist_mlp.train_sfo(model, loss, x, y, 1, 1)
    assert row["loss"] == pytest.approx(before, 1e-5)


def test_figure_3(fits):
    calls = fits(cifar10_cnn)
    with tfds.testing.mock_data(num_examples=50):
        images, _ = data.images("cifar10")
    white = data.whiten(images)
    pool = "MaxPooling2D", (3, 3), (2, 2)
    for i, (model, *_, x, _, epochs) in enumerate(calls):
        expected = [
            layer
            for n in (64, 64, 128)
            for layer in (("Conv2D", n, (5, 5), (1, 1)), pool)
        ]
        expected.append(("Dense", 1000, "relu"))
        if i >= 4:
            expected = [("Dropout", 0.2), *expected, ("Dropout", 0.5)]
        assert layers(model) == [*expected, ("Dense", 10, "linear")]
        np.testing.assert_array_equal(x.reshape(50, -1), white)
        assert epochs == 3
    kinds = [type(optimizer) for _, optimizer, *_ in calls]
    adam, adamax = keras_adam.Adam, keras_adam.AdaMax
    assert kinds == [adam, adamax, keras.optimizers.SGD, keras.optimizers.Adagrad] * 2


def test_figure_4(fits):
    calls = fits(mnist_vae)
    trained = [
        (o.beta_1, o.beta_2, o.bias_correction, round(np.log10(float(o.learning_rate))))
        for _, o, *_ in calls
    ]
    assert trained == [
        *itertools.product((0, 0.9), (0.99, 0.999, 0.9999), (True, False), range(-5, 0))
    ]
    for model, _, loss, x, y, _ in calls:
        encoder, decoder = [("Dense", 500, "softplus")], [("Dense", 784, "linear")]
        latent = [("Dense", 50, "linear")] * 2
        assert layers(model) == [*encoder, *latent, *encoder, *decoder]
        assert x is y and loss is mnist_vae.negative_log_likelihood


def test_loss_of_figure_4():
    """The bound of section 6.4, negative: at the mean, and of the divergence."""
    rng = np.random.default_rng(0)
    x, logits = rng.random((3, 8)), rng.standard_normal((3, 8))
    p = 1 / (1 + np.exp(-logits))
    expected = -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=1)
    np.testing.assert_allclose(
        mnist_vae.negative_log_likelihood(x, logits), expected, rtol=1e-5
    )
    mean, log_variance = rng.standard_normal((2, 5000, 4)).astype(np.float32)
    sample = mnist_vae.Sample()
    z = np.array(sample(mean, log_variance))
    noise = (z - mean) / np.exp(log_variance / 2)
    assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
    of_each = 0.5 * (np.exp(log_variance) + mean**2 - 1 - log_variance)
    np.testing.assert_allclose(
        float(sample.losses[0]), of_each.sum(axis=1).mean(), rtol=1e-5
    )


class AdaGrad:
    """Its authors', for the oracle's training."""

    def init(self, theta):
        return {"sum": np.zeros(theta.shape)}

    def step(self, s, g, alpha, t):
        s["sum"] = s["sum"] + g**2
        return alpha * g / (np.sqrt(s["sum"]) + 1e-8)


@pytest.mark.parametrize(
    "problem, name",
    [(p, n) for p in ("dense", "sparse") for n in ("Adam", "AdaMax")]
    + [("dense", "AdaGrad")],
)
def test_regret(monkeypatch, problem, name):
    """Of the oracle in float64, with the schedules of theorem 4.1."""
    args = "--steps=300", "--decay_rate=0.99", "--alpha=0.5", f"--optimizers={name}"
    set_flags(monkeypatch, regret, *args)
    at = np.array([10, 100, 300])
    ((_, found),) = regret.regrets(problem, at)
    _, x = regret.make_inputs(problem)
    rng = np.random.default_rng(1)
    y = x @ rng.standard_normal(x.shape[1])
    y += 0.5 * rng.standard_normal(300)
    if name == "AdaGrad":
        rule, rate = AdaGrad(), 0.5
    else:
        rule = getattr(reference, name)(lambda step: 0.9 * 0.99**step)
        rate = lambda step: 0.5 / np.sqrt(step + 1)  # noqa: E731
    training = reference.Training(
        rule, [np.zeros(x.shape[1])], ["float32"], lazy=False, learning_rate=rate
    )
    paid = []
    for row, target in zip(x, y):
        error = row @ training.thetas[0] - target
        paid.append(error**2)
        training.apply([2 * error * row])
    for t, value in zip(at, found):
        best = np.linalg.pinv(x[:t]) @ y[:t]
        expected = sum(paid[:t]) - np.sum((x[:t] @ best - y[:t]) ** 2)
        assert value == pytest.approx(expected, 1e-3)
