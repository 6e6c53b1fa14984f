"""Speed of a round of ASPL on a GPU: what each means brings, against the published loop in the same process.

    python benchmarks/gpu_speed.py                             # Stable Diffusion 1.5's size at 512 px, random weights
    python benchmarks/gpu_speed.py --variants plain-bf16,compile,cuda-graphs --profile compile
    python benchmarks/gpu_speed.py --tiny                      # the script itself, on any machine
    python benchmarks/gpu_speed.py --count                     # operations of the schedule by phase; needs no GPU

The first variants build on one another: each has what the one before it has, and one thing more. Those that have to be
asked for are bf16 with or without one thing (see ``variants.py``). They run in the order in which they are asked for;
the tables are written anew after each one, so that a stop or a failure loses only what runs at the time.
"""

from __future__ import annotations

import argparse
import gc
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from antidreambooth.attack.rounds import Outcome
from antidreambooth.diffusion.seeding import Turn
from benchmarks.aspl_speed import PARTS, Operations, Ours, Plain, count, multiply, schedule, totals
from benchmarks.host import waits
from benchmarks.tables import write
from benchmarks.variants import OPTIONAL, REFERENCES, VARIANTS, Variant, compile_networks, make_side, make_task


@dataclass(frozen=True)
class Result:
    """What was found out about a variant.

    Args:
        seconds: of each timed round.
        warm_up: seconds of the rounds before them, which compile where something is compiled.
        peak: bytes of the device in a timed round; 0 where it does not tell.
        reserved: bytes that the allocator holds for them, with what a recording keeps for good.
        losses: of the last round: clean, PGD, cloaked.
        waits: how often the host waits in a round, by place.
        graphs: compiled in all of this time.
    """

    seconds: list[float]
    warm_up: float
    peak: int
    reserved: int
    losses: list[float]
    waits: dict[str, int]
    graphs: int = 0


def try_out(variant: Variant, name: str, args: argparse.Namespace) -> Result:
    """Warm-up, then timed rounds; the host's waits and a profile in rounds of their own."""
    torch.compiler.reset()
    counters.clear()
    task = make_task(args, args.device, variant.checkpointing)
    side, cloaked = make_side(variant, task), task.photos
    if variant.compiled:
        compile_networks(task, variant.compiled)
    start = mark(args.device)
    for number in range(args.warm_up):
        cloaked = side.round(cloaked, Turn(number)).state
    end = mark(args.device)
    if args.device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    seconds, outcome = timed(side, cloaked, args)
    cuda = args.device == "cuda"
    peak, reserved = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    last = args.warm_up + args.rounds
    found = waits(lambda: side.round(outcome.state, Turn(last)), args.device)
    if name in args.profile:
        profile_round(lambda: side.round(outcome.state, Turn(last)), name, args)
    losses = [loss.item() for loss in outcome.losses]
    return Result(seconds, between(start, end), peak, reserved, losses, dict(found.most_common()), graphs())


def graphs() -> int:
    """How many graphs have been compiled, each anew for other shapes, precision or weights that learn."""
    return int(counters["stats"]["unique_graphs"])


def timed(side: Plain | Ours, cloaked: Tensor, args: argparse.Namespace) -> tuple[list[float], Outcome]:
    """Seconds of each round, by the device's own clock where it has one, so that rounds may overlap with the host."""
    marks = []
    for number in range(args.warm_up, args.warm_up + args.rounds):
        marks.append(mark(args.device))
        outcome = side.round(cloaked, Turn(number))
        cloaked = outcome.state
    marks.append(mark(args.device))
    if args.device == "cuda":
        torch.cuda.synchronize()
    return [between(start, end) for start, end in pairwise(marks)], outcome


