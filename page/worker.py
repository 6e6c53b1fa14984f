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
from page.jobs import CLOAK, ESTIMATE, ROOT, RUNNING, TEST, checkpoint, read
from page.models import words_of
from page.texts import say

COMMAND = ROOT / "cli.py"
LOOK = 0.3  # seconds between two looks at whether it is asked to stop, or whether it is its turn
CHECKPOINTS = {"embedded": 2}  # rounds between two: it is small; of others 10
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
    callbacks: list[dict[str, Any]] = [
        {"class_path": "CloakedPhotos", "init_args": {"every_n_epochs": 0}},
        {"class_path": "ProgressFile", "init_args": {"folder": str(folder)}},
    ]
    words = [
        "fit",
        "--config=configs/aspl.yaml",
        *model,
        f"--data.photos={folder / 'photos'}",
        f"--model.budget={settings['budget']}",
        f"--trainer.max_epochs={settings['rounds']}",
        f"--trainer.default_root_dir={folder / ('estimate' if kind == ESTIMATE else 'run')}",
        f"--trainer.callbacks={json.dumps(callbacks)}",
        "--trainer.enable_progress_bar=false",
        f"--checkpoint.every_n_epochs={CHECKPOINTS.get(settings['model']['source'], 10)}",
        *region(settings["whom"]),
    ]
    if kind == ESTIMATE:
        return [*words, "--dry_run"]
    return [*words, "--ckpt_path=last" if checkpoint(folder) else "--overwrite"]


def region(whom: str) -> list[str]:
    """Where the photos may change."""
    if whom == "everything":
        return []
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
            wanted = "wanted.json" if kind == ESTIMATE else "settings.json"
            words = command(folder, kind, read(folder / wanted))
            run(words, printed)
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
    return {}


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
    """Waits until no other job of this machine computes; an estimate takes a moment and waits for nobody.

    Raises:
        Stopped: the user does not want to wait.
    """
    if kind not in RUNNING:
        yield
        return
    lock = FileLock(folder.parent / "queue.lock")
    while not lock.is_locked:
        try:
            lock.acquire(timeout=LOOK)
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
        while not over.wait(LOOK):
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
    if kind not in (CLOAK, TEST, ESTIMATE):
        sys.exit(f"a worker does {CLOAK}, {TEST} or {ESTIMATE}, not {kind}")
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
