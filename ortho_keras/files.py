"""Files that are whole or not there at all."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def whole_file(path, name="path"):
    """Yields the path of a file of its own beside `path`, and renames it to `path` at the end; an error leaves nothing behind.

    Args:
        path: String or path, of a file in a folder that exists. What stands there is replaced.
        name: String, what the caller calls it, for the message.

    Raises:
        ValueError: If `path` is no such path, or the folder cannot be written.
    """
    message = f"`{name}` must be the path of a file in a folder that exists and can be written. Received: {name}={path!r}"
    try:
        target = pathlib.Path(path)
    except TypeError as error:
        raise ValueError(message) from error
    if not target.name or target.is_dir() or not target.parent.is_dir() or not os.access(target.parent, os.W_OK | os.X_OK):
        raise ValueError(message)
    own = target.with_name(f".{os.getpid()}-{target.name}")
    try:
        yield own
        own.replace(target)
    except FileNotFoundError as error:  # a folder that is no real one, as in /proc
        raise ValueError(message) from error
    finally:
        own.unlink(missing_ok=True)
