"""The true page as ``cli.py page`` starts it; its workers compute nothing."""

import sys
from pathlib import Path

from page import command, jobs

jobs.WORKER = (sys.executable, str(Path(__file__).with_name("fake_worker.py")))

if __name__ == "__main__":
    command.main(sys.argv[1:])
