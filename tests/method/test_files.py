"""Files that are whole or not there: what is written, what is refused, and that nothing is left over."""

import os

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import entries, only_one, whole_file


def test_a_file_takes_the_place_of_the_old_one_at_the_end_and_a_link_stays(tmp_path):
    path, link = tmp_path / "report.csv", tmp_path / "link.csv"
    path.write_text("old")
    link.symlink_to(path)
    with whole_file(str(link)) as own:
        own.write_text("new")
        assert own.suffix == ".csv" and path.read_text() == "old"
    assert path.read_text() == "new" and link.is_symlink() and set(tmp_path.iterdir()) == {path, link}


def test_an_error_leaves_what_was_there(tmp_path):
    path = tmp_path / "report.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), whole_file(path) as own:
        own.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_paths_of_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # like a device, which a test must not risk
    for path in ("no/such/file.csv", "", ".", "pipe", "/proc/report.csv", None, 3):
        with pytest.raises(ValueError, match="`path` must be the path of a file .* Received: path="), whole_file(path) as own:
            own.write_text("text")
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(InputError, match="--workdir is in use by another process. Received: "), only_one(tmp_path):
            pass
        assert not entries(tmp_path)  # the lock is not content
    with only_one(tmp_path):
        pass
