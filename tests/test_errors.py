"""Errors that are the user's to mend become one line where they happen; bugs at the same place keep their traceback."""

import errno
import io
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from filelock import FileLock
from huggingface_hub.cli.hf import app
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image, ImageFile
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import CLIPTextModel, CLIPTokenizer

import launch.jobs
import launch.runs
from antidreambooth.diffusion import class_images as class_images_module
from antidreambooth.diffusion import layout
from antidreambooth.diffusion.class_images import class_images
from antidreambooth.diffusion.defaults import Defaults
from antidreambooth.diffusion.layout import resolution_of
from antidreambooth.diffusion.loading import load_backbone
from antidreambooth.diffusion.source import Source, download_command
from antidreambooth.errors import InputError, causes, first_line
from antidreambooth.files import write_atomically, write_json, writing
from antidreambooth.finetuning.full import Full
from antidreambooth.finetuning.textual_inversion import TextualInversion
from antidreambooth.photos import decoding
from antidreambooth.photos.captioned import read_pictures
from antidreambooth.photos.decoding import decode
from callbacks import CloakedPhotos, TrainedModel
from callbacks.disk_space import require_writable
from cli import CommandLine, main, memory_is_full
from launch.jobs import Launcher, run_jobs
from launch.runs import cloak_photos
from lightning_modules import ASPL, FSMG, AtomicCheckpointIO, TensorBoardLog, Victim
from lightning_modules.running import atomic_checkpoint
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.*"),  # lightning's own
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),  # LightningCLI's
]
FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
HINT = "(ANTIDREAMBOOTH_DEBUG=1 shows where)"
OUT_OF_MEMORY = torch.OutOfMemoryError(
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 7.79 GiB of which 1.00 GiB is free."
)
BUGS = [  # of ours, or of a library, that no place may translate
    AttributeError("'NoneType' object has no attribute 'shape'"),
    TypeError("unsupported operand"),
    KeyError("weight"),
    MemoryError(),
    OUT_OF_MEMORY,
    RuntimeError("CUDA error: device-side assert triggered"),
]
bugs = pytest.mark.parametrize("bug", BUGS, ids=lambda bug: type(bug).__name__)


@pytest.fixture(autouse=True)
def _of_the_command_line(monkeypatch):
    """LightningCLI warns about arguments of the process beside the given ones."""
    monkeypatch.setattr(sys, "argv", ["cli.py"])
    monkeypatch.delenv("ANTIDREAMBOOTH_DEBUG", raising=False)


@pytest.fixture
def words(small_model, photos, tmp_path):
    """The command line of a cloaking run of one small round; more can be added."""

    def build(*more, config="aspl"):
        learning = ["--model.surrogate.learning_rate=1e-3", "--model.surrogate.prior.images=4"]
        return [
            "fit",
            f"--config={ROOT / 'configs' / config}.yaml",
            f"--data.photos={photos}",
            f"--model.backbone={small_model}",
            *(learning if config == "aspl" else []),
            "--trainer.accelerator=cpu",
            "--trainer.precision=32-true",
            "--trainer.max_epochs=1",
            f"--trainer.default_root_dir={tmp_path / 'out'}",
            *more,
        ]

    return build


def raising(error):
    """Something that fails, whatever it is given."""

    def fail(*args, **kwargs):
        raise error

    return fail


def told(arguments):
    """The one line that a command ends with, which is followed by how to see more."""
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    line, hint = str(stopped.value).split("\n")
    assert hint == HINT
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


# --- the command line ---


def test_what_an_error_was_raised_from_is_followed_and_what_was_being_handled_is_not():
    root = KeyError("root")
    error = ValueError("two\nlines")
    error.__cause__, root.__context__ = root, InputError("handled")
    assert list(causes(error)) == [error, root]
    assert first_line(error) == "two"
    assert first_line(MemoryError()) == "MemoryError"


