"""Files that are written completely or not at all, JSON files of a given form, and which paths can be written."""

import contextlib
import json
import os
import pathlib
import re
import reprlib
import tempfile
import uuid

from ortho_keras.method.errors import InputError

LOCK = ".lock"
_TEMPORARY = re.compile(r"\.[0-9a-f]{12}-")  # begins a file's name while it is written
_KINDS = {dict: "an object", list: "a list", str: "a string", float: "a number", int: "an integer"}
_KINDS |= {bool: "true or false", type(None): "null"}


@contextlib.contextmanager
def only_one(directory):
    """Locks a directory, which exists, for this process, or raises `InputError` where another process has locked it."""
    import filelock

    try:
        held = filelock.FileLock(directory / LOCK, timeout=0).acquire()
    except filelock.Timeout as error:
        raise InputError(f"--workdir is in use by another process. Received: {str(directory)!r}") from error
    except OSError as error:
        raise InputError(f"--workdir must have a file {LOCK} that can be locked. Received: {error}") from error
    with held:
        yield


@contextlib.contextmanager
def whole_file(path):
    """Yields a temporary path in the folder of `path`, and renames it to `path` at the end; after an error it is removed.

    An existing file is replaced; a link is followed. `ValueError` is raised where no file can be written.
    """
    try:
        target = pathlib.Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError("a folder or a device")
        own = target.with_name(_temporary(target.name))
        own.touch()
    except (TypeError, ValueError, OSError) as error:
        message = "`path` must be the path of a file in a folder that exists and can be written"
        raise ValueError(f"{message}. Received: path={path!r} ({getattr(error, 'strerror', None) or error})") from error
    try:
        yield own
        own.replace(target)
    finally:
        own.unlink(missing_ok=True)


def _temporary(name):
    return f".{uuid.uuid4().hex[:12]}-{name}"  # ends as `name` does: Keras goes by that


def write_json(path, content):
    """Writes a JSON file completely or not at all."""
    with whole_file(path) as own:
        own.write_text(json.dumps(content, indent=2) + "\n")


def read_json(path, form, expected):
    """Returns the content of a JSON file, or raises `InputError`, which begins with `expected`, where it is not of a form.

    >>> read_json("run.json", {"recipe": dict, "data_sha256": (str, type(None))}, "--workdir must be the folder of a run")

    Args:
        path: Path of the file.
        form: See `parse_json`.
        expected: What the file must be, a clause.
    """
    path = pathlib.Path(path)
    try:
        if path.exists() and not path.is_file():
            raise OSError("a folder or a device")  # reading a pipe would wait
        return parse_json(path.read_text(encoding="utf-8"), form)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{expected}. Received: {str(path)!r} ({reason})") from error


def parse_json(text, form):
    """Returns the content of a JSON text, or raises `ValueError` where it is not of a form.

    A form is a type, a tuple of forms, `{key: form}` (a missing value is `None`, other keys are free), `{str: form}` for all
    values of an object, `[form]` for all elements of a list, or a longer list. `float` is any number, NaN and inf included.
    """
    try:  # an integer beyond 64 bits is read as a float, which may be inf
        content = json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 20 else float(digits))
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    _check_form(content, form, "")
    return content


def _check_form(value, form, place):
    forms = form if isinstance(form, tuple) else (form,)
    kinds = [one if isinstance(one, type) else type(one) for one in forms]
    if type(value) not in kinds and not (type(value) is int and float in kinds):
        expected = " or ".join(_KINDS[kind] for kind in kinds)
        raise ValueError(f"{place.removeprefix('.') or 'its content'} is {reprlib.repr(value)}, expected {expected}")
    form = next((one for one in forms if type(one) is type(value)), None)
    if isinstance(form, list):
        if 1 < len(form) != len(value):
            raise ValueError(f"{place.removeprefix('.') or 'its content'} has {len(value)} elements, expected {len(form)}")
        for index, one in enumerate(value):
            _check_form(one, form[index % len(form)], f"{place}[{index}]")
    elif isinstance(form, dict):
        for key, own in form.items():
            for name in value if key is str else [key]:
                _check_form(value.get(name), own, f"{place}.{reprlib.repr(name)[1:-1]}")  # a name may be long


def expanded(path):
    """Returns a `pathlib.Path` in which `~` is the user's folder, as in a shell; that of an unknown user stays as it is."""
    return pathlib.Path(os.path.expanduser(path))


def check_folder(flag, path):
    """Raises `InputError` if `path`, the value of `flag`, is not a folder that can be written or created."""
    try:
        folders = [pathlib.Path(path).absolute(), *pathlib.Path(path).absolute().parents]
        nearest = next(folder for folder in folders if os.path.lexists(folder))
        with tempfile.TemporaryFile(dir=nearest):
            pass
        for folder in folders[: folders.index(nearest)]:
            _look_up(nearest / folder.name)
        _look_up(pathlib.Path(path, "n" * 60))  # files that are written there
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} must be a folder that can be written. Received: {str(path)!r} ({reason})") from error


def check_file(flag, path):
    """Raises `InputError` if `path`, the value of `flag`, is not a file that can be written or replaced by `whole_file`."""
    check_folder(flag, path.parent)
    try:
        _look_up(path.with_name(f"{'n' * len(_temporary(''))}{path.name}"))
        if os.path.lexists(path) and not path.is_file():
            raise OSError("a folder, a device or a dangling link")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{flag} must be a file that can be written. Received: {str(path)!r} ({reason})") from error


def _look_up(path):
    """Raises `OSError` or `ValueError` if the path could not exist, as where its name is too long."""
    os.fspath(path).encode()  # TensorFlow reads and writes no others
    with contextlib.suppress(FileNotFoundError):
        os.stat(path)


def entries(folder):
    """Returns the names in a folder, if it exists, except the lock and what a killed `whole_file` left."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if name != LOCK and not _TEMPORARY.match(name)]


def remove_temporary(folder):
    """Removes what a killed `whole_file` left in a folder."""
    for name in os.listdir(folder):
        if _TEMPORARY.match(name) and os.path.isfile(os.path.join(folder, name)):
            os.remove(os.path.join(folder, name))
