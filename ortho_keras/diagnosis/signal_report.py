"""Where a network loses its signal: one batch forward and its gradient backward, measured at each parametric layer."""

import contextlib
import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.diagnosis import signal_inputs
from ortho_keras.diagnosis.signal_inputs import shapes
from ortho_keras.diagnosis.signals import LayerSignal, SignalReport
from ortho_keras.diagnosis.trace import Trace, magnitude, ratio
from ortho_keras.method.checks import check_built
from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph
from ortho_keras.method.kernels import walk_layers
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import unchanged


def signal_report(model, x, y, loss=None, tolerance=2.0, max_scale=1000.0, reference="anchor", singular_values=True):
    """Measures one batch and its backpropagated gradient, the error, at each parametric layer, and changes nothing.

    The model runs as in training (BatchNormalization uses the batch's statistics, dropout is on); its variables are restored
    afterwards. The error is that of the loss without the weights' penalties, but with what layers add by `add_loss`; it is
    taken before a layer's own activation, where it has one (after it in a `TimeDistributed`). A layer that is called several
    times has one entry for each call. A custom layer, or a subclassed model inside, counts as one layer. Recurrent layers and
    embeddings are not measured; the report lists them.

    Args:
        model: A built Functional or Sequential Keras model of any shape, nested and branching ones included.
        x: Inputs, arrays `(batch, ...)`, a batch of at least 2: one, a list in the model's order, or a dict by inputs' names.
        y: Targets, as the loss takes them; a list or dict of arrays for a model of several outputs; `None` for a model that
            is compiled without a loss and trains by `add_loss` alone.
        loss: A Keras loss, its name, or a function of `(y, outputs)`, which gets `y` in the outputs' rank as in `compile`.
            Defaults to `None`, what the model is compiled with: one loss or several, their weights, and targets as in `fit`.
        tolerance, max_scale, reference: As in `ErrorModulation`: the report shows what modulation would do. For a model with
            `ErrorModulation` layers it shows what they did, and the error after them.
        singular_values: bool. Whether to compute singular values, the slow part for wide layers on large images.

    Returns:
        A `SignalReport`: `.layers`, `.growth`, `.findings`, `.to_csv(path)`, `.to_pandas()`, `.plot(path)`, and `print`.

    Raises:
        ValueError: If the model is of another kind or has no parametric layer, or if the batch or the loss does not fit it.

    Example:

    >>> model = plain_cnn(44)
    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> print(signal_report(model, images[:64], labels[:64], loss))

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): second-order moments of the error (Fig. 3),
        mean cosine similarity of filters (Fig. 2), the scale of the modulation. The other columns are ours.
    """
    rule = ErrorModulation(tolerance, max_scale, reference)
    return Probe(model, x, y, loss).measure(rule, singular_values)


