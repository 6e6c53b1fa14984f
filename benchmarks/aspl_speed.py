"""Seconds and memory of a round of ASPL: the engine's against the published loop written out plainly, side by side.

    python benchmarks/aspl_speed.py                                # embedded model, this machine
    python benchmarks/aspl_speed.py --size sd15 --device cuda      # Stable Diffusion 1.5's architecture, random weights
    python benchmarks/aspl_speed.py --size sd15 --count-only       # operations only, on the meta device

`Plain` draws the same noise and images as `Ours` and so reaches the same losses, to rounding; its comments "left out"
are all that differs in fp32. Each side runs in a process of its own, so that its peak memory can be read, and the sides
take turns, so that the drift of a busy machine hits all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import AdamW
from torch.utils.flop_counter import FlopCounterMode

from antidreambooth.attack.canvas import STEP, SquareCanvas
from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import Outcome, alternate
from antidreambooth.diffusion.backbone import Backbone, Posterior
from antidreambooth.diffusion.defaults import given
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.precision import computes_in_bf16
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.files import to_json
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.photos.decoding import load_photos, to_float
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, build

PHOTOS = Path(__file__).parents[1] / "examples" / "photos"
SIDES = ("plain", "ours-fp32", "ours-best")
PARTS = ("VAE encoder", "U-Net", "text encoder")
CLASS_IMAGES = 8  # a run has 200, of which a round looks at a few

Results = dict[str, list[dict[str, Any]]]  # by side, one for each repeat
Operations = dict[str, dict[str, list[int]]]  # of a round, by side, phase and part


@dataclass(frozen=True)
class Task:
    """What both sides are given."""

    backbone: Backbone
    training: DreamBooth
    attack: PGD
    photos: Tensor  # n 3 h w: the photos to protect, and the clean reference too
    classes: Tensor | None  # m 3 h w: class images, with prior preservation only

    @classmethod
    def load(cls, args: argparse.Namespace) -> Task:
        """The model, the example photos at its size, random class images of that size."""
        torch.manual_seed(0)
        backbone = load_backbone(args.backbone) if args.size == "embedded" else build(STABLE_DIFFUSION_15, args.device)
        backbone.to(args.device)
        training = DreamBooth().completed(backbone.defaults)
        resolution = backbone.unet.config.sample_size * backbone.downscale
        found = [photo.pixels for photo in load_photos(PHOTOS, resolution)]
        photos = to_float(torch.stack([found[i % len(found)] for i in range(args.photos)])).to(args.device)
        classes = torch.rand((CLASS_IMAGES, *photos.shape[1:]), device=args.device) * 2 - 1
        attack = PGD(micro_batch=args.micro_batch)
        return cls(backbone, training, attack, photos, classes if training.prior.weight else None)


class Plain:
    """The published loop (arXiv:2303.15433, Section 4) in fp32, all photos in one batch, nothing left out."""

    def __init__(self, task: Task) -> None:
        self.task, self.vae = task, task.backbone.vae
        self.theta = nn.ModuleList([task.backbone.unet, task.backbone.text_encoder]).requires_grad_(True)

    def round(self, cloaked: Tensor, turn: Turn) -> Outcome:
        """One alternation."""
        generator = turn.generator(cloaked.device)
        prime = deepcopy(self.theta)  # left out: ours keeps one copy of the weights and no second model
        prime, clean_loss = self.learn(prime, self.task.photos, turn, generator)
        cloaked, objective = self.perturb(prime, cloaked, generator)
        self.theta, cloaked_loss = self.learn(self.theta, cloaked, turn, generator)
        # Nobody keeps the base model beside what has become of it.
        self.task.backbone.unet, self.task.backbone.text_encoder = self.theta
        unmeasured = torch.zeros_like(objective)
        return Outcome(
            cloaked, clean_loss, objective, cloaked_loss, slope=unmeasured, latents=unmeasured, weights=unmeasured
        )

    def learn(
        self, models: nn.ModuleList, images: Tensor, turn: Turn, generator: torch.Generator
    ) -> tuple[nn.ModuleList, Tensor]:
        """DreamBooth steps on the images; returns the trained models and the mean loss."""
        models, settings, losses = deepcopy(models), self.task.training, []  # left out: a deep copy for every phase
        rate, steps, prior = given(settings.learning_rate, 0.0), given(settings.steps, 0), settings.prior
        optimizer = AdamW(models.parameters(), lr=rate, weight_decay=given(settings.weight_decay, 0.0))
        batches = turn.batches(steps, given(settings.batch_size, 1), len(images), images.device)
        others = self.task.classes
        for step, batch in enumerate(batches):
            pixels, prompts = images[batch], [settings.instance_prompt] * len(batch)
            if others is not None:
                pixels = torch.cat([pixels, others[turn.batches(steps, len(batch), len(others), images.device)[step]]])
                prompts += [given(prior.class_prompt, "")] * len(batch)
            # left out: the VAE in every step; ours encodes clean and class images once a run, cloaked ones once a round
            each = self.loss(models, pixels, prompts, generator)
            loss = each[: len(batch)].mean()
            if others is not None:
                loss = loss + given(prior.weight, 0.0) * each[len(batch) :].mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return models, torch.stack(losses).mean()

    def perturb(self, models: nn.ModuleList, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """PGD steps against the models; returns the images and the mean objective."""
        models, attack, losses = deepcopy(models), self.task.attack, []  # left out: a deep copy for every phase
        originals, radius = self.task.photos, attack.budget * STEP
        prompts = [self.task.training.instance_prompt] * len(images)
        for _ in range(attack.steps):
            images = images.detach().requires_grad_()
            loss = self.loss(models, images, prompts, generator).mean()  # left out: the text encoder, same prompt
            loss.backward()  # left out: the gradients of all weights, which nobody looks at
            assert images.grad is not None
            models.zero_grad()
            images = images.detach() + attack.budget / 10 * STEP * images.grad.sign()
            images = images.clamp(originals - radius, originals + radius).clamp(-1, 1)
            losses.append(loss.detach())
        return images, torch.stack(losses).mean()

    def loss(self, models: nn.ModuleList, images: Tensor, prompts: list[str], generator: torch.Generator) -> Tensor:
        """Denoising loss of each image, all of them in one batch."""
        unet, text_encoder = models
        scheduler, tokenizer = self.task.backbone.scheduler, self.task.backbone.tokenizer
        posterior = self.vae.encode(images).latent_dist
        timesteps = torch.randint(1000, (len(images),), generator=generator, device=images.device)
        noise, drawn = torch.randn((2, *posterior.mean.shape), generator=generator, device=images.device)
        latents = (posterior.mean + posterior.std * drawn) * self.vae.config.scaling_factor
        tokens = tokenizer(
            prompts, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
        )
        embeddings = text_encoder(tokens.input_ids.to(images.device))[0]
        prediction = unet(scheduler.add_noise(latents, noise, timesteps), timesteps, embeddings).sample
        velocity = scheduler.config.prediction_type == "v_prediction"
        target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
        return (prediction - target).square().mean(dim=(1, 2, 3))


class Ours:
    """The engine's round, with an optimizer of plain Python; the flags apply to the best form only."""

    def __init__(self, task: Task, args: argparse.Namespace, best: bool, execution: Execution = Execution()) -> None:  # noqa: B008
        backbone, training = task.backbone, task.training
        self.task, self.bf16 = task, best and args.bf16
        if best and args.channels_last:
            backbone.to(memory_format=torch.channels_last)
        if best and args.checkpointing:
            backbone.checkpoint(True)
        if best and args.compile:
            backbone.unet.compile()
            backbone.vae.encoder.compile()
        settings = Settings(training=training, micro_batch=args.micro_batch, execution=execution)
        assembly = Assembly(METHODS["aspl"], settings)
        self.attack = assembly.attack
        with self.autocast():  # once a run
            assembly.adopt([backbone], lambda *_: self.classes(), seed=0)
            self.surrogates = assembly.surrogates(task.photos, task.photos, plain_weights)

    def classes(self) -> Posterior:
        """Latents of the class images."""
        assert self.task.classes is not None
        return self.task.backbone.encode_all(self.task.classes, self.task.attack.micro_batch)

    def autocast(self) -> torch.autocast:
        """Low precision with fp32 weights, as the trainer's bf16-mixed does it."""
        return torch.autocast(self.task.photos.device.type, torch.bfloat16, enabled=self.bf16)

    def round(self, cloaked: Tensor, turn: Turn) -> Outcome:
        """One alternation."""
        with self.autocast():
            return alternate(self.surrogates, SquareCanvas(self.task.photos), cloaked, self.attack, turn)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds a round, bytes and the last round's losses of one side, alone in this process."""
    task, cuda = Task.load(args), args.device == "cuda"
    side = Plain(task) if args.side == "plain" else Ours(task, args, best=args.side == "ours-best")
    low_precision = args.side == "ours-best" and args.bf16
    with torch.no_grad(), torch.autocast(args.device, torch.bfloat16, enabled=low_precision):  # loads kernels
        latents, prompt = task.backbone.encode(task.photos[:1]).mean, task.backbone.embed(["a photo"])
        task.backbone.unet(latents, torch.zeros(1, dtype=torch.long, device=latents.device), prompt)
    loaded, seconds, losses, cloaked = resident(cuda), [], [], task.photos
    for number in range(1 + args.rounds):
        start = time.perf_counter()
        outcome = side.round(cloaked, Turn(number))
        cloaked, losses = outcome.state, [value.item() for value in outcome.losses]  # item() waits for the device
        seconds.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if cuda else peak_resident()
    return {"seconds": median(seconds[1:]), "first": seconds[0], "peak": peak, "above": peak - loaded, "losses": losses}


