"""Imports run one way, as docs and CONTRIBUTING.md draw it: no circle, no arrow upward."""

import ast
from collections.abc import Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.conftest import ROOT

OUTSIDE = ("benchmarks", "scripts", "tests")  # which may import every room, and no room them
SHELL = {"lightning_modules", "datamodules", "callbacks"}
GROUND = {"errors", "files", "provenance"}
BELOW: dict[str, set[str]] = {  # room -> the rooms that it may import from, beside itself
    "cli": {"launch", "page", *SHELL, "antidreambooth"},
    "page": {"antidreambooth"},  # errors, files and formats: nothing that imports torch
    "launch": {*SHELL, "antidreambooth"},
    **{name: {"antidreambooth"} for name in SHELL},
    "antidreambooth": set(),
}
ENGINE: dict[str, set[str]] = {
    "": {"api"},
    "api": {"attack", "finetuning", "diffusion", "photos", *GROUND},
    "attack": {"finetuning", "diffusion", "photos", *GROUND},
    "evaluation": {"finetuning", "diffusion", "photos", *GROUND},
    "finetuning": {"diffusion", "photos", *GROUND},
    "diffusion": {"photos", *GROUND},
    "photos": GROUND,
    "provenance": {"errors", "files"},
    "files": {"errors"},
    "errors": set(),
}


@cache
def imports() -> dict[str, set[str]]:
    """Dotted name of each module of the rooms -> the modules of this repository that it imports, anywhere in it."""
    rooms = [ROOT / "cli.py", *(file for room in BELOW for file in (ROOT / room).rglob("*.py"))]
    outside = [file for folder in OUTSIDE for file in (ROOT / folder).rglob("*.py")]
    dotted = {dotted_name(file): file for file in (*rooms, *outside)}
    return {dotted_name(file): read(file, {*dotted, *OUTSIDE}) for file in rooms}


def dotted_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def read(file: Path, known: set[str]) -> set[str]:
    wanted = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            wanted |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None, f"{file} imports relatively"
            assert node.level == 0, f"{file} imports relatively"
            wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return (wanted & known) - {dotted_name(file)}


def in_order(graph: Mapping[str, set[str]]) -> list[str]:
    """The modules, each after what it imports.

    Raises:
        CycleError: They import in a circle.
    """
    # A package's __init__ names what is in it; whoever imports a module of the package does not need that list.
    inner = {name: {other for other in used if not name.startswith(f"{other}.")} for name, used in graph.items()}
    return list(TopologicalSorter(inner).static_order())


def allowed(name: str, other: str) -> bool:
    (room, _, rest), (its, _, lower) = name.partition("."), other.partition(".")
    if its != room:
        return its in BELOW[room]
    if room != "antidreambooth":
        return True
    here, there = rest.partition(".")[0], lower.partition(".")[0]
    return there in {here} | ENGINE[here]


def test_no_circle():
    assert set(in_order(imports())) >= set(imports())
    graph = {**imports(), "antidreambooth.errors": {"antidreambooth.attack.rounds"}}
    with pytest.raises(CycleError):
        in_order(graph)


@pytest.mark.parametrize("name", sorted(imports()))
def test_no_arrow_upward(name):
    assert [other for other in imports()[name] if not allowed(name, other)] == []


def test_people_and_the_verdict_do_not_know_each_other():
    graph = imports()
    for name, other in (("people", "verdict"), ("verdict", "people")):
        own = {module: used for module, used in graph.items() if module.startswith(f"launch.{name}")}
        assert len(own) > 3
        for module, used in own.items():
            assert not [one for one in used if one.startswith(f"launch.{other}")], module


def test_the_test_sees_what_it_forbids():
    """Rooms that no rule names, and rules for rooms that are gone, are mistakes of this file."""
    engine = {name.split(".")[1] if "." in name else "" for name in imports() if name.startswith("antidreambooth")}
    assert engine - {"models"} == set(ENGINE)
    assert {name.partition(".")[0] for name in imports()} == set(BELOW)
    assert "antidreambooth.attack.rounds" in imports()["antidreambooth.api"]
    for name, other in (
        ("antidreambooth.photos.decoding", "antidreambooth.diffusion.loading"),
        ("antidreambooth.attack.rounds", "antidreambooth.evaluation.measures"),
        ("antidreambooth.errors", "benchmarks.tables"),
        ("callbacks.likeness", "lightning_modules.victim"),
        ("lightning_modules.victim", "launch.jobs"),
        ("launch.jobs", "tests.conftest"),
    ):
        assert not allowed(name, other)


def test_the_engine_neither_prints_nor_knows_lightning():
    for file in (ROOT / "antidreambooth").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
                assert not any(name.partition(".")[0] in ("lightning", "argparse", "jsonargparse") for name in names), (
                    file
                )
            if isinstance(node, ast.Call):
                assert not (isinstance(node.func, ast.Name) and node.func.id == "print"), file
