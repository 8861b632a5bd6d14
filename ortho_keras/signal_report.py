"""Where a net loses its signal: one batch on its way up, and its error on the way down."""

import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.activations import ShiftedReLU
from ortho_keras.graphs import Graph
from ortho_keras.kernels import as_matrices, layer_kernels, walk_layers
from ortho_keras.modulation import ErrorModulation, root_mean_square
from ortho_keras.signals import LayerSignal, SignalReport, ratio
from ortho_keras.spectra import kernel_extremes, mean_cosines, operator_extremes

_ACTIVATIONS = (keras.layers.Activation, keras.layers.ReLU, ShiftedReLU)


def signal_report(model, x, y, loss=None, tolerance=2.0, max_scale=1000.0, reference="anchor", singular_values=True):
    """Measures one batch on its way up and its error on the way down, at each parametric layer, and changes nothing.

    The model runs as in training (BatchNormalization by the batch's statistics, dropout on); weights, BatchNormalization's
    averages, the optimizer and random states are afterwards what they were. The error is that of the loss alone, the mean
    over the batch, without penalties. A layer that is called more than once has one entry for each call.

    Args:
        model: A built Functional or Sequential Keras model of any shape, nested and branching ones included.
        x: Inputs, arrays `(batch, ...)` in the structure that the model takes; a batch of at least 2.
        y: Targets, as the loss takes them.
        loss: A Keras loss, its name, or a function of `(y, outputs)`. Defaults to `None`, the compiled model's.
        tolerance: See `ErrorModulation`; this and the next two say what modulation would do. Where the model has
            `ErrorModulation` layers, the report shows what they did, and the error behind them.
        max_scale: See `ErrorModulation`.
        reference: See `ErrorModulation`.
        singular_values: bool. Whether to take singular values, the slow part for wide layers on large images.

    Returns:
        A `SignalReport`: `.layers`, `.growth`, `.findings`, `.to_csv(path)`, `.to_pandas()`, `.plot(path)`; `print` shows
        a table.

    Raises:
        ValueError: If the model is of another kind, has no parametric layer, or the batch or the loss do not fit it.

    Example:

    >>> model = plain_cnn(44)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> print(signal_report(model, images[:64], labels[:64], loss))

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): second-order moments of the error (Fig. 3),
        mean cosine similarity of filters (Fig. 2), the scale of the modulation. The other figures are ours.
    """
    rule = ErrorModulation(tolerance, max_scale, reference)
    return Probe(model, x, y, loss).measure(rule, singular_values)


