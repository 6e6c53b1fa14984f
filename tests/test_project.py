"""The project's own rules: style, types, commands, one direction of imports."""

import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_the_two_commands_and_fits():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -e . && python cli.py fit -c configs/aspl.yaml" in lines
    assert "pip install -e '.[test]' && pytest" in lines
    assert len(lines) <= 150


def test_shell_packages_do_not_import_one_another():
    shell = ("lightning_modules", "datamodules", "callbacks")
    for package in shell:
        others = "|".join(name for name in shell if name != package)
        for file in (ROOT / package).glob("*.py"):
            assert not re.search(rf"^\s*(from|import) ({others})\b", file.read_text(), re.M), file


def test_the_engine_neither_prints_nor_knows_lightning():
    for file in (ROOT / "antidreambooth").rglob("*.py"):
        text = file.read_text()
        assert not re.search(r"^\s*(from|import) lightning\b", text, re.M), file
        assert not re.search(r"^\s*print\(", text, re.M), file
