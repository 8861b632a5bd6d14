"""One pass through a model's layers, with what parametric layers were given and returned kept for backpropagation."""

import contextlib
import math
import re

import keras
import tensorflow as tf

from ortho_keras.method.kernels import layer_kernels, walk_layers
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.nets.shifted_relu import ShiftedReLU

_ACTIVATIONS = (keras.layers.Activation, keras.layers.ReLU, ShiftedReLU)


class Call:
    """One call of a parametric layer: what it was given, what came out, what became of it."""

    def __init__(self, layer, name, kernels, inputs, linear, outputs):
        self.layer = layer
        self.inner = _unwrapped(layer)
        self.name = name
        self.kernels = kernels
        timed = isinstance(layer, keras.layers.TimeDistributed)
        self.input_shape = inputs.shape[:1] + inputs.shape[2:] if timed else inputs.shape  # of the inner layer
        self.linear = linear  # the output before the layer's own activation, or the output
        self.outputs = outputs
        self.channels = _channel_axes(self.inner, len(outputs.shape), int(timed))
        self.behind = outputs  # the same, behind the call's ErrorModulation
        self.dead_share = math.nan


class Trace:
    """Calls layers, and follows each tensor back to the parametric layer that it comes from.

    Args:
        inputs: The model's input tensors.
    """

    def __init__(self, inputs):
        self.calls = []
        self.branches = False
        self.modulated = False
        self.unmeasured = []  # names of layers with weights that are no kernels: recurrent ones, embeddings
        self.kernels = {}  # id of a layer -> the LayerKernels in it
        # id of a tensor -> [the tensor, index of the call it comes from or None, whether it was taken]
        self.tensors = {id(tensor): [tensor, None, False] for tensor in keras.tree.flatten(inputs)}

    def call(self, layer, *args, **kwargs):
        given = keras.tree.flatten((args, kwargs))
        taken = [self.tensors[id(value)] for value in given if id(value) in self.tensors]
        self.branches = self.branches or len(taken) > 1 or any(used for _, _, used in taken)
        for entry in taken:
            entry[2] = True
        source = max((index for _, index, _ in taken if index is not None), default=None)
        with _own_activation(layer) as linear:
            outputs = layer(*args, **kwargs)
        first = keras.tree.flatten(outputs)[0]
        kernels = self._kernels(layer)
        if kernels:
            names = {call.name for call in self.calls}
            name, again = layer.name, 2
            while name in names:  # one layer called again, or a namesake in another nested model
                name, again = f"{layer.name} ({again})", again + 1
            inputs = next(value for value in given if hasattr(value, "shape"))  # flags given by name may come first
            self.calls.append(Call(layer, name, kernels, inputs, linear[0] if len(linear) == 1 else first, first))
            source = len(self.calls) - 1
        elif isinstance(layer, ErrorModulation) and source is not None:
            self.calls[source].behind, self.modulated = first, True
        elif isinstance(layer, keras.Layer) and any(len(weight.shape) > 1 for weight in layer.trainable_weights):
            self.unmeasured += [layer.name] * (layer.name not in self.unmeasured)
        # The operations of keras.ops and keras.activations are no layers: they tell by their names.
        activates = bool(linear) or isinstance(layer, _ACTIVATIONS) or type(layer).__name__.lower() in ("relu", "relu6")
        if activates and source is not None and math.isnan(self.calls[source].dead_share):
            self.calls[source].dead_share = _constant_share(first, self.calls[source].channels)
        for tensor in keras.tree.flatten(outputs)[: 1 if isinstance(layer, ErrorModulation) else None]:
            self.tensors[id(tensor)] = [tensor, source, False]
        return outputs

    def _kernels(self, layer):
        if id(layer) not in self.kernels:
            inner = walk_layers(layer) if isinstance(layer, keras.Layer) else ()
            self.kernels[id(layer)] = [kernel for each, _ in inner for kernel in layer_kernels(each)]
        return self.kernels[id(layer)]


@contextlib.contextmanager
def _own_activation(layer):
    """Collects, in a list, what a convolution, dense or einsum layer, in a wrapper or not, hands to its own activation."""
    layer = _unwrapped(layer)
    linear, activation = [], getattr(layer, "activation", None)
    if activation in (None, keras.activations.linear) or not isinstance(layer, keras.Layer) or not layer_kernels(layer):
        yield linear
        return

    def record(inputs):
        linear.append(inputs)
        return activation(inputs)

    layer.activation = record
    try:
        yield linear
    finally:
        layer.activation = activation


def _unwrapped(layer):
    while isinstance(layer, keras.layers.Wrapper):
        layer = layer.layer
    return layer


def _channel_axes(layer, rank, leading):
    """The axes of an output of this rank that are a layer's channels: an EinsumDense's can be several, heads and units."""
    if getattr(layer, "data_format", None) == "channels_first":
        return (1 + leading,)
    if isinstance(layer, keras.layers.EinsumDense):
        inputs, _, outputs = re.split(r",|->", layer.equation.replace(" ", "").replace("...", "."))
        new = [at for at, letter in enumerate(outputs) if letter not in inputs]
        behind = rank - len(outputs)  # how far the axes behind an ellipsis are from where the equation has them
        return tuple(at + (behind if "." in outputs[:at] else leading) for at in new) or (rank - 1,)
    return (rank - 1,)


def _constant_share(outputs, channels):
    """The share of channels that are the same for all images and positions: no signal, and no gradient, passes."""
    rank = len(outputs.shape)
    channels = channels if max(channels) < rank else (rank - 1,)  # flattened since
    others = [axis for axis in range(rank) if axis not in channels]
    constant = tf.equal(tf.reduce_max(outputs, others), tf.reduce_min(outputs, others))
    return float(tf.reduce_mean(tf.cast(constant, tf.float32)))
