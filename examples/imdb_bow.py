"""Figure 1, right: logistic regression on IMDB's words, with dropout or without.

    pip install ".[examples]"
    python examples/imdb_bow.py
    python examples/imdb_bow.py --inputs=dense --dropout=0 --grid=10,30,100,300,1000
    python examples/imdb_bow.py --inputs=words --optimizers=Adam --grid=10 --epochs=5

Section 6.1 of the paper: bags of the 10,000 most frequent words, half of the features
dropped at each step, batches of 128, alpha / sqrt(t) (AdaGrad and AdaDelta lower their
steps by themselves); no bias and no L2, of which it says nothing. The same model on
three forms of a bag: a dense vector of 0 and 1 times a matrix (`dense`); the rows of
its words in an embedding table, whose gradient is sparse (`words`); a dense vector of
how often each word is there (`counts`). The first two have the same gradients. Keras's
own optimizers square the gradients of a word that repeats in a batch one by one, and so
differ between the two; ours do not. Writes a table (CSV) and a picture of the training
loss to --output.
"""

from __future__ import annotations

import data
import devices
import experiment
import keras
import numpy as np
from absl import app, flags

import keras_adam
from keras_adam.schedules import InverseSqrtDecay

FLAGS = flags.FLAGS

INPUTS = ("dense", "words", "counts")


def define_flags(values: flags.FlagValues = FLAGS) -> None:
    grid = 0.3, 1, 3, 10, 30, 100, 300
    experiment.define_flags(values, epochs=160, tune_epochs=5, grid=grid)
    flags.DEFINE_multi_enum(
        "inputs", list(INPUTS), INPUTS, "Forms of the bags.", flag_values=values
    )
    flags.DEFINE_integer("vocabulary", 10_000, "Words known.", 1, flag_values=values)
    flags.DEFINE_float(
        "dropout", 0.5, "Share of the features dropped.", 0, 0.99, flag_values=values
    )


def make_dense(vocabulary: int, dropout: float) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input([vocabulary], dtype="uint16"),
            keras.layers.Rescaling(1.0),  # to floats
            keras.layers.Dropout(dropout),
            keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros"),
        ]
    )


def make_words(vocabulary: int, dropout: float) -> keras.Model:
    ids = keras.Input([None], dtype="int32")
    there = keras.ops.cast(keras.ops.not_equal(ids, 0)[..., None], "float32")
    table = keras_adam.Embedding(vocabulary + 1, 1, embeddings_initializer="zeros")
    kept = keras.layers.Dropout(dropout)(there)
    return keras.Model(ids, keras.ops.sum(table(ids) * kept, axis=1))


def main(_) -> None:
    devices.use()
    ((texts, y),) = data.load("imdb_reviews", FLAGS.limit, ["train"])
    bags = data.bag_of_words(texts, FLAGS.vocabulary)
    inputs = {"dense": (bags > 0).astype(np.uint16), "counts": bags}
    if "words" in FLAGS.inputs:
        inputs["words"] = data.words_in(bags)
    models = {"dense": make_dense, "counts": make_dense, "words": make_words}
    loss = keras.losses.BinaryCrossentropy(from_logits=True)

    def train(setting, optimizer, epochs):
        model, x = models[setting](FLAGS.vocabulary, FLAGS.dropout), inputs[setting]
        return experiment.fit(model, optimizer, loss, x, y[:, None], epochs)

    experiment.run(
        experiment.open_table("imdb_bow", "vocabulary", "dropout"),
        f"Bags of words of IMDB, dropout {FLAGS.dropout:g} (section 6.1)",
        FLAGS.inputs,
        train,
        yscale="log",
        size=len(y),
        schedule=InverseSqrtDecay,
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
