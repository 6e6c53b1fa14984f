"""Leaves behind what ``fit``, ``fit --dry_run`` and ``verdict`` of the true command line leave, a round at a time."""

import json
import os
import sys
import time
from pathlib import Path

from PIL import Image

from antidreambooth.files import write_json
from page.preview import opened, upright

FLAGS = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[2:] if "=" in word)
SECONDS = float(os.environ["FAKE_SECONDS"])


def fit() -> None:
    root, rounds = Path(FLAGS["trainer.default_root_dir"]), int(FLAGS["trainer.max_epochs"])
    callbacks = json.loads(FLAGS["trainer.callbacks"])
    watched = [one["init_args"]["folder"] for one in callbacks if one["class_path"] == "ProgressFile"]
    kept = root / "checkpoints" / "last.ckpt"
    done = int(kept.read_text()) if FLAGS.get("ckpt_path") == "last" else 0
    begun = done
    try:
        while done < rounds:
            for folder in map(Path, watched):
                record = {"phase": "working", "step": done, "steps": rounds, "left": 1.0}
                write_json(folder / "progress.json", record)
                Image.new("RGB", (16, 16)).save(folder / "so-far.part", "PNG")
                (folder / "so-far.part").replace(folder / "so-far.png")
            time.sleep(SECONDS)
            done += 1
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_text(str(done))
    except KeyboardInterrupt:
        deliver(root, done, begun, complete=False)
        sys.exit(1)
    deliver(root, done, begun, complete=True)


def deliver(root: Path, done: int, begun: int, complete: bool) -> None:
    entries = []
    (root / "cloaked").mkdir(parents=True, exist_ok=True)
    source = Path(FLAGS["data.photos"])
    for file in sorted(source.iterdir()) if source.is_dir() else [source]:
        picture = upright(opened(file)).point(lambda level: min(255, level + int(FLAGS["model.budget"])))
        made = root / "cloaked" / f"{file.stem}.png"
        Image.frombytes("RGB", picture.size, picture.tobytes()).save(made)
        entries.append({"source": file.name, "cloaked": f"cloaked/{made.name}"})
    write_json(root / "manifest.json", {"complete": complete, "rounds": done, "photos": entries, "begun_at": begun})


def verdict() -> None:
    for number, protection in enumerate(("base", "none", "cloaked")):
        cell = Path(FLAGS["folder"]) / FLAGS["name"] / "cells" / f"you-{protection}"
        (cell / "images").mkdir(parents=True)
        Image.new("RGB", (16, 16), (80 * number, 80, 80)).save(cell / "images" / "0.png")
        (cell / "per_image.csv").write_text(f"file,accepted\nimages/0.png,{float(number == 1)}\n")
        time.sleep(SECONDS)
        write_json(cell / "cell.json", {"protection": protection, "seconds": 100 * SECONDS})


if reason := os.environ["FAKE_ERROR"]:
    sys.exit(f"error: {reason}\n(ANTIDREAMBOOTH_DEBUG=1 shows where)")
if "--dry_run" in sys.argv:
    print("2 photos, a face found in 1 of them\ntime: about 3 min (50 rounds of 3 s)")
elif sys.argv[1] == "fit":
    fit()
else:
    verdict()
