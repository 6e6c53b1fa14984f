"""Several draws of timestep and noise for each time that a photo is encoded: do they pay at equal time?

    python benchmarks/draws.py time                                          # seconds of a PGD step, this machine
    python benchmarks/draws.py time --sd15 --device cuda --bf16              # Stable Diffusion 1.5's shape
    python benchmarks/draws.py losses ~/alice ~/bob ~/carol                  # against a model trained on the person
    python benchmarks/draws.py losses ~/alice ~/bob ~/carol --alternating    # as ASPL does it
    python benchmarks/draws.py compare                                       # both together: what a fixed time buys

How the loss rises from step to step does not depend on the machine's load, so ``losses`` may run beside other work;
``time`` wants a quiet machine. ``compare`` puts what they wrote together.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import torch
from torch import Tensor

from antidreambooth.attack.canvas import SquareCanvas
from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import alternate
from antidreambooth.attack.steps import Momentum, Sign, StepRule
from antidreambooth.attack.surrogates import Fixed, Surrogate
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import computes_in_bf16
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.photos.decoding import load_photos, to_float
from benchmarks.aspl_speed import count
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, build
from benchmarks.tables import write

HELD_OUT = 64  # draws that a loss is the mean of, none of which the attack sees
YARDSTICK = 60  # DreamBooth steps on the clean photos of the model that losses are read off
ROUNDS = 50  # of ASPL, as published
PROMPT = "a photo of sks person"
RULES = {"sign": Sign(), "falling": Sign("linear"), "momentum": Momentum()}

Curve = list[tuple[float, float]]  # (steps, loss)


class Key(NamedTuple):
    """Whose photos were attacked, and how."""

    surrogate: str
    rule: str
    draws: int
    person: int
    seed: int


def seconds_of_steps(args: argparse.Namespace) -> None:
    """Seconds of a PGD step for each number of draws, which take turns; ratios are of neighbours in time."""
    torch.manual_seed(0)
    backbone = build(STABLE_DIFFUSION_15, args.device) if args.sd15 else load_backbone("embedded").to(args.device)
    side = backbone.unet.config.sample_size * backbone.downscale
    photos = torch.rand((args.photos, 3, side, side), device=args.device) * 2 - 1
    surrogate, cuda = Fixed(backbone, PROMPT), args.device == "cuda"
    generator = torch.Generator(args.device).manual_seed(0)
    seconds: dict[int, list[float]] = {draws: [] for draws in args.draws}
    peaks = dict.fromkeys(args.draws, 0)
    for repeat, draws in itertools.product(range(1 + args.repeats), args.draws):
        attack = PGD(steps=args.steps, micro_batch=args.photos, draws=draws)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.bf16):
            attack(
                surrogate, SquareCanvas(photos), photos, Turn(repeat), generator
            ).objective.item()  # waits for the device
        if repeat:  # the first one loads kernels
            seconds[draws].append((time.perf_counter() - start) / args.steps)
        peaks[draws] = torch.cuda.max_memory_allocated() if cuda else 0
    operations = operations_of_steps(args)
    rows = []
    for draws, taken in seconds.items():
        ratios = [one / base for one, base in zip(taken, seconds[args.draws[0]], strict=True)]
        spreads = [f"{median(v):.3f} ({min(v):.3f} to {max(v):.3f})" for v in (taken, ratios)]
        memory = f"{peaks[draws] / 2**30:.1f}" if cuda else "-"
        rows.append([str(draws), *spreads, f"{operations[draws]:.2f}", f"{median(ratios):.4f}", memory])
    header = ["draws", "seconds a step", "x", "x by operations", "median x", "peak GiB"]
    machine = torch.cuda.get_device_name() if cuda else f"a CPU, {torch.get_num_threads()} threads"
    title = (
        f"Seconds of a PGD step on {args.photos} photos of {side} pixels with one and several draws for each time that "
        f"they are encoded: {'Stable Diffusion 1.5 (random weights)' if args.sd15 else 'the embedded model'}, "
        f"{'bf16' if args.bf16 else 'fp32'}, {machine}, torch {torch.__version__}. Median and range of {args.repeats}."
    )
    print(write(args.output, "draws-time-sd15" if args.sd15 else "draws-time", title, header, rows))


def operations_of_steps(args: argparse.Namespace) -> dict[int, float]:
    """Operations of a step over those with the first number of draws: encoder once, U-Net once a draw, both ways."""
    model = build(STABLE_DIFFUSION_15, "meta") if args.sd15 else load_backbone("embedded").to("meta")
    encoder, unet, _ = (cost.forward + cost.to_input for cost in count(model))
    return {draws: (encoder + draws * unet) / (encoder + args.draws[0] * unet) for draws in args.draws}


class Person:
    """Photos, the model that losses are read off, and the draws that losses are the mean of.

    Args:
        folder: of photos, which are protected and are the clean reference, too.
        seed: of the attack.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        backbone = load_backbone("embedded")
        side = backbone.unet.config.sample_size * backbone.downscale
        self.photos = to_float(torch.stack([photo.pixels for photo in load_photos(folder, side)]))
        _, self.yardstick = self.adopted(Settings(training=DreamBooth(steps=YARDSTICK)))
        self.yardstick.learn_clean(Turn(0, seed=10), Turn(0, seed=10).generator(self.photos.device))
        generator = Turn(0, seed=11).generator(self.photos.device)
        objective = self.yardstick.backbone
        self.held_out = [PGD().objective.draw(objective, self.photos, generator) for _ in range(HELD_OUT)]

    def adopted(self, settings: Settings) -> tuple[PGD, Surrogate]:
        """An attack with the settings, and a surrogate that has learned nothing yet."""
        assembly = Assembly(METHODS["aspl"], settings)
        assembly.adopt([load_backbone("embedded")], lambda *_: None, seed=0)
        (surrogate,) = assembly.surrogates(self.photos, self.photos, plain_weights)
        return assembly.attack, surrogate

    @torch.no_grad()
    def loss(self, cloaked: Tensor) -> float:
        """The yardstick's denoising loss on the cloaked photos."""
        backbone, embedding = self.yardstick.backbone, self.yardstick.prompt_embedding()
        posterior = backbone.encode(cloaked)
        losses = [PGD().objective(backbone, posterior, embedding, draw).mean() for draw in self.held_out]
        return float(torch.stack(losses).mean())

    def fixed(self, draws: int, rule: StepRule, steps: float, points: int) -> Iterator[tuple[int, float]]:
        """The loss at some points of PGD against the yardstick itself, the last one after all steps."""
        every = max(1, round(steps / points))
        attack, cloaked, memory = PGD(steps=every, draws=draws, rule=rule), self.photos, None
        for number in range(points):
            turn = Turn(number, self.seed, rounds=points)
            generator = turn.generator(cloaked.device)
            cloaked, *_, memory = attack(self.yardstick, SquareCanvas(self.photos), cloaked, turn, generator, memory)
            yield (number + 1) * every, self.loss(cloaked)

    def alternating(self, draws: int, rule: StepRule, steps: float, points: int) -> Iterator[tuple[int, float]]:
        """The same of ASPL, whose surrogate learns in about ``ROUNDS`` rounds, each of as many steps as that leaves."""
        a_round = max(1, round(steps / ROUNDS))
        attack, surrogate = self.adopted(Settings(draws=draws, step_rule=rule, pgd_steps=a_round))
        every, cloaked, memory = max(1, round(steps / a_round / points)), self.photos, None
        for number in range(points * every):
            turn = Turn(number, self.seed, rounds=points * every)
            outcome = alternate([surrogate], SquareCanvas(self.photos), cloaked, attack, turn, memory)
            cloaked, memory = outcome.state, outcome.memory
            if (number + 1) % every == 0:
                yield (number + 1) * a_round, self.loss(cloaked)


