"""examples/cloak.ipynb: it runs, and what is stored in it is small and of this very source."""

import os
import re

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import ROOT

PATH = ROOT / "examples" / "cloak.ipynb"
QUICK = 'ROUNDS, STEPS, PICTURES, OUT = 1, 1, 1, "{out}"'


@pytest.fixture
def notebook():
    return nbformat.read(PATH, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """What a cell shows besides text that was printed."""
    return {kind for output in cell.outputs for kind in output.get("data", {})}


def test_it_is_stored_as_it_was_run_and_small(notebook):
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    assert not any(output.output_type == "error" for cell in code(notebook) for output in cell.outputs)
    assert PATH.stat().st_size < 1_500_000
    assert sum("image/jpeg" in kinds(cell) for cell in code(notebook)) == 3
    assert not re.search(r"(/home|/root|/work|/tmp|/Users)/", PATH.read_text(encoding="utf-8"))


def test_its_words_say_what_its_table_says(notebook):
    (table,) = [o["data"]["text/markdown"] for o in code(notebook)[-1].outputs]
    shares = dict(re.findall(r"^\| (\w+) \| (\d+)% \|", table, re.MULTILINE))
    words = " ".join(notebook.cells[-1].source.split())
    assert f"{shares['originals']} % of the pictures of the attacker with the originals" in words
    assert f"{shares['noise']} % of those from noisy photos" in words
    assert f"{shares['cloaked']} % of those from cloaked photos" in words


@pytest.mark.slow
def test_it_runs(notebook, tmp_path):
    cells = code(notebook)
    stored = [kinds(cell) for cell in cells]
    assert cells[0].source.startswith("ROUNDS = 50")
    cells[0].source = QUICK.format(out=tmp_path / "out")
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(PATH.parent)}})
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert [kinds(cell) for cell in cells] == stored
    assert "nan" not in cells[-1].outputs[0]["data"]["text/markdown"]
    assert len(list((tmp_path / "out" / "cloaked").glob("*.png"))) == 3
