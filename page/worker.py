"""One process for each job: waits for its turn, runs ``cli.py`` in the job's folder, says how it ended.

Started as ``python -m page.worker FOLDER KIND``. ``cli.py`` runs in this very process, so that one lock tells whether
it lives, and nothing is left behind where it is killed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import runpy
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from antidreambooth.files import write_json
from page.jobs import CLOAK, ESTIMATE, FACES, KINDS, LOOK, ROOT, RUNNING, TEST, checkpoint, original, photos_of
from page.models import words_of
from page.preview import ask
from page.records import read
from page.texts import say

COMMAND = ROOT / "cli.py"
PAUSE = 0.3  # seconds between two looks at whether it is asked to stop, or whether it is its turn
CHECKPOINTS = {"embedded": 2}  # rounds between two: it is small; of others 10
ROUNDS, STRONGEST = 2, 16  # of a look at one photo; weaker changes are the same, scaled down
PICTURES = 8  # that each model of the test draws


class Stopped(Exception):  # noqa: N818 (nothing is wrong)
    """The user wants it to end."""


def command(folder: Path, kind: str, settings: dict[str, Any]) -> list[str]:
    """The command line that does a job, after ``python cli.py``.

    Args:
        folder: of the job.
        kind: what is to be done.
        settings: as the server wrote them.
    """
    model = words_of(settings["model"])
    if kind == TEST:
        return [
            "verdict",
            f"--photos={folder / 'run' / 'cloaked'}",
            f"--clean_photos={folder / 'photos'}",
            f"--folder={folder}",
            "--name=test",
            f"--backbone={settings['model']['source']}",
            f"--generation.images={PICTURES}",
            "--launcher.workers=1",
        ]
    callbacks: list[dict[str, Any]] = [{"class_path": "CloakedPhotos", "init_args": {"every_n_epochs": 0}}]
    if kind == CLOAK:
        callbacks.append({"class_path": "ProgressFile", "init_args": {"folder": str(folder)}})
    one = original(folder, settings["photo"]) if kind == LOOK else None
    words = [
        "fit",
        "--config=configs/aspl.yaml",
        *model,
        f"--data.photos={one or folder / 'photos'}",
        f"--model.budget={STRONGEST if one else settings['budget']}",
        f"--trainer.max_epochs={ROUNDS if one else settings['rounds']}",
        f"--trainer.default_root_dir={folder / ('run' if kind == CLOAK else kind)}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_progress_bar=false",
        f"--checkpoint.every_n_epochs={CHECKPOINTS.get(settings['model']['source'], 10)}",
        *([] if one else region(folder, settings)),
    ]
    if kind == ESTIMATE:
        return [*words, "--dry_run"]
    return [*words, "--ckpt_path=last" if kind == CLOAK and checkpoint(folder) else "--overwrite"]


def region(folder: Path, settings: dict[str, Any]) -> list[str]:
    """Where the photos may change."""
    whom = settings["whom"]
    if whom == "everything":
        return []
    if whom == "pressed":
        return [f"--data.region.mask={folder / 'masks'}"]
    return [f"--data.region.faces={'largest' if whom == 'largest' else 'all'}", "--data.region.widths=2"]


def work(folder: Path, kind: str) -> dict[str, Any]:
    """Does a job when it is its turn; whoever watches the folder sees how far it is.

    Returns:
        How it ended: ``error`` in a line where it could not, ``stopped`` where the user wanted so.
    """
    printed = io.StringIO()
    try:
        if kind in RUNNING:
            write_json(folder / "progress.json", {"phase": "queued"})
        with turn(folder, kind), stopping(folder, kind):
            if kind in RUNNING:
                write_json(folder / "progress.json", {"phase": "starting"})
            settings = read(folder / ("settings.json" if kind in RUNNING else "wanted.json"))
            if kind == FACES:
                return {"found": faces_of(folder)}
            if kind != TEST and settings["whom"] == "pressed":
                write_masks(folder, settings["pressed"])
            run(command(folder, kind, settings), printed)
    except (Stopped, KeyboardInterrupt):
        return {"stopped": True}
    except SystemExit as ended:
        if (folder / "stop").exists():
            return {"stopped": True}
        if ended.code:
            said = re.findall(r"^error: (.+)$", f"{ended.code}\n{printed.getvalue()}", re.MULTILINE)
            return {"error": said[0] if said else say("failed")}
    except Exception:
        traceback.print_exc()
        return {"error": say("failed")}
    if kind == ESTIMATE:
        return estimate(printed.getvalue())
    return {"photo": strengths(folder, settings["photo"])} if kind == LOOK else {}


def faces_of(folder: Path) -> dict[str, Any]:
    """Boxes of the faces of each photo, the largest first, in hundredths of the preview's width and height."""
    from PIL import Image

    from antidreambooth.photos.regions import face_boxes

    found = {}
    for photo in photos_of(folder):
        with Image.open(folder / "shown" / f"{photo['id']}.jpg") as picture:
            sides = picture.size * 2
            boxes = face_boxes(picture.convert("RGB"))
        found[photo["id"]] = [[100 * end / side for end, side in zip(box, sides, strict=True)] for box in boxes]
    return found


