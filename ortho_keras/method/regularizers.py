"""The orthonormal regularizer: what the paper puts in the place of weight decay."""

import math

import keras
import tensorflow as tf

from ortho_keras.method.kernels import at_least_float32, column_sets, gram_deviation, standardize_groups, standardize_layout
from ortho_keras.method.live import LiveScalar


class KernelRegularizer(keras.regularizers.Regularizer):
    """What the penalties on kernels share: a factor that can change while training, and how the kernel's axes read.

    A subclass has `penalty(kernel)`, the scalar that the factor multiplies. See `OrthonormalRegularizer` for the arguments.
    """

    def __init__(self, factor=1e-4, layout="standard", groups=1):
        self._factor = LiveScalar(_checked_factor(factor))
        self.layout = standardize_layout(layout)
        self.groups = standardize_groups(groups)

    @property
    def factor(self):
        return self._factor.value

    @factor.setter
    def factor(self, factor):
        self._factor.value = _checked_factor(factor)

    def __call__(self, x):
        penalty = self.penalty(x)
        return tf.cast(self._factor.read(), penalty.dtype) * penalty

    def get_config(self):
        return {"factor": self.factor, "layout": self.layout, "groups": self.groups}


@keras.saving.register_keras_serializable(package="ortho_keras")
class OrthonormalRegularizer(KernelRegularizer):
    """Penalizes a kernel whose output filters are not orthonormal.

    `penalty = factor / 2 * ||W^T W - I||_F^2`, where W is the kernel read as a matrix of shape `(f_in, f_out)`:
    a Conv2D kernel `(kh, kw, cin, cout)` becomes `(kh * kw * cin, cout)`, and its columns, the output filters, are
    what should be orthonormal. Where `f_in < f_out` that many orthogonal vectors cannot exist, so the columns are
    split into groups of `f_in` (the last one takes the remainder) and the penalty is the sum over groups.

    Put it in the place of weight decay on every kernel of a net; L2 on some kernels beside it on others is
    discouraged by the paper. A half-precision kernel is cast to float32 first. The result is a scalar.

    Args:
        factor: float, at least 0. The strength, lambda in Eq. 3 (the paper's value is not known to us; 1e-4 is weight
            decay's usual one). It can be set while training: `regularizer.factor = 1e-3` takes effect at the next step
            without retracing.
        layout: How the kernel's axes read. `"standard"`: `(..., in, out)`, as in Dense and Conv. `"transposed"`:
            `(..., out, in)`, as in Conv2DTranspose. `"depthwise"`: `(..., channels, multiplier)`, one matrix
            `(kernel size, multiplier)` for each channel. A tuple of ints: the output axes, as in EinsumDense;
            all others are input axes. A pair of tuples: the axes that input and output share (one matrix for each
            index), and the output axes.
        groups: int. A grouped convolution's `groups`: each group's filters form a matrix of their own.

    Raises:
        ValueError: If `factor` is negative or not finite, `layout` or `groups` is none of the above, or the kernel is
            not of rank 2 to 5.

    Example:

    >>> layer = keras.layers.Conv2D(16, 3, kernel_regularizer=OrthonormalRegularizer(1e-4))
    >>> float(OrthonormalRegularizer(1.0)(2 * keras.ops.eye(4)))  # 1 / 2 * 9 * 4
    18.0

    Reference:
        Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)). `layout` and `groups` are ours.
    """

    def penalty(self, kernel):
        sets = column_sets(at_least_float32(kernel), self.layout, self.groups)
        return tf.add_n([_half_square_deviation(columns) for columns in sets])


@tf.custom_gradient
def _half_square_deviation(columns):
    """1 / 2 * ||W^T W - I||^2 with its gradient in closed form, 2 W (W^T W - I): one product, where autodiff makes two."""
    deviation = gram_deviation(columns)
    return tf.nn.l2_loss(deviation), lambda upstream: 2 * upstream * tf.matmul(columns, deviation)


def _checked_factor(factor):
    try:
        value = float(factor)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"`factor` must be a finite number, at least 0. Received: factor={factor!r}")
    return value
