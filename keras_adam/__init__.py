"""Adam and AdaMax for Keras 3, made for embedding-heavy models."""

import importlib
from typing import TYPE_CHECKING, Any

from keras_adam import backend, schedules
from keras_adam.adam import Adam
from keras_adam.adamax import AdaMax
from keras_adam.embedding import Embedding

__all__ = ["AdaMax", "Adam", "Embedding", "schedules"]
__version__ = "0.1.0"

if backend.tf is not None:
    from keras_adam import averaging, diagnostics

    __all__ += ["averaging", "diagnostics"]
elif not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in ("averaging", "diagnostics"):
            importlib.import_module(f"keras_adam.{name}")  # tells what it needs
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
