"""What the documents name is there: tests, files, rooms, jobs."""

import ast
import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_architecture import BELOW, ENGINE

ROOMS = (
    "antidreambooth|benchmarks|callbacks|configs|datamodules|docs|examples|launch|lightning_modules|page|scripts|tests"
)
FOLDERS = (ROOT / name for name in ("docs", "configs", "examples", "results"))
DOCUMENTS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))]


def of_document(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=of_document)
def test_links_lead_somewhere(document):
    for target in re.findall(r"\]\((?!https?://)([^)#]+)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=of_document)
def test_files_that_are_named_are_there(document):
    for name in re.findall(rf"`((?:{ROOMS})/[\w./-]+)(?:::\w+)?`", document.read_text(encoding="utf-8")):
        placeholder = "NAME" in name or name.startswith("tests/test_images/")  # the latter are of another package
        assert placeholder or (ROOT / name).exists(), name


def test_every_deviation_names_tests_that_are_there():
    rows = re.findall(
        r"^\| .+ \| (.+) \|$", (ROOT / "docs" / "deviations.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    rows = [row for row in rows if row != "tested by"]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", row)
        assert named or "not tested" in row, row
        for file, name in named:
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


def test_the_map_has_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `(\w+)", text, re.MULTILINE)) | set(re.findall(r"`(\w+)\.py`", text))
    assert set(BELOW) | set(ENGINE) - {""} <= rows


def test_the_workflow_runs_what_the_readme_says_and_may_only_read():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yaml").read_text())
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
