"""A net as it is deployed: modulation removed, BatchNormalization folded into the layers before it."""

import keras
import numpy as np

from ortho_keras.method.graphs import Graph, has_own_call
from ortho_keras.method.kernels import layer_kernels
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import copy_rest
from ortho_keras.nets.batchnorm import FusedBatchNormalization

_SEPARABLE = (keras.layers.SeparableConv1D, keras.layers.SeparableConv2D)


def fold_batchnorm(model, dtype=None):
    """Returns a copy of a model for inference, with every BatchNormalization that allows it folded into the layer before it.

    `gamma * (W x + b - mean) / sqrt(variance + epsilon) + beta` is again a convolution (or dense layer) with a bias. Folded is
    a BatchNormalization that alone takes the output of a convolution or `Dense` without an activation of its own, over that
    layer's channels, where each of the two is called once, and computes as Keras's class does. Others stay, as every other
    layer does. `ErrorModulation`, which does nothing in inference, goes, and so do regularizers. Nested Functional and
    Sequential models are unfolded. The copy's outputs are the model's up to rounding; training one does not touch the other.

    Args:
        model: A built Functional or Sequential model.
        dtype: The copy's type or policy, such as `"float32"` for a model trained in bfloat16. Defaults to each layer's own.
            A layer inside a wrapper (`TimeDistributed`) keeps its own.

    Returns:
        A Functional model, not compiled, of the model's name. Layers keep their names.

    Raises:
        ValueError: If the model is of another kind or not built.

    Example:

    >>> deployed = fold_batchnorm(keras.models.load_model("runs/digits/final.keras"))
    >>> deployed.save("digits.keras")
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
    graph = Graph(model)
    calls = _Calls()
    calls.end(graph.run(_inputs(model), calls.call))
    with model.distribute_strategy.scope():
        inputs = _inputs(model)
        copy = keras.Model(inputs, graph.run(inputs, _Folding(calls.folded(), dtype).call), name=model.name)
    return copy


def _inputs(model):
    def fresh(tensor):
        return keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name)

    return keras.tree.map_structure(fresh, model.inputs[0] if isinstance(model, keras.Sequential) else model.input)


class _Calls:
    """Which layer made and which layers took each tensor."""

    def __init__(self):
        self.made = {}  # id of a tensor -> (the tensor, the layer that made it)
        self.taken = {}  # id of a tensor -> the layers that took it
        self.count = {}  # id of a layer -> how often it was called
        self.ends = set()  # ids of the model's outputs

    def call(self, layer, *args, **kwargs):
        if isinstance(layer, ErrorModulation):
            return args[0], args[0]  # the second one is the token, which only the next modulation takes
        for tensor in keras.tree.flatten((args, kwargs)):
            self.taken.setdefault(id(tensor), []).append(layer)
        self.count[id(layer)] = self.count.get(id(layer), 0) + 1
        outputs = layer(*args, **kwargs)
        self.made |= {id(tensor): (tensor, layer) for tensor in keras.tree.flatten(outputs)}
        return outputs

    def end(self, outputs):
        self.ends = {id(tensor) for tensor in keras.tree.flatten(outputs)}

    def folded(self):
        """Returns `{id of a layer: the BatchNormalization that is folded into it}`."""
        found = {}
        for tensor, layer in self.made.values():
            takers = self.taken.get(id(tensor), [])
            if id(tensor) in self.ends or len(takers) != 1 or not isinstance(takers[0], keras.layers.BatchNormalization):
                continue
            if self.count[id(layer)] == self.count[id(takers[0])] == 1 and _fits(layer, takers[0], len(tensor.shape)):
                found[id(layer)] = takers[0]
        return found


def _fits(layer, normalization, rank):
    kernels = layer_kernels(layer) if isinstance(layer, keras.Layer) else []
    if not kernels or isinstance(layer, keras.layers.EinsumDense) or layer.activation is not keras.activations.linear:
        return False
    if has_own_call(layer) or (has_own_call(normalization) and type(normalization) is not FusedBatchNormalization):
        return False
    channels = 1 if getattr(layer, "data_format", None) == "channels_first" else rank - 1
    return normalization.axis % rank == channels


class _Folding:
    """Calls copies of the layers, without modulation and without what is folded."""

    def __init__(self, folded, dtype):
        self.folded = folded
        self.dtype = dtype
        self.gone = {id(normalization) for normalization in folded.values()}
        self.copies = {}

    def call(self, layer, *args, **kwargs):
        if isinstance(layer, ErrorModulation):
            return args[0], args[0]
        if id(layer) in self.gone:
            return args[0] if args else kwargs["inputs"]
        if not isinstance(layer, keras.Layer):
            return layer(*args, **kwargs)  # a keras.ops operation
        if id(layer) in self.copies:
            return self.copies[id(layer)](*args, **kwargs)
        normalization = self.folded.get(id(layer))
        config = {name: None if name.endswith("_regularizer") else value for name, value in layer.get_config().items()}
        if normalization is not None:
            config["use_bias"] = True
        if self.dtype is not None:
            config["dtype"] = self.dtype
        self.copies[id(layer)] = copy = type(layer).from_config(config)
        outputs = copy(*args, **kwargs)
        copy.set_weights(layer.get_weights() if normalization is None else _weights(layer, normalization))
        copy_rest(layer, copy)
        return outputs


def _weights(layer, normalization):
    """The weights of a layer with the BatchNormalization behind it folded in, in the order of its variables."""
    mean, variance = (np.asarray(v, np.float64) for v in (normalization.moving_mean, normalization.moving_variance))
    gamma = np.asarray(normalization.gamma, np.float64) if normalization.scale else 1.0
    beta = np.asarray(normalization.beta, np.float64) if normalization.center else 0.0
    scale = gamma / np.sqrt(variance + normalization.epsilon)
    bias = np.asarray(layer.bias, np.float64) if layer.use_bias else 0.0
    *before, last = layer_kernels(layer)  # a separable convolution's depthwise kernel stays as it is
    kernel = np.asarray(last.variable, np.float64)
    if last.layout == "transposed":
        kernel = kernel * scale[:, np.newaxis]
    elif last.layout == "depthwise":
        kernel = kernel * scale.reshape(kernel.shape[-2:])
    else:
        kernel = kernel * scale
    return [*(np.asarray(one.variable) for one in before), kernel, (bias - mean) * scale + beta]
