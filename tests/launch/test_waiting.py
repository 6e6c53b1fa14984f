"""On a busy machine a run takes a thread for each idle core."""

import subprocess
import sys
import time

import pytest

from launch import waiting
from launch.waiting import Meter, others, threads_beside


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
    ("busy", "threads", "chosen"), [(0.2, 4, 4), (0.8, 4, 3), (0.8, 3, 3), (0.8, 2, 2), (9.0, 4, 1), (9.0, 1, 1)]
)
def test_a_thread_for_each_idle_core(monkeypatch, busy, threads, chosen):
    monkeypatch.setattr(waiting, "usable_cores", lambda: [0, 1, 2, 3])
    assert threads_beside(busy, threads) == chosen
