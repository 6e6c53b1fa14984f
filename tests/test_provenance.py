"""Settings as plain values, and how two of them differ."""

import json
import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from antidreambooth.attack.objectives import Denoising
from antidreambooth.finetuning.dreambooth import DreamBooth
from antidreambooth.provenance import describe, differences, slug, versions


def test_describe_is_plain_and_complete():
    described = describe(
        {"objective": Denoising(), "surrogate": DreamBooth(steps=5), "folder": Path("a"), "n": [1, None]}
    )
    assert json.loads(json.dumps(described)) == described
    assert described["objective"] == {"class": "Denoising", "timesteps": None, "detached_target": False}
    assert described["surrogate"]["steps"] == 5
    assert described["surrogate"]["prior"]["images"] == 200


def test_differences_name_what_changed():
    before, now = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5}
    assert differences(before, now) == ["a.c: 2 then, 4 now", "d: 3 then, None now", "e: None then, 5 now"]
    assert differences(before, before) == []


def test_versions_name_the_libraries():
    assert {"torch", "diffusers", "lightning"} <= set(versions())


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, min_size=2))
def test_slugs_differ_and_are_file_names(texts):
    slugs = [slug(text) for text in texts]
    assert len(set(slugs)) == len(texts)
    assert all(re.fullmatch(r"[\w.-]+", name) for name in slugs)
