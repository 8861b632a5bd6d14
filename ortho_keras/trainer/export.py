"""A trained model as a file to deploy: BatchNormalization folded, modulation removed, float32."""

import os
import pathlib

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import check_file, check_folder, expanded, whole_file, write_json
from ortho_keras.method.kernels import walk_layers
from ortho_keras.method.loading import load_model
from ortho_keras.nets.fold import fold_batchnorm
from ortho_keras.trainer.result import DESCRIBED, DESCRIPTION, EVALUATE_AGAIN


def check_export(output, model):
    """Raises `InputError` if `output`, the value of `--export`, is no path that `deploy` can write, or one of the run's own.

    `model` is the path of the run's `final.keras`, whether or not it exists.
    """
    output = expanded(output)
    if output.suffix not in (".keras", ".tflite", ""):
        raise InputError(f"--export must end in .keras or .tflite, or have no suffix (a folder). Received: {str(output)!r}")
    if output.suffix == "" and os.path.exists(output):
        raise InputError(f"--export must be a folder that does not exist. Received: {str(output)!r}")
    if output.suffix == "":
        check_folder("--export", output)
    else:
        check_file("--export", output)
    check_file("the file for the classes next to --export", output.with_suffix(DESCRIBED))
    output, model = (pathlib.Path(os.path.realpath(path)) for path in (output, model))
    own = ("final.keras", "best.keras", "checkpoints", "tensorboard", "run.json", "history.json", "result.json")
    own = [model, *map(model.with_name, own)]
    if model.is_relative_to(output) or any(output.is_relative_to(one) for one in own):
        raise InputError(f"--export must be another path than those of the run's own files. Received: {str(output)!r}")


def deploy(path, output, result=None):
    """Writes the folded float32 copy of the model in the file `path` to `output`, in the format of its suffix.

    Args:
        path: Path of a `.keras` file.
        output: Path. `*.keras` and `*.tflite` are files; a name without a suffix is a new folder for a SavedModel.
        result: The content of the run's `result.json`, or `None`. What `predict` needs of it is written to a JSON file next
            to the output: `flowers.classes.json` for `flowers.tflite`.

    Returns:
        A line of text: how many layers were folded, and the outputs' largest difference on noise, relative to the largest.

    Raises:
        InputError: If `path` holds no model that can be read and folded, or `output` cannot be written.
    """
    output = expanded(output)
    check_export(output, path)
    try:
        model = load_model(path)
        deployed = fold_batchnorm(model, dtype="float32")
    except (ValueError, OSError, TypeError) as error:
        expected = f"the model must be an intact Functional or Sequential one in a .keras file (of a run: {EVALUATE_AGAIN})"
        raise InputError(f"{expected}. Received: {str(path)!r} ({first_line(error)})") from error
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        _write(deployed, output)
        if result and result.get("class_names"):  # a run of an earlier version has none
            write_json(output.with_suffix(DESCRIBED), {key: result[key] for key in DESCRIPTION})
    except (OSError, RuntimeError, tf.errors.OpError) as error:  # a full disk
        expected = "--export must be on a disk with space for the model"
        raise InputError(f"{expected}. Received: {str(output)!r} ({first_line(error)})") from error
    before, left = (
        sum(isinstance(layer, keras.layers.BatchNormalization) for layer, _ in walk_layers(one)) for one in (model, deployed)
    )
    difference = f"outputs differ by {_difference(model, deployed):.1e} of the largest on noise"
    return f"{output}: {before - left} of {before} BatchNormalization layers folded, {difference}"


def _write(deployed, output):
    if output.suffix == "":
        deployed.export(output, format="tf_saved_model", verbose=False)
    else:
        with whole_file(output) as part:
            if output.suffix == ".keras":
                deployed.save(part)
            else:  # with the weights as constants
                deployed.export(str(part), "litert", verbose=False, experimental_enable_resource_variables=False)


def _difference(model, deployed):
    rng = np.random.default_rng(0)

    def noise(tensor):
        return tf.cast(rng.uniform(0, 255, (16, *(size or 32 for size in tensor.shape[1:]))), tensor.dtype)

    batch = keras.tree.map_structure(noise, deployed.input)
    mine, theirs = (keras.tree.flatten(one(batch, training=False)) for one in (model, deployed))
    pairs = [(np.asarray(tf.cast(a, tf.float32)), np.asarray(b)) for a, b in zip(mine, theirs)]
    return max(np.abs(a - b).max() / max(np.abs(a).max(), 1e-30) for a, b in pairs)