@bugs
def test_a_bug_in_a_round_keeps_its_traceback(words, monkeypatch, bug):
    monkeypatch.setattr(ASPL, "training_step", raising(bug))
    if bug is OUT_OF_MEMORY:
        assert "the GPU's memory is full" in told(words())
        return
    with pytest.raises(type(bug)) as raised:
        main(words())
    assert raised.value is bug


@pytest.mark.parametrize("handled", [InputError("the user's"), FULL_DISK], ids=["input", "disk"])
def test_a_bug_while_an_error_of_the_users_is_handled_keeps_its_traceback(words, monkeypatch, handled):
    def step(*args):
        try:
            raise handled
        except type(handled):
            raise AttributeError("a bug")  # noqa: B904 (the point: nothing is said about where it comes from)

    monkeypatch.setattr(ASPL, "training_step", step)
    with pytest.raises(AttributeError, match="a bug"):
        main(words())


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EEXIST])
def test_a_refusal_of_the_file_system_is_translated_only_where_we_write(words, monkeypatch, number):
    monkeypatch.setattr(ASPL, "training_step", raising(OSError(number, os.strerror(number))))
    with pytest.raises(OSError, match=os.strerror(number)):
        main(words())


@pytest.mark.parametrize("kind", [ASPL, CloakedPhotos], ids=["module", "callback"])
def test_a_bug_in_a_constructor_is_found_in_the_traceback(words, monkeypatch, kind):
    monkeypatch.setattr(kind, "__init__", signed(kind, raising(AttributeError("a bug"))))
    with pytest.raises(ValueError, match="a bug") as raised:  # jsonargparse's, raised from ours
        main(words())
    assert [type(cause) for cause in causes(raised.value)][-1] is AttributeError


@pytest.mark.parametrize("kind", [ASPL, CloakedPhotos], ids=["module", "callback"])
def test_a_constructor_may_refuse(words, monkeypatch, kind):
    monkeypatch.setattr(kind, "__init__", signed(kind, raising(InputError("this cannot\nbe"))))
    assert told(words()) == "this cannot be"


def signed(kind, function):
    """With the signature of a class's own constructor, which jsonargparse reads."""
    function.__wrapped__ = kind.__init__
    return function


def test_what_the_trainer_refuses_is_one_line(words):
    assert told(words("--trainer.devices=0")).startswith("the trainer refuses its settings (--trainer.*): ")


@pytest.mark.parametrize("error", [MisconfigurationException("a. b"), ValueError("a. b"), MisconfigurationException()])
def test_lightnings_own_types_are_what_the_trainer_refuses_with(words, monkeypatch, error):
    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI.instantiate_trainer", raising(error))
    reason = "a" if str(error) else "MisconfigurationException"
    assert told(words()) == f"the trainer refuses its settings (--trainer.*): {reason}"


@bugs
def test_a_bug_in_making_the_trainer_keeps_its_traceback(words, monkeypatch, bug):
    monkeypatch.setattr("lightning.pytorch.cli.LightningCLI.instantiate_trainer", raising(bug))
    if bug is OUT_OF_MEMORY:
        assert "the GPU's memory is full" in told(words())
        return
    with pytest.raises(type(bug)) as raised:
        main(words())
    assert raised.value is bug


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_the_traceback_of_a_translated_error_is_shown_on_request(words, monkeypatch, tmp_path, capsys, value):
    monkeypatch.setenv("ANTIDREAMBOOTH_DEBUG", value)
    with pytest.raises(SystemExit) as stopped:
        main(words(f"--data.photos={tmp_path / 'nowhere'}"))
    shown = capsys.readouterr().err
    line = f"error: {tmp_path / 'nowhere'} does not exist: give a folder of photos, or one photo"
    if value == "1":
        assert stopped.value.code == line
        assert re.search(r"Traceback.* in find_photos\n.*InputError: ", shown, re.DOTALL)
    else:
        assert stopped.value.code == f"{line}\n{HINT}"
        assert "Traceback" not in shown


# --- memory of a GPU ---


