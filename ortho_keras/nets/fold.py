"""BatchNormalization folded into the layers before it, for inference."""

import collections

import keras
import numpy as np
from keras import ops

from ortho_keras.method import backend
from ortho_keras.method.checks import check_built
from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph, has_own_call
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import copy_rest
from ortho_keras.nets.batchnorm import FusedBatchNormalization


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

    with backend.scope(model):
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
        return default if variable is None else np.asarray(ops.convert_to_numpy(variable), np.float64)

    scale = value(normalization.gamma, 1.0) / np.sqrt(value(normalization.moving_variance) + normalization.epsilon)
    shift = value(normalization.beta, 0.0) - value(normalization.moving_mean) * scale
    *before, last = layer_kernels(layer)  # a separable convolution's depthwise kernel stays as it is
    shapes = {"transposed": (-1, 1), "depthwise": last.variable.shape[-2:]}
    kernel = value(last.variable) * scale.reshape(shapes.get(last.layout, -1))
    return [*(ops.convert_to_numpy(one.variable) for one in before), kernel, value(layer.bias, 0.0) * scale + shift]
