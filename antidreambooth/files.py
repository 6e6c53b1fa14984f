"""Files that are whole or not there."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that nobody ever sees half of it; its folder is created.

    Raises:
        OSError: It cannot be written; a file that was there stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, as a rename must not cross file systems; short, as `path` may use up the 255 bytes of a name.
    temporary = path.parent / f".{secrets.token_hex(8)}"
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:  # Ctrl-C too
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: Path, record: Any) -> None:
    """Write plain values, indented. See ``write_atomically``."""
    write_atomically(path, (json.dumps(record, indent=2) + "\n").encode())
