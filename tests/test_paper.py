"""The paper's experiments on mock data, and what they share."""

import csv
import math
import time

import cifar10_cnn
import data
import devices
import experiment
import imdb_bow
import keras
import mnist_logistic
import mnist_mlp
import mnist_vae
import numpy as np
import pytest
import regret
import tensorflow_datasets as tfds
from absl import flags

SMALL = ("--limit=40", "--batch_size=16", "--epochs=2")
TWO = ("--optimizers=Adam,AdaGrad", "--grid=1,2", "--tune_epochs=1")

# module: (flags, curves in the table)
EXAMPLES = {
    mnist_logistic: ((*SMALL, *TWO), 6),
    imdb_bow: ((*SMALL, *TWO, "--vocabulary=50"), 18),
    mnist_mlp: ((*SMALL, *TWO, "--width=8", "--sfo_batches=10"), 13),
    cifar10_cnn: (
        (*SMALL, *TWO, *("--filters=4",) * 3),
        12,
    ),
    mnist_vae: (
        (*SMALL, "--beta_1=0.9", "--log10_rate=-3", "--hidden=8", "--latent=2"),
        6,
    ),
}


def set_flags(monkeypatch, module, *args):
    values = flags.FlagValues()
    module.define_flags(values)
    values([module.__name__, *args])
    for user in (module, devices, experiment):
        monkeypatch.setattr(user, "FLAGS", values)
    return values


def call(monkeypatch, module, *args):
    set_flags(monkeypatch, module, *args)
    module.main([])


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def in_a_minute():
    """Of all cores together, so that it does not matter what else runs."""
    start = time.process_time()
    yield
    assert time.process_time() - start < 60


@pytest.mark.usefixtures("in_a_minute")
@pytest.mark.parametrize("module", EXAMPLES, ids=lambda m: m.__name__)
def test_on_mock_data(monkeypatch, tmp_path, capsys, module):
    args, curves = EXAMPLES[module]
    args = *args, f"--output={tmp_path}"
    with tfds.testing.mock_data(num_examples=50):
        call(monkeypatch, module, *args)
        table = tmp_path / f"{module.__name__}.csv"
        rows = read(table)
        assert len(capsys.readouterr().out.splitlines()) == curves
        for row in rows:
            assert math.isfinite(float(row["loss"])) and float(row["seconds"]) > 0
        assert {row["epochs"] for row in rows} <= {"1", "2"}
        assert table.with_suffix(".png").stat().st_size > 1000
        # What is there is not trained again.
        call(monkeypatch, module, *args)
    assert capsys.readouterr().out == ""
    assert read(table) == rows


@pytest.mark.usefixtures("in_a_minute")
def test_diagnostics_of_cifar10(monkeypatch, tmp_path):
    args = *SMALL, *("--filters=4",) * 3, "--settings=no dropout", "--diagnostics"
    with tfds.testing.mock_data(num_examples=50):
        call(monkeypatch, cifar10_cnn, *args, f"--output={tmp_path}")
    rows = read(tmp_path / "cifar10_cnn_steps_no_dropout.csv")
    assert [row["step"] for row in rows[::10]] == list("123456")
    for row in rows:
        if row["variable"].endswith("kernel"):
            assert 0 < float(row["effective_step_mean"]) <= 1.001
    assert (tmp_path / "cifar10_cnn_steps.png").stat().st_size > 1000


@pytest.mark.usefixtures("in_a_minute")
def test_regret(monkeypatch, tmp_path):
    call(monkeypatch, regret, "--steps=300", f"--output={tmp_path}")
    rows = read(tmp_path / "regret.csv")
    assert {(r["problem"], r["method"]) for r in rows} == {
        (p, m) for p in ("dense", "sparse") for m in ("Adam", "AdaMax")
    }
    assert all(float(r["regret"]) > 0 for r in rows)
    assert (tmp_path / "regret.png").stat().st_size > 1000


