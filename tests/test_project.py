"""The project's own rules: style, types, commands."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize("command", [["ruff", "check"], ["ruff", "format", "--check"], ["mypy"]], ids=" ".join)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -e . && python cli.py fit -c configs/aspl.yaml" in lines
    assert "pip install -e '.[test]' && pytest" in lines
