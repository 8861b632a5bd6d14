"""The orthonormal regularizer, which takes the place of weight decay, and the base class of all penalties on kernels."""

import functools
import math

import keras
from keras import ops

from ortho_keras.method.backend import LiveScalar, Trackable, closed_form, half_square
from ortho_keras.method.checks import check_number
from ortho_keras.method.kernels import at_least_float32, column_sets, gram_deviation, standardize_layout

REGULARIZERS = {}  # name -> subclass of KernelRegularizer


class KernelRegularizer(keras.regularizers.Regularizer, Trackable):
    """Base class of regularizers that read a kernel as matrices.

    A subclass defines `penalty(kernel)`, the scalar that the factor multiplies. With a `name`, Keras saves and loads it, and it
    is available in `orthonormalize`, in `OrthonormalDecay` and as `train.py --regularizer`. `tf.saved_model.save` finds it
    where a layer or a `tf.Module` holds it as an attribute, as Keras's layers do.

    Args:
        factor, layout, groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If an argument is none of the above, or a subclass takes a name that another class has.

    Example:

    >>> class EntryRegularizer(KernelRegularizer, name="entries"):
    ...     def penalty(self, kernel):
    ...         return keras.ops.sum(keras.ops.abs(kernel))
    >>> orthonormalize(model, 1e-3, regularizer="entries")
    """

    def __init_subclass__(cls, name=None, **kwargs):
        super().__init_subclass__(**kwargs)
        if name is not None:
            if REGULARIZERS.get(name, cls).__qualname__ != cls.__qualname__:
                raise ValueError(f"`name` must not be the name of another regularizer. Received: name={name!r}")
            REGULARIZERS[name] = keras.saving.register_keras_serializable(package="ortho_keras")(cls)

    def __init__(self, factor=1e-4, layout="standard", groups=1):
        self._factor = LiveScalar(check_number("factor", factor, least=0))
        self.layout = standardize_layout(layout)
        self.groups = check_number("groups", groups, least=1, integer=True)

    @classmethod
    def for_kernel(cls, factor, kernel):
        """Returns the regularizer of a layer's `LayerKernel`; raises `ValueError`, with the reason, where it has none."""
        return cls(factor, kernel.layout, kernel.groups)

    @property
    def factor(self):
        return self._factor.value

    @factor.setter
    def factor(self, factor):
        self._factor.value = check_number("factor", factor, least=0)

    def penalty(self, kernel):
        raise NotImplementedError(f"{type(self).__name__} must define `penalty(kernel)`")

    def largest_step(self, penalty):
        """Returns the largest step along the negative gradient of the penalty, of the given value, that is stable."""
        return math.inf

    def _trackable_children(self, save_type="checkpoint", **kwargs):
        return {"factor": self._factor}

    def __call__(self, x):
        penalty = self.penalty(x)
        penalty = ops.cast(self._factor.read(), penalty.dtype) * penalty
        half = keras.backend.standardize_dtype(penalty.dtype) == "float32" and keras.config.floatx() in ("float16", "bfloat16")
        return ops.cast(penalty, keras.config.floatx()) if half else penalty  # Keras adds losses in its own floatx

    def get_config(self):
        return {"factor": self.factor, "layout": self.layout, "groups": self.groups}


def find_regularizer(regularizer):
    """Returns the subclass of `KernelRegularizer` that has this name in `REGULARIZERS`; a subclass is returned as it is."""
    found = REGULARIZERS.get(regularizer) if isinstance(regularizer, str) else regularizer
    if not isinstance(found, type) or not issubclass(found, KernelRegularizer):
        names = f"one of {', '.join(REGULARIZERS)}, or a subclass of KernelRegularizer"
        raise ValueError(f"`regularizer` must be {names}. Received: regularizer={regularizer!r}")
    return found


class OrthonormalRegularizer(KernelRegularizer, name="orthonormal"):
    """Penalizes a kernel whose output filters are not orthonormal.

    `penalty = factor / 2 * ||W^T W - I||_F^2`, where W is the kernel read as a matrix of shape `(f_in, f_out)`:
    a Conv2D kernel `(kh, kw, cin, cout)` becomes `(kh * kw * cin, cout)`, and its columns, the output filters, should be
    orthonormal. Where `f_in < f_out`, that many orthogonal vectors do not exist, so the columns are split into groups of
    `f_in` (the last one takes the remainder) and the penalty is the sum over groups. It is in float32 for a half-precision
    kernel. Use it in place of weight decay on every kernel of a network; the paper advises against mixing it with L2.

    Args:
        factor: float, at least 0. The strength, lambda in Eq. 3 (the paper's value is not known to us; 1e-4 is common for
            weight decay). Setting `regularizer.factor = 1e-3` takes effect at the next training step, without retracing (but on
            JAX, where what was compiled is compiled again).
        layout: How the kernel's axes are read. `"standard"`: `(..., in, out)`, as in Dense and Conv. `"transposed"`:
            `(..., out, in)`, as in Conv2DTranspose. `"depthwise"`: `(..., channels, multiplier)`, one matrix for each channel.
            A tuple of ints: the output axes, as in EinsumDense; all others are input axes. A pair of tuples: the axes that
            input and output share (one matrix for each index), and the output axes.
        groups: int, at least 1. A grouped convolution's `groups`: each group's filters form a matrix.

    Raises:
        ValueError: If an argument is none of the above, or the kernel is not of rank 2 to 5.

    Example:

    >>> layer = keras.layers.Conv2D(16, 3, kernel_regularizer=OrthonormalRegularizer(1e-4))
    >>> float(OrthonormalRegularizer(1.0)(2 * keras.ops.eye(4)))  # 1 / 2 * 9 * 4
    18.0

    Reference:
        Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)). `layout` and `groups` are ours.
    """

    def penalty(self, kernel):
        sets = column_sets(at_least_float32(kernel), self.layout, self.groups)
        return add_all([_half_square_deviation(columns) for columns in sets])

    def largest_step(self, penalty):
        # A step t turns a singular value s into s (1 - 2 t (s^2 - 1)): at least s / 2 where t * ||W^T W - I|| <= 1 / 4.
        return ops.minimum(ops.ones_like(penalty), ops.rsqrt(2 * penalty)) / 4


def add_all(tensors):
    return functools.reduce(ops.add, tensors)


@closed_form
def _half_square_deviation(columns):
    """1 / 2 * ||W^T W - I||^2 with its gradient in closed form, 2 W (W^T W - I): one product, where autodiff makes two."""
    deviation = gram_deviation(columns)
    return half_square(deviation), lambda upstream: 2 * upstream * ops.matmul(columns, deviation)
