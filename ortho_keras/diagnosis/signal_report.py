"""Where a net loses its signal: one batch on its way up, and its error on the way down."""

import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis.signal_inputs import (
    KerasFunction,
    checked_inputs,
    checked_loss,
    checked_targets,
    is_keras,
    loss_name,
    shapes,
    takes_logits_for_probabilities,
)
from ortho_keras.diagnosis.signals import LayerSignal, SignalReport, ratio
from ortho_keras.diagnosis.spectra import kernel_extremes, mean_cosines, operator_extremes
from ortho_keras.diagnosis.trace import Trace
from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import as_matrices, walk_layers
from ortho_keras.method.layer_state import unchanged
from ortho_keras.method.modulation import ErrorModulation, root_mean_square

# float16 gradients are taken of the loss times the first of these at which all of them are finite.
LOSS_SCALES = (2.0**15, 2.0**11, 2.0**7, 2.0**3, 1.0)


def signal_report(model, x, y, loss=None, tolerance=2.0, max_scale=1000.0, reference="anchor", singular_values=True):
    """Measures one batch on its way up and its error on the way down, at each parametric layer, and changes nothing.

    The model runs as in training (BatchNormalization by the batch's statistics, dropout on); weights, BatchNormalization's
    averages, the optimizer and the layers' random states are afterwards what they were. (A layer of one's own that draws
    without a seed generator moves Keras's or TensorFlow's global one.) The error is that of the loss alone, the mean
    over the batch, without penalties, and it is taken before a layer's own activation, where it has one (behind it in a
    `TimeDistributed`). A layer that is called more than once has one entry for each call; "next" and "top" go by the order of
    calls. A layer of one's own, or a subclassed model inside, is one layer. Recurrent layers and embeddings are not measured,
    but named.

    Args:
        model: A built Functional or Sequential Keras model of any shape, nested and branching ones included.
        x: Inputs, arrays `(batch, ...)`, a batch of at least 2: one, a list in the model's order, or a dict by inputs' names.
        y: Targets, as the loss takes them; a list or dict of arrays for a model of several outputs.
        loss: A Keras loss, its name, or a function of `(y, outputs)`, which gets `y` of shape `(batch,)` as `(batch, 1)` where
            the outputs are, as in `compile`. Defaults to `None`, what the model is compiled with: one loss or several, their
            weights, and targets as `fit` takes them.
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
    """

    def __init__(self, model, x, y, loss=None):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
        self.graph = Graph(model)
        self.model = model
        self.x = checked_inputs(model, x)
        self.y = checked_targets(model, y)
        if loss is None and not model.compiled:
            raise ValueError("`loss` must be given for a model that is not compiled. Received: loss=None")
        # None: what `compile` made of its losses, which is more than the losses (see `_compiled_loss`).
        self.loss = None if loss is None and model.loss is not None else checked_loss(loss)
        # An output without a loss may have no target.
        sizes = {leaf.shape[:1] for leaf in keras.tree.flatten(self.y) if leaf.shape or leaf.dtype != object}
        size = len(keras.tree.flatten(self.x)[0])
        if (self.loss is None or isinstance(self.loss, keras.losses.Loss)) and sizes != {(size,)}:
            raise ValueError(f"`y` must hold a target for each of the {size} samples. Received: y of shape {shapes(self.y)}")
        self.half = any(getattr(layer, "compute_dtype", "") == "float16" for layer, _ in walk_layers(model))

    def measure(self, rule, singular_values=True):
        """Returns a `SignalReport`.

        Args:
            rule: `ErrorModulation`, what modulation would do.
            singular_values: bool.
        """
        with unchanged(self.model):
            return self._measure(rule, singular_values)

    def _measure(self, rule, singular_values):
        trace = Trace(self.x)
        with tf.GradientTape(persistent=True) as tape:
            # Inside a layer's call, so that layers that take no `training` argument pass it on.
            outputs = self._outputs(trace)
            loss = self._loss(outputs)
        if not trace.calls:
            raise ValueError(f"`model` must call a convolution, dense or einsum layer. Received: model={self.model.name!r}")
        calls, variables = trace.calls, {id(k.variable): k.variable.value for call in trace.calls for k in call.kernels}
        sources = [[getattr(c, name) for c in calls] for name in ("linear", "outputs", "behind")]
        for scale in LOSS_SCALES if self.half else (1.0,):
            *errors, gradients = tape.gradient(loss, [*sources, list(variables.values())], tf.constant(scale))
            if all(_is_finite(gradient) for gradient in keras.tree.flatten(gradients) if gradient is not None):
                break
        linear, outer, behind = ([_magnitude(error, scale) for error in some] for some in errors)
        # Keras takes the error of a softmax at its logits, past the output.
        outer = [own if error is None else magnitude for own, error, magnitude in zip(linear, errors[1], outer)]
        if trace.modulated:
            scales = [ratio(own, upper) if own else 1.0 for own, upper in zip(outer, behind)]
            fired = [scaled != 1.0 for scaled in scales]
        elif trace.branches:
            scales, fired = [math.nan] * len(calls), [False] * len(calls)
        else:
            scales, fired = _would_scale(rule, outer)
        gradients = dict(zip(variables, gradients))
        top = next((own for own in reversed(linear) if own > 0), 0.0)
        layers = []
        for index, call in enumerate(calls):
            own, after = linear[index], linear[min(index + 1, len(calls) - 1)]
            layers.append(
                LayerSignal(
                    name=call.name,
                    kind=type(call.layer).__name__,
                    positions=len(call.linear.shape) > 1 + len(call.channels),
                    forward_moment=_magnitude(call.linear) ** 2,
                    backward_moment=own**2,
                    error_to_next=ratio(own, after),
                    error_to_top=ratio(own, top),
                    gradient_ratio=_gradient_ratio(call.kernels, gradients, scale),
                    **dict(zip(("mean_cosine", "mean_abs_cosine"), mean_cosines(map(_matrices, call.kernels)))),
                    **_extremes(call, singular_values),
                    image_share=_image_share(call.linear, call.channels),
                    dead_share=call.dead_share,
                    scale=scales[index],
                    fired=fired[index],
                )
            )
        return SignalReport(self.model.name, float(loss), tuple(layers), trace.modulated, tuple(trace.unmeasured))

    def _outputs(self, trace):
        probe = _InTraining(self.model, lambda: self.graph.run(self.x, trace.call, training=True), name="probe")
        try:
            return probe(None, training=True)
        except Exception as error:  # a layer may raise anything
            raise ValueError(
                f"`x` must suit the model's layers. Received: x of shape {shapes(self.x)} ({first_line(error)})"
            ) from error

    def _compiled_loss(self, y, outputs):
        """Targets' ranks, losses' weights, one loss for several outputs: as in training; but without penalties."""
        held = [(variable, variable.regularizer) for variable in self.model.trainable_variables]
        try:
            for variable, _ in held:
                variable.regularizer = None  # taken away afterwards, a large penalty would take the loss's digits with it
            added = sum(tf.reduce_sum(tf.cast(own, tf.float32)) for own in self.model.losses)  # by the layers' calls
            return self.model.compute_loss(x=self.x, y=y, y_pred=outputs, sample_weight=None) - added
        finally:
            for variable, regularizer in held:
                variable.regularizer = regularizer

    def _given_loss(self, y, outputs):
        ours, targets = is_keras(self.loss), keras.tree.flatten(y)
        if ours and len(self.model.outputs) == len(targets) == 1:  # in a list or dict, they may be
            (outputs,), (y,) = keras.tree.flatten(outputs), targets
        one_each = tf.is_tensor(outputs) and outputs.shape[1:] == (1,)
        if (
            one_each
            and np.ndim(y) == 1
            and (isinstance(self.loss, KerasFunction) or not isinstance(self.loss, keras.losses.Loss))
        ):
            y = y[:, np.newaxis]  # as `compile` does for a function
        return self.loss(y, outputs)

    def _loss(self, outputs):
        compiled = self.loss is None
        loss = self.model.loss if compiled else self.loss
        name = loss_name(loss)
        try:
            if takes_logits_for_probabilities(loss, outputs):
                raise ValueError("these outputs are logits: give the loss object, with from_logits=True")
            value = self._compiled_loss(self.y, outputs) if compiled else self._given_loss(self.y, outputs)
            return tf.reduce_mean(tf.cast(value, tf.float32))
        except Exception as error:  # a loss of one's own may raise anything
            raise ValueError(
                f"`y` and `loss` must suit the model's outputs {shapes(outputs)}. Received: y of shape {shapes(self.y)}, "
                f"loss={name or loss!r} ({first_line(error)})"
            ) from error


