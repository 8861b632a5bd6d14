"""Orthonormal starting points for kernels of any layout."""

import math
import random

import keras
import tensorflow as tf

from ortho_keras.method.kernels import as_kernel, matrix_shape, standardize_groups, standardize_layout


@keras.saving.register_keras_serializable(package="ortho_keras")
class OrthonormalInitializer(keras.initializers.Initializer):
    """Draws kernels whose output filters are orthonormal: `W^T W = gain^2 * I`.

    W is the kernel read as a matrix `(f_in, f_out)`, as in `OrthonormalRegularizer`; where `f_in < f_out`, each group
    of `f_in` columns is orthonormal within itself. The groups are drawn independently from the uniform (Haar)
    distribution, by a QR decomposition in float64, and cast at the end, so every float dtype works.

    Args:
        gain: float, positive. The length of each filter.
        seed: int, `keras.random.SeedGenerator` or `None`. The same int gives the same kernel at every call; `None` draws
            anew at every call (and `keras.utils.set_random_seed` makes the draws repeatable).
        layout: How the kernel's axes read, see `OrthonormalRegularizer`.
        groups: int. A grouped convolution's `groups`.

    Raises:
        ValueError: If an argument is none of the above, or a kernel is asked for that is not of rank 2 to 5.

    Example:

    >>> kernel = OrthonormalInitializer(seed=0)((3, 3, 16, 32))
    >>> w = keras.ops.reshape(kernel, (144, 32))
    >>> bool(keras.ops.max(keras.ops.abs(keras.ops.transpose(w) @ w - keras.ops.eye(32))) < 1e-5)
    True

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)), which starts from Gram-Schmidt over the
        output channels. `gain`, `layout` and `groups` are ours.
    """

    def __init__(self, gain=1.0, seed=None, layout="standard", groups=1):
        if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not 0 < gain < math.inf:
            raise ValueError(f"`gain` must be a finite positive number. Received: gain={gain!r}")
        if isinstance(seed, dict):
            seed = keras.saving.deserialize_keras_object(seed)
        if isinstance(seed, bool) or not isinstance(seed, (int, keras.random.SeedGenerator, type(None))):
            raise ValueError(f"`seed` must be an integer, a SeedGenerator or None. Received: seed={seed!r}")
        self.gain = gain
        self.seed = seed
        self.layout = standardize_layout(layout)
        self.groups = standardize_groups(groups)

    def __call__(self, shape, dtype=None):
        count, f_in, f_out = matrix_shape(shape, self.layout, self.groups)
        full, rest = divmod(f_out, f_in)
        seed = random.randrange(2**31) if self.seed is None else self.seed
        normal = keras.random.normal((count, f_in, f_out), dtype="float64", seed=seed)
        parts = [_haar(normal[..., part * f_in : (part + 1) * f_in]) for part in range(full + bool(rest))]
        kernel = as_kernel(self.gain * tf.concat(parts, axis=-1), tuple(shape), self.layout, self.groups)
        return tf.cast(kernel, keras.backend.standardize_dtype(dtype))

    def get_config(self):
        seed = self.seed
        if isinstance(seed, keras.random.SeedGenerator):
            seed = keras.saving.serialize_keras_object(seed)
        return {"gain": self.gain, "seed": seed, "layout": self.layout, "groups": self.groups}


