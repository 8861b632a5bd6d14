"""Orthonormal initializers for kernels of any layout."""

import random

import keras
import numpy as np
from keras import ops

from ortho_keras.method.backend import normal_float64
from ortho_keras.method.checks import check_number
from ortho_keras.method.kernels import as_kernel, matrix_shape, standardize_layout


@keras.saving.register_keras_serializable(package="ortho_keras")
class OrthonormalInitializer(keras.initializers.Initializer):
    """Draws kernels whose output filters are orthonormal: `W^T W = gain^2 * I`.

    W is the kernel read as a matrix `(f_in, f_out)`, as in `OrthonormalRegularizer`; where `f_in < f_out`, the filters are
    orthonormal within groups of `f_in`. Groups are drawn independently from the uniform (Haar) distribution, in float64.

    Args:
        gain: float, above 0. The length of each filter.
        seed: int, `keras.random.SeedGenerator` or `None`. An int gives the same kernel at every call; `None` gives a new one.
        layout, groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If an argument is none of the above, or the kernel is not of rank 2 to 5.

    Example:

    >>> kernel = OrthonormalInitializer(seed=0)((3, 3, 16, 32))
    >>> orthonormality_error(kernel) < 1e-5
    True

    Reference:
        Xie, Xiong, Pu 2017 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)), which starts from Gram-Schmidt over the
        output channels. `gain`, `layout` and `groups` are ours.
    """

    def __init__(self, gain=1.0, seed=None, layout="standard", groups=1):
        self.gain = check_number("gain", gain, above=0)
        if isinstance(seed, dict):
            seed = keras.saving.deserialize_keras_object(seed)
        if isinstance(seed, bool) or not isinstance(seed, (int, keras.random.SeedGenerator, type(None))):
            raise ValueError(f"`seed` must be an integer, a SeedGenerator or None. Received: seed={seed!r}")
        self.seed = seed
        self.layout = standardize_layout(layout)
        self.groups = check_number("groups", groups, least=1, integer=True)

    def __call__(self, shape, dtype=None):
        count, f_in, f_out = matrix_shape(shape, self.layout, self.groups)
        seed = random.randrange(2**31) if self.seed is None else self.seed
        normal = normal_float64((count, f_in, f_out), seed)
        parts = [_haar(normal[..., start : start + f_in]) for start in range(0, f_out, f_in)]
        kernel = as_kernel(self.gain * ops.concatenate(parts, axis=-1), tuple(shape), self.layout, self.groups)
        return ops.cast(kernel, keras.backend.standardize_dtype(dtype))

    def get_config(self):
        seed = keras.saving.serialize_keras_object(self.seed)
        return {"gain": self.gain, "seed": seed, "layout": self.layout, "groups": self.groups}


@keras.saving.register_keras_serializable(package="ortho_keras")
class DeltaOrthonormalInitializer(OrthonormalInitializer):
    """Draws convolution kernels that are an orthonormal matrix at the center and zero elsewhere.

    Such a convolution with stride 1 preserves the norm of each pixel where `cin = cout`. Where `cin < cout`, the columns of the
    central matrix `(cin, cout)` are orthonormal in groups of `cin`. The center of an even kernel of size k is `(k - 1) // 2`,
    as for padding "same". A Dense kernel is drawn as in `OrthonormalInitializer`.

    Args:
        gain, seed: See `OrthonormalInitializer`.
        layout: `"standard"`, `"transposed"` or `"depthwise"`: the layouts whose leading axes are the pixels.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If an argument is none of the above, or the kernel is not of rank 2 to 5.

    Reference:
        Xiao et al. 2018 ([arXiv:1806.05393](https://arxiv.org/abs/1806.05393)), for `cin <= cout`; the groups, where they take
        orthonormal rows, follow Xie et al. 2017.
    """

    def __init__(self, gain=1.0, seed=None, layout="standard", groups=1):
        super().__init__(gain, seed, layout, groups)
        if not isinstance(layout, str):
            names = "'standard', 'transposed' or 'depthwise'"
            raise ValueError(f"`layout` must be {names}: a delta kernel has a center pixel. Received: layout={layout!r}")

    def __call__(self, shape, dtype=None):
        return _around_center(super().__call__(_center_shape(shape), dtype), shape)


@keras.saving.register_keras_serializable(package="ortho_keras")
class DiracInitializer(DeltaOrthonormalInitializer):
    """Makes convolutions with `cin = cout` the identity, and draws other kernels as `OrthonormalInitializer` does.

    An identity kernel is the identity matrix times `gain` at the center and zero elsewhere. With `ShiftedReLU`, what a layer
    learns is added to the identity, as in a residual network, but without a shortcut. Not part of Xie et al. 2017.

    Args:
        gain, seed, layout, groups: See `DeltaOrthonormalInitializer`. A Dense kernel is the identity where it is square, a
            depthwise one where its multiplier is 1, a grouped one where each group's matrix is square.

    Raises:
        ValueError: If an argument is none of the above, or the kernel is not of rank 2 to 5.

    Reference:
        Zagoruyko, Komodakis 2017 ([arXiv:1706.00388](https://arxiv.org/abs/1706.00388)) add the identity throughout training;
        Le, Jaitly, Hinton 2015 ([arXiv:1504.00941](https://arxiv.org/abs/1504.00941)) start recurrent networks there.
    """

    def __call__(self, shape, dtype=None):
        count, f_in, f_out = matrix_shape(_center_shape(shape), self.layout, self.groups)
        if f_in != f_out:
            return OrthonormalInitializer.__call__(self, shape, dtype)
        identities = self.gain * np.tile(np.eye(f_in), (count, 1, 1))
        center = as_kernel(identities, _center_shape(shape), self.layout, self.groups)
        return _around_center(ops.cast(center, keras.backend.standardize_dtype(dtype)), shape)


def _center_shape(shape):
    return (1,) * len(shape[:-2]) + tuple(shape[-2:])


def _around_center(center, shape):
    """Pads the one tap of a kernel with zeros to the kernel's shape."""
    return ops.pad(center, [((size - 1) // 2, size // 2) for size in shape[:-2]] + [(0, 0), (0, 0)])


def _haar(normal):
    """Turns Gaussian matrices into Haar-distributed orthonormal ones: QR with the signs of R's diagonal (Mezzadri 2007)."""
    q, r = ops.qr(normal) if ops.is_tensor(normal) else np.linalg.qr(normal)
    return ops.where(ops.diagonal(r, 0, -2, -1)[:, None, :] < 0, -q, q)
