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
        ValueError: If the file does not exist, is not a `.keras` archive, does not load, or holds a `Lambda` layer or anything
            but a model's parts (an outside path, a link). The message gives the file and the reason.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        raise _refusal(path, "it is not a zip archive" if path.is_file() else "there is no such file")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            parts = pathlib.PurePosixPath(entry.filename.replace("\\", "/")).parts
            known = entry.filename in CONTENT or parts[:1] == ("assets",)
            if not known or ".." in parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise _refusal(path, f"it holds {entry.filename!r}")
        layers = archive.read("config.json").count(b'"build_config"') if "config.json" in archive.namelist() else 0
    allow_deep_graphs(layers)
    try:
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


def _refusal(path, reason):
    return ValueError(f"`path` must be a .keras file that loads safely. Received: {str(path)!r}, refused because {reason}")