def mark(device: str) -> Any:
    """A point in time."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(start: Any, end: Any) -> float:
    """Seconds from one to the other."""
    return end - start if isinstance(start, float) else float(start.elapsed_time(end)) / 1e3


def profile_round(run: Callable[[], object], name: str, args: argparse.Namespace) -> None:
    """The operators that take most of a round, as a table: ``profile-NAME.md``."""
    cuda = args.device == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        run()
        if cuda:
            torch.cuda.synchronize()

    def own(event: Any) -> float:
        return float(event.self_device_time_total if cuda else event.self_cpu_time_total)

    events = sorted(profiler.key_averages(), key=own, reverse=True)
    # Kernels stand under the operators that start them, and once more by themselves.
    events = [event for event in events if not cuda or event.device_type == DeviceType.CUDA]
    total = sum(map(own, events))
    rows = [[e.key[:100], str(e.count), f"{own(e) / 1e3:.2f}", f"{own(e) / total:.1%}"] for e in events[:30]]
    title = f"Where a round of {name} spends {total / 1e6:.3f} s of {'the device' if cuda else 'the CPU'}"
    print(write(args.output, f"profile-{name}", title, ["operator", "calls", "ms", "share"], rows))


def report(args: argparse.Namespace, results: dict[str, Result], rounds: Operations) -> str:
    """Writes the table of variants; returns it."""
    of_a_round = dict(zip(("plain", "ours"), totals(rounds), strict=True))
    middle = {name: median(result.seconds) for name, result in results.items()}
    references = [name for name in REFERENCES if name in results]
    rows = []
    for name in sorted(results, key=list(VARIANTS).index):
        result = results[name]
        done = of_a_round["plain" if VARIANTS[name].plain else "ours"] / 1e12
        rate = done / middle[name]
        rows.append(
            [
                name,
                f"{middle[name]:.3f} ({min(result.seconds):.3f}-{max(result.seconds):.3f})",
                f"{result.warm_up:.1f}",
                f"{result.warm_up + middle[name] * (args.schedule - args.warm_up):.1f}",
                str(result.graphs),
                *(f"{middle[reference] / middle[name]:.2f}" for reference in references),
                f"{done:.3f}",
                f"{rate:.2f}",
                f"{rate / args.peak_tflops:.1%}",
                *(f"{size / 2**30:.1f}" if size else "" for size in (result.peak, result.reserved)),
                str(sum(result.waits.values())),
                " ".join(f"{loss:.4f}" for loss in result.losses),
            ]
        )
    header = [
        "variant",
        "s a round (min-max)",
        "s to warm up",
        f"s for {args.schedule}, warm-up included",
        "graphs",
        *(f"x faster than {n}" for n in references),
    ]
    header += ["TFLOP a round", "TFLOP/s", "of peak", "peak GiB", "reserved GiB", "waits", "loss clean, PGD, cloaked"]
    device = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    title = (
        f"{args.photos} photos, torch {torch.__version__}, {device}; median of {args.rounds} rounds after "
        f"{args.warm_up}; the peak is {args.peak_tflops:.0f} TFLOP/s."
    )
    return write(args.output, "speed", title, header, rows)


def counted(args: argparse.Namespace) -> Operations:
    """Operations of a round by side, phase and part, from shapes alone; what is computed twice counts once."""
    task = make_task(args, "meta")
    return multiply(schedule(task), count(task.backbone))


def report_operations(args: argparse.Namespace, rounds: Operations) -> str:
    """Writes the table of operations; returns it."""
    rows = [
        [f"{phase}: {part}", *(f"{rounds[side][phase][index] * args.schedule / 1e15:.4g}" for side in rounds)]
        for phase in rounds["plain"]
        for index, part in enumerate(PARTS)
    ]
    rows.append(["all", *(f"{total * args.schedule / 1e15:.4g}" for total in totals(rounds))])
    title = f"PFLOP of {args.schedule} rounds with {args.photos} photos"
    return write(args.output, "operations", title, ["phase: part", *rounds], rows)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, usual = parser.add_argument, [name for name in VARIANTS if name not in OPTIONAL]
    add("--variants", default=",".join(usual), help=f"of {', '.join(VARIANTS)} (all but {', '.join(OPTIONAL)})")
    add("--output", type=Path, default=Path("outputs/gpu_speed"), help="folder (outputs/gpu_speed)")
    add("--photos", type=int, default=4, help="to protect (4)")
    add("--micro-batch", type=int, default=4, help="photos at a time (4)")
    add("--warm-up", type=int, default=2, help="rounds that are not timed (2)")
    add("--rounds", type=int, default=5, help="timed rounds (5)")
    add("--schedule", type=int, default=50, help="rounds of a whole run (50)")
    add("--peak-tflops", type=float, default=989, help="the card's bf16 rate (989: H100)")
    add("--profile", default="", help="of these variants, write the operators that take most of the time")
    add("--tiny", action="store_true", help="a tiny architecture, to try the script")
    add("--count", action="store_true", help="count operations, run nothing")
    args = parser.parse_args(arguments)
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.variants, args.profile = args.variants.split(","), args.profile.split(",") if args.profile else []
    unknown = {*args.variants, *args.profile} - set(VARIANTS)
    if unknown:
        parser.error(f"there is no variant {', '.join(sorted(unknown))}: choose from {', '.join(VARIANTS)}")
    if not (args.tiny or args.count or args.device == "cuda"):
        parser.error("there is no GPU here, and a CPU takes hours: use --tiny to try the script, or --count")
    return args


def report_waits(args: argparse.Namespace, name: str, result: Result) -> str:
    """Writes where the host waits in a round of a variant; returns it."""
    rows = [[place, str(times)] for place, times in result.waits.items()]
    return write(args.output, f"waits-{name}", f"Where the host waits in a round of {name}", ["place", "times"], rows)


def main(
    arguments: list[str] | None = None, seen: Callable[[str, Result], object] = lambda name, result: None
) -> dict[str, Result]:
    """Counts, or tries the variants out, and writes tables.

    Args:
        arguments: the command line.
        seen: is told what was found out about each variant, at once.

    Returns:
        What was found out about each variant.
    """
    args = parse(arguments)
    rounds = counted(args)
    print(report_operations(args, rounds))
    results: dict[str, Result] = {}
    for name in [] if args.count else tqdm(args.variants, desc="variants"):
        try:
            results[name] = try_out(VARIANTS[name], name, args)
        except Exception as error:
            if len(args.variants) == 1:
                raise
            traceback.print_exc()
            print(f"{name} failed, the others go on: {error}", flush=True)
            continue
        print(report(args, results, rounds), flush=True)
        seen(name, results[name])
        if results[name].waits:
            print(report_waits(args, name, results[name]), flush=True)
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()
    return results


if __name__ == "__main__":
    main()
