"""A machine that is busy with something else, and how many threads to compute with there. Loads no torch."""

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


def threads_beside(busy: float, threads: int) -> int:
    """How many threads to compute with: one for each idle core, at least one, and never more than there were.

    Args:
        busy: cores that other programs keep busy.
        threads: that torch would compute with.
    """
    return min(threads, max(1, len(usable_cores()) - round(busy)))


def usable_cores() -> list[int]:
    """Cores that this process may use; of Windows and macOS all that there are."""
    return [*(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))]
