"""The page's routes. Everything that is known is in the jobs' folders: this process may end at any time."""

from __future__ import annotations

import asyncio
import hashlib
import re
import secrets
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from antidreambooth.errors import InputError
from antidreambooth.files import write_json
from page import jobs
from page.answers import body_of, existing, in_a_sentence, zipped
from page.choices import BUDGETS, settings_of
from page.guard import PHOTO_BYTES, Guard, one_of, sized
from page.models import here
from page.names import clean_name
from page.preview import RefusedPhoto, ask
from page.records import read
from page.texts import say, texts

HERE = Path(__file__).parent
STATIC = {
    "page.css": "text/css",
    "page.js": "text/javascript",
    "choices.js": "text/javascript",
    "compare.js": "text/javascript",
    "icon.svg": "image/svg+xml",
}
LOOKS = ("before", *BUDGETS, *(f"{name}-difference" for name in BUDGETS))
SHOWN = ("before", "after", "difference", "close-before", "close-after", "close-difference")


class Page:
    """The application's handlers.

    Args:
        home: folder of all jobs.
        models: folders with base models, beside the embedded one and the hub's cache.
        rounds: of a run.
    """

    def __init__(self, home: Path, models: list[Path], rounds: int) -> None:
        self.home, self.models, self.rounds = home, models, rounds
        self.comparing = asyncio.Lock()  # a browser asks for several pictures of a photo at once

    def routes(self) -> list[Route]:
        """What may be asked for."""
        job = "/jobs/{job}"
        return [
            Route("/", self.index),
            Route("/favicon.ico", self.icon),
            Route("/static/{name}", self.static),
            Route("/texts", self.words),
            Route("/models", self.base_models),
            Route("/jobs", self.list_jobs),
            Route("/jobs", self.new_job, methods=["POST"]),
            Route(job, self.delete_job, methods=["DELETE"]),
            Route(f"{job}/state", self.state),
            Route(f"{job}/photos", self.add_photo, methods=["POST"]),
            Route(f"{job}/photos/{{photo}}", self.remove_photo, methods=["DELETE"]),
            Route(f"{job}/{{what}}", self.act, methods=["POST"]),
            Route(f"{job}/preview/{{photo}}", self.preview),
            Route(f"{job}/so-far", self.so_far),
            Route(f"{job}/look/{{kind}}", self.looked),
            Route(f"{job}/shown/{{photo}}/{{kind}}", self.shown),
            Route(f"{job}/drawn/{{kind}}/{{number}}", self.drawn),
            Route(f"{job}/download", self.download_all),
            Route(f"{job}/download/{{photo}}", self.download),
        ]

    async def index(self, request: Request) -> Response:
        """The page itself, in the texts' language."""
        html = (HERE / "templates" / "index.html").read_text(encoding="utf-8")
        return HTMLResponse(re.sub(r"\{\{ (\w+) \}\}", lambda found: texts()[found[1]], html))

    async def icon(self, request: Request) -> Response:
        """Browsers ask for this address by themselves."""
        return FileResponse(HERE / "static" / "icon.svg", media_type="image/svg+xml")

    async def static(self, request: Request) -> Response:
        """One of a fixed list of files."""
        name = request.path_params["name"]
        if name not in STATIC:
            raise HTTPException(404, say("not_here"))
        return FileResponse(HERE / "static" / name, media_type=STATIC[name])

    async def words(self, request: Request) -> Response:
        """What the script says."""
        return JSONResponse(texts())

    async def base_models(self, request: Request) -> Response:
        """The base models on this machine; their places stay here."""
        found = await run_in_threadpool(here, self.models)
        hidden = ("source", "pipeline", "card")
        return JSONResponse([{key: value for key, value in one.items() if key not in hidden} for one in found])

    async def list_jobs(self, request: Request) -> Response:
        """Earlier work, the newest first."""
        return JSONResponse(
            await run_in_threadpool(lambda: [jobs.brief(folder) for folder in jobs.everyone(self.home)])
        )

    async def new_job(self, request: Request) -> Response:
        """A folder for photos."""
        return JSONResponse({"id": jobs.create(self.home).name}, status_code=201)

    async def delete_job(self, request: Request) -> Response:
        """Ends its work and removes all of it from this machine."""
        await run_in_threadpool(jobs.delete, self.job(request))
        return JSONResponse({})

    async def state(self, request: Request) -> Response:
        """All that the page shows of a job; asked for every second."""
        return JSONResponse(await run_in_threadpool(jobs.state_of, self.job(request)))

    async def add_photo(self, request: Request) -> Response:
        """Takes a photo as the request's whole body, its name in a header; looks at it in a process of its own."""
        folder = self.choosing(request)
        if len(jobs.photos_of(folder)) >= jobs.PHOTOS:
            raise HTTPException(409, say("too_many", most=jobs.PHOTOS))
        name = clean_name(unquote(request.headers.get("x-name", "")))
        number = secrets.token_hex(8)
        came = folder / "photos" / f".{number}.part"
        seen = hashlib.sha256()
        try:
            with came.open("wb") as file:
                async for piece in sized(request, PHOTO_BYTES):
                    file.write(piece)
                    seen.update(piece)
            same = [one["name"] for one in jobs.photos_of(folder) if one.get("sha256") == seen.hexdigest()]
            if same:
                raise HTTPException(409, say("photo_twice", photo=same[0]))
            preview = folder / "shown" / f"{number}.jpg"
            found = await run_in_threadpool(ask, "look", came, preview)
            came.rename(folder / "photos" / f"{number}{found['suffix']}")
        except RefusedPhoto as refused:
            raise HTTPException(415, str(refused)) from refused
        finally:
            came.unlink(missing_ok=True)
        info = {"id": number, "name": name, "came": time.time(), "sha256": seen.hexdigest(), **found}
        await run_in_threadpool(write_json, folder / "info" / f"{number}.json", info)
        return JSONResponse({"id": number, "name": name}, status_code=201)

    async def remove_photo(self, request: Request) -> Response:
        """Takes a photo out again."""
        folder = self.choosing(request)
        file = self.photo(request, folder)
        await run_in_threadpool(jobs.remove_photo, folder, file)
        return JSONResponse({})

    async def act(self, request: Request) -> Response:
        """What the buttons do."""
        folder, what = self.job(request), request.path_params["what"]
        actions: dict[str, Callable[[Path, dict[str, Any]], None]] = {
            **{kind: partial(self.moment, kind) for kind in jobs.MOMENTS},
            "start": self.start,
            "continue": lambda folder, _: self.go_on(folder),
            "stop": lambda folder, _: jobs.stop(folder),
            "throw-away": lambda folder, _: jobs.throw_away(folder),
            "test": lambda folder, _: self.test(folder),
        }
        if what not in actions:
            raise HTTPException(404, say("not_here"))
        wanted = await body_of(request)
        try:
            await run_in_threadpool(actions[what], folder, wanted)
        except jobs.Refused as refused:
            raise HTTPException(409, str(refused)) from refused
        except InputError as error:  # a full disk, say
            raise HTTPException(507, str(error)) from error
        return JSONResponse(await run_in_threadpool(jobs.state_of, folder))

    def moment(self, kind: str, folder: Path, wanted: dict[str, Any]) -> None:
        """What is found out before the start: how long it takes, what it looks like on a photo, where faces are."""
        photos = jobs.photos_of(folder)
        if photos and not jobs.busy(folder) and not jobs.alive(folder, kind):
            settings = {
                **settings_of(wanted, self.models, self.rounds),
                "whom": "everything",
            }  # which takes as long as any other choice
            photo = one_of(wanted.get("photo", photos[0]["id"]), [one["id"] for one in photos])
            write_json(folder / "wanted.json", {**settings, "photo": photo})
            jobs.start(folder, kind)

    def start(self, folder: Path, wanted: dict[str, Any]) -> None:
        """Cloaks the photos."""
        if read(folder / "settings.json"):
            raise jobs.Refused(say("already_started"))
        jobs.begin(folder, settings_of(wanted, self.models, self.rounds))

    def go_on(self, folder: Path) -> None:
        """Goes on from the last checkpoint, with the settings of before."""
        settings = read(folder / "settings.json")
        if not settings:
            raise jobs.Refused(say("nothing_runs"))
        jobs.begin(folder, settings)

    def test(self, folder: Path) -> None:
        """Trains an attacker on the changed photos, and one on the originals."""
        settings = read(folder / "settings.json")
        if not read(folder / "run" / "manifest.json") or not settings["model"]["testable"]:
            raise jobs.Refused(say("no_test"))
        if jobs.busy(folder):
            raise jobs.Refused(say("already_started"))
        jobs.start(folder, jobs.TEST)

    async def preview(self, request: Request) -> Response:
        """A photo as it came, small."""
        folder = self.job(request)
        return FileResponse(folder / "shown" / f"{self.photo(request, folder).stem}.jpg", media_type="image/jpeg")

    async def so_far(self, request: Request) -> Response:
        """What some of the photos look like now; read at once, as another one takes its place at any time."""
        try:
            return Response((self.job(request) / "so-far.png").read_bytes(), media_type="image/png")
        except FileNotFoundError as error:
            raise HTTPException(404, say("not_here")) from error

    async def looked(self, request: Request) -> Response:
        """What one of the photos looks like at a strength."""
        folder, kind = self.job(request), one_of(request.path_params["kind"], LOOKS)
        return existing(folder / jobs.LOOK / "shown" / f"{kind}.png")

    async def shown(self, request: Request) -> Response:
        """A photo before or after, or the difference; made when it is first asked for, from files without loss."""
        folder, kind = self.job(request), request.path_params["kind"]
        file = self.photo(request, folder)
        changed = jobs.cloaked(folder, file.stem)
        if kind not in SHOWN or changed is None:
            raise HTTPException(404, say("not_here"))
        made = folder / "shown" / file.stem
        picture = made / f"{kind}.png"
        async with self.comparing:
            if not picture.is_file() or picture.stat().st_mtime < changed[0].stat().st_mtime:
                try:
                    await run_in_threadpool(ask, "compare", file, changed[0], made)
                except RefusedPhoto as refused:
                    raise HTTPException(415, str(refused)) from refused
        return existing(picture)

    async def drawn(self, request: Request) -> Response:
        """A picture that a model of the test has drawn."""
        folder, kind, number = self.job(request), request.path_params["kind"], request.path_params["number"]
        found = jobs.tested(folder)["figures"].get(kind)
        if found is None or not number.isdecimal() or int(number) >= len(found["files"]):
            raise HTTPException(404, say("not_here"))
        return existing(folder / "test" / "cells" / found["cell"] / "images" / found["files"][int(number)])

    async def download(self, request: Request) -> Response:
        """A changed photo, with its own name."""
        folder = self.job(request)
        changed = jobs.cloaked(folder, self.photo(request, folder).stem)
        if changed is None or not changed[0].is_file():
            raise HTTPException(404, say("not_here"))
        return FileResponse(changed[0], filename=changed[1], media_type="application/octet-stream")

    async def download_all(self, request: Request) -> Response:
        """All changed photos in a zip file, which is gone once it is sent."""
        folder = self.job(request)
        files = [jobs.cloaked(folder, one["id"]) for one in jobs.photos_of(folder)]
        there = [one for one in files if one is not None]
        if not there:
            raise HTTPException(404, say("not_here"))
        archive = await run_in_threadpool(zipped, there, folder)
        gone = BackgroundTask(archive.unlink, missing_ok=True)
        return FileResponse(archive, filename="photos.zip", media_type="application/zip", background=gone)

    def job(self, request: Request) -> Path:
        """The folder of the job that is asked for.

        Raises:
            HTTPException: 404, there is none.
        """
        folder = jobs.find(self.home, request.path_params["job"])
        if folder is None:
            raise HTTPException(404, say("no_job"))
        return folder

    def choosing(self, request: Request) -> Path:
        """The same of a job that has not been started yet.

        Raises:
            HTTPException: 409, it has.
        """
        folder = self.job(request)
        if read(folder / "settings.json"):
            raise HTTPException(409, say("already_started"))
        return folder

    def photo(self, request: Request, folder: Path) -> Path:
        """The file of the photo that is asked for, as it came.

        Raises:
            HTTPException: 404, there is none.
        """
        file = jobs.original(folder, request.path_params["photo"])
        if file is None:
            raise HTTPException(404, say("not_here"))
        return file


def application(home: Path, port: int, key: str, models: list[Path], rounds: int) -> Guard:
    """The page behind its guard.

    Args:
        home: folder of all jobs.
        port: that the server listens on.
        key: the secret of the printed address.
        models: folders with base models.
        rounds: of a run.
    """
    page = Page(home, models, rounds)
    return Guard(Starlette(routes=page.routes(), exception_handlers={HTTPException: in_a_sentence}), port, key)
