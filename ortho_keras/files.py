"""Files that are whole or not there at all."""

import contextlib
import os
import pathlib
import uuid


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
