"""What a second process costs a round, what processes tell one another, and how many people two workers protect.

    python benchmarks/scaling.py               # the embedded model and the example photos: half an hour of two cores
    python benchmarks/scaling.py --rounds 3 --repeats 1 --people 2

Runs the real commands, each process on a core of its own with one thread, in turn, so that what else the machine does
meets all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from tqdm import tqdm

from antidreambooth.photos.decoding import find_photos
from benchmarks.tables import write

ROOT = Path(__file__).parents[1]
PHOTOS = ROOT / "examples" / "photos"
STRATEGIES = {  # of two processes, whose messages are counted
    "DDP": {"class_path": "DDP"},
    "ZeRO-2": {"class_path": "tests.lightning_modules.ranks.DeepSpeedCPU", "init_args": {"stage": 2}},
    "ZeRO-3": {"class_path": "tests.lightning_modules.ranks.DeepSpeedCPU", "init_args": {"stage": 3}},
    "FSDP2": {"class_path": "FSDP2"},
}
KINDS = ("all_reduce", "all_gather", "broadcast", "barrier")  # gloo scatters what it has reduced everywhere


def command(words: list[str], cores: Sequence[int], folder: Path) -> float:
    """Seconds that a command of this project takes on these of our cores, with one thread for each process."""
    before = os.sched_getaffinity(0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    begun = time.perf_counter()
    os.sched_setaffinity(0, [sorted(before)[core] for core in cores])  # of this thread; inherited by what it starts
    try:
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(
                [sys.executable, str(ROOT / "cli.py"), *words],
                check=True,
                env=environment,
                cwd=ROOT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
    except subprocess.CalledProcessError:
        sys.exit(f"error: {' '.join(words)} failed:\n{(folder / 'log.txt').read_text()[-2000:]}")
    finally:
        os.sched_setaffinity(0, before)
    return time.perf_counter() - begun


def rounds(cores: Sequence[int], strategy: str, count: int) -> tuple[list[float], dict[str, dict[str, int]]]:
    """Seconds of each of so many rounds of ASPL with a process on each core, and the messages of one more."""
    processes = len(cores)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        several = [f"--trainer.strategy={json.dumps(STRATEGIES[strategy])}"] if processes > 1 else []
        words = ["fit", "-c=configs/aspl.yaml", "--trainer.accelerator=cpu", f"--trainer.devices={processes}", *several]
        words += [f"--trainer.max_epochs={count + 2}", f"--trainer.default_root_dir={folder / 'run'}"]
        words += ["--trainer.callbacks=benchmarks.watch.Watch", f"--trainer.callbacks.file={folder / 'seen.json'}"]
        command(words, cores, folder)
        seen = json.loads((folder / "seen.json").read_text(encoding="utf-8"))
        return seen["seconds"], seen["collectives"]


def protected(workers: int, people: int, count: int) -> float:
    """People per hour of a worker on one core, or of two on two, start and end included."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(people):
            (folder / "people" / f"{number}").mkdir(parents=True)
            for photo in find_photos(PHOTOS):
                (folder / "people" / f"{number}" / photo.name).symlink_to(photo)
        words = ["people", "-c=configs/people.yaml", f"--folder={folder / 'people'}", f"--output={folder / 'out'}"]
        words += [f"--launcher.workers={workers}", f"--protection=configs/aspl.yaml --trainer.max_epochs={count}"]
        return 3600 * people / command(words, range(workers), folder)


def spread(values: list[float], digits: int) -> str:
    """Median and range."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


def report_rounds(args: argparse.Namespace) -> str:
    """Seconds a round with one process and with two, in turn; writes the table and returns it."""
    seconds = defaultdict[str, list[float]](list)
    with ThreadPoolExecutor(2) as pool:
        for _ in tqdm(range(args.repeats), desc="rounds"):
            seconds["1"] += rounds([0], "DDP", args.rounds)[0]
            for one, _ in pool.map(lambda core: rounds([core], "DDP", args.rounds), (0, 1)):
                seconds["2 that do not know of one another"] += one
            seconds["2"] += rounds([0, 1], "DDP", args.rounds)[0]
    alone = median(seconds["1"])
    rows = [[name, spread(s, 2), f"{int(name[0]) * alone / median(s):.2f}"] for name, s in seconds.items()]
    header = ["processes", "s a round (min-max)", "work per second, against 1"]
    title = f"A round of ASPL under DDP, the same work for each process on a core of its own; {args.repeats} runs each."
    return write(args.output, "rounds", title, header, rows)


def report_messages(args: argparse.Namespace) -> str:
    """What one of two ranks hands in, by strategy; writes the table and returns it."""
    rows = []
    for name in tqdm(STRATEGIES, desc="messages"):
        seen = rounds([0, 1], name, 0)[1]
        cells = [seen.get(kind, {"calls": 0, "bytes": 0}) for kind in KINDS]
        total = sum(cell["bytes"] for cell in cells) / 1e6
        rows.append([name, *(f"{cell['calls']}: {cell['bytes'] / 1e6:.2f}" for cell in cells), f"{total:.1f}"])
    title = "Calls, and MB that one of two ranks hands in, in a round of ASPL on the embedded model, with gloo."
    return write(args.output, "messages", title, ["strategy", *KINDS, "MB"], rows)


def report_people(args: argparse.Namespace) -> str:
    """People per hour with one worker and with two, in turn; writes the table and returns it."""
    rates = defaultdict[int, list[float]](list)
    for _ in tqdm(range(args.repeats), desc="people"):
        for workers in (1, 2):
            rates[workers].append(protected(workers, args.people, args.rounds_each))
    rows = [[str(n), spread(r, 1), f"{median(r) / median(rates[1]):.2f}"] for n, r in rates.items()]
    title = (
        f"People per hour, {args.people} of them with {len(find_photos(PHOTOS))} photos and {args.rounds_each} rounds "
        f"each, a core for each worker; whole commands, {args.repeats} times."
    )
    return write(args.output, "people", title, ["workers", "people/h (min-max)", "against 1"], rows)


PARTS = {"rounds": report_rounds, "messages": report_messages, "people": report_people}


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, default=Path("outputs/scaling"), help="folder (outputs/scaling)")
    add("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)} (all)")
    add("--rounds", type=int, default=8, help="timed rounds of a run (8)")
    add("--repeats", type=int, default=3, help="runs of each kind (3)")
    add("--people", type=int, default=4, help="how many (4)")
    add("--rounds-each", type=int, default=10, help="rounds for a person (10)")
    args = parser.parse_args(arguments)
    if unknown := set(args.parts.split(",")) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    if len(os.sched_getaffinity(0)) < 2:
        parser.error("two processes need two cores")
    for name in args.parts.split(","):
        print(PARTS[name](args), flush=True)


if __name__ == "__main__":
    main()
