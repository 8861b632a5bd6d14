"""Writes a trained model as it is deployed: BatchNormalization folded, modulation removed, float32."""

import pathlib
import tempfile

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import check_folder, whole_file
from ortho_keras.method.kernels import walk_layers
from ortho_keras.method.loading import load_model
from ortho_keras.trainer.fold import fold_batchnorm

IMAGES = 16


def check_export(output):
    """Raises `InputError` if `output`, which `--export` gave, is no path that `deploy` can write."""
    output = pathlib.Path(output).expanduser()
    if output.suffix not in (".keras", ".tflite", ""):
        raise InputError(f"--export must end in .keras or .tflite, or have no suffix (a folder). Received: {str(output)!r}")
    if output.suffix == "" and output.exists():
        raise InputError(f"--export must be a folder that does not exist. Received: {str(output)!r}")
    check_folder("--export", output.absolute().parent)


def deploy(path, output):
    """Writes the folded float32 copy of the model in the file `path` to `output`, in the format that its name says.

    Args:
        path: Path of a `.keras` file.
        output: Path. `*.keras` and `*.tflite` are files; a name without a suffix is a new folder for a SavedModel.

    Returns:
        A line about what was done: layers folded, and the largest difference of outputs on noise, over their largest magnitude.

    Raises:
        InputError: If `path` holds no model that can be read and folded, or `output` cannot be written.
    """
    output = pathlib.Path(output).expanduser()
    check_export(output)
    try:
        model = load_model(path)
        deployed = fold_batchnorm(model, dtype="float32")
    except (ValueError, OSError, TypeError) as error:
        told = f"the model must be a Functional or Sequential one in a .keras file. Received: {str(path)!r}"
        raise InputError(f"{told} ({first_line(error)})") from error
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == "":
        deployed.export(output, format="tf_saved_model", verbose=False)
    else:
        with whole_file(output) as own:
            own.write_bytes(_tflite(deployed)) if output.suffix == ".tflite" else deployed.save(own)
    before, after = (
        sum(isinstance(layer, keras.layers.BatchNormalization) for layer, _ in walk_layers(one)) for one in (model, deployed)
    )
    return f"{output}: {before - after} of {before} BatchNormalization layers folded, {_difference(model, deployed)}"


def _difference(model, deployed):
    """How far the outputs of a model and its copy are apart on noise, in words."""
    rng, batch = np.random.default_rng(0), []
    for tensor in model.inputs:
        shape = [IMAGES, *(size or 32 for size in tensor.shape[1:])]
        batch.append(tf.cast(rng.uniform(0, 255, shape), tensor.dtype))
    batch = keras.tree.pack_sequence_as(model.input, batch) if isinstance(model, keras.Function) else batch[0]
    outputs = zip(*(keras.tree.flatten(one(batch, training=False)) for one in (model, deployed)))
    pairs = [(np.asarray(tf.cast(mine, tf.float32)), np.asarray(theirs)) for mine, theirs in outputs]
    largest = max(np.abs(mine - theirs).max() / max(np.abs(mine).max(), 1e-30) for mine, theirs in pairs)
    return f"outputs differ by {largest:.1e} of the largest on noise"


def _tflite(model):
    with tempfile.TemporaryDirectory() as folder:
        model.export(folder, format="tf_saved_model", verbose=False)
        return tf.lite.TFLiteConverter.from_saved_model(folder).convert()
