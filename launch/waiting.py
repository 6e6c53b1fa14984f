"""A machine that is busy with something else, and what helps. Loads no torch."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Meter:
    """Seconds so far.

    Args:
        now: by the clock.
        cores: that those cores which this process may use have worked, for whomever.
        own: that they have worked for this process.
    """

    now: float
    cores: float
    own: float

    @classmethod
    def read(cls) -> Meter:
        """As it stands."""
        times, own = psutil.cpu_times(percpu=True), psutil.Process().cpu_times()
        usable = [times[number] for number in usable_cores()]
        worked = sum(sum(core) - core.idle - getattr(core, "iowait", 0.0) for core in usable)
        return cls(time.monotonic(), worked, own.user + own.system)


def others(before: Meter, after: Meter) -> float:
    """How many cores other programs kept busy in between, on average."""
    return max(0.0, after.cores - before.cores - after.own + before.own) / (after.now - before.now)


def advice(busy: float, threads: int) -> str:
    """What to do about other programs; empty where there is nothing to do.

    A thread fewer changes how sums are rounded, and with it the bytes of a result, so it is for the user to choose.

    Args:
        busy: cores that other programs keep busy.
        threads: that torch computes with.
    """
    cores = len(usable_cores())
    idle = max(1, cores - round(busy))
    if threads <= idle:
        return ""
    return (
        f"other programs keep about {round(busy)} of {cores} cores busy, and a round waits for its slowest thread: "
        f"OMP_NUM_THREADS={idle} before the command makes it faster (results differ by rounding)"
    )


def usable_cores() -> list[int]:
    """Cores that this process may use; of Windows and macOS all that there are."""
    return [*(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))]
