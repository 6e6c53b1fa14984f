"""Tasks of a larger job, shared out over its workers; what fails is written down and does not stop the others."""

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
STOPPED = (None, 1, 128 + signal.SIGTERM)  # exit codes of a run that was told to stop: by Lightning, Ctrl-C, a signal


class Task(NamedTuple):
    """One of them.

    Args:
        record: the file that is there once it is done; what it consists of lies beside it.
        run: does it.
    """

    record: Path
    run: Callable[[], None]


def share_out(
    words: list[str], records: Sequence[Path], launcher: Launcher, logs: Path, title: str, phase: str = ""
) -> None:
    """Starts jobs where something is left to do, each with its share, and shows a bar until all have ended.

    Args:
        words: this project's command line, to which a job's share is added as ``--share``.
        records: of all tasks, done or not.
        launcher: where the jobs run.
        logs: folder of what they print.
        title: of the bar.
        phase: what stands before the share.
    """
    waiting = [record for record in records if not record.is_file()]
    for record in waiting:
        failure(record.parent).unlink(missing_ok=True)
    jobs = min(workers_of(launcher), len(waiting))
    commands = [[sys.executable, str(COMMAND), *words, f"--share={phase}{number}/{jobs}"] for number in range(jobs)]
    if commands:
        run_jobs(commands, launcher, logs, title, len(records), counter(records))


def work(tasks: Sequence[Task], share: str, logs: Path) -> None:
    """A job's part, see ``part``. Base models and class images' latents stay in memory from one to the next.

    Args:
        tasks: of all jobs.
        share: NUMBER/JOBS.
        logs: where the reason is said to be found if one fails.
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
    """One of every JOBS tasks in a row, not always in the same place: every second one may cost most."""
    return [task for place, task in enumerate(tasks) if (place + place // jobs) % jobs == number]


def failure(folder: Path) -> Path:
    """The file that says why a task failed."""
    return folder.with_name(folder.name + ".failed")


def failures(records: Sequence[Path]) -> dict[str, str]:
    """Why those failed that are not there."""
    missing = [record.parent for record in records if not record.is_file()]
    return {f.name: failure(f).read_text(encoding="utf-8") for f in missing if failure(f).is_file()}


def counter(records: Sequence[Path]) -> Callable[[], int]:
    """Counts those that are there, and looks only for those that were not there before: there may be ten thousand."""
    missing = set(records)

    def count() -> int:
        missing.difference_update([record for record in missing if record.is_file()])
        return len(records) - len(missing)

    return count
