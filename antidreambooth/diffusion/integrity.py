"""Whether weights are whole: every one there, none left over, each of the right shape and a finite number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

SHOWN = 3  # names in a message


def faults(state: Mapping[str, Tensor], report: Mapping[str, Any], harmless: re.Pattern[str] | None = None) -> str:
    """What is wrong with weights that a library has loaded, in words; nothing where they are whole.

    Args:
        state: the weights, as loaded.
        report: the ``output_loading_info`` of diffusers or transformers, which fill in what is missing: with random
            numbers, or with tensors that have no values at all.
        harmless: names of weights that may be left over.
    """
    missing, shapes = sorted(report["missing_keys"]), sorted(report["mismatched_keys"])
    left = sorted(name for name in report["unexpected_keys"] if not (harmless and harmless.search(name)))
    sized = [f"{name} ({list(there)}, not {list(wanted)} as its config.json says)" for name, there, wanted in shapes]
    found = [
        (f"lacks {listed(missing)}" if missing else ""),
        (f"holds what its config.json has no place for: {listed(left)}" if left else ""),
        (f"holds weights of another shape: {listed(sized)}" if sized else ""),
    ]
    return " and ".join(filter(None, found)) or unusable(state)


def unusable(state: Mapping[str, Tensor]) -> str:
    """What is wrong with the values of weights, in words; nothing where they can be used."""
    if broken := not_finite(state.items()):
        return f"holds values that are no finite numbers: {listed(broken)}"
    if state and not any(values.any() for values in state.values()):  # a file whose contents never reached the disk
        return "holds nothing but zeros"
    return ""


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity.

    These make the sum one, which is thirty times as fast to find; finite numbers may do so too, when they are large.
    """
    return [name for name, values in tensors if not (values.sum().isfinite() or values.isfinite().all())]


def listed(names: list[str]) -> str:
    """The first few of many names."""
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
