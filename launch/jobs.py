"""Shares of an experiment as jobs, through submitit: processes on this machine or a SLURM array."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import submitit
import torch
from submitit import AutoExecutor, Job
from submitit.core.utils import DelayedSubmission
from tqdm import tqdm

from antidreambooth.errors import InputError, require
from antidreambooth.files import writing
from launch.waiting import usable_cores

POLL = 2.0  # seconds between two looks at what is finished
GRACE = 10.0  # seconds that cancelled jobs of this machine have to end
NEVER = 366 * 24 * 60  # minutes


@dataclass(frozen=True)
class Launcher:
    """Where jobs run, through submitit.

    Args:
        cluster: ``local`` or ``slurm``.
        workers: jobs at a time; for ``local`` one for each GPU or CPU core when not given.
        timeout_min: of a SLURM job, in minutes; run the same command again for what was not finished.
        parameters: further ones of submitit, such as ``slurm_partition`` or ``gpus_per_node``.
    """

    cluster: str = "local"
    workers: int | None = None
    timeout_min: int = 24 * 60
    parameters: dict[str, str | int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("workers", self.workers, 1)
        require("timeout_min", self.timeout_min, 1)


def workers_of(launcher: Launcher) -> int:
    """Jobs at a time: as asked for, else one for each GPU, or for each CPU core."""
    if launcher.workers is not None:
        return launcher.workers
    return torch.cuda.device_count() or len(usable_cores())


def run_jobs(
    commands: list[list[str]], launcher: Launcher, logs: Path, title: str, total: int, done: Callable[[], int]
) -> None:
    """Starts one job for each command and shows a bar until all have ended.

    Args:
        commands: command lines.
        launcher: where.
        logs: folder of what the jobs print.
        title: of the bar.
        total: how many things the jobs have to do.
        done: how many are done by now.

    Raises:
        InputError: there is no such cluster, a job died (things that failed inside it do not raise), or Ctrl-C.
    """
    with writing(logs):
        logs.mkdir(parents=True, exist_ok=True)
    executor = _executor(launcher, logs, title)
    with executor.batch():
        jobs = [
            executor.submit(_job(command, _environment(launcher, number, len(commands))))
            for number, command in enumerate(commands)
        ]
    try:
        with tqdm(total=total, initial=done(), desc=title, unit="", file=sys.stdout, dynamic_ncols=True) as bar:
            while not all(job.done() for job in jobs):
                time.sleep(POLL)
                bar.update(done() - bar.n)
                bar.refresh()  # the clock, where nothing was finished
            bar.update(done() - bar.n)
    except BaseException as error:
        _cancel(jobs)
        if isinstance(error, KeyboardInterrupt):
            raise InputError("stopped: run the same command again to go on, what is finished is kept") from error
        raise
    for job in jobs:
        if (failure := job.exception()) is not None:
            reasons = re.findall(r"^RuntimeError: (.+)$", str(failure), re.MULTILINE)
            reason = reasons[-1] if reasons else "it was killed"
            raise InputError(f"a job ended early ({reason}): see {job.paths.stderr}, and run the same command again")


def _executor(launcher: Launcher, logs: Path, title: str) -> AutoExecutor:
    if launcher.cluster not in ("local", "slurm"):
        raise InputError(f"--launcher.cluster is local or slurm, got {launcher.cluster}")
    timeout = launcher.timeout_min if launcher.cluster == "slurm" else NEVER
    try:
        executor = AutoExecutor(folder=logs, cluster=launcher.cluster)
        executor.update_parameters(name=title, timeout_min=timeout, **launcher.parameters)
    except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:  # submitit's, for all of these
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"submitit refuses --launcher {launcher.cluster}: {reason}") from error
    return executor


def _job(command: list[str], environment: dict[str, str] | None) -> Callable[[], None]:
    """A command to be run by submitit; a cancelled job takes it along, as results are written whole or not at all."""

    class Run:  # inside, so that it is sent by value: a job may start where this package is not found
        number: int | None = None  # of the process

        def __call__(self) -> None:
            variables = dict(environment or os.environ)
            if cores := os.environ.get("SLURM_CPUS_PER_TASK"):
                variables.setdefault("OMP_NUM_THREADS", cores)  # torch would count all of the node's
            with subprocess.Popen(command, env=variables) as process:  # noqa: S603
                self.number = process.pid
                try:
                    process.wait()
                except BaseException:
                    process.kill()
                    raise
            if process.returncode:
                raise RuntimeError(f"exit code {process.returncode}")

        def checkpoint(self) -> DelayedSubmission:
            """SLURM takes the machine away: the command stops so that it can be resumed, submitit requeues the job."""
            if self.number is not None:
                os.kill(self.number, signal.SIGTERM)
                # Popen's own wait, which this interrupts, holds a lock.
                os.waitid(os.P_PID, self.number, os.WEXITED | os.WNOWAIT)
            self.number = None
            return DelayedSubmission(self)

    return Run()


def _cancel(jobs: list[Job[None]]) -> None:
    for job in jobs:
        job.cancel()
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(isinstance(job, submitit.LocalJob) and not job.done() for job in jobs):
        time.sleep(0.1)


def _environment(launcher: Launcher, number: int, jobs: int) -> dict[str, str] | None:
    """Local jobs share the cores, and each has a GPU of its own; on a cluster they keep what they are given there."""
    if launcher.cluster != "local":
        return None
    environment = dict(os.environ)
    environment["OMP_NUM_THREADS"] = str(max(1, len(usable_cores()) // jobs))
    if count := torch.cuda.device_count():
        visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        environment["CUDA_VISIBLE_DEVICES"] = (visible or [str(gpu) for gpu in range(count)])[number % count]
    return environment