@keras.saving.register_keras_serializable(package="ortho_keras")
class DeltaOrthonormalInitializer(OrthonormalInitializer):
    """Draws convolution kernels that are zero but for an orthonormal matrix at their centre.

    Such a convolution with stride 1 turns and mirrors the channels of each pixel and mixes no pixels, so it keeps the
    norm of its input exactly wherever `cin = cout`. Where `cin < cout` the columns of the central matrix, of shape
    `(cin, cout)`, are orthonormal in groups of `cin`. An even kernel of size k has its centre at `(k - 1) // 2`, the tap that
    padding "same" puts on the pixel itself. A Dense kernel is drawn as by `OrthonormalInitializer`.

    Args:
        gain: float, positive. The length of each filter.
        seed: See `OrthonormalInitializer`.
        layout: `"standard"`, `"transposed"` or `"depthwise"`: the layouts whose leading axes are the pixels.
        groups: int. A grouped convolution's `groups`.

    Raises:
        ValueError: If an argument is none of the above, or a kernel is asked for that is not of rank 2 to 5.

    Reference:
        Xiao et al. 2018, "Dynamical Isometry and a Mean Field Theory of CNNs"
        ([arXiv:1806.05393](https://arxiv.org/abs/1806.05393)), for `cin <= cout`; the groups, where they take orthonormal rows,
        follow Xie et al. 2017.
    """

    def __init__(self, gain=1.0, seed=None, layout="standard", groups=1):
        if not isinstance(layout, str):
            raise ValueError(
                "`layout` must be 'standard', 'transposed' or 'depthwise': a delta kernel has a centre pixel. "
                f"Received: layout={layout!r}"
            )
        super().__init__(gain, seed, layout, groups)

    def __call__(self, shape, dtype=None):
        return _around_centre(super().__call__(_centre_shape(shape), dtype), shape)


@keras.saving.register_keras_serializable(package="ortho_keras")
class DiracInitializer(DeltaOrthonormalInitializer):
    """Starts convolutions as the identity where they can, `cin = cout`, and draws the others as `OrthonormalInitializer` does.

    The kernel is the identity matrix times `gain` at the centre and zero around it: with padding "same" and stride 1 the
    output is the input. With `gain=1` it is orthonormal, so `OrthonormalRegularizer`'s gradient starts at 0. Between
    BatchNormalization and `ShiftedReLU` a deep plain net so begins as little more than its widening layers, and what a layer
    learns is added to what passes it: as in a residual net, without a shortcut. Where `cin` and `cout` differ (the first
    convolution, and those that widen) an identity would drop channels or double them.

    Args:
        gain: float, positive. The length of each filter.
        seed: See `OrthonormalInitializer`; the identities do not depend on it.
        layout: See `DeltaOrthonormalInitializer`. A Dense kernel is the identity where it is square, a depthwise one where
            its multiplier is 1.
        groups: int. A grouped convolution's `groups`; each group's matrix is an identity of its own.

    Raises:
        ValueError: If an argument is none of the above, or a kernel is asked for that is not of rank 2 to 5.

    Reference:
        Zagoruyko and Komodakis 2017, "DiracNets" ([arXiv:1706.00388](https://arxiv.org/abs/1706.00388)), who add the identity
        to plain nets' kernels throughout training instead of starting there; Le, Jaitly and Hinton 2015
        ([arXiv:1504.00941](https://arxiv.org/abs/1504.00941)) start recurrent nets there. Not a part of Xie et al. 2017.
    """

    def __call__(self, shape, dtype=None):
        count, f_in, f_out = matrix_shape(_centre_shape(shape), self.layout, self.groups)
        if f_in != f_out:
            return OrthonormalInitializer.__call__(self, shape, dtype)
        identities = self.gain * tf.eye(f_in, batch_shape=(count,), dtype="float64")
        centre = as_kernel(identities, _centre_shape(shape), self.layout, self.groups)
        return _around_centre(tf.cast(centre, keras.backend.standardize_dtype(dtype)), shape)


def _centre_shape(shape):
    return (1,) * len(shape[:-2]) + tuple(shape[-2:])


def _around_centre(centre, shape):
    """Pads the one tap of a kernel with zeros to the kernel's shape."""
    return tf.pad(centre, [((size - 1) // 2, size // 2) for size in shape[:-2]] + [(0, 0), (0, 0)])


def _haar(normal):
    """Turns Gaussian matrices `(count, rows, columns)`, `rows >= columns`, into Haar-distributed orthonormal ones.

    QR alone is not uniform: its signs depend on the routine. Fixing them by R's diagonal makes it so (Mezzadri 2007).
    """
    q, r = tf.linalg.qr(normal)
    signs = tf.where(tf.linalg.diag_part(r) < 0, -1, 1)
    return q * tf.cast(signs, q.dtype)[:, tf.newaxis, :]
