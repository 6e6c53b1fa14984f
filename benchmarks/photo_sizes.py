"""What a photo's own size costs: seconds and memory of reading, of a round, and of giving it back, by megapixels.

    python benchmarks/photo_sizes.py                       # 1, 12 and 48 megapixels, the embedded model
    python benchmarks/photo_sizes.py --formats PNG,JPEG    # of the source, 8 bits

Each size runs in a process of its own, so that its peak memory can be read; what the model and the round take is in
the first line, of a photo of the model's own size.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

from benchmarks.tables import write

ROOT = Path(__file__).parents[1]
PORTRAIT = ROOT / "examples" / "photos" / "obama-1.jpg"
SIZES = {"model's": (128, 128), "1": (1152, 864), "12": (4000, 3000), "48": (8000, 6000)}  # megapixels


def photo(size: tuple[int, int], path: Path) -> None:
    """A portrait enlarged to the size, with grain, as a camera has it."""
    with Image.open(PORTRAIT) as image:
        large = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC)).copy()
    rng = np.random.default_rng(0)
    for rows in range(0, len(large), 256):
        part = large[rows : rows + 256]
        part[:] = (part + rng.normal(0, 3, part.shape)).round().clip(0, 255)
    Image.fromarray(large).save(path, quality=95, compress_level=1)  # of JPEG, of PNG


def child(path: Path, rounds: int) -> dict[str, float]:
    """One photo through all three parts."""
    from antidreambooth.attack.methods import METHODS, Assembly, Settings, plain_weights
    from antidreambooth.attack.parametrisation import OwnSize
    from antidreambooth.attack.rounds import alternate
    from antidreambooth.diffusion.loading import load_backbone
    from antidreambooth.diffusion.seeding import Turn
    from antidreambooth.finetuning.dreambooth import DreamBooth, PriorPreservation
    from antidreambooth.photos.delivery import Delivery

    parametrisation, side = OwnSize(), 128
    marks = [time.perf_counter()]
    photos = parametrisation.load(path, side)
    marks.append(time.perf_counter())
    canvas = parametrisation.canvas(photos, side)
    backbone = load_backbone("embedded")
    settings = Settings(training=DreamBooth(prior=PriorPreservation(weight=0.0)))
    assembly = Assembly(METHODS["aspl"], settings)
    assembly.adopt([backbone], lambda *_: None, seed=0)
    seen = canvas.images(canvas.blank)
    surrogates = assembly.surrogates(seen, canvas.lessons(canvas.blank), plain_weights)
    state = canvas.blank + assembly.attack.start(canvas, 0)
    times = []
    for number in range(rounds):
        start = time.perf_counter()
        state = alternate(surrogates, canvas, state, assembly.attack, Turn(number)).state
        times.append(time.perf_counter() - start)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    (finished,) = parametrisation.finish(canvas, state, photos, 8.0, Delivery())
    wrote = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "read": marks[1] - marks[0],
        "round": median(times[1:]),
        "write": wrote,
        "peak_before": before / 2**20,
        "peak": peak / 2**20,
        "largest": finished.file.largest,
        "megabytes": len(finished.file.data) / 1e6,
        "faces": len(canvas.photos[0].faces),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures all sizes, each in its process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="JPEG", help="of the source: JPEG, PNG or both (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="of which the first is warm-up (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/photo-sizes"), help="folder (%(default)s)")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.child:
        print(json.dumps(child(args.child, args.rounds)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in args.formats.split(","):
            for name, size in SIZES.items():
                path = Path(folder) / f"photo{'.jpg' if kind == 'JPEG' else '.png'}"
                photo(size, path)
                words = [sys.executable, "-m", "benchmarks.photo_sizes", f"--child={path}", f"--rounds={args.rounds}"]
                done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"a run failed:\n{done.stderr}")
                found = json.loads(done.stdout.splitlines()[-1])
                seconds = [f"{found[part]:.2f}" for part in ("read", "round", "write")]
                memory = [f"{found[part]:.2f}" for part in ("peak_before", "peak")]
                rows.append([f"{kind}, {name}", *seconds, *memory, f"{found['megabytes']:.1f}", str(found["faces"])])
                print(rows[-1], flush=True)
    header = [
        "megapixels",
        "read, s",
        "round, s",
        "write, s",
        "peak before writing, GiB",
        "peak, GiB",
        "file, MB",
        "faces",
    ]
    print(write(args.output, "photo-sizes", "One photo of each size through the embedded model", header, rows))


if __name__ == "__main__":
    main()
