"""On a busy machine threads give their cores back, and the user is told what would help."""

import os
import subprocess
import sys
import time

import pytest

from launch import waiting
from launch.waiting import SPINS, Meter, advice, others, spin_briefly
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": SPINS}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_threads_spin_briefly_unless_the_user_has_said_how_long(monkeypatch, given, expected):
    monkeypatch.setattr(os, "environ", dict(given))
    spin_briefly()
    assert os.environ == expected


def test_the_command_line_settles_it_before_torch_is_loaded():
    code = (
        "import os, sys\n"
        "seen = []\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n"
        "            seen.append(os.environ.get('GOMP_SPINCOUNT'))\n"
        "sys.meta_path.insert(0, Finder())\n"
        "import cli\n"
        "print(seen)"
    )
    environment = {
        name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    }
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == f"[{SPINS!r}]"


def test_what_other_programs_do_is_not_what_this_one_does():
    before = Meter.read()
    program = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(1.0)
        beside = others(before, Meter.read())
    finally:
        program.kill()
        program.wait()
    assert 0.3 < beside <= len(waiting.usable_cores()) + 0.1
    start = Meter(0.0, 0.0, 0.0)
    assert others(start, Meter(10.0, 15.0, 12.0)) == pytest.approx(0.3)
    assert others(start, Meter(10.0, 11.9, 12.0)) == 0  # clocks tick apart


@pytest.mark.parametrize(
    ("busy", "threads", "idle"), [(0.2, 4, None), (0.8, 4, 3), (0.8, 3, None), (9.0, 4, 1), (9.0, 1, None)]
)
def test_a_thread_for_each_idle_core_is_the_advice(monkeypatch, busy, threads, idle):
    monkeypatch.setattr(waiting, "usable_cores", lambda: [0, 1, 2, 3])
    line = advice(busy, threads)
    assert (f"OMP_NUM_THREADS={idle} before" in line) if idle else not line
