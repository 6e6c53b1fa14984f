"""docs/extending.md, done: its files are written, its commands are run, and what they print is compared."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cli import main
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (An? .+?)\n(.+?)(?=^## |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder like a checkout, in which a class of one's own is found as `python cli.py` finds it."""
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return tmp_path


def written(section: str) -> list[Path]:
    """The files that a section shows, each named by its first line."""
    files = []
    for kind, block in FENCE.findall(section):
        if kind in ("python", "yaml"):
            files.append(Path(block.split("\n", 1)[0].removeprefix("# ")))
            files[-1].write_text(block, encoding="utf-8")
    return files


def run(command: str, more: list[str]) -> str:
    """What a command of the page prints; a fit gets flags for the small model behind its own."""
    words = shlex.split(command)
    if words[:2] == ["python", "cli.py"]:
        main(words[2:] + more)
        return ""
    assert words[0] == "grep"
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def test_all_of_the_page_is_tried():
    assert list(SECTIONS) == ["An objective", "A step rule", "A transform"]
    assert sum(len(FENCE.findall(section)) for section in SECTIONS.values()) == len(FENCE.findall(TEXT))


@pytest.mark.parametrize("title", SECTIONS)
def test_what_the_page_shows_works(place, small_model, title):
    section = SECTIONS[title]
    own = [str(path) for path in written(section) if path.suffix == ".py"]
    small = [
        f"--model.backbone={small_model}",
        "--model.surrogate.learning_rate=1e-3",
        "--model.surrogate.prior.images=4",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        "--trainer.max_epochs=2",
    ]
    printed = ""
    for kind, block in FENCE.findall(section):
        if kind == "bash":
            printed = "".join(run(line, small) for line in block.splitlines())
        if kind == "text":
            assert printed == block
            printed = ""
    assert not printed, "the page says what its last command prints"
    (result,) = Path("outputs").iterdir()
    record = json.loads((result / "manifest.json").read_text())
    assert record["complete"] is True
    assert all(0 < photo["largest_difference"] <= 8 for photo in record["photos"])
    main(["fit", "-c", "configs/aspl.yaml", "--trainer.default_root_dir=outputs/plain", *small])
    names = [photo["cloaked"] for photo in record["photos"]]
    assert all((result / name).read_bytes() != Path("outputs", "plain", name).read_bytes() for name in names)
    style = [sys.executable, "-m", "ruff", "check", f"--config={ROOT / 'pyproject.toml'}", *own]
    checked = subprocess.run(style, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
