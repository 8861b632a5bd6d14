"""BatchNormalization in one operation, and its averages re-estimated before an evaluation."""

import contextlib
import threading

import keras
import tensorflow as tf

from ortho_keras.method.errors import first_line
from ortho_keras.method.kernels import walk_layers


@keras.saving.register_keras_serializable(package="ortho_keras")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, computed by TensorFlow's one fused operation instead of a chain of small ones.

    The same arguments, variables and values up to rounding, in less time (`benchmarks/step_time.py`): Keras 3 (3.15) casts
    half-precision activations to float32 and writes several tensors of their size. Statistics are float32 here too. What the
    fused operation does not cover is left to Keras: `synchronized=True`, `renorm=True`, a mask, an `axis` other than the
    last, inputs that are not of rank 4 or not in the layer's compute type, and variables that are not float32.
    """

    def call(self, inputs, training=None, mask=None):
        plain = not (self.synchronized or self.renorm) and mask is None and len(inputs.shape) == 4 and self.axis in (-1, 3)
        if not plain or inputs.dtype != self.compute_dtype or self.variable_dtype != "float32":
            return super().call(inputs, training=training, mask=mask)
        moving_mean, moving_variance = (tf.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance))
        training = bool(training and self.trainable)
        none = tf.zeros((0,), moving_mean.dtype)
        outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
            x=inputs,
            scale=self.gamma if self.scale else tf.ones_like(moving_mean),
            offset=self.beta if self.center else tf.zeros_like(moving_mean),
            mean=none if training else moving_mean,
            variance=none if training else moving_variance,
            epsilon=self.epsilon,
            is_training=training,
        )
        if training:
            share = 1 - self.momentum
            self.moving_mean.assign(self.momentum * moving_mean + share * mean)
            # Of one value a processor's operation gives the variance 0, a GPU's NaN.
            variance = tf.math.multiply_no_nan(variance, share * _over_count(inputs))
            self.moving_variance.assign(self.momentum * moving_variance + variance)
        return outputs


def _over_count(inputs):
    """What makes of the operation's variance, the unbiased one, Keras's, which is over the count. A float where shapes tell."""
    count = inputs.shape[:3].num_elements()
    if count is None:
        count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)
        return tf.maximum(count - 1, 0) / tf.maximum(count, 1)
    return max(count - 1, 0) / max(count, 1)


class BatchNormalizationEstimator:
    """Replaces the moving averages of a model's BatchNormalization layers by those of given batches.

    The moving averages lag behind the weights, and a deep net compounds the error layer by layer. This runs the model
    in training mode over some batches and sets each moving mean and variance to the plain average of the batches' own
    (weights, optimizer and everything else stay as they are). Training is not affected by it: it uses each batch's own.

    The first call traces the model once; keep the object to estimate again. Dropout and the like see training mode too, and
    what else changes itself in it does so (`SpectralNormalization`). A layer that is called several times gets the average
    over its calls. A frozen layer keeps its averages, and so does one that a subclassed model or a layer calls in inference
    mode; in a Functional model `training=False` of such a call counts as little as in `fit`, for Keras hands its own on. A
    model that was built under a `tf.distribute` strategy gets the mean over replicas.

    Args:
        model: A built Keras model.

    Raises:
        ValueError: If `model` is not a built Keras model.

    Example:

    >>> BatchNormalizationEstimator(model)(image_batches)
    >>> model.evaluate(...)

    Reference:
        "Precise BN": Wu and Johnson 2021, "Rethinking 'Batch' in BatchNorm" ([arXiv:2105.07576](https://arxiv.org/abs/2105.07576)),
        section 3. Not a part of Xie et al. 2017.
    """

    def __init__(self, model):
        if not isinstance(model, keras.Model) or not model.built:
            raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
        found = [layer for layer, _ in walk_layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
        self.layers = [layer for layer in found if layer.built and layer.trainable]
        self.averages = [v for layer in self.layers for v in (layer.moving_mean, layer.moving_variance)]
        strategy = model.distribute_strategy

        statistics = self._statistics = _Statistics()

        def observe(images):
            statistics.of_calls = {}
            model(images, training=True)
            return statistics.means(self.layers)

        @tf.function(reduce_retracing=True)
        def observe_all(images):
            means = strategy.run(observe, args=(images,))
            return [strategy.reduce(tf.distribute.ReduceOp.MEAN, mean, axis=None) for mean in means]

        self._observe = observe_all

    def __call__(self, batches):
        """Re-estimates the averages.

        Args:
            batches: Iterable of input batches, at least one, each `(batch, ...)` as the model takes it; a list or a
                `tf.data.Dataset`.

        Raises:
            ValueError: If there is no batch, or one that the model does not take.
        """
        if not self.layers:
            return
        before = [tf.identity(v.value) for v in self.averages]
        sums, count = [0.0] * len(before), 0
        for variable in self.averages:
            variable.assign(tf.where(tf.math.is_finite(variable.value), variable.value, 0))  # 0 times a NaN would remain one
        try:
            with self._statistics.recorded(self.layers):
                for images in batches:
                    sums = [total + mean for total, mean in zip(sums, self._means(images))]
                    count += 1
            if not count:
                raise ValueError("`batches` must hold at least one batch. Received: none")
        except BaseException:
            for variable, value in zip(self.averages, before):
                variable.assign(value)
            raise
        for variable, total in zip(self.averages, sums):
            variable.assign(total / count)

    def _means(self, images):
        try:
            return self._observe(images)
        except (ValueError, TypeError, tf.errors.InvalidArgumentError) as error:  # a lost device is none of the batch's
            shapes = keras.tree.map_structure(lambda tensor: tuple(getattr(tensor, "shape", ())), images)
            raise ValueError(
                f"`batches` must be what the model takes. Received: one of shape {shapes} ({first_line(error)})"
            ) from error


class _Statistics(threading.local):
    """What the calls of each layer in training mode found in one pass, in the thread of one replica."""

    def __init__(self):
        self.of_calls = {}

    @contextlib.contextmanager
    def recorded(self, layers):
        """Within it each call of a layer leaves the batch's own statistics in its averages, and puts them on record here."""

        def recording(layer, call):
            def recorded_call(*args, training=None, **kwargs):
                outputs = call(*args, training=training, **kwargs)
                if training:
                    self.of_calls.setdefault(id(layer), []).append(_averages(layer))
                return outputs

            return recorded_call

        momenta = [layer.momentum for layer in layers]
        for layer in layers:
            layer.momentum = 0.0  # a graph that is traced meanwhile keeps it
            layer.call = recording(layer, layer.call)
        try:
            yield
        finally:
            for layer, momentum in zip(layers, momenta):
                layer.momentum = momentum
                del layer.call

    def means(self, layers):
        """Returns each layer's two figures, in the order of the layers, the mean over its calls.

        Without a call, and where calls are those of a loop in the graph (`tf.map_fn`), as they are: the last call's then.
        """
        here = tf.compat.v1.get_default_graph() if tf.inside_function() else None
        calls = [self.of_calls.get(id(layer), []) for layer in layers]
        calls = [[one for one in each if getattr(one[0], "graph", None) is here] for each in calls] if here else calls
        calls = [each or [_averages(layer)] for each, layer in zip(calls, layers)]
        return [tf.add_n(figures) / len(figures) for of_layer in calls for figures in zip(*of_layer)]


def _averages(layer):
    return [tf.cast(variable.value, tf.float64) for variable in (layer.moving_mean, layer.moving_variance)]
