"""What a wrong command line is told: one line with the flag, what is wrong with it and where to look."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import NoReturn

from jsonargparse import ArgumentParser
from lightning.pytorch.cli import LightningArgumentParser


class OneLine(ArgumentParser):
    """A parser whose errors are one line; jsonargparse's own say why each type in a union does not fit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Says what is wrong and ends the program; while a value is only tried, raises as usual."""
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {one_line(message)}\n")
        self.exit(2)
        raise AssertionError  # exit does not come back


class OneLineOfLightning(OneLine, LightningArgumentParser):
    """The same for Lightning's commands."""


def one_line(message: str) -> str:
    """What matters in an error of jsonargparse's: flag and reason, of the innermost class that it is about."""
    keys, classes = (re.findall(pattern, message) for pattern in (r'Parser key "([^"]+)"', r"class_path '([^']+)'"))
    # The outermost, which is the last one, has the whole name of what was typed.
    nested = next(reversed(list(re.finditer(r"NestedArg\(key='([^']+)', val=(.*)\)", message))), None)
    flag = f"--{keys[0]}.{nested[1]}" if nested and keys else "--" + ".".join(keys)
    given = nested[2].strip("'") if nested else next(iter(re.findall(r"Given value: (.*)", message)), "")
    if unknown := re.search(
        r"(?:Option |does not accept option )'([^']+)'|unrecognized arguments: --([^=\s]+)=", message
    ):
        name = unknown[1] or unknown[2]
        if not classes:  # at the top of a config file
            return f"{name}: there is no such setting; see --help, or check the config file"
        owner, where = classes[-1].rpartition(".")[2], flag.removesuffix(f".{name}")
        return f"{where}.{name}: {owner} has no such setting; {where}.help {owner} lists those it has"
    if lost := re.search(r"No module named '[^']+'", message):
        own = "a class of your own is named MODULE.CLASS, with MODULE.py in the folder where you start"
        return f"{flag} {given}: {lost[0]}; {own}"
    if wrong := re.findall(r"Expected an? <class '([^']+)'>\. Got value: (.*)", message):
        kind, got = wrong[-1]
        hint = f"; a list is put into quotes: {flag} '[A, B]'" if got.startswith("[") and not got.endswith("]") else ""
        return f"{flag} {got}: {expected([kind])}{hint}"
    if nested and "is abstract" in message:
        where = flag.rpartition(".")[0]
        return f"{flag} {given}: of which class? Give {where} CLASS first"
    if "dot import path" in message:
        return f"{flag} {given}: there is no class of this name; see --help"
    if choices := re.findall(r"Expected a typing\.Literal\[(.*)\]", message):
        return f"{flag} {given}: choose one of {', '.join(choices)}"
    if kinds := [kind for kind in re.findall(r"Expected an? <class '(\w+)'>", message) if kind != "NoneType"]:
        return f"{flag} {given}: {expected(kinds)}"
    if keys and "Given value" in message:
        return f"{flag} {given}: it takes nothing of this kind; see --help and --model.help CLASS"
    return " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))


def expected(kinds: Sequence[str]) -> str:
    """Types in words."""
    return " or ".join(f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in kinds) + " is expected"
