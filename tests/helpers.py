"""What tests of several rooms do with the command line: start it, wait for it, read what it wrote."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from antidreambooth.attack.methods import Method
from antidreambooth.attack.objectives import LikelihoodRatio
from antidreambooth.errors import DEBUG
from cli import main
from tests.conftest import ROOT, random_images


def make_photos(folder: Path, count: int, seed: int) -> Path:
    """A new folder of PNGs of 16 pixels, called 0.png, 1.png and so on."""
    folder.mkdir(parents=True)
    for index, picture in enumerate(random_images(count, 16, seed)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


def files(folder: Path) -> dict[str, bytes]:
    """What a cloaking run is for: cloaked photos, manifest, comparison."""
    paths = [*(folder / "cloaked").iterdir(), folder / "manifest.json", folder / "comparison.png"]
    return {path.name: path.read_bytes() for path in paths}


def pixels(path: Path) -> np.ndarray:
    """A picture's pixels, h w 3."""
    with Image.open(path) as image:
        return np.asarray(image)


def manifest(folder: Path) -> dict[str, Any]:
    """What a run says about itself."""
    return json.loads((folder / "manifest.json").read_text())


def denoisers(method: Method) -> int:
    """How many times a denoiser is asked for each image in a PGD step, of each base model."""
    if method.surrogate == "none":
        return 0
    return 2 if isinstance(method.objective(), LikelihoodRatio) else 1


def refused(arguments: list[str], *messages: str) -> None:
    """The command line ends with one line, which holds all of these, and with how to see where it came from."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    line, *hint = str(stopped.value).splitlines()
    assert line.startswith("error: ")
    assert hint == [f"({DEBUG}=1 shows where)"]
    for message in messages:
        assert message in line, line


def fit_of_a_victim(
    model: Path, photos: Path, out: Path, *more: str, config: str = "dreambooth", steps: int = 3
) -> list[str]:
    """The arguments of a few fast steps; more can be added."""
    return [
        "fit",
        f"--config={ROOT / 'configs' / config}.yaml",
        f"--data.photos={photos}",
        f"--model.backbone={model}",
        f"--model.training.steps={steps}",
        "--model.training.learning_rate=1e-2",
        "--model.training.prior.images=4",
        "--trainer.accelerator=cpu",
        "--trainer.precision=32-true",
        f"--trainer.default_root_dir={out}",
        "--checkpoint.every_n_train_steps=2",
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command line in a process of its own, whose errors are in its output."""
    # One thread: two processes of several threads each wait for one another on few cores, a hundred times slower.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "cli.py"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Until it holds; the process has to live until then."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended with {process.returncode}: {process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.01)
