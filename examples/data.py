"""The data sets of the examples, through TensorFlow Datasets."""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import sys
from collections.abc import Sequence

import keras
import numpy as np
import requests
import tensorflow as tf
import tensorflow_datasets as tfds

# Inputs and labels.
Examples = tuple[np.ndarray, np.ndarray]

# Where each comes from, to see at once whether there is a network.
HOMES = {
    "imdb_reviews": "http://ai.stanford.edu/~amaas/data/sentiment/",
    "mnist": "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}


def load(
    name: str, limit: int | None = None, splits: Sequence[str] = ("train", "test")
) -> tuple[Examples, ...]:
    """The examples of each split, at most `limit` of it; None or 0: all."""
    what = {"name": name, "split": list(splits), "as_supervised": True}
    try:
        try:
            datasets = tfds.load(**what, download=False)
        except AssertionError:  # not there
            # Without a network the download tries again for minutes.
            requests.head(HOMES[name], timeout=10)
            datasets = tfds.load(**what)
    except (ImportError, OSError, tf.errors.OpError, tfds.download.DownloadError) as e:
        sys.exit(
            f"Cannot load {name}: {e}\n\n"
            'Install what the examples need with pip install ".[examples]"; then '
            f"run once with a network, which downloads {name} to "
            "~/tensorflow_datasets, or set TFDS_DATA_DIR to a folder in which "
            f"TensorFlow Datasets has prepared {name} before."
        )
    return tuple(_arrays(split.take(limit or -1)) for split in datasets)


def _arrays(dataset: tf.data.Dataset) -> Examples:
    inputs, labels = zip(*dataset.as_numpy_iterator())
    kind = object if isinstance(inputs[0], bytes) else None
    return np.array(inputs, kind), np.array(labels)


def images(name: str, limit: int | None = None) -> Examples:
    """The training images as rows of numbers from 0 to 1, and their labels."""
    ((x, y),) = load(name, limit, ["train"])
    return x.reshape(len(x), -1).astype(np.float32) / 255, y.astype(np.int32)


def whiten(x: np.ndarray, epsilon: float = 1e-2) -> np.ndarray:
    """Decorrelates the columns of `[n, d]`, nearest to the input (ZCA).

    Args:
        x: Rows of examples.
        epsilon: Added to the variances, so that directions in which there is
            nothing but noise are not blown up.
    """
    x = x - x.mean(axis=0)
    few = len(x) < x.shape[1]  # The same from the left then, of a smaller matrix.
    values, vectors = np.linalg.eigh((x @ x.T if few else x.T @ x) / len(x))
    transform = vectors / np.sqrt(np.maximum(values, 0) + epsilon) @ vectors.T
    return transform @ x if few else x @ transform


def bag_of_words(texts: np.ndarray, vocabulary: int) -> np.ndarray:
    """How often a text has each of the texts' most frequent words, the most frequent
    first, `[n, vocabulary]`, uint16. Other words do not count."""
    # It also has one id for padding and one for other words.
    layer = keras.layers.TextVectorization(max_tokens=vocabulary + 2)
    with keras.device("cpu"):  # the one that knows strings
        layer.adapt(texts, batch_size=1024)
    bags = np.zeros([len(texts), vocabulary], np.uint16)
    for start in range(0, len(texts), 1024):
        with keras.device("cpu"):
            ids = layer(texts[start : start + 1024]).numpy()
        part = np.zeros([len(ids), vocabulary + 2], np.uint16)
        np.add.at(part, (np.arange(len(ids))[:, None], ids), 1)
        bags[start : start + 1024] = part[:, 2:]
    return bags


def words_in(bags: np.ndarray) -> np.ndarray:
    """The ids of each text's words, that of column i is i + 1,
    `[n, most words in a text]`, int32, then 0."""
    counts = np.count_nonzero(bags, axis=1)
    ids = np.zeros([len(bags), counts.max()], np.int32)
    ids[np.arange(ids.shape[1]) < counts[:, None]] = np.nonzero(bags)[1] + 1
    return ids
