"""The rules for a server on the loopback address, a test for each; what stands in their way is the guard alone."""

import io
import re
import socket
import stat
import subprocess
import sys
import zlib
from itertools import repeat

import numpy as np
import pytest
from PIL import Image
from starlette.websockets import WebSocketDisconnect

from antidreambooth.errors import InputError
from page import command, jobs
from page.guard import CSP, PHOTO_BYTES, read_key
from page.preview import PIXELS
from tests.conftest import ROOT
from tests.page.conftest import KEY, OWN, PORT, add, picture


def test_loopback_only_and_no_flag_to_change_it():
    with command.bound("127.0.0.1", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    options = {word for action in command.parser()._actions for word in action.option_strings}
    assert options == {"-h", "--help", "--port", "--folder", "--models", "--rounds"}
    with command.bound("127.0.0.1", 0) as listener, socket.socket() as other:
        other.settimeout(1)
        with pytest.raises(OSError, match=r"refused|unreachable|no network"):
            other.connect((own_address(), listener.getsockname()[1]))


def own_address() -> str:
    """An address of this machine that is not 127.0.0.1: without another one, a second loopback address."""
    return "127.0.0.2"


def test_a_port_that_is_taken_is_named():
    with command.bound("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} .*--port"):
            command.bound("127.0.0.1", port)


@pytest.mark.parametrize("path", ["/", "/jobs", "/static/page.js", "/texts", "/?token=wrong", "/favicon.ico"])
def test_without_the_key_nothing_is_shown(stranger, path):
    answer = stranger.get(path)
    assert answer.status_code == 401
    assert "terminal" in answer.text


def test_a_wrong_cookie_is_no_key(stranger):
    stranger.cookies.set(f"antidreambooth-{PORT}", "wrong")
    assert stranger.get("/").status_code == 401
    stranger.cookies.set(f"antidreambooth-{PORT + 1}", KEY)
    assert stranger.get("/").status_code == 401


def test_the_key_goes_from_the_address_into_a_cookie(stranger):
    answer = stranger.get("/", params={"token": KEY})
    cookie = answer.headers["set-cookie"].lower()
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert cookie.startswith(f"antidreambooth-{PORT}=")
    assert stranger.get("/").status_code == 200


def test_the_key_is_long_kept_and_nobody_elses(tmp_path):
    home = tmp_path / "page"
    key = read_key(home)
    assert len(key) >= 43  # 32 random bytes
    assert read_key(home) == key
    assert read_key(tmp_path / "other") != key
    assert stat.S_IMODE((home / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1", "127.0.0.1:80", f"127.0.0.1.evil.example:{PORT}", ""])
def test_another_host_is_refused(client, host):
    assert client.get("/", headers={"host": host}).status_code == 421


def test_localhost_is_a_name_of_ours(client):
    assert client.get("/jobs", headers={"host": f"localhost:{PORT}", "origin": f"http://localhost:{PORT}"}).is_success
    assert client.get("/jobs", headers={"host": f"localhost:{PORT}"}).status_code == 403  # 127.0.0.1's page


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", f"http://127.0.0.1:{PORT + 1}", f"https://127.0.0.1:{PORT}"]
)
def test_another_origin_is_refused(client, home, origin):
    for method, path in (("POST", "/jobs"), ("DELETE", "/jobs/0123456789abcdef"), ("GET", "/jobs")):
        assert client.request(method, path, headers={"origin": origin}).status_code == 403
    assert jobs.everyone(home) == []


def test_what_changes_something_needs_an_origin(client, home):
    del client.headers["origin"]
    assert client.post("/jobs").status_code == 403
    assert client.get("/jobs").status_code == 200
    assert jobs.everyone(home) == []


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_a_foreign_page_that_the_browser_names_is_refused(client, site):
    assert client.get("/", headers={"sec-fetch-site": site}).status_code == 403
    assert client.get("/", headers={"sec-fetch-site": "same-origin"}).status_code == 200
    assert client.get("/", headers={"sec-fetch-site": "none"}).status_code == 200


@pytest.mark.parametrize("origin", ["https://evil.example", OWN])
def test_no_other_origin_may_read(client, origin):
    answers = [client.get("/jobs", headers={"origin": origin}), client.options("/jobs", headers={"origin": origin})]
    assert not [name for answer in answers for name in answer.headers if name.startswith("access-control")]


def test_every_answer_carries_the_rules(client, job):
    answers = {
        200: client.get("/"),
        303: client.get("/", params={"token": KEY}),
        400: client.post(f"/jobs/{job}/start", content=b"["),
        404: client.get("/nothing"),
        405: client.put("/"),
        415: add(client, job, b"text"),
        421: client.get("/", headers={"host": "evil.example"}),
    }
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["content-security-policy"] == CSP
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert answer.headers["cross-origin-opener-policy"] == "same-origin"
        assert answer.headers["cache-control"] == "no-store"
    for word in ("default-src 'none'", "frame-ancestors 'none'", "base-uri 'none'", "script-src 'self'"):
        assert word in CSP
    assert "unsafe" not in CSP


def test_websockets_are_closed(client):
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/"):
        pass


def test_nothing_of_the_page_comes_from_elsewhere():
    folder = ROOT / "page"
    for file in [*folder.glob("static/*"), *folder.glob("templates/*")]:
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert not re.findall(r"https?://|url\(|@import|[\"']//", text), file
        assert " style=" not in text, file
        assert "innerHTML" not in text, file  # names of photos are shown as text


def test_a_size_that_is_said_is_believed(client, job, folder):
    answer = client.post(f"/jobs/{job}/photos", content=b"", headers={"content-length": str(PHOTO_BYTES + 1)})
    assert answer.status_code == 413
    assert "40 MB" in answer.json()["error"]
    assert contents(folder) == []


def test_a_size_that_is_not_said_is_counted(client, job, folder):
    came = []

    def pieces():
        for piece in repeat(bytes(2**20), 60):
            came.append(piece)
            yield piece

    assert add(client, job, pieces()).status_code == 413
    assert contents(folder) == []


def test_settings_are_small(client, job):
    assert client.post(f"/jobs/{job}/start", content=bytes(2**17)).status_code == 413


def test_so_many_photos_and_no_more(client, job, folder, monkeypatch):
    monkeypatch.setattr(jobs, "PHOTOS", 1)
    assert add(client, job, picture()).status_code == 201
    answer = add(client, job, picture())
    assert answer.status_code == 409
    assert len([*(folder / "photos").iterdir()]) == 1


def test_a_photo_is_not_taken_twice(client, job, folder):
    number = add(client, job, picture(), "me.jpg").json()["id"]
    before = contents(folder)
    again = add(client, job, picture(), "copy.jpg")
    assert (again.status_code, again.json()["error"]) == (409, "The same photo is there already: me.jpg.")
    assert contents(folder) == before
    assert add(client, job, picture(seed=1), "me.jpg").status_code == 201
    client.delete(f"/jobs/{job}/photos/{number}")
    assert add(client, job, picture(), "copy.jpg").status_code == 201


def of_mode(mode: str, kind: str) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (9, 9), 30_000 if mode == "I;16" else 0).save(data, kind)
    return data.getvalue()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"only a text, called a photo", "It is not a picture."),
        (b"", "not a picture"),
        (picture()[:-600], "cut off"),
        (picture("TIFF")[:-600], "cut off"),
        (of_mode("F", "TIFF"), "floating-point"),
    ],
)
def test_what_is_no_photo_is_refused_with_a_sentence(client, job, folder, what, words):
    answer = add(client, job, what)
    assert answer.status_code == 415
    assert words in answer.json()["error"]
    assert contents(folder) == []