def losses_of_steps(args: argparse.Namespace) -> None:
    """How the loss rises for each person and number of draws, all for as long by what ``time`` measured."""
    file = args.output / "draws-losses.csv"
    done = curves(file) if file.exists() else {}  # a run that was stopped goes on
    ratios, rule = measured_ratios(args.output), RULES[args.rule]
    for (number, folder), seed in itertools.product(enumerate(args.people, 1), range(args.seeds)):
        person: Person | None = None
        for draws in args.draws:
            key = Key("ASPL" if args.alternating else "fixed", args.rule, draws, number, seed)
            if key in done:
                continue
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                person = person or Person(folder, seed)
                found = [(0, person.loss(person.photos))]
                climb = person.alternating if args.alternating else person.fixed
                found += climb(draws, rule, args.budget / ratios[draws], args.points)
            with file.open("a", encoding="utf-8", newline="") as rows:
                if not rows.tell():
                    csv.writer(rows).writerow([*Key._fields, "steps", "loss"])
                csv.writer(rows).writerows([*key, steps, f"{loss:.6f}"] for steps, loss in found)
            print(*key, f"loss {found[0][1]:.4f} to {found[-1][1]:.4f}", flush=True)


def measured_ratios(folder: Path) -> dict[int, float]:
    """How long a step takes by the number of draws, in steps of one draw: what ``time`` wrote."""
    with (folder / "draws-time.csv").open(encoding="utf-8", newline="") as rows:
        return {int(row["draws"]): float(row["median x"]) for row in csv.DictReader(rows)}