def write_masks(folder: Path, pressed: dict[str, list[int]]) -> None:
    """For each photo a picture that is white around the faces that were pressed; all of it where none was."""
    from PIL import Image

    from antidreambooth.photos.regions import widened

    found = read(folder / f"{FACES}.json").get("found", {})
    (folder / "masks").mkdir(exist_ok=True)
    for photo in photos_of(folder):
        size = photo["width"], photo["height"]
        faces = [box for number, box in enumerate(found.get(photo["id"], ())) if number in pressed.get(photo["id"], ())]
        mask = Image.new("L", size, 0 if faces else 255)
        for left, top, right, bottom in faces:
            scaled = (left * size[0], top * size[1], right * size[0], bottom * size[1])
            mask.paste(255, widened(tuple(round(end / 100) for end in scaled), 2.0, size))
        mask.save(folder / "masks" / f"{photo['id']}.png")


def strengths(folder: Path, photo: str) -> str:
    """Writes what a photo looks like at each strength, after a moment's work on it; gives the photo's number."""
    before, (after,) = original(folder, photo), (folder / LOOK / "cloaked").iterdir()
    assert before is not None  # the work was done on it
    ask("strengths", before, after, folder / LOOK / "shown")
    return photo


def run(words: list[str], printed: io.StringIO) -> None:
    """Runs ``cli.py`` as if it had been started with these words."""

    class Both(io.StringIO):
        """What is printed goes to the log and is kept."""

        def write(self, text: str) -> int:
            sys.__stdout__.write(text)  # type: ignore[union-attr]
            return printed.write(text)

        def flush(self) -> None:
            sys.__stdout__.flush()  # type: ignore[union-attr]

    sys.argv = ["cli.py", *words]
    with contextlib.redirect_stdout(Both()):
        runpy.run_path(str(COMMAND), run_name="__main__")


def estimate(printed: str) -> dict[str, Any]:
    """What a dry run says, as the page needs it."""
    time_needed = re.search(r"^time: about ([^(\n]+?)(?: \(|$)", printed, re.MULTILINE)
    faces = re.search(r"a face found in (\d+) of them", printed)
    return {"time": time_needed[1] if time_needed else None, "faces": int(faces[1]) if faces else None}


@contextlib.contextmanager
def turn(folder: Path, kind: str) -> Iterator[None]:
    """Waits until no other job of this machine computes; what takes a moment waits for nobody.

    Raises:
        Stopped: the user does not want to wait.
    """
    if kind not in RUNNING:
        yield
        return
    lock = FileLock(folder.parent / "queue.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=PAUSE)
        except Timeout:
            if (folder / "stop").exists():
                raise Stopped from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def stopping(folder: Path, kind: str) -> Iterator[None]:
    """Inside, the file ``stop`` is Ctrl-C: what there is, is written. Not while the finished result is written."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PAUSE):
            if (folder / "stop").exists() and read(folder / "progress.json").get("phase") != "writing":
                signal.raise_signal(signal.SIGINT)
                return

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has background processes ignore it
    watching = threading.Thread(target=watch, daemon=True)
    if kind in RUNNING:
        watching.start()
    try:
        yield
    finally:
        over.set()


def main(words: list[str]) -> None:
    """Holds the job's lock as long as it works; where another worker has it, there is nothing to do."""
    folder, kind = Path(words[0]), words[1]
    if kind not in KINDS:
        sys.exit(f"a worker does one of {', '.join(KINDS)}, not {kind}")
    if hasattr(os, "nice"):
        os.nice(10)
    lock = FileLock(folder / f"{kind}.lock")
    try:
        lock.acquire(timeout=1)  # the server may be looking at it
    except Timeout:
        return
    with lock:
        write_json(folder / f"{kind}.pid", {"pid": os.getpid()})
        begun = time.monotonic()
        ended = work(folder, kind)
        if folder.is_dir():  # nobody has deleted it meanwhile
            write_json(folder / f"{kind}.json", {**ended, "seconds": round(time.monotonic() - begun)})


if __name__ == "__main__":
    main(sys.argv[1:])
