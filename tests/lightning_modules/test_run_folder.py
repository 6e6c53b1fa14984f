"""What is in a run's folder is not lost, by whatever start; what a checkpoint's loading meets is one line."""

import multiprocessing
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from antidreambooth.errors import InputError
from antidreambooth.files import locked, replacing
from antidreambooth.photos.delivery import require_change
from antidreambooth.provenance import cloaked_by, read_manifest
from cli import main
from lightning_modules import ASPL
from lightning_modules.running.atomic_checkpoint import AtomicCheckpointIO
from lightning_modules.running.run_folder import read_checkpoint
from tests.conftest import contents, three_photos
from tests.helpers import files, make_photos, manifest, refused, start, wait_for

TOLD = "--trainer.callbacks+=tests.lightning_modules.told.Told"


@pytest.fixture
def finished(command, tmp_path):
    """A finished run in ``out``; gives what it left there."""
    main(command())
    return files(tmp_path / "out")


def test_a_second_start_is_refused_before_anything_is_computed(command, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(ASPL, "configure_model", lambda self: pytest.fail("it began"))
    refused(command(), "holds a finished run (2 rounds): ", "--trainer.default_root_dir", "--overwrite")
    assert files(tmp_path / "out") == finished


def test_overwriting_replaces_the_result_and_is_not_kept_in_the_config(command, finished, photos, tmp_path):
    (photos / "b.jpg").unlink()
    main(command("--overwrite", "--seed_everything=1"))
    assert sorted(path.name for path in (tmp_path / "out" / "cloaked").iterdir()) == ["a.png", "c.webp"]
    assert files(tmp_path / "out")["a.png"] != finished["a.png"]
    assert "overwrite: false" in (tmp_path / "out" / "tensorboard" / "config.yaml").read_text()
    refused(command(), "holds a finished run")


def test_another_persons_photos_under_the_same_names_are_another_run(command, finished, photos, tmp_path):
    checkpoint = shutil.copy(tmp_path / "out" / "checkpoints" / "last.ckpt", tmp_path / "elsewhere.ckpt")
    for photo in photos.iterdir():
        Image.new("RGB", (24, 20), (10, 200, 30)).save(photo)
    refused(command(), "holds a finished run (2 rounds) of other photos")
    refused(command(f"--ckpt_path={checkpoint}", rounds=3), "holds a finished run (2 rounds) of other photos")
    refused(command("--ckpt_path=last", rounds=3), "made with other settings: photos.a.png")
    assert files(tmp_path / "out") == finished


def test_more_rounds_of_a_finished_run_go_on_from_it(command, finished, tmp_path):
    main(command("--ckpt_path=last", rounds=3))
    main(command(rounds=3, out="whole"))
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def interrupted(arguments: list[str], number: int, epoch: int) -> None:
    """A run to which a signal comes in a round."""
    with pytest.raises(SystemExit):
        main([*arguments, TOLD, f"--trainer.callbacks.number={number}", f"--trainer.callbacks.epoch={epoch}"])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_an_interrupted_run_is_resumed_or_refused(command, tmp_path, number):
    interrupted(command(rounds=5), int(number), 1)
    before = files(tmp_path / "out")
    refused(command(rounds=5), "holds an interrupted run (2 rounds): resume it with --ckpt_path last")
    assert files(tmp_path / "out") == before
    assert not manifest(tmp_path / "out")["complete"]


def test_a_checkpoint_without_a_result_is_not_lost_either(command, finished, tmp_path):
    (tmp_path / "out" / "manifest.json").unlink()
    shutil.rmtree(tmp_path / "out" / "cloaked")
    refused(command(), "holds the checkpoint of another run: resume that with --ckpt_path last")


@pytest.mark.parametrize("flags", [["--overwrite"], ["--ckpt_path=last"]], ids=["overwritten", "resumed"])
def test_an_interruption_leaves_a_finished_result(command, finished, tmp_path, flags, caplog):
    interrupted(command(*flags, rounds=5), int(signal.SIGTERM), 3 if flags == ["--ckpt_path=last"] else 0)
    assert files(tmp_path / "out") == finished
    assert "the finished result of an earlier run stays" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["class images", "before the first round"])
