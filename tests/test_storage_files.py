"""Folders that are whole or not there; files are tested where they are written."""

import pytest

from storage.files import replacing_folder


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "run" / "best"
    with replacing_folder(folder) as fresh:
        (fresh / "a").write_text("old")
    return folder


def test_a_folder_takes_the_place_of_another_and_keeps_what_somebody_put_there(folder):
    (folder / "b").write_text("old too")
    with replacing_folder(folder) as fresh:
        (fresh / "b").write_text("new")
        assert content(folder) == {"a": "old", "b": "old too"}
    assert content(folder) == {"a": "old", "b": "new"}
    assert list(folder.parent.iterdir()) == [folder]


def test_a_body_that_fails_leaves_the_old_one(folder):
    with pytest.raises(OSError, match="no space"), replacing_folder(folder) as fresh:
        (fresh / "b").write_text("new")
        raise OSError("no space")
    assert content(folder) == {"a": "old"} and list(folder.parent.iterdir()) == [folder]


def test_what_a_kill_between_the_renames_left_is_found_again(folder):
    folder.rename(folder.with_name(".best.old"))
    with pytest.raises(OSError, match="no space"), replacing_folder(folder):
        raise OSError("no space")
    assert content(folder) == {"a": "old"}
