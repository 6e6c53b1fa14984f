"""The true worker with a ``cli.py`` that computes nothing."""

import sys
from pathlib import Path

from page import worker

worker.COMMAND = Path(__file__).parent / "fake" / "cli.py"

if __name__ == "__main__":
    worker.main(sys.argv[1:])
