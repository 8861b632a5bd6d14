"""Loading a model file that came from somewhere else."""

import pathlib
import re
import stat
import zipfile

import keras

from ortho_keras.method.graphs import allow_deep_graphs

CONTENT = ("config.json", "metadata.json", "model.weights.h5")


def load_model(path, compile=True):
    """Loads a `.keras` file, and refuses one that would run code of its own or reaches outside itself.

    `keras.saving.load_model` with `safe_mode=True`, behind a look at the archive.

    Args:
        path: Path of a `.keras` file.
        compile: bool. Compiles the model as it was when saved.

    Returns:
        The model.

    Raises:
        ValueError: If the file does not exist, is no `.keras` archive, holds anything but a model's parts (a path outside, a
            link) or a `Lambda` layer with code, or does not load. The message names the file and what was found.
    """
    path = pathlib.Path(path)
    if not zipfile.is_zipfile(path):
        reason = "a file that is no zip archive" if path.is_file() else "no such file"
        raise ValueError(f"`path` must be a .keras file. Received: {str(path)!r}, {reason}")
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            parts = pathlib.PurePosixPath(entry.filename.replace("\\", "/")).parts
            known = entry.filename in CONTENT or parts[:1] == ("assets",)
            if not known or ".." in parts or stat.S_ISLNK(entry.external_attr >> 16):
                raise ValueError(
                    f"`path` must be a .keras file with {', '.join(CONTENT)} and assets/. Received: {str(path)!r}, refused "
                    f"because it holds {entry.filename!r}"
                )
        layers = archive.read("config.json").count(b'"build_config"') if "config.json" in archive.namelist() else 0
    allow_deep_graphs(layers)
    try:
        return keras.saving.load_model(path, compile=compile, safe_mode=True)
    except Exception as error:  # a damaged file makes Keras raise almost anything
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        unknown = re.search(r"Could not locate (class|function) '([^']+)'", str(error))
        if unknown:
            first = (
                f"its {unknown[1]} {unknown[2]!r} is not known here: decorate it with "
                "@keras.saving.register_keras_serializable() and import it first"
            )
        if "ambda" in str(error):
            first = f"it holds a Lambda layer, whose code would run: {first}"
        raise ValueError(
            f"`path` must be a .keras file that loads safely. Received: {str(path)!r}, refused because {first}"
        ) from error
