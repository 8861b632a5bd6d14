"""Files that are whole or not there at all."""

import contextlib
import json
import os
import pathlib
import re
import uuid

from ortho_keras.method.errors import InputError

LOCK = ".lock"


@contextlib.contextmanager
def only_one(directory):
    """Locks a directory, which exists, for this process, or raises `InputError` where another process has locked it."""
    import filelock

    try:
        held = filelock.FileLock(directory / LOCK, timeout=0).acquire()
    except filelock.Timeout as error:
        raise InputError(f"--workdir is in use by another process. Received: {str(directory)!r}") from error
    with held:
        yield


@contextlib.contextmanager
def whole_file(path):
    """Yields the path of a file of its own beside `path`, and renames it to `path` at the end; an error leaves nothing behind.

    Args:
        path: String or path, of a file in a folder that exists. A file that stands there is replaced, through a link the one
            that it points to.

    Raises:
        ValueError: If `path` is no such path, or the folder cannot be written.
    """
    message = f"`path` must be the path of a file in a folder that exists and can be written. Received: path={path!r}"
    try:
        target = pathlib.Path(os.path.realpath(path))
    except TypeError as error:
        raise ValueError(message) from error
    if not str(path) or (target.exists() and not target.is_file()):
        raise ValueError(message)
    own = target.with_name(f".{uuid.uuid4().hex[:12]}-{target.name}")  # ends as `path` does: Keras goes by that
    try:
        own.touch()
    except OSError as error:
        raise ValueError(message) from error
    try:
        yield own
        own.replace(target)
    finally:
        own.unlink(missing_ok=True)


def write_json(path, content):
    """Writes a JSON file, whole."""
    with whole_file(path) as own:
        own.write_text(json.dumps(content, indent=2) + "\n")


def check_folder(flag, path):
    """Raises `InputError` if `path`, which `flag` gave, is not a folder that can be written, or made."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} must be a folder that can be written. Received: {str(path)!r} ({nearest} cannot)")


def entries(folder):
    """Returns the names in a folder, but the lock and what a kill in the middle of `whole_file` left; none without a folder."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if name != LOCK and not re.match(r"\.[0-9a-f]{12}-", name)]
