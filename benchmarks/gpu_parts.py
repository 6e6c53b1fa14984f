"""What ``first_gpu.py`` tries on a GPU, part by part; each returns what it found beside what this project claims."""

from __future__ import annotations

import csv
import gc
import json
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from antidreambooth import cloak
from antidreambooth.attack.methods import Settings
from antidreambooth.attack.perturbation import PGD
from antidreambooth.attack.rounds import Outcome
from antidreambooth.diffusion.backbone import Backbone
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.execution import Execution
from antidreambooth.diffusion.layout import resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.photos.decoding import load_photos, to_float
from benchmarks import gpu_speed, memory
from benchmarks.aspl_speed import PHOTOS, Task
from benchmarks.phases import PHASES
from benchmarks.stable_diffusion import STABLE_DIFFUSION_15, TINY, build
from benchmarks.tables import write
from benchmarks.variants import VARIANTS, make_side
from cli import main as command_line

ROOT = Path(__file__).parents[1]
COUNTED = ROOT / "results" / "cost" / "memory.csv"
FACES = "--model.faces=benchmarks.fake_faces.FakeFaces"
CALLBACKS = '--trainer.callbacks=[{"class_path": "TrainedModel"}, {"class_path": "Likeness"}]'
OTHER = ROOT / "examples" / "other" / "biden-1.jpg"
LARGE_CARD = 80 * memory.GIB
SMALL_CARD = 8 * memory.GIB - memory.RESERVE  # what the allocator has of a card of 8 GB


@dataclass(frozen=True)
class Claim:
    """Something that this project says of GPUs, and what was found.

    Args:
        what: is claimed.
        found: on this machine.
        holds: whether both agree.
    """

    what: str
    found: str
    holds: bool


@dataclass(frozen=True)
class Place:
    """Where a part runs, and where it writes.

    Args:
        tables: folder of the tables.
        work: empty folder of everything else; it may be deleted afterwards.
        models: folder of the random models, which all parts share.
        tiny: whether a tiny random model stands for the embedded one and for Stable Diffusion 1.5.
    """

    tables: Path
    work: Path
    models: Path
    tiny: bool = False

    @property
    def device(self) -> str:
        """``cuda`` where there is a GPU."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @property
    def model(self) -> str:
        """The base model of the parts that look at what works, not at what it costs."""
        if not self.tiny:
            return "embedded"
        return str(saved(self.models / "tiny", tiny=True, device="cpu"))

    def flags(self, folder: str) -> list[str]:
        """Of each run: base model, folder, one device."""
        return [
            f"--model.backbone={self.model}",
            f"--trainer.default_root_dir={self.work / folder}",
            "--trainer.devices=1",
            "--trainer.enable_progress_bar=false",
        ]


def say(text: str) -> None:
    """Tells how far a part is."""
    print(f"> {text}", flush=True)


def saved(folder: Path, tiny: bool, device: str) -> Path:
    """A random base model in diffusers layout, made where it is not there yet; class images take few steps."""
    if not (folder / "antidreambooth.json").is_file():
        backbone = build(TINY if tiny else STABLE_DIFFUSION_15, device)
        backbone.pipeline().save_pretrained(folder, safe_serialization=True)
        replace(Defaults(), prior_weight=0.0 if tiny else 1.0, sampling_steps=2 if tiny else 10).write(folder)
    return folder


def run(*words: str) -> float:
    """A command line of this project, in this process; seconds that it takes.

    Raises:
        RuntimeError: it ended with a line for its user.
    """
    start = time.perf_counter()
    try:
        command_line(list(words))
    except SystemExit as stopped:
        if stopped.code:
            raise RuntimeError(str(stopped.code)) from stopped
    return time.perf_counter() - start


def attempt(what: str, act: Callable[[], str]) -> Claim:
    """A claim that something works, which says how; what fails is printed and does not stop the others."""
    try:
        claim = Claim(what, act(), holds=True)
    except Exception as error:
        traceback.print_exc()
        claim = Claim(what, f"{type(error).__name__}: {error}".splitlines()[0], holds=False)
    say(f"{claim.what}: {claim.found}")
    return claim


def machine(place: Place) -> list[Claim]:
    """The card's own rates, which bound all others."""
    device, side = place.device, 256 if place.tiny else 8192

    def seconds(act: Callable[[], object]) -> float:
        for _ in range(3):
            act()
        start = gpu_speed.mark(device)
        for _ in range(10):
            act()
        end = gpu_speed.mark(device)
        if device == "cuda":
            torch.cuda.synchronize()
        return gpu_speed.between(start, end) / 10

    rows = []
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "ieee"),
        ("TF32", torch.float32, "tf32"),
        ("fp32", torch.float32, "ieee"),
    ):
        torch.backends.cuda.matmul.fp32_precision = precision
        a, b = torch.randn((2, side, side), device=device).to(dtype)
        rate = 2 * side**3 / seconds(partial(torch.matmul, a, b)) / 1e12
        rows.append([f"{name} product of {side} x {side}", f"{rate:.1f} TFLOP/s"])
    source = torch.randn(side * side * 8, device=device)
    target = torch.empty_like(source)
    rows.append(
        ["copy, bytes read and written", f"{2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9:.0f} GB/s"]
    )
    for row in rows:
        say(": ".join(row))
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    write(
        place.tables,
        "machine",
        f"{name}, torch {torch.__version__}, Python {sys.version.split()[0]}",
        ["what", "rate"],
        rows,
    )
    return []