def resident(cuda: bool) -> int:
    """Bytes held now; from here on a GPU's peak counts."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * resource.getpagesize() if statm.exists() else peak_resident()


def peak_resident() -> int:
    """Most bytes of main memory that this process ever held; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def take_turns(args: argparse.Namespace, arguments: list[str]) -> Results:
    """All sides, again and again, each in a new process."""
    results: Results = {side: [] for side in SIDES}
    for repeat in range(args.repeats):
        for side in SIDES:
            command = [sys.executable, __file__, *arguments, "--side", side]
            result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            results[side].append(result)
            print(f"{repeat + 1}/{args.repeats} {side}: {result['seconds']:.2f} s a round", file=sys.stderr)
    return results


class Cost(NamedTuple):
    """Operations of one part for one image."""

    forward: int
    to_input: int  # backward, weights frozen; above the forward where attention multiplies activations by activations
    to_weights: int  # backward, to the input too


def count(model: Backbone) -> list[Cost]:
    """What each of ``PARTS`` costs, from a model on the meta device."""
    side, length = model.unet.config.sample_size, model.tokenizer.model_max_length
    with torch.device("meta"):
        pixels = torch.empty(1, 3, side * model.downscale, side * model.downscale, requires_grad=True)
        latents = torch.empty(1, model.latent_channels, side, side, requires_grad=True)
        prompt = torch.empty(1, length, model.unet.config.cross_attention_dim)
        timestep, words = torch.zeros(1, dtype=torch.long), torch.zeros(1, length, dtype=torch.long)
    passes: list[tuple[nn.Module, Callable[[], Tensor]]] = [
        (model.vae, lambda: model.vae.encode(pixels).latent_dist.mean),
        (model.unet, lambda: model.unet(latents, timestep, prompt).sample),
        (model.text_encoder, lambda: model.text_encoder(words)[0]),
    ]

    def operations(forward: Callable[[], Tensor], backward: bool) -> int:
        # Attention in its mathematical form consists of matrix products, which the counter knows on every device.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            output = forward()
            if backward and output.requires_grad:
                output.sum().backward()
        return counter.get_total_flops()

    costs = []
    for part, forward in passes:
        alone, both = operations(forward, backward=False), []
        for train in (False, True):
            part.requires_grad_(train)
            prompt.requires_grad_(train)  # where the text encoder learns, the U-Net hands it a gradient
            both.append(operations(forward, backward=True))
        costs.append(Cost(alone, *(total - alone for total in both)))
    return costs


