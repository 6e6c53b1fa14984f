"""What of a cloak reaches an attacker, by how it was made and how the attacker's program reads the photos.

    python benchmarks/own_size.py losses PEOPLE --names alice bob     # rise of a model's loss; minutes a person
    python benchmarks/own_size.py victims PEOPLE --names alice bob    # trained attackers; a minute or two a cell

PEOPLE holds set_A and set_B of each person, portraits; set_B is cloaked. Each portrait is put into a larger photo of
1024 x 1365 pixels with grain, so that a face's crop is something else than the whole view. ``losses`` is quick and a
proxy: no attacker is trained, PGD climbs the loss of a model that knows the person, and the loss of what arrives is
that model's, over draws that no attack has seen. ``victims`` is the whole way: ASPL, DreamBooth, pictures, verifier.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.nn.functional import interpolate

from antidreambooth.attack.canvas import STEP, Canvas
from antidreambooth.attack.methods import plain_weights
from antidreambooth.attack.parametrisation import OwnSize, Parametrisation, Square
from antidreambooth.attack.perturbation import PGD, random_change
from antidreambooth.attack.surrogates import Alternating, Fixed
from antidreambooth.attack.views import Views
from antidreambooth.diffusion.draws import Draw
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.seeding import Turn
from antidreambooth.finetuning.augmentation import jpeg
from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
from antidreambooth.finetuning.full import Full
from antidreambooth.photos.decoding import find_photos, to_float
from antidreambooth.photos.delivery import Delivery
from antidreambooth.photos.readings import Reading
from antidreambooth.photos.regions import Region
from benchmarks.tables import write
from cli import main as command_line

SIZE = (1024, 1365)  # width and height of the photos that portraits are put into
SHARE = 0.74  # of the width that a portrait takes
SIDE, BUDGET, STEPS = 128, 8.0, 50
PROMPT = "a photo of sks person"
HELD_OUT = 48  # draws that a loss is the mean of
READINGS = {
    **{
        kernel: Reading("centre", kernel, profile=False)
        for kernel in ("bilinear", "bicubic", "lanczos", "area", "linear")
    },
    "random crop": Reading("random", "bilinear", profile=False),
    "face": Reading("face", "bilinear", profile=False),
    "face, area": Reading("face", "area", profile=False),
}


@dataclass(frozen=True)
class Way:
    """How a cloak is made."""

    parametrisation: Parametrisation
    region: Region = Region()  # noqa: RUF009 (frozen)
    flags: tuple[str, ...] = ()  # of the command line, the same


def own_size(oversampling: float = 2.0, close: float = 0.5, widths: float | None = None) -> Way:
    """A cloak at the photo's own size."""
    flags = ["--model.parametrisation=OwnSize", f"--model.parametrisation.oversampling={oversampling}"]
    flags += [f"--model.parametrisation.views.close={close}", *([f"--data.region.widths={widths}"] if widths else [])]
    return Way(OwnSize(oversampling, Views(close=close)), Region(widths=widths), tuple(flags))


WAYS: dict[str, Way | None] = {
    "nothing": None,
    "noise, a sign for each model pixel": None,
    "the middle square, enlarged in the end": Way(Square(), flags=("--model.parametrisation=Square",)),
    "whole view, grid x1": own_size(1.0, 0.0),
    "whole view, grid x2": own_size(2.0, 0.0),
    "whole view, full size": own_size(8.0, 0.0),
    "whole view and face by turns": own_size(),
    "by turns, within 2 face widths": own_size(widths=2.0),
    "face alone": own_size(close=1.0),
}
DEFAULT = "whole view and face by turns"
NEITHER = "nothing"
SQUARE = "the middle square, enlarged in the end"
WHOLE = "whole view, grid x2"
DEFAULT = "whole view and face by turns"
LYING = "lying"  # photos on their side, as a program sees them that does not look at EXIF's orientation
CELLS = (  # of which attackers are trained: how the photos are cloaked, how the attacker reads them
    *((way, reading) for way in (NEITHER, SQUARE, WHOLE, DEFAULT) for reading in ("bilinear", "face", "random crop")),
    *(("by turns, within 2 face widths", reading) for reading in ("bilinear", "face")),
    *((way, LYING) for way in (NEITHER, SQUARE, DEFAULT)),
    *(("noise, a sign for each model pixel", reading) for reading in ("bilinear", "face")),
    *(("whole view, full size", reading) for reading in ("bilinear", "face")),
    *((way, kernel) for kernel in ("area", "linear", "lanczos") for way in (NEITHER, DEFAULT)),
)


