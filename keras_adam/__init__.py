"""Adam and AdaMax for Keras 3, made for embedding-heavy models."""

from keras_adam.adam import Adam
from keras_adam.adamax import AdaMax

__all__ = ["AdaMax", "Adam"]
__version__ = "0.1.0"
