"""All that is public is described, and the examples in docstrings do what they show."""

import doctest
import importlib
import inspect
import pkgutil
import re

import pytest

import echo_hf

MODULES = [module.name.removeprefix("echo_hf.") for module in pkgutil.walk_packages(echo_hf.__path__, "echo_hf.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name):
    module = importlib.import_module(f"echo_hf.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0
    for block in re.findall(r"```python\n(.*?)```", inspect.getsource(module), re.DOTALL):
        assert block.lstrip().startswith(">>> "), "an example that is not run"


@pytest.mark.parametrize("name", ["", *(f".{name}" for name in MODULES)])
def test_public_names_are_described(name):
    module = importlib.import_module(f"echo_hf{name}")
    assert module.__doc__
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    public = {name for name in own if not name.startswith("_")} | set(getattr(module, "__all__", ()))
    for name in sorted(public):
        value = getattr(module, name)  # __all__ names nothing that is not there
        if inspect.isclass(value) or inspect.isfunction(value):
            # Python writes the signature where a dataclass or named tuple has no docstring, and inherits no docstring.
            assert value.__doc__ and not value.__doc__.startswith(f"{name}("), f"{module.__name__}.{name}"