def resume(place: Place) -> list[Claim]:
    """A run of ASPL, the same again, and one that is killed and goes on; under the deterministic config and without."""
    rounds = 3 if place.tiny else 8

    def start(folder: str, *more: str) -> subprocess.Popen[bytes]:
        words = ["fit", "--config=configs/aspl.yaml", *place.flags(folder), f"--trainer.max_epochs={rounds}"]
        words += ["--checkpoint.every_n_epochs=1", "--trainer.callbacks=[{'class_path': 'CloakedPhotos'}]", *more]
        process = subprocess.Popen([sys.executable, "cli.py", *words], cwd=ROOT)
        if place.device == "cpu":
            process.wait()  # several at once would wait for one another
        return process

    exact = "--config=configs/trainer/deterministic.yaml"
    runs = {name: start(name, exact) for name in ("whole", "again")}
    if place.device == "cuda":
        runs |= {name: start(name) for name in ("usual", "usual-again")}
    rounds_done = killed(place, rounds, exact)
    say(f"killed after {rounds_done} of {rounds} rounds")
    runs["killed"] = start("killed", exact, "--ckpt_path=last")
    failed = [name for name, process in runs.items() if process.wait()]
    if failed:
        raise RuntimeError(f"these runs failed: {', '.join(failed)}")
    pairs = [
        ("again", "whole", "twice the same, deterministic"),
        ("killed", "whole", "killed and resumed, deterministic"),
    ]
    if place.device == "cuda":
        pairs.append(("usual-again", "usual", "twice the same, as usual"))
    rows, claims = [], []
    for one, other, name in pairs:
        found = differences(place.work / one, place.work / other)
        rows.append([name, *found.values()])
        if "deterministic" in name:
            bits = found["pixels that differ"] == found["weights that differ"] == "0.0000 %"
            claims.append(Claim(f"{name}: bit-identical", " ".join(f"{k} {v}" for k, v in found.items()), bits))
        say(f"{name}: {found}")
    title = f"Runs of ASPL on {place.device}, {rounds} rounds, the embedded model, compared"
    write(place.tables, "same-bytes", title, ["runs", *found], rows)
    return claims