def test_ctrl_c_before_the_first_round_delivers_nothing(command, tmp_path, moment):
    """In a process of its own, as Lightning answers Ctrl-C by ending the process."""
    slow = ["--model.surrogate.prior.images=4000"] if moment == "class images" else ["--model.pgd_steps=100000"]
    process = start(command(*slow))
    caches = Path(os.environ["XDG_CACHE_HOME"]) / "antidreambooth"
    before = len(list(caches.rglob("*.png")))
    if moment == "class images":
        wait_for(lambda: len(list(caches.rglob("*.png"))) > before + 8, process)
    else:
        wait_for(lambda: any((tmp_path / "out" / "tensorboard").glob("events*")), process)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not (tmp_path / "out" / "cloaked").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_files_that_no_run_made_are_not_removed(command, photos, tmp_path):
    own = tmp_path / "out" / "cloaked" / "holiday.png"
    own.parent.mkdir(parents=True)
    shutil.copy(photos / "a.png", own)
    for flags in ([], ["--overwrite"]):
        refused(command(*flags), "holds files that no run there has made (holiday.png)")
    assert own.read_bytes() == (photos / "a.png").read_bytes()


@pytest.mark.parametrize("text", ["{broken", '{"name": "my page"}', "[1]"])
def test_another_programs_manifest_is_left_alone(command, tmp_path, text):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "manifest.json").write_text(text)
    refused(command("--overwrite"), "out/manifest.json", "use another folder")
    assert (tmp_path / "out" / "manifest.json").read_text() == text


# Inputs and outputs


@pytest.mark.parametrize("place", ["", "cloaked", "progress/round-010", "samples", "images"])
def test_photos_where_pictures_are_written_are_refused(command, photos, tmp_path, place):
    folder = tmp_path / "out" / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    photos.rename(folder)
    before = contents(folder)
    refused(command(f"--data.photos={folder}"), "a.png lies where this run writes its own pictures")
    assert contents(folder) == before


def test_so_are_photos_behind_a_link(command, photos, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cloaked").symlink_to(photos)
    before = contents(photos)
    refused(command(), "lies where this run writes its own pictures")
    assert contents(photos) == before


def test_an_output_folder_in_the_photo_folder_is_never_read(command, photos, tmp_path):
    for _ in range(2):
        main(command(f"--trainer.default_root_dir={photos / 'out'}", "--overwrite"))
        assert [entry["source"] for entry in manifest(photos / "out")["photos"]] == ["a.png", "b.jpg", "c.webp"]


@pytest.mark.filterwarnings("ignore:skipped, as no photos. .*manifest.json")
def test_cloaked_photos_are_not_cloaked_again_unless_asked(command, finished, photos, tmp_path):
    cloaked = tmp_path / "out" / "cloaked"
    moved = shutil.copytree(cloaked, tmp_path / "moved")
    shutil.copy(tmp_path / "out" / "manifest.json", moved)
    for folder in (cloaked, tmp_path / "out", moved):
        refused(command(f"--data.photos={folder}", out="more"), "is no original", "--data.again true")
    refused(command(f"--data.clean_photos={cloaked}", out="more"), "is no original")
    main(command(f"--data.photos={cloaked}", "--data.again=true", out="more"))
    assert files(tmp_path / "out") == finished


def test_only_what_a_manifest_names_counts_as_cloaked(finished, photos, tmp_path):
    run = tmp_path / "out"
    for entry in manifest(run)["photos"]:
        assert cloaked_by(run / entry["cloaked"], entry["cloaked_sha256"]) == run
        assert cloaked_by(photos / entry["source"], entry["sha256"]) is None
    assert cloaked_by(run / "cloaked" / "of-mine.png", "0" * 64) is None
    (run / "manifest.json").write_text("of some other program")
    assert cloaked_by(run / "cloaked" / "a.png", entry["cloaked_sha256"]) is None


def test_photos_that_did_not_change_are_not_delivered(command, tmp_path):
    refused(command("--model.step_size=0.01", rounds=1), "no pixel of a.png has changed")
    assert not (tmp_path / "out" / "cloaked").exists()
    assert not (tmp_path / "out" / "manifest.json").exists()
    same = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    changed = same.clone()
    changed[0, 0, 0, 0] = changed[1, 2, 3, 3] = 1
    require_change(same, changed, ["a", "b"])
    changed[1] = 0
    with pytest.raises(InputError, match="no pixel of b has changed"):
        require_change(same, changed, ["a", "b"])


# Checkpoints


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda good, path: path.write_bytes(good[:-100]), "is cut off, damaged or no checkpoint"),
        (lambda good, path: path.write_bytes(good[:3000]), "is cut off, damaged or no checkpoint"),
        (lambda good, path: path.write_bytes(b""), "is cut off, damaged or no checkpoint"),
        (lambda good, path: path.write_text("hello"), "is cut off, damaged or no checkpoint"),
        (lambda good, path: torch.save({"x": torch.zeros(3)}, path), "is no checkpoint of a run"),
        (lambda good, path: torch.save([1, 2], path), "is no checkpoint of a run"),
        (lambda good, path: None, "there is no checkpoint"),
    ],
    ids=["cut", "cut-early", "empty", "text", "alien", "list", "missing"],
)
def test_what_is_no_checkpoint_is_refused_before_anything_is_computed(
    command, finished, tmp_path, monkeypatch, make, message
):
    monkeypatch.setattr(ASPL, "configure_model", lambda self: pytest.fail("it began"))
    path = tmp_path / "other.ckpt"
    make((tmp_path / "out" / "checkpoints" / "last.ckpt").read_bytes(), path)
    refused(command(f"--ckpt_path={path}", out="new"), str(path), message)
    if path.exists():
        path.rename(tmp_path / "out" / "checkpoints" / "last.ckpt")
        refused(command("--ckpt_path=last"), "last.ckpt", message)
    assert files(tmp_path / "out") == finished


