"""From photos to changed photos without a browser and without computing: a few lines stand in for ``cli.py``."""

import io
import json
import os
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import psutil
import pytest
from filelock import FileLock
from PIL import Image, ImageChops

from page import jobs, server, worker
from page.command import name_old
from page.outcome import left
from page.records import read
from page.texts import say
from tests.conftest import ROOT
from tests.page.conftest import add, picture, settled

pytestmark = pytest.mark.usefixtures("fake")


def state(client, job) -> dict:
    return client.get(f"/jobs/{job}/state").json()


def until(client, job, wanted, seconds: float = 15.0) -> dict:
    """The job's state as soon as ``wanted`` holds of it."""
    ends = time.monotonic() + seconds
    while not wanted(found := state(client, job)):
        assert time.monotonic() < ends, found
        time.sleep(0.02)
    return found


def at_work(found: dict) -> bool:
    return found["state"] == "working" and found["progress"].get("step", 0) >= 1


def worker_of(folder) -> psutil.Process:
    return psutil.Process(read(folder / "cloak.pid")["pid"])


def test_the_whole_way(client, job, folder):
    assert state(client, job)["state"] == "choosing"
    for seed, (name, kind) in enumerate((("Me and you.JPG", "JPEG"), ("scan.png", "PNG"), ("scan.jpeg", "JPEG"))):
        number = add(client, job, picture(kind, seed=seed), name).json()["id"]
        preview = client.get(f"/jobs/{job}/preview/{number}")
        assert Image.open(io.BytesIO(preview.content)).format == "JPEG"
    assert client.delete(f"/jobs/{job}/photos/{add(client, job, picture(seed=3)).json()['id']}").is_success
    started = client.post(f"/jobs/{job}/start", json={"strength": "strong", "whom": "faces"}).json()
    assert started["state"] == "working"
    assert (started["settings"]["budget"], started["settings"]["rounds"]) == (16, 3)
    found = settled(folder)
    assert found["state"] == "done"
    assert found["result"]["complete"] is True
    names = [photo["name"] for photo in found["result"]["photos"]]
    assert names == ["Me and you.png", "scan.png", "scan-2.png"]
    first = found["result"]["photos"][0]["id"]
    for kind in server.SHOWN:
        shown = client.get(f"/jobs/{job}/shown/{first}/{kind}")
        assert Image.open(io.BytesIO(shown.content)).size == (40, 30) if "close" not in kind else (30, 30)
    one = client.get(f"/jobs/{job}/download/{first}")
    assert "Me%20and%20you.png" in one.headers["content-disposition"]
    everything = client.get(f"/jobs/{job}/download")
    with zipfile.ZipFile(io.BytesIO(everything.content)) as archive:
        assert archive.namelist() == names
        assert archive.read(names[0]) == one.content
    assert [*folder.glob("*.zip")] == []


def test_the_words_for_the_command_line(home):
    model = {"source": "embedded", "pipeline": "StableDiffusionPipeline", "card": 0}
    settings = {"model": model, "budget": 4, "rounds": 50, "whom": "largest"}
    words = worker.command(home / "job", jobs.CLOAK, settings)
    assert words[:2] == ["fit", "--config=configs/aspl.yaml"]
    expected = {"--model.budget=4", "--data.region.faces=largest", "--data.region.widths=2", "--overwrite"}
    assert expected <= {*words}
    assert worker.command(home / "job", jobs.ESTIMATE, settings)[-1] == "--dry_run"
    assert "--data.region" not in " ".join(worker.command(home / "job", jobs.CLOAK, {**settings, "whom": "everything"}))
    large = {**model, "source": "/models/sd", "card": 12}
    words = worker.command(home / "job", jobs.CLOAK, {**settings, "model": large})
    assert words.index("--config=configs/trainer/low-memory.yaml") > words.index("--config=configs/aspl.yaml")
    assert "--model.backbone=/models/sd" in words
    assert "low-memory" not in " ".join(
        worker.command(home / "job", jobs.CLOAK, {**settings, "model": {**large, "card": 24}})
    )


def test_twice_is_once(client, job, folder, fake):
    fake(0.2)
    add(client, job, picture())
    assert client.post(f"/jobs/{job}/start").status_code == 200
    for what in ("start", "continue", "test"):
        again = client.post(f"/jobs/{job}/{what}")
        assert again.status_code == 409, what
        assert again.json()["error"]
    assert add(client, job, picture()).status_code == 409
    assert settled(folder)["state"] == "done"