def killed(place: Place, rounds: int, *more: str) -> int:
    """Starts a run and kills it once there is a checkpoint; returns the rounds that it had done."""
    words = ["fit", "--config=configs/aspl.yaml", *place.flags("killed"), f"--trainer.max_epochs={rounds}"]
    words += ["--checkpoint.every_n_epochs=1", "--trainer.callbacks=[{'class_path': 'CloakedPhotos'}]", *more]
    file = place.work / "killed" / "checkpoints" / "last.ckpt"
    with subprocess.Popen([sys.executable, "cli.py", *words], cwd=ROOT) as process:
        while process.poll() is None and not file.is_file():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the run that was to be killed ended by itself: exit code {process.returncode}")
    return int(torch.load(file, map_location="cpu", weights_only=False)["epoch"]) + 1


def differences(one: Path, other: Path) -> dict[str, str]:
    """How far two runs' photos and weights are apart."""
    pixels = [
        torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in sorted((root / "cloaked").glob("*.png"))])
        for root in (one, other)
    ]
    states = [
        torch.load(root / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)["state_dict"]
        for root in (one, other)
    ]
    names = [name for name in states[0] if not name.endswith(("perturbation", "passes"))]
    first, second = (torch.cat([state[name].flatten().float() for name in names]) for state in states)
    return {
        "pixels that differ": f"{(pixels[0] != pixels[1]).float().mean().item():.4%}".replace("%", " %"),
        "weights that differ": f"{(first != second).float().mean().item():.4%}".replace("%", " %"),
        "largest difference of a weight": f"{(first - second).abs().max().item():.1e}",
    }


def victim(place: Place, config: str) -> list[Claim]:
    """An attacker is trained, and tested with a face model without weights; the full one has class images, too."""
    steps = 3 if place.tiny else 40
    flags = [f"--config=configs/{config}.yaml", *place.flags(config), FACES, CALLBACKS]
    flags += [f"--model.training.steps={steps}", "--checkpoint.every_n_train_steps=0"]
    if config == "dreambooth":
        flags += ["--model.training.prior.weight=1", "--model.training.prior.images=4"]

    def fit() -> str:
        return f"{run('fit', *flags):.1f} s with {steps} steps"

    def test() -> str:
        asked = [f"--data.reference_photos={PHOTOS}", "--model.generation.images=2", "--model.generation.batch=2"]
        seconds = run("test", *flags, *asked)
        measures = json.loads((place.work / config / "measures.json").read_text(encoding="utf-8"))
        drawn = len(list((place.work / config / "images").glob("*.png")))
        if drawn != 4 or None in measures.values():
            raise RuntimeError(f"{drawn} pictures of 4, measures {measures}")
        return f"{seconds:.1f} s with {drawn} pictures"

    return [attempt(f"configs/{config}.yaml trains", fit), attempt(f"configs/{config}.yaml is tested", test)]


def methods(place: Place) -> list[Claim]:
    """Every cloaking method for a round or two, and the function for notebooks."""
    surrogate = f"--model.surrogate=configs/dreambooth.yaml {FACES} --model.training.steps=3 --trainer.devices=1"
    several = f"--model.ensemble.backbones=[{place.model}]"
    tried = {
        "advdm": [],
        "t-aspl": [],
        "e-aspl": [several, "--model.ensemble.offload=true"],
        "fsmg": [surrogate],
        "e-fsmg": [several, surrogate],
    }
    lora = ["--model.adaptation=LoRA", "--model.surrogate.gradient_checkpointing=true", "--model.micro_batch=1"]

    def cloaks(config: str, folder: str, more: list[str]) -> str:
        words = [f"--config=configs/{config}.yaml", *place.flags(folder), "--trainer.max_epochs=2", *more]
        seconds = run("fit", *words, "--trainer.callbacks=[{'class_path': 'CloakedPhotos'}]")
        manifest = json.loads((place.work / folder / "manifest.json").read_text(encoding="utf-8"))
        largest = max(photo["largest_difference"] for photo in manifest["photos"])
        if not 0 < largest <= 8:
            raise RuntimeError(f"the largest difference is {largest}, the budget 8")
        return f"{seconds:.1f} s, largest difference {largest} of 8"

    def function() -> str:
        start = time.perf_counter()
        pictures = cloak([Image.open(file) for file in sorted(PHOTOS.glob("*.jpg"))], place.model, rounds=2)
        return f"{time.perf_counter() - start:.1f} s for {len(pictures)} photos"

    def recorded() -> str:
        photos = sorted(PHOTOS.glob("*.jpg"))
        plain, *replayed = (  # twice, as the second one in a process must not meet what the first has left behind
            np.stack([*map(np.asarray, cloak(photos, place.model, rounds=2, settings=Settings(execution=how)))])
            for how in (Execution(), Execution(recorded=True), Execution(recorded=True))
        )
        apart = [float((pixels != plain).mean()) for pixels in replayed]
        if max(apart) > 0.05:
            raise RuntimeError(f"{apart} of the pixels' values differ")
        return f"{max(apart):.2%} of the pixels' values differ"

    claims = [attempt(f"configs/{name}.yaml cloaks", partial(cloaks, name, name, more)) for name, more in tried.items()]
    claims.append(attempt("configs/aspl.yaml cloaks with a LoRA", partial(cloaks, "aspl", "aspl-lora", lora)))
    claims.append(attempt("antidreambooth.cloak() cloaks", function))
    return [*claims, attempt("recorded steps, twice in a process, are plain ones but for rounding", recorded)]


