"""Files that are whole or not there: what is written, what is refused, and that nothing is left over."""

import os
import stat

import pytest

from ortho_keras.method.files import whole_file


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


@pytest.mark.parametrize("path", ["no/such/file.csv", "", ".", "/", "/proc/report.csv", None, 3])
def test_paths_that_are_none(tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    refused = pytest.raises(ValueError, match="`path` must be the path of a file in a folder that exists .* Received: path=")
    with refused, whole_file(path) as own:
        own.write_text("text")
    assert not os.listdir(tmp_path)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ValueError, match="`path` must be .* Received: path="), whole_file(tmp_path):
        pass


def test_what_is_no_plain_file_is_left_alone_and_a_link_stays_a_link(tmp_path):
    pipe = tmp_path / "pipe"  # as a device, which a test must not risk
    os.mkfifo(pipe)
    with pytest.raises(ValueError, match="`path` must be the path of a file"), whole_file(pipe):
        pass
    assert stat.S_ISFIFO(os.stat(pipe).st_mode) and os.listdir(tmp_path) == ["pipe"]
    (tmp_path / "file").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    with whole_file(tmp_path / "link") as own:
        own.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_text() == "new"