def framed(portrait: Path, folder: Path) -> None:
    """A portrait in a larger photo, before its own blurred and enlarged background, with grain."""
    rng = np.random.default_rng(zlib.crc32(portrait.name.encode()))
    (width, height), side = SIZE, round(SIZE[0] * SHARE)
    with Image.open(portrait) as image:
        picture = image.convert("RGB")
    left = (height - width) // 2
    behind = picture.resize((height, height)).filter(ImageFilter.GaussianBlur(60)).crop((left, 0, left + width, height))
    soft = Image.new("L", (side, side), 0)
    soft.paste(255, (24, 24, side - 24, side - 24))
    place = (round((width - side) * rng.uniform(0.2, 0.8)), round((height - side) / 2 + rng.uniform(-60, 60)))
    behind.paste(
        picture.resize((side, side), Image.Resampling.LANCZOS), place, soft.filter(ImageFilter.GaussianBlur(12))
    )
    noisy = (np.asarray(behind) + rng.normal(0, 3, (height, width, 3))).round().clip(0, 255)
    Image.fromarray(noisy.astype(np.uint8)).save(folder / f"{portrait.stem}.png", compress_level=1)


class Person:
    """One person's photos, and what is made of them.

    Args:
        people: folder of people.
        name: of the person.
        root: where everything is written.
    """

    def __init__(self, people: Path, name: str, root: Path) -> None:
        self.people, self.name, self.root = people, name, root

    def photos(self, part: str) -> Path:
        """Their photos of one set, large."""
        folder = self.root / "photos" / self.name / part
        if not folder.exists():
            folder.mkdir(parents=True)
            for portrait in find_photos(self.people / self.name / part):
                framed(portrait, folder)
        return folder

    def squares(self, folder: Path, reading: Reading) -> Tensor:
        """What an attacker's program makes of a folder, n 3 s s in 8 bits; of random crops three for each photo."""
        places = (0.1, 0.5, 0.9) if reading.crop == "random" else (0.5,)
        return torch.stack([reading(path, SIDE, place) for path in find_photos(folder) for place in places])

    def write(self, name: str, changes: Callable[[int], np.ndarray]) -> Path:
        """The photos with a change of each, h w 3 in 8-bit steps."""
        folder = self.root / "changed" / self.name / name
        folder.mkdir(parents=True, exist_ok=True)
        for index, path in enumerate(find_photos(self.photos("set_B"))):
            with Image.open(path) as image:
                numbers = (np.asarray(image) + changes(index)).clip(0, 255).astype(np.uint8)
            Image.fromarray(numbers).save(folder / path.name, compress_level=1)
        return folder

    def noisy(self, name: str) -> Path:
        """The photos with random signs, the control."""
        return self.write(name, lambda index: random_change(SIZE, SIDE, BUDGET, index).numpy())

    def lying(self, folder: Path) -> Path:
        """A folder's photos turned by 90 degrees."""
        turned = self.root / "lying" / self.name / folder.relative_to(self.root)
        turned.mkdir(parents=True, exist_ok=True)
        for path in find_photos(folder):
            with Image.open(path) as image:
                image.transpose(Image.Transpose.ROTATE_90).save(turned / path.name, compress_level=1)
        return turned

    def enlarged(self, perturbation: Tensor) -> Callable[[int], np.ndarray]:
        """Changes of the whole photos from those of their middle squares (n 3 s s, in 8-bit steps)."""
        (width, height), top = SIZE, (SIZE[1] - SIZE[0]) // 2

        def change(index: int) -> np.ndarray:
            whole = np.zeros((height, width, 3), np.int16)
            large = interpolate(perturbation[index][None], (width, width), mode="bilinear")[0].round()
            whole[top : top + width] = large.permute(1, 2, 0).to(torch.int16).numpy()
            return whole

        return change


