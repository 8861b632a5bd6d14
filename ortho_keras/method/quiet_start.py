"""Importing this module imports TensorFlow without the notes on its build and on missing GPUs that it writes first."""

import contextlib
import os
import re
import sys
import tempfile

_NOTES = re.compile(
    "before absl::InitializeLog|oneDNN custom operations|Could not find cuda drivers|failed call to cuInit|"
    "optimized to use available CPU instructions|To enable the following instructions"
)


@contextlib.contextmanager
def without_notes():
    """Leaves the notes out of what the process writes to stderr, TensorFlow's C++ code included."""
    try:
        sys.stderr.flush()
        kept = os.dup(2)
    except (AttributeError, OSError):  # there is no stderr
        yield
        return
    with tempfile.TemporaryFile() as caught:
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            caught.seek(0)
            for line in caught.read().decode(errors="replace").splitlines():
                if not _NOTES.search(line):
                    print(line, file=sys.stderr)


def find_devices():
    """Lets TensorFlow look for devices, which it says once; from then on CUDA_VISIBLE_DEVICES has no effect."""
    with without_notes():
        tf.config.list_physical_devices()


if "tensorflow" in sys.modules:
    import tensorflow as tf
else:
    with without_notes():
        import tensorflow as tf
