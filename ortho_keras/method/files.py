"""Files that are written completely or not at all, and the lock of a folder."""

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
    """Yields a temporary path in the folder of `path`, and renames it to `path` at the end; after an error it is removed.

    An existing file is replaced; a link is followed. `ValueError` is raised where no file can be written.
    """
    try:
        target = pathlib.Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            raise OSError("a folder or a device")
        own = target.with_name(f".{uuid.uuid4().hex[:12]}-{target.name}")  # ends as `path` does: Keras goes by that
        own.touch()
    except (TypeError, OSError) as error:
        message = "`path` must be the path of a file in a folder that exists and can be written"
        raise ValueError(f"{message}. Received: path={path!r}") from error
    try:
        yield own
        own.replace(target)
    finally:
        own.unlink(missing_ok=True)


def write_json(path, content):
    """Writes a JSON file completely or not at all."""
    with whole_file(path) as own:
        own.write_text(json.dumps(content, indent=2) + "\n")


def check_folder(flag, path):
    """Raises `InputError` if `path`, the value of `flag`, is not a folder that can be written or created."""
    nearest = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        raise InputError(f"{flag} must be a folder that can be written. Received: {str(path)!r} ({nearest} cannot)")


def entries(folder):
    """Returns the names in a folder, if it exists, except the lock and what a killed `whole_file` left."""
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [name for name in names if name != LOCK and not re.match(r"\.[0-9a-f]{12}-", name)]