def test_weights_best_and_fewer_rounds_are_told(command, finished, small_model):
    weights = small_model / "unet" / "diffusion_pytorch_model.safetensors"
    refused(command(f"--ckpt_path={weights}"), "holds weights and no run")
    refused(command("--ckpt_path=best"), "there is no checkpoint best", "called last")
    refused(command("--ckpt_path=last", rounds=1), "has 2 epochs (rounds) behind it", "--trainer.max_epochs is 1")


def test_last_where_there_is_none_ends_unless_nothing_has_begun(command, tmp_path):
    typo = tmp_path / "typo"
    typo.mkdir()
    (typo / "notes.txt").touch()
    refused(command("--ckpt_path=last", out="typo"), "there is no checkpoint", "typo/checkpoints/last.ckpt")
    main(command("--ckpt_path=last", "--checkpoint.every_n_epochs=9", out="new"))
    for name in ("cloaked", "checkpoints"):  # as a machine that fails before the first checkpoint leaves it
        shutil.rmtree(tmp_path / "new" / name, ignore_errors=True)
    for name in ("manifest.json", "comparison.png"):
        (tmp_path / "new" / name).unlink()
    main(command("--ckpt_path=last", out="new"))
    main(command(out="whole"))
    assert files(tmp_path / "new") == files(tmp_path / "whole")


def test_checkpoints_are_read_without_their_tensors(tmp_path):
    torch.save(
        {"state_dict": {"w": torch.ones(5)}, "epoch": 3, "pytorch-lightning_version": "2.6"}, tmp_path / "a.ckpt"
    )
    assert read_checkpoint(tmp_path / "a.ckpt")["epoch"] == 3
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_checkpoint(tmp_path)


# Two at once


def test_the_second_run_in_a_folder_is_told(command, tmp_path):
    with locked(tmp_path / "out", "go elsewhere"):
        refused(command(), "another run is at work in", "--trainer.default_root_dir")
        main(command(out="elsewhere"))
    main(command())


def test_a_lock_ends_with_its_process(tmp_path):
    def hold(ready: "multiprocessing.synchronize.Event") -> None:
        with locked(tmp_path, "wait"):
            ready.set()
            signal.pause()

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    other = context.Process(target=hold, args=(ready,))
    other.start()
    assert ready.wait(60)
    with pytest.raises(InputError, match="another run is at work"), locked(tmp_path, "wait"):
        pytest.fail("two at once")
    other.kill()
    other.join()
    with locked(tmp_path, "wait"):
        pass


