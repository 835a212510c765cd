"""The examples in docstrings do what they show."""

import doctest
import importlib
import pkgutil

import pytest

import echo_hf

MODULES = [module.name for module in pkgutil.iter_modules(echo_hf.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"echo_hf.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
