"""A ReLU whose corner lies below zero."""

import math

import keras
import tensorflow as tf


@keras.saving.register_keras_serializable(package="ortho_keras")
class ShiftedReLU(keras.layers.Layer):
    """`max(x, -shift)`: a ReLU with its corner at `-shift` instead of 0.

    Behind a BatchNormalization, whose outputs have mean 0 and deviation 1, a shift of 2 cuts the lowest 2 % off where the ReLU
    cuts half: the layer is nearly linear at first, so the error keeps its magnitude going down, and becomes as nonlinear
    as training makes BatchNormalization's gamma and beta.

    It is the plain Conv-BN-ReLU net with another border: `max(x, -s) = relu(x + s) - s`, the constant `-s` vanishes in the
    next BatchNormalization, and what remains is a ReLU net with BatchNormalization's beta at `s` whose convolutions pad
    with `s` instead of 0. The border matters: with beta at 1 and zeros around it, each convolution draws a frame into every
    map, the same for all images, and after 110 layers that frame is nearly all of the variance (see `signal_report`).

    Args:
        shift: float, at least 0. 0 is the ReLU.

    Raises:
        ValueError: If `shift` is negative or not finite.

    Reference:
        Clevert et al. 2016 ([arXiv:1511.07289](https://arxiv.org/abs/1511.07289)) compare with max(x, -1) under this name.
        Its use here, and larger shifts for deeper nets, are ours, not Xie et al.'s.
    """

    def __init__(self, shift=1.0, **kwargs):
        super().__init__(**kwargs)
        self.shift = checked_shift("shift", shift)
        self.supports_masking = True

    def call(self, inputs):
        return tf.maximum(inputs, tf.cast(-self.shift, inputs.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "shift": self.shift}


def checked_shift(name, shift):
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 <= shift < math.inf:
        raise ValueError(f"`{name}` must be a finite number, at least 0. Received: {name}={shift!r}")
    return float(shift)
