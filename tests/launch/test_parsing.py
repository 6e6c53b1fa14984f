"""A wrong command line is told in one line: the flag, what is wrong, where to look."""

import pytest
import yaml

from cli import main, parsed
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("--model.ensemble.backbones [A, B]", "--model.ensemble.backbones [A,: a list is expected; a list is put into"),
        ("--model.objective my_module.MyObjective", "--model.objective my_module.MyObjective: No module named"),
        ("--model.objective Nonsense", "--model.objective Nonsense: there is no class of this name"),
        ("--model Nonsense", "--model Nonsense: there is no class of this name"),
        ("--model.bugdet 3", "--model.bugdet: ASPL has no such setting; --model.help ASPL lists those it has"),
        ("--model.budget abc", "--model.budget abc: a float is expected"),
        (
            "--model.step_rule.schedule linear",
            "--model.step_rule.schedule linear: of which class? Give --model.step",
        ),
        ("--model.objective os.path", "--model.objective os.path: it takes nothing of this kind"),
        ("--model.surrogate.steps 1.5", "--model.surrogate.steps 1.5: an int is expected"),
        ("--model.surrogate.stepps 1", "--model.surrogate.stepps: ASPL has no such setting; --model.help ASPL lists"),
        ("--trainer.precision foo", "--trainer.precision foo: choose one of 'transformer-engine', "),
        ("--trainer.max_epochs x", "--trainer.max_epochs x: an int is expected"),
        ("--nonsense 3", "unrecognized arguments: --nonsense 3"),
        ("-c nowhere.yaml", 'Parser key "config": File does not exist'),
    ],
)
def test_a_wrong_fit_is_one_line(words, line, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / 'aspl.yaml'}", *words.split()])
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {line}"), told


@pytest.mark.parametrize("more", [[], ["--print_config"]])  # the parser has other words for either
def test_so_is_a_config_file_with_an_unknown_setting(tmp_path, capsys, more):
    (tmp_path / "own.yaml").write_text("modle: 3\n")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / 'aspl.yaml'}", f"--config={tmp_path / 'own.yaml'}", *more])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: modle: there is no such setting; see --help, or check the config file\n"


@pytest.mark.parametrize("command", ["people", "verdict"])
def test_so_are_the_other_commands(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--bugdet", "3"])
    assert stopped.value.code == 2
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith("error: ")
    assert "--bugdet" in told


def test_a_config_that_names_no_folder_can_be_parsed(tmp_path):
    """A verdict decides on the folder later."""
    settings = yaml.safe_load((ROOT / "configs" / "aspl.yaml").read_text())
    del settings["trainer"]["default_root_dir"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(settings))
    found = parsed(["fit", f"--config={tmp_path / 'own.yaml'}"])
    assert found.model.class_path.endswith("ASPL")
    assert found.trainer.default_root_dir is None


@pytest.mark.parametrize("value", ["null", ""])
def test_a_run_without_a_folder_is_refused(value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"--trainer\.default_root_dir is empty: name a folder"):
        main(["fit", f"--config={ROOT / 'configs' / 'aspl.yaml'}", f"--trainer.default_root_dir={value}"])
    assert not list(tmp_path.iterdir())