def schedule(task: Task) -> dict[str, dict[str, list[Cost]]]:
    """How many images (prompts, for the text encoder) a round sends through ``PARTS``, each way, by side and phase."""
    photos, kinds = len(task.photos), 1 if task.classes is None else 2
    steps, attacked = given(task.training.steps, 0) * kinds, task.attack.steps * photos
    learned = steps * given(task.training.batch_size, 1)
    plain = [Cost(learned, 0, 0), Cost(learned, 0, learned), Cost(learned, 0, learned)]
    ours = [Cost(0, 0, 0), Cost(learned, 0, learned), Cost(steps, 0, steps)]
    return {
        "plain": {
            "learn clean": plain,
            "PGD": [Cost(attacked, attacked, 0), Cost(attacked, 0, attacked), Cost(attacked, 0, attacked)],
            "learn cloaked": plain,
        },
        "ours": {
            "learn clean": ours,
            "PGD": [Cost(attacked, attacked, 0), Cost(attacked, attacked, 0), Cost(1, 0, 0)],
            "learn cloaked": [Cost(photos, 0, 0), *ours[1:]],
        },
    }


def multiply(rounds: dict[str, dict[str, list[Cost]]], costs: list[Cost]) -> Operations:
    """Operations of a round, from how many images go through and what each costs."""

    def product(images: Cost, cost: Cost) -> int:
        return sum(a * b for a, b in zip(images, cost, strict=True))

    return {side: {k: list(map(product, v, costs)) for k, v in phases.items()} for side, phases in rounds.items()}


