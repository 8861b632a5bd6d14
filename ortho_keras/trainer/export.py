"""Writes a trained model as it is deployed: BatchNormalization folded, modulation removed, float32."""

import pathlib

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import check_folder, whole_file
from ortho_keras.method.kernels import walk_layers
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.fold import fold_batchnorm


def check_export(output):
    """Raises `InputError` if `output`, the value of `--export`, is no path that `deploy` can write."""
    output = pathlib.Path(output).expanduser()
    if output.suffix not in (".keras", ".tflite", ""):
        raise InputError(f"--export must end in .keras or .tflite, or have no suffix (a folder). Received: {str(output)!r}")
    if output.suffix == "" and output.exists():
        raise InputError(f"--export must be a folder that does not exist. Received: {str(output)!r}")
    check_folder("--export", output.absolute().parent)


def deploy(path, output):
    """Writes the folded float32 copy of the model in the file `path` to `output`, in the format that its suffix tells.

    Args:
        path: Path of a `.keras` file.
        output: Path. `*.keras` and `*.tflite` are files; a name without a suffix is a new folder for a SavedModel.

    Returns:
        A line of text: how many layers were folded, and the outputs' largest difference on noise, relative to the largest.

    Raises:
        InputError: If `path` holds no model that can be read and folded, or `output` cannot be written.
    """
    output = pathlib.Path(output).expanduser()
    check_export(output)
    try:
        model = load_model(path)
        deployed = fold_batchnorm(model, dtype="float32")
    except (ValueError, OSError, TypeError) as error:
        expected = "the model must be a Functional or Sequential one in a .keras file"
        raise InputError(f"{expected}. Received: {str(path)!r} ({first_line(error)})") from error
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == "":
        deployed.export(output, format="tf_saved_model", verbose=False)
    else:
        with whole_file(output) as part:
            if output.suffix == ".keras":
                deployed.save(part)
            else:  # with the weights as constants
                deployed.export(str(part), "litert", verbose=False, experimental_enable_resource_variables=False)
    before, left = (
        sum(isinstance(layer, keras.layers.BatchNormalization) for layer, _ in walk_layers(one)) for one in (model, deployed)
    )
    difference = f"outputs differ by {_difference(model, deployed):.1e} of the largest on noise"
    return f"{output}: {before - left} of {before} BatchNormalization layers folded, {difference}"


def _difference(model, deployed):
    rng = np.random.default_rng(0)

    def noise(tensor):
        return tf.cast(rng.uniform(0, 255, (16, *(size or 32 for size in tensor.shape[1:]))), tensor.dtype)

    batch = keras.tree.map_structure(noise, deployed.input)
    mine, theirs = (keras.tree.flatten(one(batch, training=False)) for one in (model, deployed))
    pairs = [(np.asarray(tf.cast(a, tf.float32)), np.asarray(b)) for a, b in zip(mine, theirs)]
    return max(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in pairs)
