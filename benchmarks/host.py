"""Where a program makes the host wait for the device, or the device for the host."""

from __future__ import annotations

import os
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
aten = torch.ops.aten
READS = {
    aten._local_scalar_dense.default,  # item(), tolist(), bool(), float()
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,  # an index of booleans, too
}


class Reads(TorchDispatchMode):
    """Notes operations whose result the host has to see, on whatever device; copies between devices, too."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation."""
        result = func(*args, **(kwargs or {}))
        devices = {leaf.device.type for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor)}
        if func in READS or len(devices) > 1:
            self.found[f"{place()}: {func}"] += 1
        return result


def waits(run: Callable[[], object], device: str) -> Counter[str]:
    """How often the host waits while it runs, by place; on a CPU, how often it would have to on a GPU.

    CUDA tells by itself. On a CPU only reads of results show; a copy from host to device does not.
    """
    if device != "cuda":
        with Reads() as reads:
            run()
        return reads.found
    found: Counter[str] = Counter()

    def note(message: Any, *args: Any, **kwargs: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found[f"{place()}: {message}".splitlines()[0]] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found


def place() -> str:
    """The innermost line of the engine, or of a benchmark, that is being run."""
    codes = [(frame.f_code, line) for frame, line in traceback.walk_stack(None)]
    for folder in ("antidreambooth", "benchmarks"):
        for code, line in codes:
            if code.co_filename.startswith(f"{ROOT / folder}{os.sep}") and code.co_filename != __file__:
                return f"{Path(code.co_filename).relative_to(ROOT)}:{line} ({code.co_name})"
    return "elsewhere"