def settings_of_low_memory():
    return [f"--config={ROOT / 'configs' / 'trainer' / 'low-memory.yaml'}", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize(
    ("config", "more", "ways"),
    [
        (
            "aspl",
            [],
            "--model.micro_batch 1, --model.surrogate.gradient_checkpointing true, "
            "-c configs/trainer/low-memory.yaml (a LoRA as the surrogate, too), ",
        ),
        (
            "aspl",
            ["--model.micro_batch=1", "--model.adaptation=LoRA"],
            "--model.surrogate.gradient_checkpointing true, ",
        ),
        (
            "aspl",
            ["--model.micro_batch=1", "--model.adaptation=LoRA", "--model.execution.recorded=true"],
            "--model.execution.recorded false, --model.surrogate.gradient_checkpointing true, ",
        ),
        ("aspl", settings_of_low_memory(), ""),
        ("advdm", [], "--model.micro_batch 1, --model.gradient_checkpointing true, "),
        ("advdm", ["--model.micro_batch=1", "--model.gradient_checkpointing=true"], ""),
    ],
)
def test_a_full_gpu_is_one_line_with_what_the_run_does_not_use_yet(words, monkeypatch, config, more, ways):
    monkeypatch.setattr(FSMG if config == "advdm" else ASPL, "training_step", raising(OUT_OF_MEMORY))
    wanted = f"use {ways}a smaller --model.resolution or a GPU with more memory"
    assert told(words(*more, config=config)) == (
        f"the GPU's memory is full (torch tried to allocate 2.50 GiB): {wanted}"
    )


def test_what_makes_an_ensemble_and_a_victim_smaller(small_model):
    alone = SimpleNamespace(world_size=1, testing=False)
    ensemble = SimpleNamespace(backbones=["embedded"], offload=False)
    several = ASPL(backbone=str(small_model), micro_batch=1)
    several.hparams.ensemble, several._trainer = ensemble, alone  # type: ignore[assignment]
    assert "--model.ensemble.offload true" in several.memory_savers()
    alone.world_size = 2
    assert "--model.ensemble.offload true" not in several.memory_savers()
    victim = Victim(backbone=str(small_model))
    victim._trainer = alone  # type: ignore[assignment]
    assert victim.memory_savers() == [
        "--model.training.gradient_checkpointing true",
        "--model.training.batch_size 1",
        "--model.adaptation LoRA",
    ]
    alone.testing = True
    assert victim.memory_savers() == ["--model.generation.batch 1"]


def test_a_full_gpu_outside_a_run_is_one_line_too(monkeypatch):
    monkeypatch.setattr("cli.COMMANDS", {"people": raising(OUT_OF_MEMORY)})
    assert told(["people"]).endswith(": use a smaller --model.resolution or a GPU with more memory")
    assert "(other words)" in memory_is_full(torch.OutOfMemoryError("other words"), [])


def test_a_full_gpu_shows_its_traceback_on_request(words, monkeypatch, capsys):
    monkeypatch.setenv("ANTIDREAMBOOTH_DEBUG", "1")
    monkeypatch.setattr(ASPL, "training_step", raising(OUT_OF_MEMORY))
    with pytest.raises(SystemExit, match=r"^error: the GPU's memory is full"):
        main(words())
    assert "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.50 GiB" in capsys.readouterr().err


def test_lightning_still_has_the_method_that_knows_of_full_gpus():
    """Private: read in lightning 2.6.6."""
    assert "_run_subcommand" in vars(CommandLine)
    assert hasattr(CommandLine.__mro__[1], "_run_subcommand")


# --- writing ---


class FillsUp(io.RawIOBase):
    """A file whose second write finds no room: torch's writer then loses count, and says only that."""

    def __init__(self):
        self.writes = 0

    def writable(self):
        return True

    def write(self, data):
        self.writes += 1
        if self.writes == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data)


