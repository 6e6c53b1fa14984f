"""Shares the tasks of a larger job out over workers; a task that fails is written down and does not stop the others."""

from __future__ import annotations

import gc
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from antidreambooth.diffusion.reuse import kept_in_memory
from antidreambooth.files import write_atomically
from launch.jobs import Launcher, run_jobs, workers_of

COMMAND = Path(__file__).parent.parent / "cli.py"
# Exit codes of a run that was told to stop: Lightning's after SIGTERM, its own after Ctrl-C, and that of a signal.
STOPPED = (None, 1, 128 + signal.SIGTERM)


class Task(NamedTuple):
    """Something to be done once.

    Args:
        record: the file that exists once it is done; its results lie in the same folder.
        run: does it.
    """

    record: Path
    run: Callable[[], None]


def share_out(
    words: list[str], records: Sequence[Path], launcher: Launcher, logs: Path, title: str, phase: str = ""
) -> None:
    """Starts jobs that share what is left to do, and shows a progress bar until all of them have ended.

    Starts none where nothing is left.

    Args:
        words: the command line of each job, without ``python cli.py``; its share is added as ``--share``.
        records: the records of all tasks, done or not, see ``Task``.
        launcher: where the jobs run.
        logs: folder for what they print.
        title: of the progress bar.
        phase: written before the share, where a job has to know which of several phases this is.
    """
    waiting = [record for record in records if not record.is_file()]
    for record in waiting:
        failure(record.parent).unlink(missing_ok=True)
    jobs = min(workers_of(launcher), len(waiting))
    commands = [[sys.executable, str(COMMAND), *words, f"--share={phase}{number}/{jobs}"] for number in range(jobs)]
    if commands:
        run_jobs(commands, launcher, logs, title, len(records), counter(records))


def work(tasks: Sequence[Task], share: str, logs: Path) -> None:
    """Does one job's share of the tasks; base models and latents of class images stay in memory between them.

    Args:
        tasks: those of all jobs.
        share: ``NUMBER/JOBS``, see ``part``.
        logs: folder that the record of a failed task names as the place of the traceback.
    """
    number, jobs = map(int, share.split("/"))
    with kept_in_memory():
        for task in part(tasks, number, jobs):
            try:
                task.run()
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and error.code in STOPPED:
                    raise
                traceback.print_exc()
                reason = "its command line is wrong" if str(error) == "2" else str(error) or type(error).__name__
                text = f"{reason.splitlines()[0]} (more in {logs})"
                write_atomically(failure(task.record.parent), text.encode())
            gc.collect()


def part(tasks: Sequence[Task], number: int, jobs: int) -> list[Task]:
    """The tasks of job ``number`` of ``jobs``.

    Every ``jobs``-th task, shifted by one in each block of ``jobs``, so that expensive tasks that recur at a fixed
    interval do not all fall to one job.
    """
    return [task for place, task in enumerate(tasks) if (place + place // jobs) % jobs == number]


def failure(folder: Path) -> Path:
    """The file that says why the task with this folder failed."""
    return folder.with_name(folder.name + ".failed")


def failures(records: Sequence[Path]) -> dict[str, str]:
    """Why tasks failed, by the names of their folders; tasks that nobody has tried yet are left out."""
    missing = [record.parent for record in records if not record.is_file()]
    return {f.name: failure(f).read_text(encoding="utf-8") for f in missing if failure(f).is_file()}


def counter(records: Sequence[Path]) -> Callable[[], int]:
    """Gives a function that counts the records that exist.

    It looks only for those that were missing the last time, as there may be ten thousand of them.
    """
    missing = set(records)

    def count() -> int:
        missing.difference_update([record for record in missing if record.is_file()])
        return len(records) - len(missing)

    return count
