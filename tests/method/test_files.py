"""Files that are whole or not there: what is written, what is refused, and that nothing is left over."""

import math
import os

import pytest

from ortho_keras.method.errors import InputError
from ortho_keras.method.files import (
    check_file,
    check_folder,
    entries,
    expanded,
    only_one,
    read_json,
    remove_temporary,
    whole_file,
    write_json,
)

pytestmark = pytest.mark.every_backend


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
    for path in ("no/such/file.csv", "", ".", "pipe", "/proc/report.csv", "a\0", "\ud800", None, 3):
        with pytest.raises(ValueError, match="`path` must be the path of a file .* Received: path="), whole_file(path) as own:
            own.write_text("text")
    assert os.listdir(tmp_path) == ["pipe"]


def test_which_folders_and_files_can_be_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("new/deep/folder", ".", "é" * 100, expanded("~no_such_user")):
        check_folder("--workdir", tmp_path / path)
        check_file("--export", tmp_path / path / "net.keras")
    (tmp_path / "file").touch()
    for path, reason in (
        ("a\0b", "embedded null byte"),
        ("a\ud800b", "surrogates not allowed"),
        ("a\udcffb", "surrogates not allowed"),  # a name that is not UTF-8
        ("n" * 300, "File name too long"),
        (f"new/{'n' * 300}/x", "File name too long"),
        ("y/" * 2100, "File name too long"),
        ("/proc/x", ""),
        ("file", "Not a directory"),
        ("file/x", "Not a directory"),
    ):
        with pytest.raises(InputError, match=f"^--workdir must be a folder that can be written. Received: .*[(].*{reason}[)]$"):
            check_folder("--workdir", path)
        if path != "file":
            with pytest.raises(InputError, match=f"^--export must be a f.* that can be written. Received: .*[(].*{reason}[)]$"):
                check_file("--export", tmp_path / path)
    with pytest.raises(InputError, match="^--export must be a file that can be .* .a folder, a device or a dangling link.$"):
        check_file("--export", tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_what_a_kill_left_is_removed(tmp_path):
    with whole_file(tmp_path / "history.json") as own:
        left = tmp_path / own.name
    left.write_text("half")
    assert entries(tmp_path) == ["history.json"] and len(os.listdir(tmp_path)) == 2
    (tmp_path / ".0123456789ab-folder").mkdir()
    remove_temporary(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".0123456789ab-folder", "history.json"]


def test_a_directory_is_held_by_one_at_a_time(tmp_path):
    with only_one(tmp_path):
        with pytest.raises(InputError, match="--workdir is in use by another process. Received: "), only_one(tmp_path):
            pass
        assert not entries(tmp_path)  # the lock is not content
    (tmp_path / "other" / ".lock").mkdir(parents=True)
    message = "--workdir must have a file .lock that can be locked. Received: "
    with pytest.raises(InputError, match=message), only_one(tmp_path / "other"):
        pass
    with only_one(tmp_path):
        pass


FORM = {"recipe": {str: (bool, int, float, str)}, "sha256": (str, type(None)), "rows": [{"step": int, "loss": float}]}


def test_json_of_the_expected_form_is_returned_whole(tmp_path):
    content = {
        "recipe": {"on": True, "rate": 0.1, "steps": 10**18},
        "rows": [{"step": 1, "loss": 2, "more": [None]}, {"step": 2, "loss": math.inf}],
        "is": "é",
    }
    write_json(tmp_path / "run.json", content)
    assert read_json(tmp_path / "run.json", FORM, "--workdir must hold a run") == content  # sha256 may be missing
    (tmp_path / "pair.json").write_text("[[], 3]")
    assert read_json(tmp_path / "pair.json", [list, float], "it must be a pair") == [[], 3]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value: line 1 column 1 (char 0)"),
        ('{"recipe": {', "Expecting property name enclosed in double quotes: line 1 column 13 (char 12)"),
        ("[" * 100_000, "it is nested too deep"),
        ("[]", "its content is [], expected an object"),
        ("{}", "recipe is None, expected an object"),
        ('{"recipe": {"rate": []}}', "recipe.rate is [], expected true or false or an integer or a number or a string"),
        ('{"recipe": {}, "rows": [{"step": 1%s}]}' % ("0" * 400), "rows[0].step is inf, expected an integer"),
        ('{"recipe": {}, "rows": [{"step": %s}]}' % ("9" * 5000), "rows[0].step is inf, expected an integer"),
        ('{"recipe": {}, "sha256": 3}', "sha256 is 3, expected a string or null"),
        ('{"recipe": {}, "rows": {}}', "rows is {}, expected a list"),
        ('{"recipe": {}, "rows": [{"step": 1, "loss": 2}, {"step": true}]}', "rows[1].step is True, expected an integer"),
        ('{"recipe": {}, "rows": [{"step": 1, "loss": "inf"}]}', "rows[0].loss is 'inf', expected a number"),
    ],
)
def test_json_of_another_form_is_one_line(tmp_path, text, reason):
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        read_json(path, FORM, "--workdir must hold a run")
    assert str(caught.value).startswith(f"--workdir must hold a run. Received: {str(path)!r} ({reason}")


def test_what_is_no_json_file_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "bytes").write_bytes(b'"\xff"')
    (tmp_path / "pair").write_text("[1]")
    for name, reason in (
        ("missing", "No such file or directory"),
        ("", "a folder or a device"),
        ("pipe", "a folder or a device"),  # does not wait for a writer
        ("bytes", "'utf-8' codec can't decode byte 0xff"),
        ("nul\0", "embedded null byte"),
        ("n" * 300, "File name too long"),
        ("pair", "its content has 1 elements, expected 2"),
    ):
        with pytest.raises(InputError, match=f"^it must be a pair. Received: .*[(]{reason}"):
            read_json(tmp_path / name, [int, int], "it must be a pair")
