"""A tiny model of each family in turn, and what the official code says of it."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.families.oracle import Oracle, consult
from tests.families.tiny import TINY, save


@dataclass(frozen=True)
class Case:
    """A tiny model: its family's short name, its folder, what the official code says of it."""

    name: str
    folder: Path
    oracle: Oracle


@pytest.fixture(scope="module", params=TINY)
def case(request, tmp_path_factory) -> Case:
    folder = save(request.param, tmp_path_factory.mktemp(request.param) / "model")
    return Case(request.param, folder, consult(request.param, folder))


def same(actual: Tensor, expected: Tensor, atol: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=atol)