def test_slope():
    at = np.array([10, 100, 1000, 10_000])
    assert abs(regret.slope(at, 3 * at**0.5) - 0.5) < 1e-12


def test_fewer_examples_than_parts_for_sfo_and_other_parts(monkeypatch, tmp_path):
    """As many parts as there are examples; another number is another curve."""
    args = *SMALL, *TWO, "--width=8", "--settings=deterministic", f"--output={tmp_path}"
    with tfds.testing.mock_data(num_examples=50):
        for parts in ("100", "15", "14"):
            call(monkeypatch, mnist_mlp, *args, f"--sfo_batches={parts}")
    methods = {row["method"] for row in read(tmp_path / "mnist_mlp.csv")}
    assert methods >= {"SFO, 40 parts", "SFO, 15 parts", "SFO, 14 parts"}


def test_betas_are_told_apart(monkeypatch, tmp_path):
    args = *SMALL, "--hidden=8", "--latent=2", "--beta_1=0.9", "--log10_rate=-3"
    betas = "--beta_2=0.9999999", "--beta_2=0.9999998"
    with tfds.testing.mock_data(num_examples=50):
        call(monkeypatch, mnist_vae, *args, *betas, f"--output={tmp_path}")
    assert len({row["setting"] for row in read(tmp_path / "mnist_vae.csv")}) == 2


def test_rate_is_tuned_and_not_retrained(monkeypatch, tmp_path):
    """The rate of the grid with the least loss starts anew with all epochs."""
    values = flags.FlagValues()
    experiment.define_flags(values, epochs=3, tune_epochs=1)
    values(["", "--optimizers=SGDNesterov", "--grid=0.1,10,1000"])
    monkeypatch.setattr(experiment, "FLAGS", values)
    calls = []

    def train(setting, optimizer, epochs):
        rate = float(optimizer.learning_rate)
        calls.append((rate, epochs))
        loss = math.nan if rate > 1 else abs(rate - 0.1)
        return [{"loss": loss, "seconds": 1.0}] * epochs

    table = experiment.Table(tmp_path / "t.csv")
    best = experiment.compare(table, ["a"], train, size=5)
    rates = np.float32([0.001, 0.1, 10, 0.1])
    np.testing.assert_allclose([rate for rate, _ in calls], rates, rtol=1e-6)
    assert [epochs for _, epochs in calls] == [1, 1, 1, 3]
    assert len(best["a"]["SGDNesterov"]) == 3
    again = experiment.Table(tmp_path / "t.csv")
    assert again.curves.keys() == table.curves.keys()
    assert math.isnan(
        next(c for k, c in again.curves.items() if k.learning_rate == 10)[0]["loss"]
    )


def test_a_table_has_curves_of_several_models(monkeypatch, tmp_path):
    """Those of one are not taken for those of another."""

    def table(*args):
        values = flags.FlagValues()
        mnist_mlp.define_flags(values)
        values(["", f"--output={tmp_path}", *args])
        monkeypatch.setattr(experiment, "FLAGS", values)
        return experiment.open_table("t", "width")

    curve = experiment.Curve("deterministic", "Adam", 0.1, 1, 16, 40, 0)
    for loss, *args in ((1.0,), (2.0, "--width=8"), (3.0, "--width=9")):
        rows = table(*args).get(curve, lambda loss=loss: [{"loss": loss, "seconds": 1}])
        assert rows[0]["loss"] == loss
        (found,) = table(*args).curves.items()
        assert found[0] == curve and found[1][0]["loss"] == loss
    settings = [row["setting"] for row in read(tmp_path / "t.csv")]
    assert settings == ["deterministic" + x for x in ("", " | width=8", " | width=9")]


@pytest.mark.parametrize("flag", ["--optimizers=Adamm", "--grid=1,-1", "--grid=x"])
def test_wrong_flags(flag):
    values = flags.FlagValues()
    experiment.define_flags(values, epochs=1, tune_epochs=1)
    with pytest.raises(flags.IllegalFlagValueError, match=flag[2:6]):
        values(["", flag])