class _InTraining(keras.Layer):
    """Calls a function in the context of a layer that is called with `training=True`.

    The model is a layer of it: so Keras forgets what the model's layers added to its losses in the call before, which may be
    tensors of `fit`'s graph.
    """

    def __init__(self, model, function, name):
        super().__init__(name=name, autocast=False)
        self.model = model
        self.function = function

    def call(self, inputs, training=None):
        return self.function()


def _magnitude(tensor, scale=1.0):
    return 0.0 if tensor is None else float(root_mean_square(tf.convert_to_tensor(tensor), False)) / scale


def _is_finite(tensor):
    return bool(tf.reduce_all(tf.math.is_finite(tf.convert_to_tensor(tensor))))


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
    pairs = [(tf.cast(w, tf.float64), tf.cast(g, tf.float64)) for w, g in pairs if g is not None]
    if not pairs:
        return math.nan
    norms = [math.sqrt(sum(float(tf.reduce_sum(tf.square(tensor))) for tensor in tensors)) for tensors in zip(*pairs)]
    return ratio(norms[1] / factor, norms[0])


def _matrices(kernel):
    return np.asarray(as_matrices(np.asarray(kernel.variable, np.float64), kernel.layout, kernel.groups))


def _extremes(call, wanted):
    kernel, operator = (math.nan, math.nan), (math.nan, math.nan)
    if wanted:
        each = [kernel_extremes(k.variable, k.layout, k.groups) for k in call.kernels]
        kernel = min(low for low, _ in each), max(high for _, high in each)
        operator = operator_extremes(call.inner, call.input_shape)
    names = ("kernel_smallest", "kernel_largest", "operator_smallest", "operator_largest")
    return dict(zip(names, (*kernel, *operator)))


def _image_share(outputs, channels):
    """The share of variance over images and positions that lies between images at one position; NaN without positions."""
    if len(outputs.shape) <= 1 + len(channels):
        return math.nan
    outputs = tf.cast(outputs, tf.float64)
    others = [axis for axis in range(len(outputs.shape)) if axis not in channels]
    between = float(tf.reduce_mean(tf.math.reduce_variance(outputs, 0)))
    return ratio(between, float(tf.reduce_mean(tf.math.reduce_variance(outputs, others))))