REFUSALS = {
    "disk": (raising(FULL_DISK), "No space left on device; make room"),
    "read-only": (raising(OSError(errno.EROFS, "Read-only file system")), "Read-only file system; make it writable"),
    "safetensors": (lambda: save_file({"a": torch.zeros(2)}, "/nowhere/a"), "No such file or directory; make it"),
    "safetensors 0.5": (raising(SafetensorError("IoError(Os { code: 28, kind: StorageFull })")), "No space left"),
    "torch": (lambda: torch.save({"a": torch.zeros(1000)}, FillsUp()), "No space left on device; make room"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_the_file_system_name_the_file_and_the_reason(name):
    write, words = REFUSALS[name]
    with pytest.raises(InputError, match=f"^a/b.png cannot be written: {words}"), writing(Path("a/b.png")):
        write()
    with pytest.raises(InputError, match=r"; wait$"), writing(Path("a/b.png"), "wait"):
        write()


def test_torchs_writer_says_nothing_of_the_disk():
    with pytest.raises(RuntimeError, match="inline_container") as raised:
        torch.save({"a": torch.zeros(1000)}, FillsUp())  # type: ignore[arg-type]
    assert isinstance(raised.value.__context__, OSError)


NO_REFUSALS = [
    *BUGS,
    KeyboardInterrupt(),
    ConnectionError("the hub, which is no disk"),  # an OSError without a number
    SafetensorError("Error while serializing: invalid dtype"),
    RuntimeError("inline_container: without an error of the file system before"),
]


@pytest.mark.parametrize("bug", NO_REFUSALS, ids=lambda bug: type(bug).__name__)
def test_other_errors_while_writing_keep_their_traceback(bug):
    with pytest.raises(type(bug)) as raised, writing(Path("a.png")):
        raise bug
    assert raised.value is bug


def test_a_bug_while_a_full_disk_is_handled_is_no_full_disk():
    def write():
        try:
            raise FULL_DISK
        except OSError:
            raise RuntimeError("a bug")  # noqa: B904

    with pytest.raises(RuntimeError, match="a bug"), writing(Path("a.png")):
        write()


def test_a_bug_in_writing_atomically_keeps_its_traceback_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        write_atomically(tmp_path / "a", "no bytes")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"file/a\.json cannot be written: .*; make it writable, or choose another"):
        write_json(tmp_path / "file" / "a.json", {})


@pytest.mark.parametrize("bug", [*BUGS, KeyboardInterrupt()], ids=lambda bug: type(bug).__name__)
def test_a_bug_in_saving_a_checkpoint_keeps_its_traceback(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(atomic_checkpoint.torch, "save", raising(bug))
    with pytest.raises(type(bug)) as raised:
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "last.ckpt")
    assert raised.value is bug
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_torch_cannot_write_names_the_disk(tmp_path, monkeypatch):
    save = torch.save
    monkeypatch.setattr(atomic_checkpoint.torch, "save", lambda checkpoint, file: save(checkpoint, FillsUp()))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"last\.ckpt cannot be written: No space left.* go on with --ckpt_path last$"):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(1000)}, tmp_path / "last.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_below_a_file_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"last\.ckpt cannot be written"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


def test_a_result_that_cannot_be_saved_is_named(backbone, tmp_path, monkeypatch):
    module = SimpleNamespace(trained=lambda: backbone, adaptation=Full())
    trainer = SimpleNamespace(is_global_zero=True, default_root_dir=str(tmp_path / "file"))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/model cannot be written"):
        TrainedModel().on_fit_end(trainer, module)  # type: ignore[arg-type]
    trainer.default_root_dir = str(tmp_path)
    monkeypatch.setattr(Full, "save", raising(BUGS[0]))
    with pytest.raises(AttributeError):
        TrainedModel().on_fit_end(trainer, module)  # type: ignore[arg-type]


@bugs
def test_a_bug_in_trying_a_folder_keeps_its_traceback(tmp_path, monkeypatch, bug):
    monkeypatch.setattr(tempfile, "TemporaryFile", raising(bug))
    with pytest.raises(type(bug)):
        require_writable(tmp_path)


