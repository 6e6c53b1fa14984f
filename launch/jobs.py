"""Shares of an experiment as jobs, through submitit: processes on this machine or a SLURM array."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import submitit
import torch
from submitit.helpers import CommandFunction
from tqdm import tqdm

from antidreambooth.errors import InputError
from launch.experiment import Launcher

POLL = 2.0  # seconds between two looks at what is finished


def workers_of(launcher: Launcher) -> int:
    """Jobs at a time: as asked for, else one for each GPU, or each two CPU threads' worth of cores."""
    if launcher.workers is not None:
        return max(1, launcher.workers)
    return torch.cuda.device_count() or len(os.sched_getaffinity(0))


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
        InputError: there is no such cluster, or a job died (things that failed inside it do not raise).
    """
    if launcher.cluster not in ("local", "slurm"):
        raise InputError(f"--launcher.cluster is local or slurm, got {launcher.cluster}")
    executor = submitit.AutoExecutor(folder=logs, cluster=launcher.cluster)
    executor.update_parameters(name=title, timeout_min=launcher.timeout_min, **launcher.parameters)
    with executor.batch():
        jobs = [
            executor.submit(CommandFunction(command, verbose=True, env=_environment(launcher, number, len(commands))))
            for number, command in enumerate(commands)
        ]
    try:
        with tqdm(total=total, initial=done(), desc=title, unit="", file=sys.stdout, dynamic_ncols=True) as bar:
            while not all(job.done() for job in jobs):
                time.sleep(POLL)
                bar.update(done() - bar.n)
            bar.update(done() - bar.n)
    except BaseException:
        for job in jobs:
            job.cancel()
        raise
    for job in jobs:
        if (error := job.exception()) is not None:
            last = str(error).strip().splitlines()[-1]
            raise InputError(f"a job ended early ({last}): see {job.paths.stderr}, and run the same command again")


def _environment(launcher: Launcher, number: int, jobs: int) -> dict[str, str]:
    """Local jobs share the cores, and each has a GPU of its own; a cluster gives jobs what they asked for."""
    environment = dict(os.environ)
    if launcher.cluster == "local":
        environment["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // jobs))
        if torch.cuda.device_count():
            environment["CUDA_VISIBLE_DEVICES"] = str(number % torch.cuda.device_count())
    return environment
