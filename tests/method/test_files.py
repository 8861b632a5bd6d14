"""Files that are whole or not there: what is written, what is refused, and that nothing is left over."""

import os
import stat

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import entries, only_one, whole_file


def test_a_file_takes_the_place_of_the_old_one_at_the_end(tmp_path):
    path = tmp_path / "report.csv"
    path.write_text("old")
    with whole_file(str(path)) as own:
        own.write_text("new")
        assert own.suffix == ".csv" and path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_an_error_leaves_what_was_there(tmp_path):
    path, neighbour = tmp_path / "report.csv", tmp_path / "report.partial"
    path.write_text("old")
    neighbour.write_text("mine")
    with pytest.raises(ZeroDivisionError), whole_file(path) as own:
        own.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "old" and neighbour.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_paths_of_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("no/such/file.csv", "", ".", "/proc/report.csv", None, 3):
        with pytest.raises(ValueError, match="`path` must be the path of a file .* Received: path="), whole_file(path) as own:
            own.write_text("text")
    assert not os.listdir(tmp_path)


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(InputError, match="--workdir is in use by another process. Received: "), only_one(tmp_path):
            pass
        assert not entries(tmp_path)  # the lock is not content
    with only_one(tmp_path):
        pass


def test_folders_and_pipes_are_refused_and_a_link_stays_a_link(tmp_path):
    pipe = tmp_path / "pipe"  # like a device, which a test must not risk
    os.mkfifo(pipe)
    for path in (tmp_path, pipe):
        with pytest.raises(ValueError, match="`path` must be the path of a file"), whole_file(path):
            pass
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with whole_file(tmp_path / "link") as own:
        own.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
