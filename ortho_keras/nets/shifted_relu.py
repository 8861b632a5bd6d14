"""A ReLU with its corner below zero, and the growth of gradients that it reduces."""

import math

import keras
from keras import ops

from ortho_keras.method import backend
from ortho_keras.method.checks import check_number


@keras.saving.register_keras_serializable(package="ortho_keras")
class ShiftedReLU(keras.layers.Layer):
    """`max(x, -shift)`: a ReLU with its corner at `-shift` instead of 0.

    After a BatchNormalization, whose outputs have mean 0 and standard deviation 1, a shift of 2 cuts off the lowest 2 % of the
    values where the ReLU cuts off half. The layer starts nearly linear, so the backpropagated gradient keeps its magnitude,
    and training makes it as nonlinear as it needs through BatchNormalization's gamma and beta.

    It is the plain Conv-BN-ReLU network with another border. `max(x, -s) = relu(x + s) - s`, and the constant `-s` vanishes in
    the next BatchNormalization: what remains is a ReLU network whose BatchNormalization has its beta at `s` and whose
    convolutions pad with `s` instead of 0. With zeros as padding, each convolution would draw the same frame into every
    feature map, which after 110 layers is nearly all of the variance (see `signal_report`).

    Args:
        shift: float, at least 0. 0 is the ReLU.

    Raises:
        ValueError: If `shift` is negative or not finite.

    Reference:
        Clevert et al. 2016 ([arXiv:1511.07289](https://arxiv.org/abs/1511.07289)) compare with `max(x, -1)` under this name.
        Larger shifts for deeper networks are ours, not Xie et al.'s.
    """

    def __init__(self, shift=1.0, **kwargs):
        super().__init__(**kwargs)
        self.shift = check_number("shift", shift, least=0)
        self.supports_masking = True
        self.built = True  # it has no state, so custom layers that hold it can be quantized

    def call(self, inputs):
        return _cut_below(inputs, ops.cast(-self.shift, inputs.dtype))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "shift": self.shift}


if backend.NAME == "tensorflow":
    import tensorflow as tf

    @tf.custom_gradient
    def _cut_below(inputs, corner):
        """`max(x, corner)` with a gradient that reads only the output, which the next layer keeps in memory anyway.

        TensorFlow's own reads the input, and selects with a broadcast, which is slow on a CPU (`benchmarks/step_time.py`).
        The gradient at the corner itself is 0, as in TensorFlow's ReLU.
        """
        outputs = tf.maximum(inputs, corner)

        def gradient(upstream):
            return tf.raw_ops.Select(condition=outputs > corner, x=upstream, y=tf.zeros_like(upstream)), None

        return outputs, gradient

else:

    def _cut_below(inputs, corner):
        return ops.where(inputs <= corner, corner, inputs)  # NaN for NaN, and a gradient of 0 at the corner


def error_growth(shift):
    """Returns the factor by which the backpropagated gradient grows per layer at initialization, in theory.

    For BatchNormalization and `max(x, -shift)` between orthonormal or random kernels of large width, with z standard normal:

        growth^2 = P(z > -shift) / Var(max(z, -shift))

    This is the share of the gradient that passes the corner, over the variance that the next BatchNormalization divides by.

    Args:
        shift: float, at least 0. 0 gives sqrt(pi / (pi - 1)) = 1.211.

    Returns:
        float, at least 1.

    Raises:
        ValueError: If `shift` is negative or not finite.

    Reference:
        Yang et al. 2019 ([arXiv:1902.08129](https://arxiv.org/abs/1902.08129)) for the ReLU; the shift is ours.
    """
    shift = check_number("shift", shift, least=0)
    passing = 0.5 * (1 + math.erf(shift / math.sqrt(2)))
    density = math.exp(-(shift**2) / 2) / math.sqrt(2 * math.pi)
    mean = density - shift * (1 - passing)
    square = passing - shift * density + shift**2 * (1 - passing)
    return math.sqrt(passing / (square - mean**2))


def shift_for_depth(depth, growth=3.0):
    """Returns the smallest shift for which the gradient grows at most by a factor of `growth` over `depth` layers, in theory.

    Args:
        depth: int, at least 1.
        growth: float, above 1. The default is ours; it gives 1.5 for 44 layers, 1.9 for 110, 2.8 for 1,004.

    Returns:
        float, at least 0.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        `error_growth`. Not a part of Xie et al. 2017.
    """
    allowed = math.log(check_number("growth", growth, above=1)) / check_number("depth", depth, least=1, integer=True)
    if math.log(error_growth(0)) <= allowed:
        return 0.0
    low, high = 0.0, 8.0  # at 8 the growth is 1 in float64
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if math.log(error_growth(middle)) > allowed else (low, middle)
    return high