def verdict(place: Place) -> list[Claim]:
    """A verdict of one cell and its control, of photos that are cloaked here and then cleaned by the base model."""
    steps = 2 if place.tiny else 20
    person = {"me": {"photos": str(PHOTOS), "clean_photos": str(PHOTOS)}}
    conditions = "antidreambooth.evaluation.conditions"
    cleaned = [{"class_path": f"{conditions}.Clean", "init_args": {"steps": 10}}, {"class_path": f"{conditions}.JPEG"}]
    given = {
        "name": "one",
        "folder": str(place.work / "verdict"),
        "people": person,
        "protections": {"aspl": "configs/aspl.yaml --trainer.max_epochs=2"},
        "victims": {"full": f"configs/dreambooth.yaml {FACES} --model.training.steps={steps}"},
        "conditions": {"cleaned": cleaned},
        "backbone": place.model,
        "generation": {"images": 2, "batch": 2},
        "launcher": {"workers": 1},
    }

    def judge() -> str:
        words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in given.items()]
        seconds = run("verdict", *words)
        cells = list((place.work / "verdict" / "one" / "cells").glob("*/cell.json"))
        if len(cells) != 2:
            raise RuntimeError(f"{len(cells)} cells of 2 are done")
        return f"{seconds:.1f} s: a cloak, a victim, a control"

    return [attempt("a verdict of one cell runs", judge)]


class SameNoise:
    """Noise that is the same on every device: drawn on the CPU, as only there it can be."""

    def __init__(self) -> None:
        self.draw = Draw.sample

    def sample(self, backbone: Backbone, *how: Any) -> Draw:
        """As ``Draw.sample``, moved to where the backbone is."""
        drawn, where = self.draw(backbone, *how), backbone.device
        return Draw(drawn.timesteps.to(where), drawn.noise.to(where), drawn.posterior_noise.to(where))


@contextmanager
def same_noise() -> Iterator[None]:
    """Inside, rounds draw the same noise on every device."""

    def generator(self: Turn, device: torch.device) -> torch.Generator:
        return usual(self, torch.device("cpu"))

    usual = Turn.generator
    with patch.object(Draw, "sample", SameNoise().sample), patch.object(Turn, "generator", generator):
        yield


