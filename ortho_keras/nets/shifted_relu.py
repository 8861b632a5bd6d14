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
        return _cut_below(inputs, tf.cast(-self.shift, inputs.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "shift": self.shift}


@tf.custom_gradient
def _cut_below(inputs, corner):
    """`max(x, corner)` with a gradient that reads nothing but the output, which the next layer keeps anyway.

    TensorFlow's own reads the input, and selects by an operation that broadcasts, which is slow on a CPU
    (`benchmarks/step_time.py`). At the corner itself nothing passes, as in TensorFlow's ReLU.
    """
    outputs = tf.maximum(inputs, corner)

    def gradient(upstream):
        passed = tf.raw_ops.Select(condition=outputs > corner, x=upstream, y=tf.zeros_like(upstream))
        return passed, None

    return outputs, gradient


def error_growth(shift):
    """Returns by how much the error's magnitude grows from one layer down to the next, at initialization, in theory.

    For BatchNormalization and `max(x, -shift)` between orthonormal or random kernels of large width: with z standard normal,

        growth^2 = P(z > -shift) / Var(max(z, -shift))

    the part of the error that passes the corner, over the variance that the next BatchNormalization divides by.

    Args:
        shift: float, at least 0. 0 gives sqrt(pi / (pi - 1)) = 1.211.

    Returns:
        float, at least 1.

    Raises:
        ValueError: If `shift` is negative or not finite.

    Reference:
        Yang et al. 2019 ([arXiv:1902.08129](https://arxiv.org/abs/1902.08129)) for the ReLU; the shift is ours.
    """
    shift = checked_shift("shift", shift)
    passing = 0.5 * (1 + math.erf(shift / math.sqrt(2)))
    density = math.exp(-(shift**2) / 2) / math.sqrt(2 * math.pi)
    mean = density - shift * (1 - passing)
    square = passing - shift * density + shift**2 * (1 - passing)
    return math.sqrt(passing / (square - mean**2))


def shift_for_depth(depth, growth=3.0):
    """Returns the smallest shift at which the error grows no more than `growth` times over `depth` layers, in theory.

    Args:
        depth: int, at least 1.
        growth: float, above 1. The default is a free choice of ours: 1.5 for 44 layers, 1.9 for 110, 2.8 for 1,004.

    Returns:
        float, at least 0.

    Raises:
        ValueError: If `growth` is not above 1 or `depth` is no integer above 0.

    Reference:
        `error_growth`. Not a part of Xie et al. 2017.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"`depth` must be an integer, at least 1. Received: depth={depth!r}")
    if not growth > 1:
        raise ValueError(f"`growth` must be above 1. Received: growth={growth!r}")
    low, high = 0.0, 8.0  # at 8 not a double's last bit grows
    allowed = math.log(growth) / depth
    if math.log(error_growth(low)) <= allowed:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.log(error_growth(middle)) > allowed else (low, middle)
    return high


def checked_shift(name, shift):
    if isinstance(shift, bool) or not isinstance(shift, (int, float)) or not 0 <= shift < math.inf:
        raise ValueError(f"`{name}` must be a finite number, at least 0. Received: {name}={shift!r}")
    return float(shift)
