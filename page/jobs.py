"""Jobs: a folder each, which is all that is known of them. The server may end at any time, and so may a worker.

In a job's folder: ``photos/ID.jpg`` as they came, ``info/ID.json`` with their own names, ``shown/`` with previews,
``settings.json`` once it was started, ``progress.json``, ``run/`` (the folder of ``cli.py fit``), ``test/`` (that of
``cli.py verdict``), ``look/`` (a moment's work on one photo), ``KIND.lock`` while a worker lives, ``KIND.json`` with
how it ended, and ``log``.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from antidreambooth.files import write_json
from page.names import given_names
from page.records import read
from page.texts import say

PHOTOS = 30  # of a job
OLD = 7 * 24 * 60 * 60  # seconds after which a job's folder is named at the start
CLOAK, TEST, ESTIMATE, LOOK, FACES = KINDS = "cloak", "test", "estimate", "look", "faces"  # what a worker may do
WAIT = 10.0  # seconds in which a worker that was started holds its lock
ROOT = Path(__file__).parent.parent
LOOKING = threading.Lock()  # two threads that look at a lock at once would take one another for a worker
WORKER: Sequence[str] = (sys.executable, "-m", "page.worker")
RUNNING = (CLOAK, TEST)  # what takes the whole machine: one at a time, the others wait in a queue
MOMENTS = (ESTIMATE, LOOK, FACES)  # what takes a moment, while the user makes up their mind


class Refused(Exception):  # noqa: N818 (said to the user in a sentence)
    """Something that is not possible now; the message says why."""


def find(home: Path, name: str) -> Path | None:
    """A job's folder by its name; a name is never used as a path before it has the form of one of ours."""
    folder = home / name
    return folder if re.fullmatch(r"[0-9a-f]{16}", name) and folder.is_dir() else None


def everyone(home: Path) -> list[Path]:
    """All jobs' folders, the newest first."""
    found = [folder for folder in home.iterdir() if find(home, folder.name)]
    return sorted(found, key=lambda folder: folder.stat().st_mtime, reverse=True)


def is_old(folder: Path) -> bool:
    """Whether nobody has touched it for a week."""
    return time.time() - folder.stat().st_mtime > OLD


def create(home: Path) -> Path:
    """A new job without photos."""
    folder = home / secrets.token_hex(8)
    for name in ("photos", "info", "shown"):
        (folder / name).mkdir(parents=True, mode=0o700)
    return folder


def photos_of(folder: Path) -> list[dict[str, Any]]:
    """What is known of each photo, in the order in which they came."""
    found = [read(file) for file in (folder / "info").glob("*.json")]
    return sorted((one for one in found if one), key=lambda one: one["came"])


def alive(folder: Path, kind: str) -> bool:
    """Whether a worker is at it: it holds a lock as long as it lives, however it ends."""
    file = folder / f"{kind}.lock"
    if not file.exists():  # to make it would say that somebody has touched the folder
        return False
    lock = FileLock(file)
    with LOOKING:
        try:
            with lock.acquire(timeout=0):
                return False
        except Timeout:
            return True


def busy(folder: Path) -> str | None:
    """What a worker does that uses the photos now."""
    return next((kind for kind in RUNNING if alive(folder, kind)), None)


def start(folder: Path, kind: str) -> None:
    """Starts a worker in a session of its own: it outlives the tab, the server and the terminal's Ctrl-C.

    Raises:
        Refused: one is at it already, or none could be started.
    """
    if alive(folder, kind):
        raise Refused(say("already_started"))
    for name in ("stop", f"{kind}.json", *(("progress.json",) if kind in RUNNING else ())):
        (folder / name).unlink(missing_ok=True)
    apart: dict[str, Any] = {"start_new_session": True}
    if sys.platform == "win32":
        apart = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP | subprocess.CREATE_NO_WINDOW}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}  # nothing is fetched
    with (folder / "log").open("ab") as log:
        worker = subprocess.Popen(  # noqa: S603
            [*WORKER, str(folder), kind],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            **apart,
        )
    threading.Thread(target=worker.wait, daemon=True).start()  # so that an ended one is gone, if the server lives on
    ends = time.monotonic() + WAIT
    while time.monotonic() < ends and worker.poll() is None and not alive(folder, kind):
        time.sleep(0.02)


def stop(folder: Path) -> None:
    """Asks the worker to stop and to keep what there is."""
    if busy(folder) is None:
        raise Refused(say("nothing_runs"))
    (folder / "stop").touch()


def kill(folder: Path, kinds: Sequence[str] = KINDS) -> None:
    """Ends workers of a job at once; what they have written stays."""
    for kind in kinds:
        number = read(folder / f"{kind}.pid").get("pid")
        if number is None or not alive(folder, kind):  # the number may be another program's by now
            continue
        with suppress(psutil.NoSuchProcess):  # it has just ended by itself
            worker = psutil.Process(number)
            if str(folder) not in worker.cmdline():
                continue
            family = [*worker.children(recursive=True), worker]
            for process in family:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(family, timeout=WAIT)


