"""Imports run one way, as docs and CONTRIBUTING.md draw it: no circle, no arrow upward."""

import ast
from graphlib import TopologicalSorter

import pytest

from tests.conftest import ROOT

SHELL = {"lightning_modules", "datamodules", "callbacks"}
GROUND = {"errors", "files", "provenance"}
BELOW = {  # room -> the rooms that it may import from, beside itself
    "cli": {"launch", *SHELL, "antidreambooth"},
    "launch": {*SHELL, "antidreambooth"},
    **{name: {"antidreambooth"} for name in SHELL},
    "antidreambooth": set(),
}
ENGINE = {
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


def modules():
    """Dotted name of each module of ours -> the modules of ours that it imports, anywhere in it."""
    files = [ROOT / "cli.py", *(file for room in BELOW for file in (ROOT / room).rglob("*.py"))]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    found = {}
    for name, file in dotted.items():
        wanted = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                wanted |= {alias.name for alias in node.names}
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                wanted |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
        found[name] = {other for other in wanted if other in dotted and other != name}
    return found


def test_no_circle():
    graph = modules()
    # A package's __init__ names what is in it; whoever imports a module of the package does not need that list.
    graph = {name: {other for other in used if f"{other}." not in f"{name}."} for name, used in graph.items()}
    assert len(tuple(TopologicalSorter(graph).static_order())) >= len(graph)


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_arrow_upward(name):
    room, _, rest = name.partition(".")
    for other in modules()[name]:
        its, _, lower = other.partition(".")
        if its != room:
            assert its in BELOW[room], f"{name} imports {other}"
        elif room == "antidreambooth":
            here, there = rest.partition(".")[0], lower.partition(".")[0]
            assert there in {here} | ENGINE[here], f"{name} imports {other}"


def test_people_and_the_verdict_do_not_know_each_other():
    graph = modules()
    for name, other in (("people", "verdict"), ("verdict", "people")):
        own = {module: used for module, used in graph.items() if module.startswith(f"launch.{name}")}
        assert len(own) > 3
        for module, used in own.items():
            assert not [one for one in used if one.startswith(f"launch.{other}")], module


def test_the_test_sees_what_it_forbids():
    """Rooms that no rule names, and rules for rooms that are gone, are mistakes of this file."""
    engine = {name.split(".")[1] if "." in name else "" for name in modules() if name.startswith("antidreambooth")}
    assert engine - {"models"} == set(ENGINE)
    assert {name.partition(".")[0] for name in modules()} == set(BELOW)
    assert "antidreambooth.attack.rounds" in modules()["antidreambooth.api"]


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
