"""Adam and AdaMax for Keras 3, made for embedding-heavy models."""

from keras_adam import diagnostics, schedules
from keras_adam.adam import Adam
from keras_adam.adamax import AdaMax
from keras_adam.embedding import Embedding

__all__ = ["AdaMax", "Adam", "Embedding", "diagnostics", "schedules"]
__version__ = "0.1.0"
