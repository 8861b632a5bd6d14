"""A trained model as it is deployed, as a model and as a file: BatchNormalization folded, modulation removed, float32."""

import collections
import os
import pathlib

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.checks import check_built
from ortho_keras.method.errors import InputError, first_line
from ortho_keras.method.files import check_file, check_folder, expanded, whole_file, write_json
from ortho_keras.method.graphs import Graph, has_own_call
from ortho_keras.method.kernels import layer_kernels, walk_layers
from ortho_keras.method.loading import load_model
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import copy_rest
from ortho_keras.nets.batchnorm import FusedBatchNormalization
from ortho_keras.trainer.result import DESCRIBED, DESCRIPTION, EVALUATE_AGAIN


def fold_batchnorm(model, dtype=None):
    """Returns a copy of a model for inference, in which BatchNormalization is folded into the layers before it.

    `gamma * (W x + b - mean) / sqrt(variance + epsilon) + beta` is again a convolution (or dense layer) with a bias. A
    BatchNormalization is folded if it normalizes the channels of a convolution or `Dense` without an activation, no other layer
    takes that layer's output, each of the two is called once, and neither overrides `call`. Regularizers and `ErrorModulation`
    are dropped, nested models are unfolded. The outputs are the model's up to rounding; no weights are shared. A layer without
    weights that cannot be copied is shared.

    Args:
        model: A built Functional or Sequential model.
        dtype: The copy's type or policy, such as `"float32"` for a model trained in bfloat16. Defaults to each layer's own.
            A layer inside a wrapper (`TimeDistributed`) keeps its own.

    Returns:
        A Functional model, not compiled, of the model's name. Layers keep their names.

    Raises:
        ValueError: If the model is of another kind or not built, or a layer with weights cannot be copied.

    Example:

    >>> deployed = fold_batchnorm(keras.models.load_model("runs/digits/final.keras"))
    >>> deployed.save("digits.keras")
    """
    graph, copies = Graph(check_built(model)), {}
    folded = _foldable(graph, _inputs(model))
    removed = {id(normalization) for normalization in folded.values()}

    def call_copy(layer, *args, **kwargs):
        if isinstance(layer, ErrorModulation):
            return args[0], args[0]  # the second is the token, which only the next modulation takes
        if id(layer) in removed:
            return args[0] if args else kwargs["inputs"]
        if not isinstance(layer, keras.Layer):
            return layer(*args, **kwargs)  # a keras.ops operation
        if id(layer) in copies:
            return copies[id(layer)](*args, **kwargs)
        normalization = folded.get(id(layer))
        try:
            config = {name: None if name.endswith("_regularizer") else value for name, value in layer.get_config().items()}
            config |= {"use_bias": True} if normalization else {}
            config |= {"dtype": dtype} if dtype is not None else {}
            copy = type(layer).from_config(config)
            outputs = copy(*args, **kwargs)
            copy.set_weights(_folded_weights(layer, normalization) if normalization else layer.get_weights())
            copy_rest(layer, copy)
        except Exception as error:  # a custom class may raise anything
            if layer.variables or dtype not in (None, layer.dtype_policy.name):
                received = f"{layer.name!r}, a {type(layer).__name__} ({first_line(error)})"
                raise ValueError(
                    f"`model` must have layers that `from_config(get_config())` copies. Received: {received}"
                ) from error
            copy, outputs = layer, layer(*args, **kwargs)
        copies[id(layer)] = copy
        return outputs

    with model.distribute_strategy.scope():
        inputs = _inputs(model)
        return keras.Model(inputs, graph.run(inputs, call_copy), name=model.name)


def _inputs(model):
    structure = model.inputs[0] if isinstance(model, keras.Sequential) else model.input
    return keras.tree.map_structure(lambda one: keras.Input(batch_shape=one.shape, dtype=one.dtype, name=one.name), structure)


def _foldable(graph, inputs):
    """Returns `{id of a layer: the BatchNormalization to fold into it}`."""
    calls = []  # (layer, tensors that it takes, tensors that it returns)

    def record(layer, *args, **kwargs):
        if isinstance(layer, ErrorModulation):
            return args[0], args[0]
        outputs = layer(*args, **kwargs)
        calls.append((layer, keras.tree.flatten((args, kwargs)), keras.tree.flatten(outputs)))
        return outputs

    outputs = keras.tree.flatten(graph.run(inputs, record))
    makers = {id(made): layer for layer, _, results in calls for made in results}
    takes = collections.Counter(id(tensor) for tensor in outputs)  # of each tensor, by layers or as the model's output
    takes.update(id(tensor) for _, taken, _ in calls for tensor in taken)
    count = collections.Counter(id(layer) for layer, _, _ in calls)
    found = {}
    for normalization, taken, _ in calls:
        if isinstance(normalization, keras.layers.BatchNormalization):
            layer, once = makers.get(id(taken[0])), takes[id(taken[0])] == 1
            if once and count[id(layer)] == count[id(normalization)] == 1 and _fits(layer, normalization, taken[0].ndim):
                found[id(layer)] = normalization
    return found


def _fits(layer, normalization, rank):
    kernels = layer_kernels(layer) if isinstance(layer, keras.Layer) else []
    if not kernels or isinstance(layer, keras.layers.EinsumDense) or layer.activation is not keras.activations.linear:
        return False
    if has_own_call(layer) or (has_own_call(normalization) and type(normalization) is not FusedBatchNormalization):
        return False
    channels = 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1
    return normalization.axis % rank == channels


def _folded_weights(layer, normalization):
    """Returns the weights of a layer, in the order of its variables, with a BatchNormalization folded into them."""

    def value(variable, default=None):
        return default if variable is None else np.asarray(variable, np.float64)

    scale = value(normalization.gamma, 1.0) / np.sqrt(value(normalization.moving_variance) + normalization.epsilon)
    shift = value(normalization.beta, 0.0) - value(normalization.moving_mean) * scale
    *before, last = layer_kernels(layer)  # a separable convolution's depthwise kernel stays as it is
    shapes = {"transposed": (-1, 1), "depthwise": last.variable.shape[-2:]}
    kernel = value(last.variable) * scale.reshape(shapes.get(last.layout, -1))
    return [*(np.asarray(one.variable) for one in before), kernel, value(layer.bias, 0.0) * scale + shift]


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
