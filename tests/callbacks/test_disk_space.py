"""Whether results can be written is found out before any work, for callbacks that other trainers use, too."""

import shutil

import pytest

from antidreambooth.errors import InputError
from callbacks.disk_space import require_room, require_writable


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