def test_a_cache_that_cannot_be_written_is_named(backbone, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot be written: Not a directory; .* XDG_CACHE_HOME"):
        class_images(backbone, "a person", 1, 16)


@pytest.mark.parametrize("bug", [*BUGS, OSError(errno.EIO, "of ours")], ids=lambda bug: type(bug).__name__)
def test_a_bug_in_drawing_class_images_keeps_its_traceback(backbone, tmp_path, monkeypatch, bug):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(class_images_module, "sample", raising(bug))
    with pytest.raises(type(bug)) as raised:
        class_images(backbone, "a person", 1, 16)
    assert raised.value is bug
    (lock,) = (tmp_path / "antidreambooth" / "class-images").glob("*.lock")
    FileLock(lock, timeout=0).acquire().lock.release()  # nobody holds it any more


# --- TensorBoard ---


@pytest.fixture
def log(tmp_path):
    return TensorBoardLog(str(tmp_path), name="", version="tensorboard")


def test_a_log_that_cannot_be_written_is_one_line_before_all_else(words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tensorboard").touch()
    assert re.fullmatch(r".*/out/tensorboard cannot be written: .*; make it writable, .*", told(words()))


@pytest.mark.parametrize("call", ["log_metrics", "save", "finalize"])
def test_a_log_on_a_full_disk_is_one_line(log, monkeypatch, call):
    arguments = {"log_metrics": ({"a": 1.0}, 1), "save": (), "finalize": ("success",)}[call]
    log.log_metrics({"a": 0.0}, 0)
    for name in ("add_scalar", "flush"):
        monkeypatch.setattr(log.experiment, name, raising(FULL_DISK))
    with pytest.raises(InputError, match="tensorboard cannot be written: No space left on device; make room"):
        getattr(log, call)(*arguments)
    log.finalize("failed")  # says nothing more


def test_a_log_that_is_closed_after_an_error_does_not_hide_it(words, monkeypatch):
    flushed = []

    def flush(writer):
        flushed.append(writer)
        raise FULL_DISK

    def step(*args):
        monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.flush", flush)
        raise AttributeError("a bug")

    monkeypatch.setattr(ASPL, "training_step", step)
    with pytest.raises(AttributeError, match="a bug"):
        main(words())
    assert flushed


def test_a_bug_in_logging_keeps_its_traceback(log, monkeypatch):
    with pytest.raises(ValueError, match="you tried to log") as raised:  # Lightning's
        log.log_metrics({"a": object()}, 1)
    assert not isinstance(raised.value.__cause__, OSError)
    monkeypatch.setattr(log.experiment, "flush", raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        log.save()


# --- loading a base model ---

DEAD = [
    OfflineModeIsEnabled("offline"),
    HFValidationError("Repo id must use alphanumeric chars"),
    HfHubHTTPError.__bases__[0]("the connection broke off"),  # of the hub's HTTP client
    OSError("owner/model does not appear to have a file named config.json."),
    SafetensorError("Error while deserializing header: header too small"),
]


@pytest.mark.parametrize("error", DEAD, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTokenizer])
def test_what_libraries_say_of_a_model_is_one_line(small_model, monkeypatch, kind, error):
    monkeypatch.setattr(kind, "from_pretrained", raising(error))
    with pytest.raises(InputError, match=f"cannot be loaded: .*{first_line(error).rstrip('.')}; it must hold"):
        load_backbone(str(small_model))


@bugs
@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTokenizer])
def test_a_bug_in_loading_keeps_its_traceback(small_model, monkeypatch, kind, bug):
    monkeypatch.setattr(kind, "from_pretrained", raising(bug))
    with pytest.raises(type(bug)) as raised:
        load_backbone(str(small_model))
    assert raised.value is bug


@pytest.mark.parametrize("error", DEAD[:3], ids=lambda error: type(error).__name__)
def test_what_the_hub_says_of_a_size_is_one_line(monkeypatch, error):
    monkeypatch.setattr(layout, "hf_hub_download", raising(error))
    with pytest.raises(InputError, match="check the name, the network"):
        resolution_of("owner/model")


