"""Rules of the house."""

import ast
import inspect
import pathlib

import pytest

import keras_adam

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "keras_adam").glob("*.py"))
SOURCES = sorted(
    p for d in ("keras_adam", "examples", "tests") for p in (ROOT / d).rglob("*.py")
)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_private_imports(path):
    for module in imports(path):
        assert not module.startswith(("tensorflow.python", "keras.src")), module


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)
def test_few_files_know_keras_internals(path):
    """Only the ways of a gradient call what Keras's base optimizer keeps to itself."""
    internals = ("_backend_", "_clip_gradients", "_use_weight_decay", "_iterations")
    if path.name not in ("optimizer.py", "dense.py"):
        assert not [name for name in internals if name in path.read_text()]


def test_one_file_chooses_by_backend():
    """And what runs on JAX imports TensorFlow nowhere else."""
    common = (
        *("__init__", "adam", "adamax", "base", "checks", "dense", "embedding"),
        *("migration", "schedules", "takeover"),
    )
    for path in PACKAGE:
        if path.stem in common:
            assert "tensorflow" not in {m.split(".")[0] for m in imports(path)}
        chooses = "backend.backend()" in path.read_text()
        assert chooses == (path.stem in ("backend", "base"))  # base: to raise an error


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: p.name)
def test_rules_know_neither_keras_nor_variables(path):
    """update.py and rows.py are about tensors and tf.Variables alone."""
    if path.name in ("update.py", "rows.py"):
        assert "keras" not in {m.split(".")[0] for m in imports(path)}


def public(module):
    for name in module.__all__:
        x = getattr(module, name)
        yield from public(x) if inspect.ismodule(x) else [x]


@pytest.mark.parametrize("x", [*public(keras_adam)], ids=lambda x: x.__name__)
def test_public_names_have_docstrings(x):
    for part in ("Args:", "Raises:", "Source:"):
        assert part in x.__doc__
