"""What the routes read and give back: small JSON objects, pictures, archives, and refusals in a sentence."""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from page.guard import JSON_BYTES, sized
from page.texts import say


def existing(file: Path) -> Response:
    """A picture that may not be there yet.

    Raises:
        HTTPException: 404, it is not.
    """
    if not file.is_file():
        raise HTTPException(404, say("not_here"))
    return FileResponse(file, media_type="image/png")


def zipped(files: list[tuple[Path, str]], folder: Path) -> Path:
    """Writes files with their names into a new archive, as they are: pictures are packed already."""
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".zip", delete=False) as made:
        with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
            for file, name in files:
                archive.write(file, name)
        return Path(made.name)


async def body_of(request: Request) -> dict[str, Any]:
    """A small JSON object; nothing where the body is empty.

    Raises:
        HTTPException: 400, it is something else; 413, it is too large.
    """
    data = b"".join([piece async for piece in sized(request, JSON_BYTES)])
    try:
        found = json.loads(data or b"{}")
    except ValueError as error:
        raise HTTPException(400, say("not_understood")) from error
    if not isinstance(found, dict):
        raise HTTPException(400, say("not_understood"))
    return found


async def in_a_sentence(request: Request, error: Exception) -> Response:
    """Every refusal is a sentence for the page."""
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, status_code=error.status_code)