@bugs
def test_a_bug_in_asking_the_hub_keeps_its_traceback(monkeypatch, bug):
    monkeypatch.setattr(layout, "hf_hub_download", raising(bug))
    with pytest.raises(type(bug)):
        resolution_of("owner/model")


def test_a_cache_of_the_hub_that_is_full_is_no_dead_network(monkeypatch):
    error = OSError("There was an error when trying to load owner/model")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(layout, "hf_hub_download", raising(error))
    with pytest.raises(InputError, match=r"the hub's cache cannot be written: No space left on device; .*HF_HOME$"):
        resolution_of("owner/model")


def test_weights_of_other_shapes_than_the_configs_are_named(small_model, tmp_path):
    folder = shutil.copytree(small_model, tmp_path / "model")
    file = folder / "text_encoder" / "config.json"
    file.write_text(file.read_text().replace('"intermediate_size": 32', '"intermediate_size": 40'))
    with pytest.raises(InputError, match=r"text_encoder/ .* another shape: \S+fc1\.bias \(\[32\], not \[40\]"):
        load_backbone(str(folder))


@pytest.mark.parametrize("text", ["[1]", "{", '{"learning": 1}', '{"lora": {"steps": 1}}'])
def test_defaults_that_are_none_are_named(tmp_path, text):
    (tmp_path / "antidreambooth.json").write_text(text)
    with pytest.raises(InputError, match=r"antidreambooth\.json cannot be used: .*; its keys are those of Defaults"):
        Defaults.read(tmp_path, Defaults())