def table(*rows: list[str]) -> None:
    """Prints aligned columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *others in rows:
        print("  ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]))
    print()


def report_operations(costs: list[Cost], rounds: Operations) -> None:
    """What each part costs, what a round costs on both sides, and what can be left out."""
    images = [[part, *(f"{value / 1e9:,.2f}" for value in cost)] for part, cost in zip(PARTS, costs, strict=True)]
    table(["GFLOP an image", "forward", "backward to input", "to weights too"], *images)
    rows = [
        [f"{phase}: {part}", *(f"{rounds[side][phase][index] / 1e9:,.1f}" for side in rounds)]
        for phase in rounds["plain"]
        for index, part in enumerate(PARTS)
    ]
    plain, ours = totals(rounds)
    table(["GFLOP a round", *rounds], *rows, ["all", f"{plain / 1e9:,.1f}", f"{ours / 1e9:,.1f}"])
    print(f"{1 - ours / plain:.1%} changes nothing and is left out; that alone makes {plain / ours:.2f} x in fp32\n")


def totals(rounds: Operations) -> list[int]:
    """Operations of a round: plain, ours."""
    return [sum(map(sum, phases.values())) for phases in rounds.values()]


def report_measured(args: argparse.Namespace, results: Results, rounds: Operations) -> None:
    """Seconds, memory, ratios; how much of the count's promise was kept.

    More than all of it where copies and gradients of weights cost time in memory that no operation counts.
    """
    plain, ours = totals(rounds)
    rows, ratio = [], {}
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {device}, {args.photos} photos, best: bf16 {'on' if args.bf16 else 'off'}\n")
    for side, repeats in results.items():
        seconds = [result["seconds"] for result in repeats]
        pairs = [p["seconds"] / s for p, s in zip(results["plain"], seconds, strict=True)]  # neighbours in time
        ratio[side] = median(pairs)
        spreads = [f"{median(v):.2f} ({min(v):.2f}-{max(v):.2f})" for v in (seconds, pairs)]
        memory = [f"{median(result[key] for result in repeats) / 2**20:,.0f}" for key in ("peak", "above")]
        rate = (plain if side == "plain" else ours) / median(seconds) / 1e12
        share = f"{rate:.2f}" + (f" ({rate / args.peak_tflops:.1%} of bf16 peak)" if args.device == "cuda" else "")
        rows.append([side, *spreads, *memory, share, " ".join(f"{value:.4f}" for value in repeats[-1]["losses"])])
    losses = "loss clean, PGD, cloaked"
    table(["median (min-max)", "s a round", "x faster", "peak MiB", "above loaded", "TFLOP/s", losses], *rows)
    saved = 1 - 1 / ratio["ours-fp32"]
    print(
        f"ours-fp32 saves {saved:.1%} of the time, {saved / (1 - ours / plain):.0%} of the share of operations left out"
    )


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line; what paid is the default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--size", choices=("embedded", "sd15"), default="embedded", help="sd15: its architecture, random weights")
    add("--backbone", default="embedded", help="with --size embedded: another model folder or hub id")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--photos", type=int, default=4, help="the example photos, repeated or cut to this number (4)")
    add("--repeats", type=int, default=3, help="processes a side (3)")
    add(
        "--rounds",
        type=int,
        default=2,
        help="timed rounds a process, after one that is not (2; 3 let a median skip a stall)",
    )
    add("--micro-batch", type=int, default=4, help="ours: photos at a time (4)")
    add("--bf16", action=switch, default=None, help="best: autocast; on where the processor computes in bf16")
    add("--channels-last", action=switch, default=False, help="best")
    add("--compile", action=switch, default=False, help="best: torch.compile of U-Net and VAE encoder")
    add("--checkpointing", action=switch, default=False, help="best: less memory, more time")
    add("--peak-tflops", type=float, default=989, help="the card's bf16 rate (989: H100)")
    add("--count-only", action="store_true", help="count operations, measure nothing")
    add("--side", choices=("all", *SIDES), default="all", help="measure this one here and print JSON")
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(arguments)
    if args.size == "sd15" and args.device == "cpu" and not args.count_only:
        parser.error("sd15 takes hours and about 60 GB on a CPU: use --device cuda, or --count-only")
    if args.bf16 is None:  # emulated bf16 is slower than fp32
        args.bf16 = computes_in_bf16(torch.device(args.device))
    return args


def main(arguments: list[str] | None = None) -> None:
    """Measures, counts, reports."""
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    if args.side != "all":
        print(to_json(measure(args)))
        return
    # Before anything is loaded here: on Linux a child's ru_maxrss starts at what its parent held.
    results = {} if args.count_only else take_turns(args, arguments)
    task = Task.load(argparse.Namespace(**{**vars(args), "device": "meta"}))
    costs = count(task.backbone)
    rounds = multiply(schedule(task), costs)
    if args.json:
        named = {part: cost._asdict() for part, cost in zip(PARTS, costs, strict=True)}
        print(to_json({"settings": vars(args), "flop_an_image": named, "flop_a_round": rounds, "sides": results}))
        return
    report_operations(costs, rounds)
    if results:
        report_measured(args, results, rounds)


if __name__ == "__main__":
    main()