def test_nothing_is_no_job(client, job):
    answer = client.post(f"/jobs/{job}/start")
    assert (answer.status_code, answer.json()["error"]) == (409, "Choose at least one photo.")
    for what in ("stop", "continue", "test"):
        assert client.post(f"/jobs/{job}/{what}").status_code == 409


def queued_behind(client, job) -> str:
    """Another job, started while one is at work; given back once it waits."""
    second = client.post("/jobs").json()["id"]
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    until(client, job, at_work)
    add(client, second, picture())
    client.post(f"/jobs/{second}/start")
    until(client, second, lambda found: (found["progress"] or {}).get("phase") == "queued")
    return second


def test_one_job_at_a_time_across_processes(client, job, folder, home, fake):
    fake(1.0)
    second = queued_behind(client, job)
    waiting = state(client, second)["progress"]
    assert (waiting["first"]["id"], waiting["first"]["photos"]) == (job, ["me.jpg"])
    assert state(client, job)["progress"]["first"] is None
    assert settled(folder)["state"] == "done"
    until(client, second, at_work)
    assert settled(home / second)["state"] == "done"


def test_who_waits_can_leave(client, job, folder, home, fake):
    fake(1.0)
    second = queued_behind(client, job)
    client.post(f"/jobs/{second}/stop")
    found = settled(home / second)
    assert (found["state"], found["message"]) == ("failed", say("stopped_early"))
    assert jobs.alive(folder, jobs.CLOAK)
    client.post(f"/jobs/{job}/throw-away")


def test_stop_keeps_what_there_is_and_it_can_go_on(client, job, folder, fake):
    fake(0.3)
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    until(client, job, at_work)
    assert client.post(f"/jobs/{job}/stop").json()["progress"]["ends"] is True
    stopped = settled(folder)
    assert stopped["state"] == "done"
    assert stopped["result"]["complete"] is False
    assert 1 <= stopped["result"]["rounds"] < 3
    assert client.get(f"/jobs/{job}/download").is_success
    fake()
    client.post(f"/jobs/{job}/continue")
    finished = settled(folder)
    assert finished["result"]["complete"] is True
    begun = read(folder / "run" / "manifest.json")["begun_at"]
    assert begun == stopped["result"]["rounds"]


def test_a_killed_worker_is_interrupted_and_goes_on(client, job, folder, fake):
    fake(0.3)
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    until(client, job, lambda found: at_work(found) and found["progress"]["step"] >= 2)
    worker_of(folder).kill()
    found = settled(folder)
    assert (found["state"], found["resumes"]) == ("failed", True)
    assert "interrupted" in found["message"]
    fake()
    client.post(f"/jobs/{job}/continue")
    assert settled(folder)["result"]["complete"] is True
    assert read(folder / "run" / "manifest.json")["begun_at"] >= 2


def test_a_new_server_finds_it_all(client, job, folder, stranger):
    add(client, job, picture(), "me.jpg")
    client.post(f"/jobs/{job}/start")
    settled(folder)
    (found,) = client.get("/jobs").json()
    assert (found["id"], found["state"], found["photos"], found["old"]) == (job, "done", ["me.jpg"], False)


def test_throwing_away_keeps_the_photos(client, job, folder, fake):
    fake(1.0)
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    until(client, job, lambda found: found["progress"]["phase"] == "working")
    process = worker_of(folder)
    after = client.post(f"/jobs/{job}/throw-away").json()
    assert after["state"] == "choosing"
    assert len(after["photos"]) == 1
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert not (folder / "run").exists()
    fake()
    client.post(f"/jobs/{job}/start")
    assert settled(folder)["state"] == "done"


def test_deleting_leaves_nothing(client, job, folder, home, fake):
    fake(1.0)
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    until(client, job, lambda found: found["progress"]["phase"] == "working")
    process = worker_of(folder)
    assert client.delete(f"/jobs/{job}").is_success
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    assert {one.name for one in home.iterdir()} <= {"queue.lock"}
    assert client.get(f"/jobs/{job}/state").status_code == 404


