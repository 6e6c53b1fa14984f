"""Anti-DreamBooth (arXiv:2303.15433): perturb photos so that what is fine-tuned on them comes out useless."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from antidreambooth.api import cloak

__all__ = ["cloak"]

# Nothing about a run leaves the machine. Read by the hub's client when it is imported, hence here.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    """Imports ``cloak``, and torch with it, when it is asked for."""
    if name != "cloak":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from antidreambooth.api import cloak

    return cloak