def curves(file: Path) -> dict[Key, Curve]:
    """What ``losses`` wrote: the loss by steps."""
    found: dict[Key, Curve] = {}
    with file.open(encoding="utf-8", newline="") as rows:
        for surrogate, rule, draws, person, seed, steps, loss in itertools.islice(csv.reader(rows), 1, None):
            key = Key(surrogate, rule, int(draws), int(person), int(seed))
            found.setdefault(key, []).append((float(steps), float(loss)))
    return found


def compare(args: argparse.Namespace) -> None:
    """What a fixed time buys, and how long an equal loss takes; time is in steps of one draw."""
    ratios = measured_ratios(args.output)
    found = {
        key: [(steps * ratios[key.draws], loss) for steps, loss in curve]
        for key, curve in curves(args.output / "draws-losses.csv").items()
    }
    rows = []
    for surrogate, rule, draws in dict.fromkeys(key[:3] for key in sorted(found)):
        pairs = [(found[key], found[key._replace(draws=1)]) for key in found if key[:3] == (surrogate, rule, draws)]
        whole = round(pairs[0][1][-1][0])  # as long as one draw took
        ends = [(at(curve, whole), at(one, whole), one[0][1]) for curve, one in pairs]
        gains = [100 * (end - one) / (one - start) for end, one, start in ends]
        times = [reached(curve, one[-1][1]) / whole for curve, one in pairs]
        # A step size that falls belongs to the whole run: what there is on the way is not what a shorter run gives.
        # The loss after ASPL rises, then falls: its surrogate learns cloaked photos, the model of the loss does not.
        climbs = surrogate == "fixed" and rule != "falling"
        equal = f"{median(times):.2f} ({min(times):.2f} to {max(times):.2f})" if climbs else "-"
        losses = [f"{mean(at(curve, whole * share) for curve, _ in pairs):.4f}" for share in (0.5, 1)]
        gain = f"{mean(gains):+.1f} ({min(gains):+.1f} to {max(gains):+.1f})"
        rows.append([f"{surrogate}, {rule}", str(draws), str(whole), str(len(pairs)), *losses, gain, equal])
    header = ["attack", "draws", "time", "people", "loss at half-time", "loss", "rise, % more", "time to equal loss"]
    title = (
        "What several draws of timestep and noise for each encoding buy in the same time, which is counted in PGD "
        "steps of one draw (draws-time.md). Loss: of a model that was trained on the person's own photos, on the "
        f"cloaked ones, mean over people and over {HELD_OUT} draws that no attack saw. Rise: how much more the loss "
        "rises over that of the clean photos than with one draw and the same rule, mean and range over people. "
        "Time to equal loss: until the loss of one draw is reached, as a share of its time, median and range. "
        "Attack: PGD on that model itself (fixed) or on ASPL's surrogate; steps along the sign as published, with "
        "a size that falls to nothing, or with momentum."
    )
    print(write(args.output, "draws", title, header, rows))


def at(curve: Curve, when: float) -> float:
    """The loss at a time, between the two points around it along a straight line."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if before <= when <= after:
            return low + (high - low) * (when - before) / (after - before)
    return curve[-1][1]


def reached(curve: Curve, loss: float) -> float:
    """The first time at which the loss is this high; infinite where it never is."""
    for (before, low), (after, high) in itertools.pairwise(curve):
        if low <= loss <= high:
            return before + (after - before) * (loss - low) / (high - low)
    return math.inf


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    switch = argparse.BooleanOptionalAction
    for name, run in (("time", seconds_of_steps), ("losses", losses_of_steps), ("compare", compare)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--output", type=Path, default=Path("results/cost"), help="folder of the tables")
        command.add_argument("--draws", type=int, nargs="+", default=[1, 2, 4, 8], help="the first is compared with")
        command.add_argument("--bf16", action=switch, default=None, help="autocast; by the machine when not given")
        if name == "time":
            command.add_argument("--sd15", action="store_true", help="Stable Diffusion 1.5's shape, random weights")
            command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
            command.add_argument("--photos", type=int, default=4)
            command.add_argument("--steps", type=int, default=2, help="of a measurement")
            command.add_argument("--repeats", type=int, default=7)
        if name == "losses":
            command.add_argument("people", type=Path, nargs="+", help="folders of photos, one for each person")
            command.add_argument("--seeds", type=int, default=1, help="of the attack, for each person")
            command.add_argument("--budget", type=float, default=100, help="time of each run, in steps of one draw")
            command.add_argument("--points", type=int, default=5, help="of a curve")
            command.add_argument("--rule", choices=tuple(RULES), default="sign", help="what a step does")
            command.add_argument("--alternating", action="store_true", help="ASPL: its surrogate learns, too")
    args = parser.parse_args(arguments)
    if args.bf16 is None:
        args.bf16 = computes_in_bf16(torch.device(getattr(args, "device", "cpu")))
    return args


def main(arguments: list[str] | None = None) -> None:
    """Runs the part that is asked for."""
    args = parse(arguments)
    args.run(args)


if __name__ == "__main__":
    main()