def test_no_other_program_is_ended(folder):
    """Numbers of processes are used again: a worker's may be another program's by now."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (folder / "cloak.pid").write_text(json.dumps({"pid": other.pid}))
        with FileLock(folder / "cloak.lock"):
            jobs.kill(folder)
        assert other.poll() is None
        other.kill()


def test_many_who_look_at_once_are_no_worker(folder):
    (folder / "cloak.lock").touch()
    with ThreadPoolExecutor(8) as pool:
        assert not any(pool.map(lambda _: jobs.alive(folder, jobs.CLOAK), range(200)))
    with FileLock(folder / "cloak.lock"):
        assert jobs.alive(folder, jobs.CLOAK)


def test_an_error_is_said_in_its_sentence(client, job, folder, fake):
    fake(error="the disk is full: make room")
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    found = settled(folder)
    assert (found["state"], found["message"], found["resumes"]) == ("failed", "the disk is full: make room", False)


def test_the_estimate(client, job, folder):
    add(client, job, picture())
    assert client.post(f"/jobs/{job}/estimate", json={"strength": "weak"}).json()["state"] == "choosing"
    found = settled(folder, jobs.ESTIMATE)
    assert found["state"] == "choosing"
    assert (found["estimate"]["time"], found["estimate"]["faces"]) == ("3 min", 1)
    assert found["estimate"]["running"] is False


def test_the_three_strengths_on_a_photo(client, job, folder):
    dark = io.BytesIO()
    Image.new("RGB", (50, 40), (100, 100, 100)).save(dark, "PNG")
    number = add(client, job, dark.getvalue(), "a.png").json()["id"]
    other = add(client, job, picture(), "b.jpg").json()["id"]
    assert client.post(f"/jobs/{job}/look", json={"photo": "f" * 16}).status_code == 400
    client.post(f"/jobs/{job}/look", json={"photo": number, "strength": "weak"})
    found = settled(folder, jobs.LOOK)
    assert (found["state"], found["look"]["photo"]) == ("choosing", number)
    seen = {}
    for kind in server.LOOKS:
        shown = client.get(f"/jobs/{job}/look/{kind}")
        seen[kind] = Image.open(io.BytesIO(shown.content)).convert("L").getpixel((20, 20))
    levels = {"before": 100, "weak": 104, "usual": 108, "strong": 116}
    stronger = {f"{name}-difference": 128 + 8 * (level - 100) for name, level in levels.items() if name != "before"}
    assert seen == {**levels, **{name: min(255, level) for name, level in stronger.items()}}
    client.delete(f"/jobs/{job}/photos/{other}")  # nothing of a removed photo may be left, nor be mistaken for another
    assert not (folder / "look").exists()
    assert client.get(f"/jobs/{job}/look/weak").status_code == 404


def test_faces_that_are_pressed_become_masks(client, job, folder):
    for data, name in (((ROOT / "examples/photos/obama-1.jpg").read_bytes(), "me.jpg"), (picture(), "noise.jpg")):
        add(client, job, data, name)
    me, noise = (photo["id"] for photo in state(client, job)["photos"])
    found = worker.faces_of(folder)
    ((left, top, right, bottom),) = found[me]
    assert 0 < left < 45 < 55 < right < 100
    assert 0 < top < bottom < 80
    assert found[noise] == []
    (folder / "faces.json").write_text(json.dumps({"found": {**found, me: [[40, 40, 50, 50], [80, 80, 90, 90]]}}))
    for pressed, seen in (({me: [0]}, (255, 0)), ({me: [1]}, (0, 255)), ({}, (255, 255))):
        worker.write_masks(folder, pressed)
        with Image.open(folder / "masks" / f"{me}.png") as mask:
            assert mask.size == (600, 600)
            assert (mask.getpixel((270, 270)), mask.getpixel((510, 510))) == seen
        with Image.open(folder / "masks" / f"{noise}.png") as mask:
            assert mask.getextrema() == (255, 255)
    words = worker.region(folder, {"whom": "pressed"})
    assert words == [f"--data.region.mask={folder / 'masks'}"]


@pytest.mark.parametrize("wrong", [[1], {"../..": [0]}, {"f" * 16: 0}, {"f" * 16: ["0"]}, {"f" * 16: [-1]}])
def test_pressed_faces_are_numbers(client, job, wrong):
    add(client, job, picture())
    answer = client.post(f"/jobs/{job}/start", json={"whom": "pressed", "pressed": wrong})
    assert answer.status_code == 400


def test_the_attackers(client, job, folder):
    add(client, job, picture())
    client.post(f"/jobs/{job}/start")
    settled(folder)
    assert client.post(f"/jobs/{job}/test").json()["test"]["running"] is True
    found = settled(folder, jobs.TEST)["test"]
    figures = {kind: (one["recognised"], one["pictures"]) for kind, one in found["figures"].items()}
    assert figures == {"originals": (1, 1), "changed": (0, 1), "nobody": (0, 1)}
    drawn = client.get(f"/jobs/{job}/drawn/changed/0")
    assert Image.open(io.BytesIO(drawn.content)).getpixel((0, 0)) == (160, 80, 80)
    for place in ("changed/1", "changed/x", "other/0"):
        assert client.get(f"/jobs/{job}/drawn/{place}").status_code == 404


@pytest.mark.parametrize(
    ("trained", "ago", "since", "expected"),
    [
        ([], 0, 0, None),
        ([("base", 3.0)], 0, 0, None),  # which says nothing of how long a training takes
        ([("none", 60.0)], 20, 0, 40),
        ([("base", 3.0), ("none", 60.0)], 100, 10, 50),  # interrupted, and started again ten seconds ago
        ([("none", 60.0)], 90, 0, 0),
        ([("none", 60.0), ("cloaked", 80.0)], 0, 0, 0),
    ],
)
def test_how_long_the_test_still_takes(tmp_path, trained, ago, since, expected):
    now = time.time()
    for protection, seconds in trained:
        record = tmp_path / f"you-{protection}" / "cell.json"
        record.parent.mkdir()
        record.write_text(json.dumps({"protection": protection, "seconds": seconds}))
        os.utime(record, (now - ago, now - ago))
    found = left(tmp_path, now - since if since else 0.0)
    assert found == (expected if expected is None else pytest.approx(expected, abs=2))


def test_old_folders_are_named(client, job, folder, home, capsys):
    name_old(home)
    assert capsys.readouterr().out == ""
    week = time.time() - jobs.OLD - 60
    os.utime(folder, (week, week))
    name_old(home)
    assert job in capsys.readouterr().out
    assert client.get("/jobs").json()[0]["old"] is True


def test_no_name_of_a_photo_gets_into_the_log(client, job, folder, fake):
    add(client, job, picture(), "very private.jpg")
    client.post(f"/jobs/{job}/start")
    settled(folder)
    assert "private" not in (folder / "log").read_text()
    assert "private" not in (folder / "run" / "manifest.json").read_text()


def test_the_server_loads_no_torch():
    code = "import sys, page.server, page.worker, page.command; print({*sys.modules} & {'torch', 'lightning', 'PIL'})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.slow
def test_the_true_worker_goes_on_from_its_checkpoint(client, job, folder, monkeypatch):
    """The embedded model on a small photo: killed once it has a checkpoint, and started again."""
    monkeypatch.setattr(jobs, "WORKER", (sys.executable, "-m", "page.worker"))
    add(client, job, picture("PNG", (64, 48)), "me.png")
    assert client.post(f"/jobs/{job}/start", json={"strength": "usual"}).json()["settings"]["rounds"] == 3
    until(client, job, lambda found: jobs.checkpoint(folder) or found["state"] != "working", 120)
    worker_of(folder).kill()
    found = settled(folder)
    assert (found["state"], found["resumes"]) == ("failed", True), (folder / "log").read_text()
    assert client.post(f"/jobs/{job}/continue").json()["state"] == "working"
    found = settled(folder, seconds=120)
    assert found["state"] == "done", (folder / "log").read_text()
    assert (found["result"]["complete"], found["result"]["rounds"]) == (True, 3)
    assert read(folder / "progress.json")["step"] == 3
    assert Image.open(io.BytesIO((folder / "so-far.png").read_bytes())).size == (128, 128)
    (photo,) = found["result"]["photos"]
    changed = Image.open(io.BytesIO(client.get(f"/jobs/{job}/download/{photo['id']}").content))
    assert (changed.size, photo["name"]) == ((64, 48), "me.png")
    difference = ImageChops.difference(changed, Image.open(io.BytesIO(picture("PNG", (64, 48)))))
    assert 0 < np.asarray(difference).max() <= 8
