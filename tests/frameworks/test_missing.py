"""A framework that is not installed: what to install, and nothing else fails."""

import importlib
import sys

import pytest

import otmdr_jax


@pytest.mark.parametrize(
    ("name", "package", "message"),
    [
        ("nnx", "flax", r"otmdr_jax.nnx needs Flax. .*pip install '.\[models\]'"),
        ("equinox", "equinox", "otmdr_jax.equinox needs Equinox: pip install equinox"),
    ],
)
def test_what_is_missing_is_named(name, package, message, monkeypatch):
    monkeypatch.delitem(sys.modules, f"otmdr_jax.frameworks.{name}", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=message):
        getattr(otmdr_jax, name)
    monkeypatch.undo()
    module = importlib.import_module(f"otmdr_jax.frameworks.{name}")
    assert getattr(otmdr_jax, name) is module