def test_a_bug_in_reading_defaults_keeps_its_traceback(tmp_path, monkeypatch):
    (tmp_path / "antidreambooth.json").write_text("{}")
    monkeypatch.setattr("antidreambooth.diffusion.defaults.json.loads", raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        Defaults.read(tmp_path, Defaults())


# --- the download on a machine that has a network ---


def published(small_model, folder):
    """The small model as a hub has models: with pickles, variants, whole checkpoints and a safety checker."""
    shutil.copytree(small_model, folder)
    for part, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        weights = folder / part / f"{stem}.safetensors"
        shutil.copy(weights, folder / part / f"{stem}.fp16.safetensors")
        for other in (f"{stem}.bin", f"{stem}.fp16.bin", f"{stem}.non_ema.safetensors"):
            (folder / part / other).write_text("not read")
    (folder / "safety_checker").mkdir()
    for other in ("safety_checker/model.safetensors", "v1-5-pruned.safetensors", "v1-5-pruned.ckpt", "README.md"):
        (folder / other).write_text("not read")
    return folder


def parsed(line, monkeypatch):
    """What the hub's own client makes of a command line."""
    program, *words = shlex.split(line)
    assert program == "hf"
    seen = {}
    monkeypatch.setattr("huggingface_hub.cli.download.snapshot_download", lambda **given: seen.update(given) or "there")
    with pytest.raises(SystemExit) as ended:
        app(words)
    assert not ended.value.code
    return seen


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_download_brings_what_is_read_and_nothing_else(small_model, tmp_path, monkeypatch, variant):
    hub, folder = published(small_model, tmp_path / "hub"), tmp_path / "folder"
    seen = parsed(download_command(Source("owner/model", "main", variant)), monkeypatch)
    assert (seen["repo_id"], seen["revision"], seen["local_dir"]) == ("owner/model", "main", "FOLDER")
    names = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
    kept = list(
        filter_repo_objects(names, allow_patterns=seen["allow_patterns"], ignore_patterns=seen["ignore_patterns"])
    )
    for name in kept:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(hub / name, folder / name)
        assert (folder / name).read_bytes() != b"not read"
    assert sum(name.endswith(".safetensors") for name in kept) == 3
    assert (
        load_backbone(Source(str(folder), variant=variant)).fingerprint()
        == load_backbone(str(small_model)).fingerprint()
    )


@pytest.mark.parametrize("page", ["cluster.md", "base-models.md"])
def test_the_manual_has_the_same_line(page):
    text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
    assert download_command(Source("NAME")) in text


# --- results, photos, pictures, jobs ---


@bugs
def test_a_bug_in_reading_a_result_keeps_its_traceback(backbone, tmp_path, monkeypatch, bug):
    monkeypatch.setattr("antidreambooth.finetuning.full.load_backbone", raising(bug))
    with pytest.raises(type(bug)) as raised:
        Full().load(backbone, tmp_path)
    assert raised.value is bug


def test_embeddings_of_another_width_are_no_result(backbone, tmp_path):
    save_file({"<sks>": torch.zeros(99)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(InputError, match="holds no result of this victim on this backbone"):
        TextualInversion().load(backbone, tmp_path)


def picture():
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    return data.getvalue()


DECODERS = [OSError("cut"), EOFError(), SyntaxError("broken PNG"), ValueError("tile"), RuntimeError("libheif's")]


@pytest.mark.parametrize("error", DECODERS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("place", ["open", "load"])
def test_what_decoders_say_of_a_photo_is_one_line(monkeypatch, place, error):
    data = picture()
    monkeypatch.setattr(*((Image, "open") if place == "open" else (ImageFile.ImageFile, "load")), raising(error))
    with pytest.raises(InputError, match=r"^a\.png cannot be decoded: it is truncated or damaged"):
        decode(data, "a.png")


@pytest.mark.parametrize(
    "bug", [b for b in BUGS if not isinstance(b, RuntimeError)], ids=lambda bug: type(bug).__name__
)
@pytest.mark.parametrize("place", ["Image.open", "separate", "to_srgb"])
def test_a_bug_in_decoding_keeps_its_traceback(monkeypatch, place, bug):
    monkeypatch.setattr(f"antidreambooth.photos.decoding.{place}", raising(bug))
    with pytest.raises(type(bug)) as raised:
        decode(picture(), "a.png")
    assert raised.value is bug


@pytest.mark.parametrize("bug", [ValueError("ours"), OSError("ours"), RuntimeError("ours")])
def test_what_is_done_with_decoded_pixels_is_ours(monkeypatch, bug):
    monkeypatch.setattr(decoding, "separate", raising(bug))
    with pytest.raises(type(bug), match="ours"):
        decode(picture(), "a.png")


def test_a_bug_in_reading_exif_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(Image.Image, "getexif", raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        decode(picture(), "a.png")


def test_pictures_that_are_none_are_named_and_a_bug_is_not(tmp_path, monkeypatch):
    (tmp_path / "pictures.npy").touch()
    (tmp_path / "captions.json").write_text("[]")
    with pytest.raises(InputError, match=r"the folder must hold pictures\.npy"):
        read_pictures(tmp_path)
    monkeypatch.setattr(np, "load", raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        read_pictures(tmp_path)


def test_jobs_that_cannot_keep_what_they_print_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file/jobs cannot be written"):
        run_jobs([], Launcher(), tmp_path / "file" / "jobs", "people", 0, int)
    monkeypatch.setattr(launch.jobs, "_executor", raising(AttributeError("a bug")))
    with pytest.raises(AttributeError):
        run_jobs([], Launcher(), tmp_path / "jobs", "people", 0, int)


def test_a_full_disk_does_not_hide_why_a_cloak_stopped(tmp_path, monkeypatch):
    written = []

    def write(path, record):
        written.append(path)
        if len(written) > 1:
            raise InputError("no room")

    monkeypatch.setattr(launch.runs, "write_json", write)
    with pytest.raises(AttributeError, match="a bug"):
        cloak_photos(tmp_path / "done.json", {}, "configs/aspl.yaml", {}, raising(AttributeError("a bug")))
    assert [path.name for path in written] == ["begun.json", "begun.json"]
