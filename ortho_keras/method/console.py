"""What is written to the terminal. Importing this module imports TensorFlow, if it is the backend, without its first notes."""

import contextlib
import os
import re
import sys
import tempfile

_GPUS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # of NVIDIA in Linux, of Windows's subsystem, and of AMD
_NOTES = re.compile(
    "before absl::InitializeLog|oneDNN custom operations|Could not find cuda drivers|failed call to cuInit|"
    "optimized to use available CPU instructions|To enable the following instructions"
)


@contextlib.contextmanager
def without_notes():
    """Leaves the notes out of what the process writes to stderr, TensorFlow's C++ code included."""
    try:
        sys.stderr.flush()
        caught, kept = tempfile.TemporaryFile(), os.dup(2)  # noqa: SIM115
    except (AttributeError, OSError):  # there is no stderr, or no folder for the file
        yield
        return
    with caught:
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


def start_command():
    """Prepares a command's output: no notes on devices that TensorFlow looks for, and any text in terminals of any encoding."""
    with without_notes():
        tf.config.list_physical_devices()  # from here on CUDA_VISIBLE_DEVICES has no effect
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - it is None where the process was started without one
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def say(line, stream=None):
    """Prints a line to stdout or another stream. Where that is closed or on a full disk, this and what follows is lost."""
    stream = stream or sys.stdout
    try:
        print(line, file=stream, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


if os.environ.get("KERAS_BACKEND") != "tensorflow":
    pass  # TensorFlow is neither needed nor imported
elif "tensorflow" in sys.modules:
    import tensorflow as tf
else:
    with without_notes():
        import tensorflow as tf

        if not any(map(os.path.exists, _GPUS)):
            tf.config.list_physical_devices()  # which TensorFlow looks for at its first operation, with one more note
