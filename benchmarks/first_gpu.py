"""The first GPU at hand: does everything run there, and is it as we say?

    python benchmarks/first_gpu.py                         # under eight minutes on a large card; needs no network
    python benchmarks/first_gpu.py --parts memory,speed    # some of it
    python benchmarks/first_gpu.py --tiny                  # the script itself, on any machine; compiles nothing

Each part is a process of its own with a time limit: one that fails or hangs costs the others nothing. What it prints
goes to ``WORK/logs/PART.log``, tables to ``OUTPUT``. The last line says what disagrees with what this project claims.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from antidreambooth.files import to_json
from benchmarks.tables import markdown

ROOT = Path(__file__).parents[1]
MARK = "> "  # lines of a part that are shown; see ``gpu_parts.say``
LAST_LINES = 12  # of a part that failed
VARIANTS = "bf16,plain-bf16,channels-last,autotune,tf32,fp32,plain"


@dataclass(frozen=True)
class Part:
    """A process of its own.

    Args:
        function: of ``gpu_parts``.
        limit: seconds after which it is killed.
        alone: whether nothing else runs beside it, as its figures are times.
        arguments: of the function, beside the place.
    """

    function: str
    limit: float
    alone: bool = True
    arguments: tuple[str | int, ...] = ()


PARTS = {  # in this order; those that need not be alone run together, where there is a GPU
    "machine": Part("machine", 60),
    "resume": Part("resume", 150, alone=False),
    "victim-full": Part("victim", 120, alone=False, arguments=("dreambooth",)),
    "victim-lora": Part("victim", 120, alone=False, arguments=("dreambooth-lora",)),
    "victim-textual-inversion": Part("victim", 120, alone=False, arguments=("textual-inversion",)),
    "methods": Part("methods", 150, alone=False),
    "verdict": Part("verdict", 150, alone=False),
    "distance": Part("distance", 120, alone=False),
    "speed": Part("speed", 150, arguments=(VARIANTS, "speed", "", 3)),
    "memory": Part("memory_by_mode", 100),
    "real-size": Part("real_size", 140),
    "profile": Part("speed", 100, arguments=("bf16", "profile", "bf16", 1)),
    "compile": Part("speed", 170, arguments=("compile,bf16", "compile", "", 3)),
}


@dataclass(frozen=True)
class Outcome:
    """Of a part.

    Args:
        claims: what was claimed and found, as dictionaries of ``gpu_parts.Claim``.
        failure: why it has none; empty where it came to its end.
        seconds: that it took.
    """

    claims: list[dict[str, str | bool]]
    failure: str
    seconds: float


class Runner:
    """Runs parts and shows how far they are.

    Args:
        args: the command line.
        command: of a part's process, by the part's name.
    """

    def __init__(self, args: argparse.Namespace, command: Callable[[str], list[str]]) -> None:
        self.args, self.command, self.begun = args, command, time.monotonic()
        self.lock = threading.Lock()
        self.logs: Path = args.work / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)

    def show(self, name: str, text: str) -> None:
        """A line, with the time since the start."""
        with self.lock:
            print(f"[{time.monotonic() - self.begun:5.1f} s] {name}: {text}", flush=True)

    def run(self, name: str, limit: float, together: bool) -> Outcome:
        """One part, killed after ``limit`` seconds or when all of the time is used up."""
        started = time.monotonic()
        left = self.args.limit - (started - self.begun)
        limit = min(limit, left)
        if left < 5:
            return self._ended(name, f"not started: the {self.args.limit:.0f} s of --limit are used up", 0.0)
        result, log = self.args.work / f"{name}.json", self.logs / f"{name}.log"
        result.unlink(missing_ok=True)
        variables = dict(os.environ, XDG_CACHE_HOME=str(self.args.work / "cache"), PYTHONUNBUFFERED="1")
        if together:
            variables["OMP_NUM_THREADS"] = "2"  # they share the cores
        with subprocess.Popen(
            self.command(name),
            cwd=ROOT,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that what it starts is killed with it
        ) as process:
            clock = threading.Timer(limit, os.killpg, (process.pid, signal.SIGKILL))
            clock.start()
            with log.open("w", encoding="utf-8") as file:
                for line in process.stdout or ():
                    file.write(line)
                    if line.startswith(MARK):
                        self.show(name, line.removeprefix(MARK).rstrip())
            code = process.wait()
            clock.cancel()
        seconds = time.monotonic() - started
        if result.is_file() and not code:
            self.show(name, f"done in {seconds:.0f} s")
            return Outcome(json.loads(result.read_text(encoding="utf-8")), "", seconds)
        lines = [text for text in log.read_text(encoding="utf-8").splitlines() if text.strip() and "%|" not in text]
        for text in lines[-LAST_LINES:]:
            self.show(name, f"| {text[:300]}")
        killed = code == -signal.SIGKILL and seconds >= limit
        reason = f"killed after {limit:.0f} s" if killed else f"exit code {code}"
        return self._ended(name, f"{reason}: {lines[-1][:200] if lines else 'it said nothing'}", seconds)

    def _ended(self, name: str, failure: str, seconds: float) -> Outcome:
        self.show(name, failure)
        return Outcome([], failure, seconds)


def run_all(parts: dict[str, Part], runner: Runner, together: bool) -> dict[str, Outcome]:
    """All parts; those that may run beside one another do, where ``together``."""
    outcomes: dict[str, Outcome] = {}
    names = list(parts)
    while names:
        group = [names[0]]
        if together and not parts[names[0]].alone:
            group = [name for name in names if not parts[name].alone]
        names = [name for name in names if name not in group]
        with ThreadPoolExecutor(len(group)) as pool:
            found = pool.map(lambda name: runner.run(name, parts[name].limit, together and len(group) > 1), group)  # noqa: B023
            outcomes |= dict(zip(group, found, strict=True))
    return outcomes


def report(outcomes: dict[str, Outcome], folder: Path, machine: str) -> str:
    """Writes the table of claims; returns the last line."""
    rows, wrong = [], []
    for name, outcome in outcomes.items():
        if outcome.failure:
            rows.append([name, "runs to its end", outcome.failure, "no"])
            wrong.append(f"{name}: {outcome.failure}")
        for claim in outcome.claims:
            rows.append([name, str(claim["what"]), str(claim["found"]), "yes" if claim["holds"] else "no"])
            if not claim["holds"]:
                wrong.append(f"{name}: {claim['what']}: {claim['found']}")
    total = sum(outcome.seconds for outcome in outcomes.values())
    title = f"What this project claims, and what was found on {machine}; {len(outcomes)} parts, {total:.0f} s of them"
    table = markdown(["part", "claim", "found", "holds"], rows)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "claims.md").write_text(f"{title}\n\n{table}\n", encoding="utf-8")
    if wrong:
        return f"{len(wrong)} disagree with what we claim: {'; '.join(wrong)}"
    return "nothing disagrees with what we claim"


def run_part(name: str, args: argparse.Namespace) -> None:
    """One part, in this process; its claims are written last."""
    from benchmarks import gpu_parts  # imports torch, which the parent process does not need

    part, work = PARTS[name], args.work / name
    shutil.rmtree(work, ignore_errors=True)  # of an earlier run, with which this one would go on
    work.mkdir(parents=True)
    place = gpu_parts.Place(args.output, work, args.work / "models", args.tiny)
    claims = partial(getattr(gpu_parts, part.function), place)(*part.arguments)
    text = to_json([asdict(claim) for claim in claims])
    (args.work / f"{name}.json").write_text(text, encoding="utf-8")


def gpu_name() -> str:
    """Of the first GPU, as its driver says it; empty where there is none."""
    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        found = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.splitlines()[0] if found else ""


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="folder of the tables (results/gpu; WORK/tables with --tiny)")
    parser.add_argument("--work", type=Path, default=Path("outputs/first_gpu"), help="folder of the rest (%(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="of %(default)s (all)")
    parser.add_argument("--limit", type=float, default=470, help="seconds for all parts (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, to try the script")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # run this one here
    args = parser.parse_args(arguments)
    args.work = args.work.resolve()
    args.output = (args.output or (args.work / "tables" if args.tiny else ROOT / "results" / "gpu")).resolve()
    unknown = set(args.parts.split(",")) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs the parts, writes the table, prints what disagrees."""
    args = parse(arguments)
    if args.part:
        run_part(args.part, args)
        return
    gpu = gpu_name()
    if not (gpu or args.tiny):
        sys.exit("there is no GPU here (nvidia-smi finds none): use --tiny to try the script")
    same = [f"--output={args.output}", f"--work={args.work}", *(["--tiny"] if args.tiny else [])]
    runner = Runner(args, lambda name: [sys.executable, "-m", "benchmarks.first_gpu", *same, f"--part={name}"])
    outcomes = run_all(
        {name: PARTS[name] for name in args.parts.split(",")}, runner, together=bool(gpu) and not args.tiny
    )
    print(report(outcomes, args.output, gpu or "a CPU"), flush=True)


if __name__ == "__main__":
    main()