def a_round(place: Place, device: str, variant: str) -> tuple[Outcome, Tensor, Tensor]:
    """A round of ASPL: its outcome, the weights before and after, on the CPU."""
    backbone = load_backbone(place.model).to(device)
    found = [photo.pixels for photo in load_photos(PHOTOS, resolution_of(place.model))]
    photos = to_float(torch.stack(found)).to(device)
    task = Task(backbone, DreamBooth().completed(backbone.defaults), PGD(), photos, None)
    side = make_side(VARIANTS[variant], task)
    before = torch.cat([p.detach().flatten().cpu() for p in backbone.learned()])
    outcome = side.round(photos, Turn(0))
    after = torch.cat([p.detach().flatten().cpu() for p in backbone.learned()])
    shown = {name: getattr(outcome, name).detach().float().cpu() for name in Outcome._fields if name != "memory"}
    return Outcome(**shown), before, after


def distance(place: Place) -> list[Claim]:
    """A round on the GPU beside the same round on the CPU."""
    with same_noise():
        expected, before, learned = a_round(place, "cpu", "fp32")
        rows, far = [], {}
        for variant in ("fp32", "tf32", "bf16"):
            outcome, _, after = a_round(place, place.device, variant)
            losses = [abs(a - b).item() / abs(b).item() for a, b in zip(outcome.losses, expected.losses, strict=True)]
            far[variant] = max(losses)
            pixels = (outcome.state - expected.state).abs() > 1e-6
            moved = (after - learned).norm() / (learned - before).norm()
            rows.append([variant, *(f"{loss:.1e}" for loss in losses), f"{pixels.float().mean():.2%}", f"{moved:.2%}"])
            say(" ".join(rows[-1]))
    header = [place.device, "clean loss", "objective", "cloaked loss", "pixels that differ", "weights, of their way"]
    title = "A round of ASPL with the same noise, against the CPU in fp32: relative differences"
    write(place.tables, "cpu-against-gpu", title, header, rows)
    what = "in fp32 a round's losses are a CPU's to 1e-3, in bf16 to 5e-2"
    return [Claim(what, f"{far['fp32']:.1e}, {far['bf16']:.1e}", far["fp32"] < 1e-3 and far["bf16"] < 5e-2)]


def memory_by_mode(place: Place) -> list[Claim]:
    """The peak of each part of a round in each mode, beside what was counted without a GPU."""
    cuda = place.device == "cuda"
    with COUNTED.open(encoding="utf-8", newline="") as file:
        counted = {row["peak GiB"]: row for row in csv.DictReader(file)}
    found, rows, off = [], [], []
    modes = memory.SINGLE[:1] if place.tiny else memory.SINGLE
    for row in memory.single(TINY if place.tiny else STABLE_DIFFUSION_15, cuda, modes):
        found.append(row)
        memory.report(place.tables, found, f"{row.how} on {torch.cuda.get_device_name() if cuda else 'no GPU'}")
        for phase in PHASES:
            expected, peak = float(counted[row.name][phase]), memory.gib(row.peaks[phase])
            rows.append([f"{row.name}: {phase}", f"{expected:.1f}", peak])
            true = (row.peaks[phase] or sys.maxsize) / memory.GIB
            if not place.tiny and not 0.9 * expected - 0.1 <= true <= expected + 1.0:
                off.append(f"{row.name}, {phase}: {peak} for {expected:.1f}")
        say(f"{row.name}: {' '.join(f'{phase} {memory.gib(peak)}' for phase, peak in row.peaks.items())}")
    write(place.tables, "memory-compared", "Peak GiB of each phase", ["mode: phase", "counted", row.how], rows)
    return [Claim("peaks are as counted: less than 1 GiB above, 10 % below", "; ".join(off) or "all are", not off)]


