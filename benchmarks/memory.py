"""Peak memory of each part of a run of ASPL, for Stable Diffusion 1.5's size at 512 pixels, in every mode.

    python benchmarks/memory.py                 # measured where there is a GPU, counted where there is none
    python benchmarks/memory.py --count         # counted in any case
    python benchmarks/memory.py --validate      # the count against what the CPU's allocator measures
    python benchmarks/memory.py --families      # every base model that people fine-tune today: counted

What runs is the engine's own code. Sharded modes are counted in any case: FSDP2 by running it on fake ranks, ZeRO by
the arithmetic of its states, on top of what the networks were counted to compute with.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from benchmarks import family_memory
from benchmarks.base_models import BASE_MODELS
from benchmarks.counting import fake, measured
from benchmarks.phases import PHASES, PHOTOS, Mode, Peaks, Round, count, measure, sizes
from benchmarks.published import published
from benchmarks.sharding import Zero
from benchmarks.stable_diffusion import NARROW, STABLE_DIFFUSION_15, TINY, Architecture
from benchmarks.tables import write

GIB = 2**30
UNKNOWN = "out of memory"
CARDS = (8, 24, 80)  # GiB
RESERVE = GIB  # for the CUDA context, kernels' workspaces and what the allocator cannot reuse

SINGLE = (
    Mode("full, fp32", bf16=False),
    Mode("full, bf16"),
    Mode("full, bf16, VAE checkpointing", checkpointing="vae"),
    Mode("full, bf16, checkpointing", checkpointing=True),
    Mode("LoRA, bf16", lora=True),
    Mode("LoRA, bf16, VAE checkpointing", lora=True, checkpointing="vae"),
    Mode("LoRA, bf16, checkpointing", lora=True, checkpointing=True),
)
FSDP2 = tuple(
    Mode(
        f"full, bf16{', checkpointing' if checkpointing else ''}, FSDP2 over {ranks}", True, False, checkpointing, ranks
    )
    for ranks in (2, 8)
    for checkpointing in (False, True)
)
NETWORKS = (
    Mode("full, bf16", network=True),
    Mode("full, bf16, checkpointing", network=True, checkpointing=True),
)


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: of the mode.
        peaks: bytes by phase.
        how: measured, counted, or computed from what was counted.
        host: bytes of main memory that stand for the device's.
        published: whether this is the published loop, which lacks some phases.
    """

    name: str
    peaks: Peaks
    how: str
    host: int = 0
    published: bool = False

    def whole(self, photos: int) -> int | None:
        """Most bytes of a run with prior preservation and samples, and with so many photos at a time."""
        if self.published:  # all photos are in one batch
            return max(filter(None, self.peaks.values()), default=None) if photos == PHOTOS else None
        parts = [self.peaks[phase] for phase in (f"encode {photos}", "learn 1+1", f"PGD {photos}", "sample 4")]
        return None if None in parts else max(part for part in parts if part is not None)

    def fits(self, card: int) -> str:
        """Whether a card of so many GiB is large enough."""
        for photos, answer in ((4, "yes"), (1, "one by one")):
            whole = self.whole(photos)
            if whole is not None and whole + RESERVE <= card * GIB:
                return answer
        return "no"

    def cells(self) -> list[str]:
        """As text."""
        sizes = [gib(size) for size in (*self.peaks.values(), self.whole(4), self.whole(1))]
        if self.published:
            sizes = [size.replace(UNKNOWN, "") for size in sizes]
        host = gib(self.host) if self.host else ""
        return [self.name, *sizes, *map(self.fits, CARDS), host, self.how]


def gib(size: int | None) -> str:
    """Bytes as GiB."""
    return UNKNOWN if size is None else f"{size / GIB:.1f}"


def rows(architecture: Architecture, cuda: bool) -> Iterator[Row]:
    """All modes, one after the other."""
    for bf16 in (False, True):
        name, how = f"published loop, {'bf16' if bf16 else 'fp32'}", "measured" if cuda else "counted"
        yield Row(name, published(architecture, bf16, cuda), how, published=True)
    yield from single(architecture, cuda)
    for mode in tqdm(FSDP2, desc="FSDP2"):
        yield Row(mode.name, count(architecture, mode), "counted")
    for mode in tqdm(NETWORKS, desc="DeepSpeed"):
        network, (trained, frozen) = count(architecture, mode), sizes(architecture)
        for zero in zeros(trained, frozen):
            yield Row(f"{mode.name}, {zero.name}", zero_peaks(zero, network), "computed", zero.host)