def test_whiten():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 6)) @ rng.standard_normal((6, 6)) + 3
    white = data.whiten(x, epsilon=0)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(white.T @ white / 500, np.eye(6), atol=1e-10)
    few = x[:4]
    _, s, vt = np.linalg.svd(few - few.mean(axis=0), full_matrices=False)
    expected = (few - few.mean(axis=0)) @ (vt.T / np.sqrt(s**2 / 4 + 0.1)) @ vt
    np.testing.assert_allclose(data.whiten(few, epsilon=0.1), expected, atol=1e-10)
    # Of all such transforms ZCA's is the symmetric one.
    centered = x - x.mean(axis=0)
    transform = np.linalg.lstsq(centered, white, rcond=None)[0]
    np.testing.assert_allclose(transform, transform.T, atol=1e-10)


def test_bags_and_words():
    bags = data.bag_of_words(np.array([b"a film, a Film!", b"a long review"]), 2)
    # "long" and "review" are not among the two most frequent.
    np.testing.assert_array_equal(bags, [[2, 2], [1, 0]])
    np.testing.assert_array_equal(data.words_in(bags), [[1, 2], [1, 0]])
    np.testing.assert_array_equal(data.words_in(np.array([[0, 3], [0, 0]])), [[2], [0]])


def test_forms_of_a_bag_are_one_model():
    bags = np.random.default_rng(0).integers(0, 2, (8, 30), np.uint16)
    dense, words = imdb_bow.make_dense(30, 0.5), imdb_bow.make_words(30, 0.5)
    w = np.random.default_rng(1).standard_normal((30, 1)).astype(np.float32)
    dense.set_weights([w])
    words.set_weights([np.concatenate([[[9]], w])])  # a row for the padding
    np.testing.assert_allclose(
        dense.predict(bags, verbose=0),
        words.predict(data.words_in(bags), verbose=0),
        rtol=1e-5,
        atol=1e-6,
    )


def test_vae_loss_is_minus_the_bound():
    """Against section 6.4's model in NumPy: the divergence and the likelihood."""
    mean = np.float32([[0.5, -1.0], [0.0, 2.0]])
    log_variance = np.float32([[0.2, -0.3], [0.0, 1.0]])
    layer = mnist_vae.Sample()
    layer(mean, log_variance)
    variance = np.exp(log_variance.astype(np.float64))
    expected = 0.5 * np.sum(variance + mean**2 - 1 - log_variance, axis=1).mean()
    np.testing.assert_allclose(float(layer.losses[0]), expected, rtol=1e-6)
    logits = np.float32([[2.0, -1.0, 0.0]])
    x = np.float32([[1.0, 0.25, 0.5]])
    p = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(
        mnist_vae.negative_log_likelihood(x, logits),
        -np.sum(x * np.log(p) + (1 - x) * np.log(1 - p), axis=1),
        rtol=1e-6,
    )


def test_missing_data(monkeypatch):
    def load(**kwargs):
        raise AssertionError("no such folder")  # as where nothing is prepared

    monkeypatch.setattr(data.tfds, "load", load)
    monkeypatch.setattr(data, "HOMES", {"mnist": "http://127.0.0.1:9/"})
    with pytest.raises(SystemExit, match=r"Cannot load mnist(.|\n)*TFDS_DATA_DIR"):
        data.load("mnist")


def test_adagrad_is_the_paper_s():
    """Its sums start at 0: the first step is the learning rate's size."""
    optimizer = experiment.METHODS["AdaGrad"].make(0.5)
    v = keras.Variable([1.0, -2.0])
    optimizer.apply([np.float32([0.1, 10.0])], [v])
    np.testing.assert_allclose(v.numpy(), [0.5, -2.5], rtol=1e-5)