def throw_away(folder: Path) -> None:
    """Ends the work and removes what it made; the photos stay."""
    kill(folder)
    for name in ("run", "test"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("settings.json", "progress.json", "so-far.png", "stop", "log", *(f"{kind}.json" for kind in RUNNING)):
        (folder / name).unlink(missing_ok=True)
    for shown in (folder / "shown").iterdir():
        if shown.is_dir():
            shutil.rmtree(shown, ignore_errors=True)


def remove_photo(folder: Path, file: Path) -> None:
    """Removes a photo, and what was found out about the photos while it was among them."""
    kill(folder, MOMENTS)
    for one in (folder / "info" / f"{file.stem}.json", file, folder / "shown" / f"{file.stem}.jpg"):
        one.unlink(missing_ok=True)
    for moment in MOMENTS:
        (folder / f"{moment}.json").unlink(missing_ok=True)
    shutil.rmtree(folder / LOOK, ignore_errors=True)


def delete(folder: Path) -> None:
    """Ends the work and removes the folder with all that is in it."""
    kill(folder)
    shutil.rmtree(folder)


def begin(folder: Path, settings: dict[str, Any]) -> None:
    """Cloaks a job's photos with these settings; goes on where a worker of the same job was interrupted.

    Raises:
        Refused: there are no photos, or it runs already.
    """
    if not photos_of(folder):
        raise Refused(say("no_photos"))
    if busy(folder):
        raise Refused(say("already_started"))
    kill(folder, MOMENTS)
    write_json(folder / "settings.json", settings)
    start(folder, CLOAK)


def state_of(folder: Path) -> dict[str, Any]:
    """All that the page shows of a job, read from its folder."""
    photos = [{key: one[key] for key in ("id", "name", "width", "height")} for one in photos_of(folder)]
    settings, manifest = read(folder / "settings.json"), read(folder / "run" / "manifest.json")
    ended, kind = read(folder / f"{CLOAK}.json"), busy(folder)
    state: dict[str, Any] = {"id": folder.name, "photos": photos, "settings": settings, "old": is_old(folder)}
    for moment in MOMENTS:
        state[moment] = {"running": alive(folder, moment), **read(folder / f"{moment}.json")}
    progress = read(folder / "progress.json")
    if kind == CLOAK:
        phase = progress.get("phase", "starting")
        how = {"phase": phase, "ends": ends_after(folder), "first": waits_for(folder, progress)}
        return {**state, "state": "working", "progress": {**progress, **how}}
    if manifest:
        result = {"complete": manifest["complete"], "rounds": manifest["rounds"], "photos": changes(folder, manifest)}
        test = {"running": kind == TEST, **read(folder / f"{TEST}.json"), "first": waits_for(folder, progress)}
        return {**state, "state": "done", "result": result, "test": {**test, **tested(folder)}}
    if not settings:
        return {**state, "state": "choosing"}
    message = ended.get("error") or (say("stopped_early") if ended.get("stopped") else say("interrupted"))
    return {**state, "state": "failed", "message": message, "progress": progress, "resumes": bool(checkpoint(folder))}


def brief(folder: Path) -> dict[str, Any]:
    """A job in the list of all of them."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(folder.stat().st_mtime))
    names = [photo["name"] for photo in photos_of(folder)]
    return {"id": folder.name, "state": state_of(folder)["state"], "photos": names, "when": when, "old": is_old(folder)}


def at_work(home: Path) -> dict[str, Any] | None:
    """The job that computes now, which the others wait for."""
    for folder in everyone(home):
        if busy(folder) and read(folder / "progress.json").get("phase") != "queued":
            return brief(folder)
    return None


def waits_for(folder: Path, progress: dict[str, Any]) -> dict[str, Any] | None:
    """Whose turn it is, where it is not this job's."""
    return at_work(folder.parent) if progress.get("phase") == "queued" and busy(folder) else None


def ends_after(folder: Path) -> bool:
    """Whether it was asked to stop."""
    return (folder / "stop").exists()


def checkpoint(folder: Path) -> Path | None:
    """Where an interrupted run resumes."""
    file = folder / "run" / "checkpoints" / "last.ckpt"
    return file if file.is_file() else None


def changes(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Each cloaked photo: its number, the name that it is given back with, and what its file has no more."""
    entries = {Path(entry["source"]).stem: entry for entry in manifest["photos"]}
    known = [one for one in photos_of(folder) if one["id"] in entries]
    names = given_names([(one["name"], Path(entries[one["id"]]["cloaked"]).suffix) for one in known])
    return [
        {"id": one["id"], "name": name, "removed": entries[one["id"]].get("removed", [])}
        for one, name in zip(known, names, strict=True)
    ]


def cloaked(folder: Path, photo: str) -> tuple[Path, str] | None:
    """A cloaked photo's file and the name that it is given back with."""
    manifest = read(folder / "run" / "manifest.json")
    files = {Path(entry["source"]).stem: folder / "run" / entry["cloaked"] for entry in manifest.get("photos", [])}
    names = {one["id"]: one["name"] for one in changes(folder, manifest)} if manifest else {}
    return (files[photo], names[photo]) if photo in names else None


def original(folder: Path, photo: str) -> Path | None:
    """A photo's file as it came."""
    info = read(folder / "info" / f"{photo}.json") if re.fullmatch(r"[0-9a-f]{16}", photo) else {}
    return folder / "photos" / f"{photo}{info['suffix']}" if info else None


def tested(folder: Path) -> dict[str, Any]:
    """How far the test is, and what it found for each kind of photos that is done."""
    from page.outcome import left, outcome  # reads tables; not needed before

    cells, begun = folder / "test" / "cells", folder / f"{TEST}.pid"
    since = begun.stat().st_mtime if begun.is_file() else 0.0
    done = len([*cells.glob("*/cell.json")])
    return {"done": done, "left": left(cells, since), "figures": outcome(cells)}
