"""Which base models the page offers, and how it starts."""

import json
import subprocess
import sys
import time

import pytest

import cli
from antidreambooth.diffusion.families import FAMILIES
from antidreambooth.photos.formats import FORMATS
from page import models, preview
from page.texts import say
from tests.conftest import ROOT


def a_model(folder, pipeline: str):
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(bytes(1000))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))
    return folder


@pytest.fixture(autouse=True)
def machine(monkeypatch, tmp_path):
    """Without a graphics card and with an empty cache; gives a way to put a card in."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "gigabytes_of_card", lambda: 0)
    return lambda size: monkeypatch.setattr(models, "gigabytes_of_card", lambda: size)


def test_it_knows_what_the_engine_knows():
    assert set(models.KINDS) == set(FAMILIES)
    assert {name for name in FORMATS if name not in ("PPM", "QOI")} == set(preview.READ)


def test_the_embedded_model_is_always_there():
    (found,) = models.here([])
    assert (found["id"], found["able"], found["testable"]) == ("embedded", True, True)
    assert found["bytes"] > 1e7
    assert "non-commercial" in found["terms"]
    assert models.words_of(found) == ["--model.backbone=embedded"]


def test_folders_and_the_cache(tmp_path, machine):
    a_model(tmp_path / "mine" / "sd", "StableDiffusionPipeline")
    a_model(tmp_path / "mine" / "unknown", "SomeOtherPipeline")
    (tmp_path / "mine" / "broken").mkdir()
    (tmp_path / "mine" / "broken" / "model_index.json").write_text("[")
    one = a_model(tmp_path / "cache" / "models--owner--flux" / "snapshots" / "abc", "FluxPipeline")
    names = {found["name"]: found for found in models.here([tmp_path / "mine", tmp_path / "missing"])}
    assert [*names] == [say("model_embedded"), "sd (Stable Diffusion 1 or 2)", "owner/flux (FLUX.1)"]
    flux = names["owner/flux (FLUX.1)"]
    assert (flux["source"], flux["able"], flux["bytes"]) == (str(one), False, 1000)
    assert "graphics card" in flux["why"]
    machine(8)
    _, stable, flux = models.here([tmp_path / "mine"])
    assert (stable["able"], stable["testable"], flux["able"]) == (True, False, False)
    assert "has 8 GB" in flux["why"]
    machine(24)
    _, stable, _ = models.here([tmp_path / "mine" / "sd"])
    assert (stable["able"], stable["testable"]) == (True, True)
    assert "--config=configs/trainer/low-memory.yaml" not in models.words_of(stable)


def test_it_answers_in_a_second(tmp_path):
    """Of a machine that is busy with tests in three; torch alone would take longer."""
    begun = time.monotonic()
    command = [sys.executable, "cli.py", "page", "--port", "0", "--folder", str(tmp_path / "page")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = next(word for word in iter(process.stdout.readline, "") if "http" in word).strip()
            took = time.monotonic() - begun
        finally:
            process.kill()
    assert took < 3
    assert address.startswith("http://127.0.0.1:")


def test_without_the_extra_one_line_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['uvicorn'] = None; sys.argv = ['cli.py', 'page']; import runpy; "
        "runpy.run_path('cli.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: the page needs Starlette and uvicorn: pip install -e '.[page]'\n",
    )


def test_the_command_is_among_the_others(capsys):
    with pytest.raises(SystemExit, match="choose fit, test, people, verdict, fragility, page"):
        cli.main(["pages"])
    cli.main([])
    assert "cli.py page" in capsys.readouterr().out


def test_every_text_is_there_and_used():
    """A translation of texts.json is whole if it has these names."""
    names = json.loads((ROOT / "page" / "texts.json").read_text(encoding="utf-8"))
    sources = "".join(
        file.read_text(encoding="utf-8")
        for file in [
            *(ROOT / "page").glob("*.py"),
            *(ROOT / "page" / "static").glob("*"),
            *(ROOT / "page").glob("*/*.html"),
        ]
    )
    made = ("phase_", "test_", "kind_", "view_", "state_")  # put together from two parts
    assert [name for name in names if name not in sources and not name.startswith(made)] == []
    forbidden = ("safe ", "secure", "invisible", "guaranteed", "perturbation", "diffusion model")
    assert [name for name, text in names.items() if any(word in text.lower() for word in forbidden)] == []