def test_threads_keep_one_another_out_too(tmp_path):
    told: list[str] = []

    def second() -> None:
        try:
            with locked(tmp_path, "wait"):
                told.append("in")
        except InputError as error:
            told.append(str(error))

    with locked(tmp_path, "wait"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
    assert told == [f"another run is at work in {tmp_path}: wait until it has ended, or wait"]


def test_two_writers_of_one_checkpoint_never_mix(tmp_path):
    target = tmp_path / "last.ckpt"

    def write(number: int) -> None:
        for _ in range(10):
            checkpoint = {"who": number, "x": torch.full((200_000 + 50_000 * number,), float(number))}
            AtomicCheckpointIO().save_checkpoint(checkpoint, target)

    writers = [threading.Thread(target=write, args=(number,)) for number in (1, 2)]
    for writer in writers:
        writer.start()
    looks = 0
    while any(writer.is_alive() for writer in writers):
        if target.exists():
            found = torch.load(target, weights_only=True)
            assert (found["x"] == float(found["who"])).all()
            looks += 1
    assert looks > 0
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_what_a_kill_left_half_written_is_removed(command, tmp_path):
    left = tmp_path / "out" / "checkpoints" / ".0123456789abcdef.part"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    main(command())
    assert [path.name for path in left.parent.iterdir()] == ["last.ckpt"]


# Folders that are replaced whole


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    folder = tmp_path / "result"
    with replacing(folder) as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(InputError), replacing(folder) as fresh:
        fresh.write_text("2")
    assert contents(tmp_path) == {"result/a": b"1"}
    with replacing(folder) as fresh:
        assert contents(folder) == {"a": b"1"}
        (fresh / "b").write_text("2")
    assert contents(tmp_path) == {"result/b": b"2"}
    folder.rename(tmp_path / ".result.old")  # killed between the two renames
    with pytest.raises(KeyError), replacing(folder) as fresh:
        raise KeyError
    assert contents(tmp_path) == {"result/b": b"2"}


def test_a_full_disk_leaves_the_old_result(tmp_path, monkeypatch):
    with replacing(tmp_path / "result") as fresh:
        (fresh / "a").write_text("1")
    with pytest.raises(InputError, match="cannot be written: No space left"), replacing(tmp_path / "result"):
        raise OSError(28, os.strerror(28))
    assert contents(tmp_path) == {"result/a": b"1"}


# Victims


def test_a_victims_result_is_kept_too(tmp_path, small_model):
    photos = make_photos(tmp_path / "mine", 3, seed=1)
    base = [f"--config={Path('configs/dreambooth.yaml').resolve()}", f"--model.backbone={small_model}"]
    base += ["--trainer.accelerator=cpu", "--trainer.precision=32-true", f"--trainer.default_root_dir={tmp_path / 'v'}"]
    base += ["--model.training.steps=2", "--model.training.prior.weight=0", "--model.training.learning_rate=1e-3"]
    main(["fit", *base, f"--data.photos={photos}"])
    before = contents(tmp_path / "v" / "model")
    refused(["fit", *base, f"--data.photos={photos}"], "holds a finished run (2 steps)", "--overwrite")
    others = three_photos(tmp_path / "others")
    refused(["fit", *base, f"--data.photos={others}"], "holds a finished run (2 steps) of other photos")
    assert contents(tmp_path / "v" / "model") == before
    (tmp_path / "v" / "measures.json").write_text("{}")
    test = ["test", *base, f"--data.reference_photos={photos}"]
    refused(test, "holds the figures of a finished test", "--overwrite")
    refused([*test, "--ckpt_path=last"], "a test reads the result that `fit` left")
    main(["fit", *base, f"--data.photos={others}", "--overwrite"])
    assert contents(tmp_path / "v" / "model") != before
    assert not (tmp_path / "v" / "measures.json").exists()  # it was of the model before
    record = read_manifest(tmp_path / "v")
    assert record is not None
    assert list(record["photos"]) == ["a.png", "b.jpg", "c.webp"]
