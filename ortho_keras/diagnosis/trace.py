"""One pass through a model's layers that records what each parametric layer received and returned."""

import functools
import math
import re

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.spectra import kernel_extremes, mean_cosines, operator_extremes
from ortho_keras.method.kernels import as_matrices, layer_kernels, walk_layers
from ortho_keras.method.modulation import ErrorModulation, root_mean_square
from ortho_keras.nets.shifted_relu import ShiftedReLU

_ACTIVATIONS = (keras.layers.Activation, keras.layers.ReLU, ShiftedReLU)


class Call:
    """One call of a parametric layer; its linear output is the one before its own activation."""

    error = next_error = top_error = gradient_ratio = scale = dead_share = math.nan  # until they are found

    def __init__(self, layer, name, kernels, inputs, linear, outputs, below=None):
        self.below = below  # the parametric layer's call before it on the longest path from the inputs, or None
        self.height = 1 + (below.height if below else 0)  # the number of calls on that path
        self.layer, self.inner, self.name, self.kernels = layer, _unwrapped(layer), name, kernels
        self.linear, self.outputs = linear, outputs
        self.modulated = outputs  # or those of the `ErrorModulation` that follows
        timed = isinstance(layer, keras.layers.TimeDistributed)
        self.input_shape = inputs.shape[:1] + inputs.shape[2:] if timed else inputs.shape  # of the inner layer
        self.channels = _channel_axes(self.inner, len(outputs.shape), int(timed))
        own = [size for axis, size in enumerate(linear.shape) if axis and axis not in self.channels]
        channels_first = getattr(self.inner, "data_format", None) == "channels_first"
        received = self.input_shape[2:] if channels_first else self.input_shape[1:-1]
        received = [*received, *inputs.shape[1 : 1 + timed]]
        # A convolution of one pixel, or one that leaves one, maps vectors, as a Dense layer does.
        self.has_positions = math.prod(own) > 1 and math.prod(received) > 1

    @property
    def image_share(self):
        """The share of the variance over images and positions that lies between images; NaN without positions."""
        if not self.has_positions:
            return math.nan
        outputs = tf.cast(self.linear, tf.float64)
        others = [axis for axis in range(len(outputs.shape)) if axis not in self.channels]
        between = float(tf.reduce_mean(tf.math.reduce_variance(outputs, 0)))
        return ratio(between, float(tf.reduce_mean(tf.math.reduce_variance(outputs, others))))

    @functools.cached_property
    def cosines(self):
        return mean_cosines(as_matrices(k.variable.numpy().astype(np.float64), k.layout, k.groups) for k in self.kernels)

    @functools.cached_property
    def kernel_values(self):  # the smallest and the largest singular value, as below
        lows, highs = zip(*(kernel_extremes(k.variable, k.layout, k.groups) for k in self.kernels))
        return min(lows), max(highs)

    @functools.cached_property
    def operator_values(self):
        return operator_extremes(self.inner, self.input_shape)


class Trace:
    """Calls layers, and follows each tensor back to the parametric layer that it comes from."""

    def __init__(self, inputs):
        self.calls = []
        self.branches = self.modulated = False
        self.unmeasured = []  # names of layers whose weights are no kernels: recurrent ones, embeddings
        # id of a tensor -> [the tensor, the last call on the longest path to it or None, whether a layer has received it]
        self.tensors = {id(tensor): [tensor, None, False] for tensor in keras.tree.flatten(inputs)}

    def call(self, layer, *args, **kwargs):
        received = keras.tree.flatten((args, kwargs))
        known = [self.tensors[id(value)] for value in received if id(value) in self.tensors]
        self.branches = self.branches or len(known) > 1 or any(used for _, _, used in known)
        for entry in known:
            entry[2] = True
        source = max((call for _, call, _ in known if call), key=lambda call: call.height, default=None)
        outputs, linear = _called(layer, args, kwargs)
        first = keras.tree.flatten(outputs)[0]
        inner = walk_layers(layer) if isinstance(layer, keras.Layer) else ()
        kernels = [kernel for each, _ in inner for kernel in layer_kernels(each)]
        if kernels:
            inputs = next(value for value in received if hasattr(value, "shape"))  # flags may come first, by keyword
            before = linear[0] if len(linear) == 1 else first
            number = 1 + sum(call.layer.name == layer.name for call in self.calls)
            name = layer.name if number == 1 else f"{layer.name} ({number})"
            source = Call(layer, name, kernels, inputs, before, first, below=source)
            self.calls.append(source)
        elif isinstance(layer, ErrorModulation) and source:
            source.modulated, self.modulated = first, True
        elif isinstance(layer, keras.Layer) and any(len(weight.shape) > 1 for weight in layer.trainable_weights):
            self.unmeasured += [layer.name] * (layer.name not in self.unmeasured)
        # The operations of keras.ops and keras.activations are no layers: they are known by name.
        activates = bool(linear) or isinstance(layer, _ACTIVATIONS) or type(layer).__name__.lower() in ("relu", "relu6")
        if activates and source and math.isnan(source.dead_share):
            source.dead_share = _constant_share(first, source.channels)
        for tensor in keras.tree.flatten(outputs)[: 1 if isinstance(layer, ErrorModulation) else None]:
            self.tensors[id(tensor)] = [tensor, source, False]
        return outputs

    def paths(self, outputs):
        """Returns for each output of the model the numbers of the calls on the longest path to it, from the input up."""
        numbers = {id(call): number for number, call in enumerate(self.calls)}
        paths = []
        for tensor in keras.tree.flatten(outputs):
            _, call, _ = self.tensors.get(id(tensor), (tensor, None, False))
            path = []
            while call:
                path.append(numbers[id(call)])
                call = call.below
            paths.append(tuple(reversed(path)))
        return tuple(dict.fromkeys(paths))


def magnitude(tensor, scale=1.0):
    """Returns a tensor's root mean square over `scale`, a float; 0 for `None`, a gradient that does not exist."""
    return 0.0 if tensor is None else float(root_mean_square(tf.convert_to_tensor(tensor), False)) / scale


def ratio(numerator, denominator):
    """Returns the ratio of two magnitudes; NaN for 0 / 0."""
    if denominator == 0:
        return math.inf if numerator > 0 else math.nan
    return numerator / denominator


def _called(layer, args, kwargs):
    """Returns a layer's outputs, and a list of what it, wrapped or not, passed to its own activation after a kernel."""
    inner, linear = _unwrapped(layer), []
    activation = getattr(inner, "activation", None)
    if activation in (None, keras.activations.linear) or not isinstance(inner, keras.Layer) or not layer_kernels(inner):
        return layer(*args, **kwargs), linear

    def record(inputs):
        linear.append(inputs)
        return activation(inputs)

    inner.activation = record
    try:
        return layer(*args, **kwargs), linear
    finally:
        inner.activation = activation


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
        shift = rank - len(outputs)  # how far the axes after an ellipsis are from their place in the equation
        return tuple(at + (shift if "." in outputs[:at] else leading) for at in new) or (rank - 1,)
    return (rank - 1,)


def _constant_share(outputs, channels):
    """The share of channels that are the same for all images and positions: no signal, and no gradient, passes."""
    rank = len(outputs.shape)
    channels = channels if max(channels) < rank else (rank - 1,)  # flattened in between
    others = [axis for axis in range(rank) if axis not in channels]
    constant = tf.equal(tf.reduce_max(outputs, others), tf.reduce_min(outputs, others))
    return float(tf.reduce_mean(tf.cast(constant, tf.float32)))
