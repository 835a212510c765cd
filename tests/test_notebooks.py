"""Every notebook answers its question from start to end, within two minutes, and is committed with its outputs."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from echo_hf.inference import BUNDLED_RECORDINGS

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))
MAX_STEPS = re.compile(r'("max_steps": )\d+')
LONGEST = 300  # seconds that a cell may take; beside other work a minute of training takes two


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_was_committed_with_its_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    # Run once, from start to end.
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any(cell.outputs for cell in code)
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    texts = [
        output.get("text") or json.dumps({k: v for k, v in output.get("data", {}).items() if k.startswith("text")})
        for cell in code
        for output in cell.outputs
    ]
    # Where it was run is nobody's business: no absolute path.
    assert not re.search(r"(?<![\w.:/])/(?!s>)\w+/|[A-Z]:\\\\", "\n".join(texts))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_asks_a_question_and_defines_nothing(path):
    notebook = nbformat.read(path, as_version=4)
    title, rest = notebook.cells[0].source.split("\n", 1)
    assert title.startswith("# ") and "?" in rest
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert not re.search(r"^\s*(def|class|while) ", source, re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    committed = [bool(cell.get("outputs")) for cell in notebook.cells]
    replaced = 0
    for cell in notebook.cells:  # what training comes to is in the committed outputs
        cell.source, count = MAX_STEPS.subn(r"\g<1>3", cell.source)
        replaced += count
    assert replaced == (path.stem == "fine_tune")
    NotebookClient(notebook, timeout=LONGEST, kernel_name="python3").execute()
    assert [bool(cell.get("outputs")) for cell in notebook.cells] == committed


def test_recordings_have_their_texts():
    """For training and evaluation the texts are in a manifest, for readers in a table."""
    manifest = [json.loads(line) for line in (BUNDLED_RECORDINGS / "metadata.jsonl").read_text("utf-8").splitlines()]
    table = (BUNDLED_RECORDINGS / "README.md").read_text("utf-8")
    assert {row["file_name"] for row in manifest} == {path.name for path in BUNDLED_RECORDINGS.glob("*.ogg")}
    for row in manifest:
        assert f"| `{row['file_name']}` | {row['text']} |" in table