class Probe:
    """A batch and a model whose graph is recorded, to be measured any number of times. Its arguments are `signal_report`'s."""

    def __init__(self, model, x, y, loss=None):
        self.model = check_built(model)
        self.graph = Graph(model)
        self.x = signal_inputs.checked_inputs(model, x)
        self.y = None if y is None else signal_inputs.checked_targets(model, y)
        if loss is None and not model.compiled:
            raise ValueError("`loss` must be given for a model that is not compiled. Received: loss=None")
        self.loss = model.loss if loss is None else signal_inputs.checked_loss(loss)
        self.compiled = model if loss is None else None  # whose `compute_loss` gives the loss, unless that is a custom one
        if loss is not None and signal_inputs.is_keras(self.loss):
            self.compiled = keras.Model(model.inputs, model.outputs if len(model.outputs) > 1 else model.outputs[0])
            self.compiled.compile(loss=self.loss)
        # An output without a loss may have no target.
        leaves = [] if y is None else keras.tree.flatten(self.y)
        sizes = {leaf.shape[:1] for leaf in leaves if leaf.shape or leaf.dtype != object}
        size = len(keras.tree.flatten(self.x)[0])
        if self.loss is not None and (self.compiled or isinstance(self.loss, keras.losses.Loss)) and sizes != {(size,)}:
            received = "None" if y is None else f"y of shape {shapes(self.y)}"
            raise ValueError(f"`y` must hold a target for each of the {size} samples. Received: {received}")
        self.half = any(getattr(layer, "compute_dtype", "") == "float16" for layer, _ in walk_layers(model))

    def measure(self, rule, singular_values=True):
        """Returns a `SignalReport`; `rule` is the `ErrorModulation` of which it shows what it would do."""
        with unchanged(self.model):
            trace = Trace(self.x)
            with tf.GradientTape(persistent=True) as tape:
                outputs = self._outputs(trace)
                loss = self._loss(outputs)
            if not trace.calls:
                raise ValueError(f"`model` must call a convolution, dense or einsum layer. Received: model={self.model.name!r}")
            self._backpropagate(trace, tape, loss, rule)
            for call in () if singular_values else trace.calls:
                call.kernel_values = call.operator_values = (math.nan, math.nan)
            layers = tuple(LayerSignal.of(call) for call in trace.calls)
        unmeasured, paths = tuple(trace.unmeasured), trace.paths(outputs)
        return SignalReport(self.model.name, float(loss), layers, trace.modulated, unmeasured, paths)

    def _backpropagate(self, trace, tape, loss, rule):
        """Sets what the calls of a trace have from the gradients."""
        calls = trace.calls
        kernels = {id(kernel.variable): kernel.variable.value for call in calls for kernel in call.kernels}
        sources = [[getattr(call, name) for call in calls] for name in ("linear", "outputs", "modulated")]
        for factor in (2.0**15, 2.0**11, 2.0**7, 2.0**3, 1.0) if self.half else (1.0,):  # of the loss; the first that is finite
            *errors, gradients = tape.gradient(loss, [*sources, list(kernels.values())], tf.constant(factor))
            if all(np.isfinite(gradient).all() for gradient in gradients if gradient is not None):
                break
        gradients = dict(zip(kernels, gradients))
        linear, outputs, modulated = ([magnitude(error, factor) for error in some] for some in errors)
        # Keras takes the gradient of a softmax at its logits, which bypasses the output.
        outputs = [own if error is None else at_output for own, error, at_output in zip(linear, errors[1], outputs)]
        scales = [math.nan] * len(calls)
        if trace.modulated:
            scales = [ratio(own, before) if own else 1.0 for own, before in zip(outputs, modulated)]
        elif not trace.branches:
            scales = _scales(rule, outputs)
        top = next((error for error in reversed(linear) if error > 0), 0.0)
        for call, error, next_error, scale in zip(calls, linear, [*linear[1:], linear[-1]], scales):
            call.error, call.next_error, call.top_error, call.scale = error, next_error, top, scale
            call.gradient_ratio = _gradient_ratio(call.kernels, gradients, factor)

    def _outputs(self, trace):
        probe = _InTraining(self.model, lambda: self.graph.run(self.x, trace.call, training=True))
        try:
            return probe(None, training=True)
        except Exception as error:  # a layer may raise anything
            received = f"x of shape {shapes(self.x)} ({first_line(error)})"
            raise ValueError(f"`x` must suit the model's layers. Received: {received}") from error

    def _loss(self, outputs):
        try:
            signal_inputs.check_probabilities(self.loss, outputs)
            with _without_penalties(self.model):
                if self.compiled:
                    return self._compiled_loss(outputs)
                added = [tf.reduce_sum(tf.cast(loss, tf.float32)) for loss in self.model.losses]  # by layers' `add_loss`
                return tf.reduce_mean(tf.cast(self._custom_loss(outputs), tf.float32)) + sum(added)
        except Exception as error:  # a custom loss may raise anything
            received = f"y of shape {None if self.y is None else shapes(self.y)}, loss={self.loss!r} ({first_line(error)})"
            raise ValueError(f"`y` and `loss` must suit the outputs {shapes(outputs)}. Received: {received}") from error

    def _compiled_loss(self, outputs):
        """The loss of training, with the ranks of the targets, the weights of several losses, and what layers add."""
        model, y = self.compiled, self.y
        if y is not None and len(model.outputs) == len(keras.tree.flatten(y)) == 1 and model is not self.model:
            (outputs,), (y,) = keras.tree.flatten(outputs), keras.tree.flatten(y)
        return tf.cast(model.compute_loss(x=self.x, y=y, y_pred=outputs, sample_weight=None), tf.float32)

    def _custom_loss(self, outputs):
        one_each = tf.is_tensor(outputs) and outputs.shape[1:] == (1,) and np.ndim(self.y) == 1
        ranked = one_each and not isinstance(self.loss, keras.losses.Loss)  # as `compile` does for a function
        return self.loss(self.y[:, np.newaxis] if ranked else self.y, outputs)


@contextlib.contextmanager
def _without_penalties(model):
    """Takes the regularizers off the weights; subtracting a large penalty afterwards would cost the loss its digits."""
    variables = [(variable, variable.regularizer) for variable in model.trainable_variables]
    try:
        for variable, _ in variables:
            variable.regularizer = None
        yield
    finally:
        for variable, regularizer in variables:
            variable.regularizer = regularizer


class _InTraining(keras.Layer):
    """Calls a function as a layer with `training=True`, so that layers that take no such argument pass it on."""

    def __init__(self, model, function):
        super().__init__(name="probe", autocast=False)
        self.model = model  # a sublayer, so that Keras clears the losses of an earlier call, which may be `fit`'s tensors
        self.function = function

    def call(self, inputs, training=None):
        return self.function()


def _scales(rule, magnitudes):
    """By what a rule would multiply errors of these magnitudes, layer by layer from the input."""
    above, passed, scales = tf.constant(0.0), 1.0, []
    for own in reversed(magnitudes):
        scale, _, above = rule.decide(tf.constant(own * passed, tf.float32), above)
        scales.append(float(scale))
        passed *= scales[-1]  # the error is linear in the error of the next layer
    return scales[::-1]


def _gradient_ratio(kernels, gradients, factor):
    pairs = [(kernel.variable.value, gradients[id(kernel.variable)]) for kernel in kernels]
    pairs = [(tf.cast(w, tf.float64), tf.cast(g, tf.float64)) for w, g in pairs if g is not None]
    if not pairs:
        return math.nan
    norm, gradient_norm = (float(tf.linalg.global_norm(tensors)) for tensors in zip(*pairs))
    return ratio(gradient_norm / factor, norm)