class Probe:
    """A batch and a model whose graph is recorded, to be measured any number of times.

    Args:
        model: See `signal_report`.
        x: See `signal_report`.
        y: See `signal_report`.
        loss: See `signal_report`.
        optimizer: The one whose loss scale is used. Defaults to `None`, the model's, if it has one.
    """

    def __init__(self, model, x, y, loss=None, optimizer=None):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
        self.graph = Graph(model)
        self.model = model
        self.optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        self.kernels = {}  # id of a parametric layer -> its LayerKernels
        for layer, _ in walk_layers(model):
            if not isinstance(layer, keras.Model):
                kernels = [kernel for inner, _ in walk_layers(layer) for kernel in layer_kernels(inner)]
                if kernels:
                    self.kernels[id(layer)] = kernels
        if not self.kernels:
            raise ValueError(f"`model` must have a convolution, dense or einsum layer. Received: model={model.name!r}")
        self.x = keras.tree.map_structure(tf.convert_to_tensor, x)
        self.y = keras.tree.map_structure(tf.convert_to_tensor, y)
        sizes = {len(array) for array in keras.tree.flatten(self.x)}
        if len(sizes) != 1 or sizes.pop() < 2:
            raise ValueError(f"`x` must be a batch of at least 2. Received: x of shape {_shapes(self.x)}")
        if loss is None and not model.compiled:
            raise ValueError("`loss` must be given for a model that is not compiled. Received: loss=None")
        self.loss = keras.losses.get(model.loss if loss is None else loss)
        if not callable(self.loss):
            raise ValueError(f"`loss` must be one loss, or a function of (y, outputs). Received: loss={self.loss!r}")

    def measure(self, rule, singular_values=True):
        """Returns a `SignalReport`.

        Args:
            rule: `ErrorModulation`, what modulation would do.
            singular_values: bool.
        """
        # Everything that a call in training mode moves: BatchNormalization's averages, seeds of dropout.
        trained = {id(v) for v in self.model.trainable_variables}
        state = [(v, tf.identity(v.value)) for v in self.model.variables if id(v) not in trained]
        try:
            return self._measure(rule, singular_values)
        finally:
            for variable, value in state:
                variable.assign(value)

    def _measure(self, rule, singular_values):
        trace = _Trace(self.kernels)
        scaled = isinstance(self.optimizer, keras.optimizers.LossScaleOptimizer) and self.optimizer.built
        with tf.GradientTape() as tape:
            outputs = self.graph.run(self.x, trace.call, training=True)
            loss = tf.reduce_mean(tf.cast(self._loss(outputs), tf.float32))
            target = self.optimizer.scale_loss(loss) if scaled else loss
        variables = {id(k.variable): k.variable.value for call in trace.calls for k in call.kernels}
        sources = [call.outputs for call in trace.calls], [call.behind for call in trace.calls], list(variables.values())
        errors, unmodulated, gradients = tape.gradient(target, sources)
        factor = float(target) / float(loss) if scaled and float(loss) else 1.0
        gradients = dict(zip(variables, gradients))
        magnitudes, before = (
            [0.0 if error is None else float(root_mean_square(error, False)) / factor for error in some]
            for some in (errors, unmodulated)
        )
        if trace.modulated:
            scales = [ratio(own, upper) if own else 1.0 for own, upper in zip(magnitudes, before)]
            fired = [scale != 1.0 for scale in scales]
        elif trace.branches:
            scales, fired = [math.nan] * len(magnitudes), [False] * len(magnitudes)
        else:
            scales, fired = _would_scale(rule, magnitudes)
        layers = []
        for index, call in enumerate(trace.calls):
            own, after = magnitudes[index], magnitudes[min(index + 1, len(magnitudes) - 1)]
            layers.append(
                LayerSignal(
                    name=call.name,
                    kind=type(call.layer).__name__,
                    positions=len(call.outputs.shape) > 2,
                    forward_moment=float(root_mean_square(call.outputs, False)) ** 2,
                    backward_moment=own**2,
                    error_to_next=ratio(own, after),
                    error_to_top=ratio(own, magnitudes[-1]),
                    gradient_ratio=_gradient_ratio(call.kernels, gradients, factor),
                    **dict(zip(("mean_cosine", "mean_abs_cosine"), mean_cosines(map(_matrices, call.kernels)))),
                    **_extremes(call, singular_values),
                    image_share=_image_share(call.outputs, call.channels),
                    dead_share=call.dead_share,
                    scale=scales[index],
                    fired=fired[index],
                )
            )
        return SignalReport(self.model.name, float(loss), tuple(layers), trace.modulated)

    def _loss(self, outputs):
        name = getattr(self.loss, "__name__", "")
        if name.endswith("crossentropy") and (tf.reduce_min(outputs) < 0 or tf.reduce_max(outputs) > 1):
            raise ValueError(
                "`loss` must suit the model's outputs, which are logits: give the loss object, with from_logits=True. "
                f"Received: loss={name!r}"
            )
        try:
            return self.loss(self.y, outputs)
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:
            raise ValueError(
                f"`y` and `loss` must suit the model's outputs {_shapes(outputs)}. Received: y of shape {_shapes(self.y)}, "
                f"loss={self.loss!r} ({str(error).splitlines()[0]})"
            ) from error


class _Call:
    """One call of a parametric layer: what it was given, what came out, what became of it."""

    def __init__(self, layer, name, kernels, inputs, outputs):
        self.layer = layer
        self.name = name
        self.kernels = kernels
        self.input_shape = inputs.shape
        self.outputs = outputs
        self.channels = 1 if getattr(layer, "data_format", None) == "channels_first" else len(outputs.shape) - 1
        self.behind = outputs  # the same, behind the call's ErrorModulation
        self.dead_share = math.nan