def real_size(place: Place) -> list[Claim]:
    """Whole runs on Stable Diffusion 1.5's shape, class images and checkpoint included: peak memory of the process."""
    cuda = place.device == "cuda"
    folder = saved(place.models / ("tiny" if place.tiny else "sd15"), place.tiny, place.device)
    say("a random model of Stable Diffusion 1.5's shape is on the disk")
    photos = place.work / "four-photos"
    photos.mkdir(exist_ok=True)
    for file in (*PHOTOS.glob("*.jpg"), OTHER):
        shutil.copy(file, photos)

    def whole(layer: str, claimed: float, cap: int) -> Claim:
        root = place.work / f"real-{layer}"
        words = ["fit", "--config=configs/aspl.yaml", f"--config=configs/trainer/{layer}.yaml"]
        words += [f"--model.backbone={folder}", f"--trainer.default_root_dir={root}", "--trainer.max_epochs=2"]
        words += ["--checkpoint.every_n_epochs=2", "--trainer.callbacks=[{'class_path': 'CloakedPhotos'}]"]
        words += [f"--data.photos={photos}", "--model.surrogate.prior.images=4", "--trainer.enable_progress_bar=false"]
        if not cuda:
            words += ["--trainer.accelerator=cpu"]

        def act() -> str:
            if cuda:
                gc.collect()
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                share = min(1.0, cap / torch.cuda.get_device_properties(0).total_memory)
                torch.cuda.set_per_process_memory_fraction(share)
            seconds = run(*words)
            size = (root / "checkpoints" / "last.ckpt").stat().st_size / memory.GIB
            peak = torch.cuda.max_memory_allocated() / memory.GIB if cuda else 0.0
            reserved = torch.cuda.max_memory_reserved() / memory.GIB if cuda else 0.0
            text = f"peak {peak:.1f} GiB ({reserved:.1f} reserved), {seconds:.1f} s, checkpoint {size:.2f} GiB"
            if cuda and peak > claimed + 1:
                raise RuntimeError(text)
            return text

        return attempt(f"a whole run with {layer}.yaml needs {claimed:.1f} GiB, of {cap / memory.GIB:.0f} allowed", act)

    claims = [whole("low-memory", 6.5, SMALL_CARD), whole("h100", 22.8, LARGE_CARD)]
    rows = [[claim.what, claim.found, "yes" if claim.holds else "no"] for claim in claims]
    write(place.tables, "real-size", "Whole runs on Stable Diffusion 1.5's shape", ["claim", "found", "holds"], rows)
    return claims


def speed(place: Place, variants: str, name: str, profiled: str, rounds: int) -> list[Claim]:
    """Seconds of a round in each variant, the profile and the host's waits of one of them."""
    if place.tiny:  # compiling takes minutes, for a tiny model, too
        variants = ",".join(variant for variant in variants.split(",") if not VARIANTS[variant].compiled)
    words = [f"--variants={variants}", f"--profile={'' if place.tiny else profiled}", f"--output={place.tables / name}"]
    words += [f"--rounds={1 if place.tiny else rounds}", f"--warm-up={0 if place.tiny else 1}"]

    def seen(variant: str, result: gpu_speed.Result) -> None:
        say(
            f"{variant}: {median(result.seconds):.3f} s a round, {result.warm_up:.1f} s to warm up, "
            f"{result.peak / memory.GIB:.1f} GiB, {sum(result.waits.values())} waits"
        )

    results = gpu_speed.main([*words, *(["--tiny"] if place.tiny else [])], seen)
    if profiled:  # times of single rounds: the part without a profile has more
        return []
    waiting = {n: sum(result.waits.values()) for n, result in results.items() if not VARIANTS[n].plain}
    claims = [Claim("in a round of ours the host never waits", str(waiting), not any(waiting.values()))]
    if {"bf16", "plain-bf16"} <= set(results):
        times, peaks = (
            [value(results[n]) for n in ("plain-bf16", "bf16")]
            for value in (lambda r: median(r.seconds), lambda r: float(r.peak))
        )
        found = f"{times[0] / times[1]:.2f} times as fast, {peaks[1] / (peaks[0] or 1):.2f} of its peak"
        holds = times[0] > times[1] or place.tiny
        claims.append(Claim("ours is faster than the published loop in bf16", found, holds))
        whole = 50 * times[1]
        claims.append(
            Claim(
                "50 rounds on four photos take under 100 s (an H200 took 90)",
                f"{whole:.1f} s",
                whole < 100 or place.tiny,
            )
        )
    return claims
