"""A page without a browser: Starlette's client stands in for it."""

import io
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from page import jobs
from page.server import application
from tests.conftest import ROOT

PORT = 8421
OWN = f"http://127.0.0.1:{PORT}"
KEY = "k" * 43


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "page"
    folder.mkdir(mode=0o700)
    return folder


@pytest.fixture
def stranger(home):
    """Somebody without the key."""
    return TestClient(application(home, PORT, KEY, [], 3), base_url=OWN, follow_redirects=False)


@pytest.fixture
def client(stranger):
    """The browser to which the key was given."""
    assert stranger.get("/", params={"token": KEY}).status_code == 303
    stranger.headers["origin"] = OWN
    return stranger


@pytest.fixture
def job(client):
    return client.post("/jobs").json()["id"]


@pytest.fixture
def folder(home, job):
    return home / job


def picture(kind: str = "JPEG", size: tuple[int, int] = (40, 30), seed: int = 0, **how) -> bytes:
    """A photo of noise; each seed's is another one."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind, **how)
    return data.getvalue()


def add(client: TestClient, job: str, data: Any, name: str = "me.jpg"):
    return client.post(f"/jobs/{job}/photos", content=data, headers={"x-name": quote(name)})


def settled(folder, kind: str = jobs.CLOAK, seconds: float = 20.0) -> dict:
    """The job's state once its worker has ended."""
    ends = time.monotonic() + seconds
    while jobs.alive(folder, kind):
        assert time.monotonic() < ends, (folder / "log").read_text()
        time.sleep(0.02)
    return jobs.state_of(folder)


@pytest.fixture
def fake(monkeypatch):
    """Workers run a script of a few lines in place of ``cli.py``; says how many seconds its rounds take."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs, "WORKER", (sys.executable, str(Path(__file__).with_name("fake_worker.py"))))

    def rounds(seconds: float = 0.02, error: str = "") -> None:
        monkeypatch.setenv("FAKE_SECONDS", str(seconds))
        monkeypatch.setenv("FAKE_ERROR", error)

    rounds()
    return rounds