def test_photos_of_every_kind_are_looked_at(client, job, folder):
    for mode, kind in (("I;16", "PNG"), ("1", "PNG"), ("P", "GIF"), ("CMYK", "JPEG"), ("RGBA", "WEBP"), ("L", "BMP")):
        number = add(client, job, of_mode(mode, kind)).json()["id"]
        shown = Image.open(io.BytesIO(client.get(f"/jobs/{job}/preview/{number}").content))
        assert (shown.mode, shown.size) == ("RGB", (9, 9)), kind
        if mode == "I;16":
            assert abs(int(np.asarray(shown).mean()) - 30_000 // 256) <= 1


def test_a_bomb_is_known_by_its_header(client, job, folder):
    side = int(PIXELS**0.5) + 1
    bomb = picture("PNG").replace((40).to_bytes(4, "big") + (30).to_bytes(4, "big"), side.to_bytes(4, "big") * 2, 1)
    header = bomb[12:29]
    bomb = bomb[:29] + zlib.crc32(header).to_bytes(4, "big") + bomb[33:]
    answer = add(client, job, bomb)
    assert answer.status_code == 415
    assert "million pixels" in answer.json()["error"]
    assert contents(folder) == []
    assert client.get("/").status_code == 200


def test_the_decoder_is_a_process_with_limits(client, job, monkeypatch):
    seen = []
    true = subprocess.run

    def run(*words, **how):
        seen.append(words)
        return true(*words, **how)

    monkeypatch.setattr(subprocess, "run", run)
    assert add(client, job, picture()).status_code == 201
    ((command_line,),) = seen
    assert command_line[1:4] == ["-m", "page.preview", "look"]
    code = (
        "import resource as r; from page import preview as p; p.limit(); "
        "print(r.getrlimit(r.RLIMIT_AS)[0] == p.MEMORY, r.getrlimit(r.RLIMIT_CPU)[0] == p.SECONDS)"
    )
    assert true([sys.executable, "-c", code], capture_output=True, text=True).stdout == "True True\n"


@pytest.mark.parametrize(
    "name", ["../../etc/passwd.jpg", "..\\..\\boot.jpg", "/etc/shadow", "a\0b\n.jpg", "", "." * 300]
)
def test_names_are_never_paths(client, job, folder, name):
    assert add(client, job, picture(), name).status_code == 201
    (stored,) = (folder / "photos").iterdir()
    assert re.fullmatch(r"[0-9a-f]{16}\.jpg", stored.name)
    (photo,) = client.get(f"/jobs/{job}/state").json()["photos"]
    assert not set(photo["name"]) & {"/", "\\", "\0", "\n"}
    assert photo["name"].strip(".")
    assert len(photo["name"]) <= 120


@pytest.mark.parametrize("slot", ["%2e%2e", "..%2f..%2fetc%2fpasswd", "%2e%2e%2fkey", "0123456789abcdef", "key", "KEY"])
def test_paths_in_every_slot_lead_nowhere(client, job, folder, slot):
    add(client, job, picture())
    places = [
        f"/jobs/{slot}/state",
        f"/jobs/{job}/preview/{slot}",
        f"/jobs/{job}/shown/{slot}/before",
        f"/jobs/{job}/download/{slot}",
        f"/jobs/{job}/drawn/{slot}/0",
        f"/jobs/{job}/drawn/changed/{slot}",
        f"/static/{slot}",
    ]
    nowhere = (404, 405)  # the latter where it leads to another route, which takes other methods
    assert [client.get(place).status_code in nowhere for place in places] == [True] * len(places)
    assert client.delete(f"/jobs/{slot}").status_code in nowhere
    assert client.delete(f"/jobs/{job}/photos/{slot}").status_code in nowhere
    assert len(contents(folder)) == 3


def test_what_is_shown_is_out_of_a_list(client, job, folder):
    number = add(client, job, picture()).json()["id"]
    for kind in ("before", "after", "original", "key"):
        assert client.get(f"/jobs/{job}/shown/{number}/{kind}").status_code == 404  # nothing is cloaked yet
    for what in ("estimates", "%2e%2e", "kill"):
        assert client.post(f"/jobs/{job}/{what}").status_code == 404


@pytest.mark.parametrize("wrong", [{"strength": "huge"}, {"whom": "me; rm"}, {"model": "/etc"}, {"strength": 8}])
def test_settings_are_words_out_of_a_list(client, job, folder, wrong):
    add(client, job, picture())
    assert client.post(f"/jobs/{job}/start", json=wrong).status_code == 400
    assert not (folder / "settings.json").exists()


def contents(folder) -> list[str]:
    """What lies in a job's folders of photos."""
    return [file.name for name in ("photos", "info", "shown") for file in (folder / name).iterdir()]