class Losses:
    """A model that knows the person, and what its loss is on what arrives."""

    def __init__(self, person: Person) -> None:
        self.person, self.backbone = person, load_backbone("embedded")
        clean = torch.cat([person.squares(person.photos("set_B"), READINGS[name]) for name in ("bilinear", "face")])
        training = DreamBooth(steps=60, prior=PriorPreservation(weight=0.0)).completed(self.backbone.defaults)
        Full().apply(self.backbone, training, 0)
        latents = self.backbone.encode_all(to_float(clean), 4)
        learner = Alternating(self.backbone, training, plain_weights(self.backbone, training), latents)
        learner.learn_clean(Turn(0), Turn(0).generator(torch.device("cpu")))
        self.fixed = Fixed(self.backbone, PROMPT)

    @torch.no_grad()
    def of(self, pictures: Tensor) -> float:
        """The mean denoising loss of pictures, n 3 s s in 8 bits."""
        posterior, embedding = self.backbone.encode_all(to_float(pictures), 4), self.fixed.prompt_embedding()
        generator, total = torch.Generator().manual_seed(99), 0.0
        for _ in range(HELD_OUT):
            draw = Draw.sample(self.backbone, posterior.mean.shape, generator)
            latents = posterior.sample(draw.posterior_noise)
            prompts = embedding.expanded(len(latents))
            total += self.backbone.denoising_loss(latents, draw.timesteps, draw.noise, prompts).mean().item()
        return total / HELD_OUT

    def arriving(self, folder: Path) -> Iterator[tuple[str, float]]:
        """Loss by how the photos are read; also compressed, and lying on their side."""
        for name, reading in READINGS.items():
            yield name, self.of(self.person.squares(folder, reading))
        middle = self.person.squares(folder, READINGS["bilinear"])
        yield "JPEG 75", self.of(torch.stack([jpeg(picture, 75) for picture in middle]))
        yield "lying", self.of(middle.rot90(1, (2, 3)))

    def cloaked(self, name: str) -> Path:
        """The photos after PGD on the model that knows the person."""
        source, way = self.person.photos("set_B"), WAYS[name]
        if name.startswith("nothing"):
            return source
        if way is None:
            return self.person.noisy(name)
        photos = way.parametrisation.load(source, SIDE, way.region)
        canvas: Canvas = way.parametrisation.canvas(photos, SIDE)
        generator = Turn(0).generator(torch.device("cpu"))
        state = PGD(BUDGET, steps=STEPS)(self.fixed, canvas, canvas.blank, Turn(0), generator).state
        if isinstance(way.parametrisation, Square):
            return self.person.write(name, self.person.enlarged((state - canvas.blank) / STEP))
        folder = self.person.root / "changed" / self.person.name / name
        folder.mkdir(parents=True, exist_ok=True)
        finished = way.parametrisation.finish(canvas, state, photos, BUDGET, Delivery())
        for photo, one in zip(photos, finished, strict=True):
            (folder / photo.name).write_bytes(one.file.data)
        return folder


def losses(people: list[Person], root: Path) -> str:
    """Rise of the loss, a row for each way, a column for each reading; the mean over people, and its range."""
    rises: dict[str, dict[str, list[float]]] = {}
    for person in people:
        model, before = Losses(person), dict[str, float]()
        for name in WAYS:
            for reading, loss in model.arriving(model.cloaked(name)):
                before.setdefault(reading, loss)  # of nothing, the first way
                rises.setdefault(name, {}).setdefault(reading, []).append(loss - before[reading])
            print(person.name, name, {k: round(v[-1], 4) for k, v in rises[name].items()}, flush=True)
    header = ["cloak", *next(iter(rises.values()))]
    rows = [
        [name, *(f"{mean(found):.4f} ({min(found):.4f}-{max(found):.4f})" for found in by_reading.values())]
        for name, by_reading in rises.items()
    ]
    return write(root, "own-size-losses", f"Rise of the loss, mean and range of {len(people)} people", header, rows)


