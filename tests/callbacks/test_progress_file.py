"""The file by which another program sees how far a run is."""

import json

import pytest
from PIL import Image

import cli
from callbacks import progress_file


@pytest.fixture
def written(monkeypatch):
    """What is written to ``progress.json``, in order."""
    records: list[dict] = []
    true = progress_file.write_json

    def write(path, record):
        records.append(record)
        true(path, record)

    monkeypatch.setattr(progress_file, "write_json", write)
    return records


def test_it_says_how_far_a_run_is_and_goes_on_with_it(command, tmp_path, written):
    watched = tmp_path / "watched"
    callbacks = [{"class_path": "ProgressFile", "init_args": {"folder": str(watched), "seconds": 0}}]
    flag = f"--trainer.callbacks={json.dumps(callbacks)}"
    cli.main(command(flag, rounds=3))
    phases = [(record["phase"], record["step"], record["steps"]) for record in written]
    rounds = [("working", step, 3) for step in range(4)]
    assert phases == [("preparing", 0, 3), *rounds, ("writing", 3, 3)]
    lefts = [record["left"] for record in written]
    assert lefts[:3] == [None] * 3  # of a single round nothing is known: it does what is done once
    assert lefts[3] > 0
    assert lefts[4] == 0
    assert json.loads((watched / "progress.json").read_text()) == written[-1]
    with Image.open(watched / "so-far.png") as picture:
        assert picture.size == (2 * 16 + 6, 2 * 16 + 6)  # three photos, two in a row, with an edge
    written.clear()
    cli.main(command(flag, "--ckpt_path=last", rounds=5))
    assert [record["step"] for record in written[1:]] == [3, 4, 5, 5]  # before, the checkpoint is not read yet
