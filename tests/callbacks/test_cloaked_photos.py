"""Ctrl-C while photos are written: what was there stays whole, and so is what comes in its place."""

import signal

import pytest

from antidreambooth.attack.parametrisation import OwnSize
from antidreambooth.files import replacing
from cli import main
from tests.conftest import contents
from tests.helpers import files, manifest


@pytest.fixture
def ctrl_c(monkeypatch):
    """Ctrl-C after the first photo of each of the next so many times that photos are written."""
    finish, before = OwnSize.finish, signal.getsignal(signal.SIGINT)

    def times(number: int) -> list[str]:
        written: list[str] = []

        def watched(self, canvas, state, photos, *rest):
            begun = len(written)
            for photo, one in zip(photos, finish(self, canvas, state, photos, *rest), strict=True):
                written.append(photo.name)
                yield one
                if len(written) == begun + 1 and len({*written}) == 1 and written.count(photo.name) <= number:
                    signal.raise_signal(signal.SIGINT)  # does nothing where it is ignored

        monkeypatch.setattr(OwnSize, "finish", watched)
        return written

    yield times
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from the first one on


def stopped(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 1


def test_a_finished_result_stays(command, tmp_path, ctrl_c, caplog):
    main(command())
    before = files(tmp_path / "out")
    written = ctrl_c(1)
    stopped(command("--overwrite", "--model.budget=4"))
    assert written == ["a.png"]
    assert files(tmp_path / "out") == before
    assert not [*(tmp_path / "out").glob(".cloaked.*")]
    assert "the finished result of an earlier run stays" in caplog.text


def test_where_there_was_none_the_photos_are_written_from_the_first_on(command, tmp_path, ctrl_c):
    main(command(out="whole"))
    written = ctrl_c(1)
    stopped(command())
    assert written == ["a.png", "a.png", "b.jpg", "c.webp"]
    assert contents(tmp_path / "out" / "cloaked") == contents(tmp_path / "whole" / "cloaked")
    assert manifest(tmp_path / "out")["complete"] is False


def test_a_second_one_leaves_without_them(command, tmp_path, ctrl_c, caplog):
    written = ctrl_c(2)
    stopped(command())
    assert written == ["a.png", "a.png"]
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {"checkpoints"}
    for name in ("cloaked", ".cloaked.part", "manifest.json", "comparison.png"):
        assert not (tmp_path / "out" / name).exists()
    assert "no photo is written" in caplog.text
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    main(command("--ckpt_path=last"))
    assert manifest(tmp_path / "out")["complete"] is True


def test_an_old_folder_is_back_when_the_new_one_does_not_take_its_place(tmp_path, monkeypatch):
    with replacing(tmp_path / "result") as fresh:
        (fresh / "a").write_text("1")
    rename = type(tmp_path).rename

    def interrupted(self, target):
        if self.name == ".result.part":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", interrupted)
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "result") as fresh:
        (fresh / "b").write_text("2")
    assert contents(tmp_path) == {"result/a": b"1"}
