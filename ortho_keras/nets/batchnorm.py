"""BatchNormalization in one operation, and its moving averages re-estimated before an evaluation."""

import contextlib

import keras
import numpy as np
from keras import ops

from ortho_keras.method import backend
from ortho_keras.method.checks import check_built
from ortho_keras.method.errors import first_line
from ortho_keras.method.kernels import walk_layers

if backend.NAME == "tensorflow":
    import tensorflow as tf


@keras.saving.register_keras_serializable(package="ortho_keras")
class FusedBatchNormalization(keras.layers.BatchNormalization):
    """`keras.layers.BatchNormalization`, computed by TensorFlow's one fused operation instead of a chain of small ones.

    It has the same arguments, variables and values up to rounding. With AVX-512, a training step of a plain net takes 0.6
    to 0.7 of the time (`benchmarks/step_time.py`), with AVX2 alone about the same: Keras 3 (3.15) casts half-precision
    activations to float32 and writes several tensors of their size. Statistics are float32 here too. An empty batch, as a
    replica may get at the end of an epoch, leaves the moving averages as they are; Keras's become NaN. Keras's computation
    is used on other backends, and where the fused operation does not apply: with `synchronized=True`, `renorm=True`, a
    mask, an `axis` other than the last, inputs that are not of rank 4 or not of the layer's compute dtype, and variables
    that are not float32.
    """

    def call(self, inputs, training=None, mask=None):
        if backend.NAME != "tensorflow":
            return super().call(inputs, training=training, mask=mask)
        standard = not (self.synchronized or self.renorm) and mask is None and len(inputs.shape) == 4 and self.axis in (-1, 3)
        if not standard or inputs.dtype != self.compute_dtype or self.variable_dtype != "float32":
            return super().call(inputs, training=training, mask=mask)
        moving_mean, moving_variance = (tf.convert_to_tensor(v) for v in (self.moving_mean, self.moving_variance))
        training = bool(training and self.trainable)
        none = tf.zeros((0,))
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
            count = tf.cast(tf.reduce_prod(tf.shape(inputs)[:3]), tf.float32)
            share = tf.where(count > 0, 1 - self.momentum, 0.0)
            self.moving_mean.assign((1 - share) * moving_mean + tf.math.multiply_no_nan(mean, share))
            # The operation's variance is divided by n - 1, Keras's by n. With n = 1 it is 0 on a CPU and NaN on a GPU.
            biased = share * tf.maximum(count - 1, 0) / tf.maximum(count, 1)
            self.moving_variance.assign((1 - share) * moving_variance + tf.math.multiply_no_nan(variance, biased))
        return outputs


class BatchNormalizationEstimator:
    """Replaces the moving averages of a model's BatchNormalization layers by the statistics of given batches.

    The moving averages lag behind the weights, and a deep network compounds the error layer by layer. An estimator runs the
    model in training mode over some batches, and sets each moving mean and variance to the plain average of the batches'
    means and variances. Weights and optimizer stay as they are, and training, which uses each batch's own statistics, is
    not affected.

    The first call traces the model; keep the object to estimate again. Dropout and other layers are in training mode too,
    and change their state as in training. A layer that is called several times gets the average over its calls. A frozen
    layer, or one that a subclassed model calls in inference mode, keeps its averages. In a Functional model, Keras passes on
    its own `training`, so `training=False` of such a call has no effect, as in `fit`. A model that was built under a
    `tf.distribute` strategy gets the mean over replicas.

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
        check_built(model)
        found = [layer for layer, _ in walk_layers(model) if isinstance(layer, keras.layers.BatchNormalization)]
        self.layers = [layer for layer in found if layer.built and layer.trainable]
        self.averages = [v for layer in self.layers for v in (layer.moving_mean, layer.moving_variance)]
        # Of each layer, the sums over its calls of the batch's mean, its variance, and 1.
        self._sums = backend.sums_over_replicas(model, [(3, *layer.moving_mean.shape) for layer in self.layers])

        def observe(images):
            model(images, training=True)

        self._observe = backend.compiled(model, observe, [*model.variables, *self._sums])

    def __call__(self, batches):
        """Re-estimates the averages.

        Args:
            batches: Iterable of input batches, at least one, each `(batch, ...)` as the model takes it; a list or a
                `tf.data.Dataset`.

        Raises:
            ValueError: If there is no batch, or one that the model does not take. The averages are then unchanged.
        """
        if not self.layers:
            return
        before = [ops.copy(variable.value) for variable in self.averages]
        for variable in self.averages:
            variable.assign(ops.where(ops.isfinite(variable.value), variable.value, 0.0))  # 0 times NaN would be NaN
        for sums in self._sums:
            sums.assign(np.zeros(sums.shape))
        received = False
        try:
            for images in batches:
                received = True
                self._add(images)
            if not received:
                raise ValueError("`batches` must hold at least one batch. Received: none")
        finally:
            for variable, value in zip(self.averages, before):
                variable.assign(value)
        for layer, sums in zip(self.layers, self._sums):
            mean, variance, calls = ops.unstack(ops.convert_to_tensor(sums))
            if calls[0]:
                layer.moving_mean.assign(mean / calls)
                layer.moving_variance.assign(variance / calls)

    def _add(self, images):
        try:
            with contextlib.ExitStack() as stack:
                for layer, sums in zip(self.layers, self._sums):
                    stack.enter_context(_recorded(layer, sums))
                self._observe(images)
        except backend.INPUT_ERRORS as error:
            shapes = keras.tree.map_structure(lambda tensor: tuple(getattr(tensor, "shape", ())), images)
            raise ValueError(
                f"`batches` must hold what the model takes. Received: one of shape {shapes} ({first_line(error)})"
            ) from error


@contextlib.contextmanager
def _recorded(layer, sums):
    """While it is open, each training call of a layer adds its batch's mean and variance, and 1, to `sums`."""
    call, momentum = layer.call, layer.momentum

    def recorded_call(*args, training=None, **kwargs):
        outputs = call(*args, training=training, **kwargs)
        if training:  # with a momentum of 0, the moving averages are the batch's own
            mean, variance = (ops.cast(v.value, sums.dtype) for v in (layer.moving_mean, layer.moving_variance))
            sums.assign_add(ops.stack([mean, variance, ops.ones_like(mean)]))
        return outputs

    layer.call, layer.momentum = recorded_call, 0.0
    try:
        yield
    finally:
        del layer.call
        layer.momentum = momentum
