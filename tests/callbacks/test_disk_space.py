"""Whether results can be written is found out before any work, for callbacks that other trainers use, too."""

import shutil
from types import SimpleNamespace
from typing import Any

import pytest

from antidreambooth.errors import InputError
from callbacks.disk_space import for_all_ranks, require_room, require_writable


def test_a_folder_is_made_and_left_empty(tmp_path):
    require_writable(tmp_path / "new" / "folder")
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(InputError, match=rf"nothing can be written to {tmp_path}/out: File exists; choose another"):
        require_writable(tmp_path / "out")


def test_room_is_what_the_disk_has(tmp_path):
    require_room(tmp_path, 1)
    with pytest.raises(InputError, match=rf"the disk of {tmp_path} has \d+ MiB free, .* needs about \d+ MiB"):
        require_room(tmp_path, shutil.disk_usage(tmp_path).total + 1)


def refuse() -> None:
    raise InputError("no room")


def trainer(rank: int, told: Any = None) -> Any:
    """Of one rank of two; ``told`` is what the first one sends the other."""
    strategy = SimpleNamespace(broadcast=lambda text: told if rank else text)
    return SimpleNamespace(is_global_zero=rank == 0, world_size=2, strategy=strategy)


def test_all_ranks_end_where_the_first_one_has_to():
    with pytest.raises(InputError, match="no room"):
        for_all_ranks(trainer(0), refuse)
    with pytest.raises(InputError, match="no room"):
        for_all_ranks(trainer(1, told="no room"), lambda: pytest.fail("only the first rank looks"))
    for_all_ranks(trainer(1), refuse)
    looks: list[int] = []
    for_all_ranks(trainer(0), lambda: looks.append(1))
    assert looks == [1]


def test_a_bug_in_a_check_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        for_all_ranks(trainer(0), lambda: 1 / 0)  # type: ignore[arg-type]