def single(architecture: Architecture, cuda: bool, modes: Sequence[Mode] = SINGLE) -> Iterator[Row]:
    """The modes of one device."""
    for mode in tqdm(modes, desc="one device"):
        peaks = measure(architecture, mode) if cuda else count(architecture, mode)
        yield Row(mode.name, peaks, "measured" if cuda else "counted")


def zeros(trained: int, frozen: int) -> list[Zero]:
    """What of DeepSpeed is in the table."""
    shared: list[tuple[Literal[2, 3], int]] = [(2, 2), (2, 8), (3, 2), (3, 8)]
    return [
        *(Zero(stage, ranks, trained, frozen) for stage, ranks in shared),
        Zero(2, 1, trained, frozen, offload=True),
    ]


def zero_peaks(zero: Zero, network: Peaks) -> Peaks:
    """Most bytes of a rank under ZeRO, whose networks by themselves were counted."""
    loaded = 4 * (zero.trained + zero.frozen)
    return {
        phase: zero.peak(
            (peak or 0) - loaded, learns=phase.startswith("learn"), borrows=phase.startswith(("learn", "PGD"))
        )
        for phase, peak in network.items()
    }


def report(folder: Path, found: Iterable[Row], where: str) -> str:
    """Writes the table; returns it."""
    header = ["peak GiB", *PHASES, "run", "one by one", *(f"{card} GB" for card in CARDS), "main memory", "how"]
    title = (
        f"Peak memory of a run of ASPL in GiB: {where}. torch {torch.__version__}. Learning takes steps of one "
        "instance image, or of one and a class image, while a copy of the weights is borrowed; encoding and PGD take "
        "4 photos, all at once or one by one (the published loop: all at once); class images and sample grids are "
        "drawn 4 at a time. A card is large "
        f"enough if it leaves {gib(RESERVE)} GiB for the CUDA context, kernels' workspaces and fragmentation: for the "
        "run as it is, or for photos one by one (micro_batch 1)."
    )
    return write(folder, "memory", title, header, [row.cells() for row in found])


def validate(folder: Path) -> str:
    """The count, with fake and with real tensors, against the CPU's allocator, on a narrow Stable Diffusion."""
    lines = []
    for mode in tqdm([mode for mode in SINGLE if not mode.lora], desc="validation"):
        with fake():
            shapes = Round(NARROW, mode, "cpu")
            held, counted = shapes.counter.held(), shapes.peaks()
        real = Round(NARROW, mode, "cpu")
        with real.autocast():
            for phase, run in zip(PHASES, real.phases(), strict=True):
                run()  # what is made once
                true, above = measured(run), (counted[phase] or 0) - held
                lines.append(
                    [f"{mode.name}: {phase}", f"{above / 2**20:.2f}", f"{true / 2**20:.2f}", f"{above / true:.3f}"]
                )
    title = "Most MiB above what is loaded: counted with fake tensors, and held by the CPU's allocator while it ran."
    return write(folder, "validation", title, ["phase", "counted", "measured", "ratio"], lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures or counts, and writes tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/memory"), help="folder (outputs/memory)")
    parser.add_argument("--count", action="store_true", help="count even where there is a GPU")
    parser.add_argument("--tiny", action="store_true", help="a tiny architecture, to try the script")
    parser.add_argument("--validate", action="store_true", help="compare the count with an allocator, on the CPU")
    parser.add_argument("--families", nargs="*", choices=[*BASE_MODELS], help="count base models (all of them)")
    args = parser.parse_args(arguments)
    if args.families is not None:
        torch.set_num_threads(1)
        print(family_memory.report(args.output, args.families or [*BASE_MODELS]))
        return
    if args.validate:
        print(validate(args.output))
        return
    cuda = torch.cuda.is_available() and not args.count
    torch.set_num_threads(1)  # shapes are no work to share out, and threads that wait for one another are slow
    where = (
        f"measured on {torch.cuda.get_device_name()}" if cuda else "counted without a GPU, as allocations of its code"
    )
    print(report(args.output, rows(TINY if args.tiny else STABLE_DIFFUSION_15, cuda), where))


if __name__ == "__main__":
    main()
