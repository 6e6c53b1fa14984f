"""The page's words, all in ``texts.json``: a translation is one file."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

FILE = Path(__file__).with_name("texts.json")


@cache
def texts() -> dict[str, str]:
    """All of them by name; ``{what}`` stands for what is filled in."""
    found: dict[str, str] = json.loads(FILE.read_text(encoding="utf-8"))
    return found


def say(name: str, **what: object) -> str:
    """A sentence."""
    return texts()[name].format(**what)