class _Trace:
    """Calls layers and keeps what parametric ones return; follows each tensor back to the parametric layer it comes from."""

    def __init__(self, kernels):
        self.kernels = kernels
        self.calls = []
        self.branches = False
        self.modulated = False
        self.tensors = {}  # id of a tensor -> [the tensor, index of the call it comes from or None, whether it was taken]

    def call(self, layer, *args, **kwargs):
        taken = [self.tensors[id(t)] for t in keras.tree.flatten((args, kwargs)) if id(t) in self.tensors]
        self.branches = self.branches or len(taken) > 1 or any(used for _, _, used in taken)
        for entry in taken:
            entry[2] = True
        source = max((index for _, index, _ in taken if index is not None), default=None)
        outputs = layer(*args, **kwargs)
        first = keras.tree.flatten(outputs)[0]
        if id(layer) in self.kernels:
            names = [call.name for call in self.calls]
            name, again = layer.name, 2
            while name in names:  # one layer called again, or a namesake in another nested model
                name, again = f"{layer.name} ({again})", again + 1
            self.calls.append(_Call(layer, name, self.kernels[id(layer)], keras.tree.flatten(args)[0], first))
            source = len(self.calls) - 1
        elif isinstance(layer, ErrorModulation) and source is not None:
            self.calls[source].behind, self.modulated = first, True
        if source is not None and self._activates(layer):
            call = self.calls[source]
            if math.isnan(call.dead_share):
                call.dead_share = _constant_share(first, call.channels)
        for tensor in keras.tree.flatten(outputs)[: 1 if isinstance(layer, ErrorModulation) else None]:
            self.tensors[id(tensor)] = [tensor, source, False]
        return outputs

    def _activates(self, layer):
        if id(layer) in self.kernels:
            return getattr(layer, "activation", None) not in (None, keras.activations.linear)
        return isinstance(layer, _ACTIVATIONS) or type(layer).__name__ in ("Relu", "Relu6")  # the latter: keras.ops


def _would_scale(rule, magnitudes):
    """What a rule would do to errors of these magnitudes, from the bottom up: scales, and whether it fires."""
    above, passed, scales, fires = tf.constant(0.0), 1.0, [], []
    for own in reversed(magnitudes):
        scale, fired, above = rule.decide(tf.constant(own * passed, tf.float32), above)
        scales.append(float(scale))
        fires.append(bool(fired))
        passed *= scales[-1]  # the error is linear in the error above it
    return scales[::-1], fires[::-1]


def _gradient_ratio(kernels, gradients, factor):
    pairs = [(kernel.variable.value, gradients[id(kernel.variable)]) for kernel in kernels]
    if all(gradient is None for _, gradient in pairs):
        return math.nan
    squares = [np.sum(np.square(np.asarray(tf.convert_to_tensor(g), np.float64))) for _, g in pairs if g is not None]
    norms = [np.sum(np.square(np.asarray(w, np.float64))) for w, g in pairs if g is not None]
    return ratio(math.sqrt(sum(squares)) / factor, math.sqrt(sum(norms)))


def _matrices(kernel):
    return np.asarray(as_matrices(np.asarray(kernel.variable, np.float64), kernel.layout, kernel.groups))


def _extremes(call, wanted):
    kernel, operator = (math.nan, math.nan), (math.nan, math.nan)
    if wanted:
        each = [kernel_extremes(k.variable, k.layout, k.groups) for k in call.kernels]
        kernel = min(low for low, _ in each), max(high for _, high in each)
        operator = operator_extremes(call.layer, call.input_shape)
    names = ("kernel_smallest", "kernel_largest", "operator_smallest", "operator_largest")
    return dict(zip(names, (*kernel, *operator)))


def _image_share(outputs, channels):
    """The share of variance over images and positions that lies between images at one position; NaN without positions."""
    if len(outputs.shape) < 3:
        return math.nan
    outputs = tf.cast(outputs, tf.float64)
    others = [axis for axis in range(len(outputs.shape)) if axis != channels]
    between = float(tf.reduce_mean(tf.math.reduce_variance(outputs, 0)))
    return ratio(between, float(tf.reduce_mean(tf.math.reduce_variance(outputs, others))))


def _constant_share(outputs, channels):
    """The share of channels that are the same for all images and positions: no signal, and no gradient, passes."""
    channels = min(channels, len(outputs.shape) - 1)
    others = [axis for axis in range(len(outputs.shape)) if axis != channels]
    constant = tf.equal(tf.reduce_max(outputs, others), tf.reduce_min(outputs, others))
    return float(tf.reduce_mean(tf.cast(constant, tf.float32)))


def _shapes(structure):
    return keras.tree.map_structure(lambda tensor: tuple(tensor.shape), structure)