class Victims:
    """Attackers that are trained on what arrives."""

    def __init__(self, person: Person) -> None:
        self.person = person

    def cloaked(self, name: str) -> Path:
        """The photos after ASPL."""
        source, way = self.person.photos("set_B"), WAYS[name]
        if name == NEITHER:
            return source
        if way is None:
            return self.person.noisy(name)
        out = self.person.root / "aspl" / self.person.name / name.replace(" ", "-").replace(",", "")
        if not (out / "manifest.json").is_file():
            given = [f"--data.photos={source}", f"--data.clean_photos={self.person.photos('set_A')}"]
            command_line(["fit", "-c", "configs/aspl.yaml", *given, f"--trainer.default_root_dir={out}", *way.flags])
        if not isinstance(way.parametrisation, Square):
            return out / "cloaked"
        middle = READINGS["bilinear"]
        made, clean = (self.person.squares(folder, middle).float() for folder in (out / "cloaked", source))
        return self.person.write(name, self.person.enlarged(made - clean))

    def measures(self, name: str, reading: str) -> dict[str, float]:
        """Of an attacker's pictures, compared with the person's portraits."""
        photos = self.cloaked(name)
        out = self.person.root / "victims" / self.person.name / f"{name}-{reading}".replace(" ", "-").replace(",", "")
        if not (out / "measures.json").is_file():
            photos = self.person.lying(photos) if reading == LYING else photos
            how = READINGS["bilinear" if reading == LYING else reading]
            read = [
                f"--data.reading.crop={how.crop}",
                f"--data.reading.kernel={how.kernel}",
                "--data.reading.profile=false",
            ]
            asked = [f"--model.generation.prompts=[{PROMPT}]", "--model.generation.images=24"]
            common = ["-c", "configs/dreambooth.yaml", "--model.training.steps=120", f"--data.photos={photos}", *read]
            common += [f"--trainer.default_root_dir={out}", "--checkpoint.every_n_train_steps=0", *asked]
            references = [str(self.person.people / self.person.name / part) for part in ("set_A", "set_C")]
            command_line(["fit", "--overwrite", *common])
            command_line(["test", *common, f"--data.reference_photos={json.dumps(references)}"])
        found: dict[str, float] = json.loads((out / "measures.json").read_text(encoding="utf-8"))
        return found


def victims(people: list[Person], root: Path) -> str:
    """Acceptance and joint ISM, a row for each way and reading."""
    rows = []
    for name, reading in CELLS:
        found = [Victims(person).measures(name, reading) for person in people]
        figures = [[one[key] for one in found] for key in ("acceptance", "joint_ism")]
        cells = [f"{mean(one):.3f} ({min(one):.3f}-{max(one):.3f})" for one in figures]
        rows.append([f"{name}; read as {reading}", *cells])
        print(rows[-1], flush=True)
    title = f"Attackers of 120 steps, 24 pictures each, mean and range of {len(people)} people"
    return write(root, "own-size-victims", title, ["cloak", "acceptance", "joint ISM"], rows)


def main(arguments: list[str] | None = None) -> None:
    """One of the two parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["losses", "victims"])
    parser.add_argument("people", type=Path, help="folder of people, each with set_A, set_B, set_C")
    parser.add_argument("--names", nargs="+", help="of people; all when not given")
    parser.add_argument("--output", type=Path, default=Path("outputs/own-size"), help="folder (%(default)s)")
    args = parser.parse_args(arguments)
    names = args.names or sorted(path.name for path in args.people.iterdir() if path.is_dir())
    people = [Person(args.people, name, args.output) for name in names]
    print({"losses": losses, "victims": victims}[args.part](people, args.output))


if __name__ == "__main__":
    main()
