"""A round of ASPL on a busy machine: what waiting threads cost, and what helps.

    python benchmarks/busy.py                    # some minutes; only on a machine that does nothing else
    python benchmarks/busy.py --cores 4 --busy 0,1,3

Threads that wait for one another spin for a while before they sleep. Where another program needs a core, one of them
does not get on and the others spin for nothing. How long they spin is a setting of GNU's OpenMP, ``GOMP_SPINCOUNT``,
that counts only from before torch is loaded; each setting is therefore a process of its own.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median

from benchmarks.tables import write

ROOT = Path(__file__).parents[1]
SETTINGS: dict[str, dict[str, str]] = {  # environment of a process
    "spins as GNU's OpenMP does": {"GOMP_SPINCOUNT": ""},
    "sleeps at once": {"GOMP_SPINCOUNT": "0"},
    **{f"spins {count} times": {"GOMP_SPINCOUNT": str(count)} for count in (1000, 5000)},
    "a thread for each idle core": {"GOMP_SPINCOUNT": "", "OMP_NUM_THREADS": "idle"},
    "a thread for each idle core, spins 5000 times": {"GOMP_SPINCOUNT": "5000", "OMP_NUM_THREADS": "idle"},
}
SPINNER = "while True: pass"


@contextmanager
def other_programs(count: int, cores: set[int]) -> Iterator[None]:
    """Programs that keep as many of the cores busy."""
    programs = [
        subprocess.Popen([sys.executable, "-c", f"import os; os.sched_setaffinity(0, {cores})\n{SPINNER}"])
        for _ in range(count)
    ]
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.wait()


def measure(setting: dict[str, str], cores: set[int], busy: int, rounds: int) -> tuple[list[float], str]:
    """Seconds of each round, and a digest of the pixels."""
    changed = dict(setting)
    if "OMP_NUM_THREADS" in changed:
        changed["OMP_NUM_THREADS"] = str(max(1, len(cores) - busy))
    environment = {**os.environ, **changed}
    for name in [name for name, value in changed.items() if not value]:
        del environment[name]
    words = [sys.executable, "-m", "benchmarks.busy", f"--child={','.join(map(str, cores))}", f"--rounds={rounds}"]
    with other_programs(busy, cores):
        done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"a run failed:\n{done.stderr}")
    *seconds, digest = done.stdout.split()
    return [float(second) for second in seconds], digest


def child(cores: set[int], rounds: int) -> None:
    """Runs the rounds on these cores; prints what ``measure`` reads."""
    os.sched_setaffinity(0, cores)  # before torch counts them
    from antidreambooth import cloak

    marks: list[float] = []

    def timed(items: Iterable[int]) -> Iterator[int]:
        for item in items:
            marks.append(time.perf_counter())
            yield item
        marks.append(time.perf_counter())

    photos = sorted((ROOT / "examples" / "photos").iterdir())
    pictures = cloak(photos, rounds=rounds + 1, device="cpu", progress=timed)
    marks = marks[-(rounds + 1) :]  # class images, if any were drawn, and the first round are warm-up
    digest = hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()[:12]
    print(*(end - start for start, end in pairwise(marks)), digest)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2, help="to run on (%(default)s)")
    parser.add_argument("--busy", default="0,1", help="how many other programs there are (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="timed ones (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/busy"), help="folder of the table (%(default)s)")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # run here, on these cores
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measures all settings, and writes the table anew after each."""
    args = parse(arguments)
    if args.child:
        child({int(core) for core in args.child.split(",")}, args.rounds)
        return
    cores = set(sorted(os.sched_getaffinity(0))[-args.cores :])
    if len(cores) < args.cores:
        sys.exit(f"there are {len(cores)} cores here, not {args.cores}")
    measure({}, cores, 0, 1)  # draws the class images
    rows = []
    for busy in map(int, args.busy.split(",")):
        for name, setting in SETTINGS.items():
            seconds, digest = measure(setting, cores, busy, args.rounds)
            rows.append([name, str(busy), f"{median(seconds):.2f} ({min(seconds):.2f}-{max(seconds):.2f})", digest])
            title = f"Seconds of a round on {args.cores} cores, median and range of {args.rounds}"
            table = write(
                args.output, f"busy-{args.cores}-cores", title, ["setting", "other programs", "s", "pixels"], rows
            )
            print(rows[-1], flush=True)
    print(table)


if __name__ == "__main__":
    main()
