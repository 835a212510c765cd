"""Imports go one way, without circles, and nothing is too long to read at once. Lazy imports count like all others."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "echo_hf"

# From the bottom up. A module imports from its own layer and from those below it.
LAYERS = (
    ("registration", "*_echo"),
    ("checkpoint", "conversion", "metrics", "speech_errors"),
    ("data", "inference", "subtitles"),
    ("analysis",),
    ("training", "demo"),
    ("cli",),
)
LONGEST_FUNCTION, LONGEST_FILE = 80, 600  # lines
LONGER_FILES = {"echo_hf.modeling_echo": 1400}  # all that a saved model needs to be read as one model
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if "assets" not in path.parts
}


def imports(name: str) -> set[str]:
    """The modules of the package that a module imports, at its top or within a function. What only type checkers read
    is left out."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    pending = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from package import name`: a module of it, or something that the package itself defines.
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {module for module in found if module in MODULES and module != name}


def noun(name: str) -> str:
    """The module or the folder right below the package."""
    return name.split(".")[1] if "." in name else ""


def layer(name: str) -> int:
    for index, nouns in enumerate(LAYERS):
        if noun(name) in nouns or (noun(name).endswith("_echo") and "*_echo" in nouns) or not noun(name):
            return index
    raise AssertionError(f"{name} has no layer: add it to LAYERS.")


def assert_no_circle(graph: dict[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(f"a circle: {' -> '.join(error.args[1])}") from None


def test_there_is_no_circle():
    graph = {name: imports(name) for name in MODULES}
    assert sum(map(len, graph.values())) > 50, "imports are found"
    assert_no_circle(graph)
    nouns: dict[str, set[str]] = {}
    for name, targets in graph.items():
        nouns.setdefault(noun(name), set()).update(map(noun, targets))
    assert_no_circle({name: targets - {name} for name, targets in nouns.items()})


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_upwards(name):
    upwards = [target for target in imports(name) if layer(target) > layer(name)]
    assert not upwards, f"{name} imports {', '.join(upwards)}"


def test_nothing_imports_scripts():
    scripts = {path.stem for folder in ("benchmarks", "study", "recipes") for path in ROOT.glob(f"{folder}/*.py")}
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not scripts.intersection(names), name


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_too_long_to_read_at_once(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGER_FILES.get(name, LONGEST_FILE)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in nodes}
    assert not {name: length for name, length in lengths.items() if length > LONGEST_FUNCTION}


def test_circles_and_lazy_imports_are_seen(tmp_path, monkeypatch):
    (tmp_path / "a.py").write_text("def f():\n    from .b import g\n")
    (tmp_path / "b.py").write_text(
        "from typing import TYPE_CHECKING\nfrom . import a\nif TYPE_CHECKING:\n    from . import c\n"
    )
    (tmp_path / "c.py").write_text("")
    modules = {f"p.{name}": tmp_path / f"{name}.py" for name in "abc"}
    monkeypatch.setitem(globals(), "MODULES", modules)
    assert imports("p.a") == {"p.b"} and imports("p.b") == {"p.a"}
    with pytest.raises(AssertionError, match="a circle"):
        assert_no_circle({name: imports(name) for name in modules})
