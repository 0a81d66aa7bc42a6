"""Adam and AdaMax for Keras 3, made for embedding-heavy models."""

from typing import Any

from keras_adam import backend, schedules
from keras_adam.adam import Adam
from keras_adam.adamax import AdaMax
from keras_adam.embedding import Embedding

__all__ = ["AdaMax", "Adam", "Embedding", "diagnostics", "schedules"]
__version__ = "0.1.0"

if backend.tf is not None:
    from keras_adam import diagnostics


def __getattr__(name: str) -> Any:
    if name in ("averaging", "diagnostics"):
        backend.needs_tensorflow(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
