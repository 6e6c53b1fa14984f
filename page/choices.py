"""What the user may choose before the start; nothing that comes from the browser is taken as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException

from page.guard import one_of
from page.jobs import Refused
from page.models import here
from page.texts import say

BUDGETS = {"weak": 4, "usual": 8, "strong": 16}
WHOM = ("everything", "faces", "largest", "pressed")
MOST_FACES = 1000  # of a photo


def settings_of(wanted: dict[str, Any], models: list[Path], rounds: int) -> dict[str, Any]:
    """What the user chose, each value out of a list.

    Args:
        wanted: what the browser sent.
        models: folders with base models.
        rounds: of a run.

    Raises:
        HTTPException: 400, a value is out of none of the lists.
        Refused: this machine cannot work with the base model.
    """
    known = {one["id"]: one for one in here(models)}
    model = known[one_of(wanted.get("model", "embedded"), known)]
    if not model["able"]:
        raise Refused(model["why"])
    strength = one_of(wanted.get("strength", "usual"), BUDGETS)
    whom = one_of(wanted.get("whom", "everything"), WHOM)
    kept = {key: model[key] for key in ("id", "source", "pipeline", "name", "card", "testable")}
    chosen = {"strength": strength, "budget": BUDGETS[strength], "whom": whom, "model": kept}
    return {**chosen, "rounds": rounds, "pressed": pressed_of(wanted.get("pressed", {}))}


def pressed_of(wanted: object) -> dict[str, list[int]]:
    """Which faces of which photos were pressed.

    Raises:
        HTTPException: 400, it is something else.
    """
    if not isinstance(wanted, dict):
        raise HTTPException(400, say("not_understood"))
    for photo, faces in wanted.items():
        if not (re.fullmatch(r"[0-9a-f]{16}", photo) and isinstance(faces, list)):
            raise HTTPException(400, say("not_understood"))
        if not all(type(face) is int and 0 <= face < MOST_FACES for face in faces):
            raise HTTPException(400, say("not_understood"))
    return wanted
