"""Safe loading of model files from elsewhere."""

import pathlib
import re
import stat
import zipfile

import keras

from ortho_keras.method.graphs import allow_deep_graphs

CONTENT = ("config.json", "metadata.json", "model.weights.h5")


def load_model(path, compile=True):
    """Loads a `.keras` file in Keras's safe mode, and refuses one that would run code or write outside of its folder.

    Args:
        path: Path of a `.keras` file.
        compile: bool. Whether to compile the model as it was when saved.

    Returns:
        The model.

    Raises:
        ValueError: If the file does not exist, is not a `.keras` archive, does not load, is encrypted, unpacks to more than
            100 times its size (and 100 MB), or holds a `Lambda` layer or anything but a model's parts (an outside path, a
            link). The message gives the file and the reason.
    """
    path = pathlib.Path(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        raise _refusal(path, "it is not a zip archive" if path.is_file() else "there is no such file")
    try:
        with zipfile.ZipFile(path) as archive:
            reason = _danger(archive.infolist(), path.stat().st_size)
            damaged = None if reason else archive.testzip()  # in parts: with a false size, reading at once may take gigabytes
            reason = f"its {damaged!r} is damaged" if damaged else reason
            layers = 0 if reason else archive.read("config.json").count(b'"build_config"')
        if not reason:
            allow_deep_graphs(layers)
            return keras.saving.load_model(path, compile=compile, safe_mode=True)
    except Exception as error:  # a damaged file makes Keras raise almost anything
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        unknown = re.search(r"Could not locate (class|function) '([^']+)'", str(error))
        if unknown:
            decorator = "@keras.saving.register_keras_serializable()"
            reason = f"its {unknown[1]} {unknown[2]!r} is unknown: decorate it with {decorator} and import it first"
        elif "ambda" in str(error):
            reason = f"it holds a Lambda layer, whose code would run: {reason}"
        raise _refusal(path, reason) from error
    raise _refusal(path, reason)


def _danger(entries, size):
    """Returns why the entries of an archive of this size must not be read, or an empty string."""
    for entry in entries:
        parts = pathlib.PurePosixPath(entry.filename.replace("\\", "/")).parts
        known = entry.filename in CONTENT or parts[:1] == ("assets",)
        if not known or ".." in parts or stat.S_ISLNK(entry.external_attr >> 16):
            return f"it holds {entry.filename!r}"
        if entry.flag_bits & 1:
            return "it is encrypted"
    unpacked = sum(entry.file_size for entry in entries)  # Keras does not compress
    return f"its {size} bytes unpack to {unpacked}" if unpacked > max(1e8, 100 * size) else ""


def _refusal(path, reason):
    return ValueError(f"`path` must be a .keras file that loads safely. Received: {str(path)!r}, refused because {reason}")
