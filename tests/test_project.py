"""The project's own rules: style, types, commands."""

import socket
import subprocess
import sys

import huggingface_hub
import pytest

from tests.conftest import ROOT


@pytest.mark.parametrize(
    "command",
    ["ruff check", "ruff format --check", pytest.param("mypy", marks=pytest.mark.slow)],  # a minute without its cache
)
def test_style_and_types(command):
    done = subprocess.run([sys.executable, "-m", *command.split()], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_readme_names_the_two_commands():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "pip install -e . && python cli.py fit -c configs/aspl.yaml" in lines
    assert "pip install -e '.[test]' && pytest" in lines


def test_no_test_has_a_network(network):
    assert huggingface_hub.constants.HF_HUB_OFFLINE
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("huggingface.co", 443), timeout=1)
    with socket.socket() as own, pytest.raises(OSError, match="no network"):
        own.connect(("192.0.2.1", 443))  # of nobody: RFC 5737
    assert network == ["huggingface.co", "192.0.2.1"]
    network.clear()
