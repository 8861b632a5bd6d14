"""Orthogonality penalties from related work, not from Xie et al. 2017. `factor` multiplies each paper's own formula."""

import math
import warnings

import numpy as np
from keras import ops

from ortho_keras.method.checks import check_number
from ortho_keras.method.kernels import as_matrices, at_least_float32, gram_deviation, gram_deviations, matrix_shape
from ortho_keras.method.regularizers import KernelRegularizer, add_all


class DoubleSoftOrthogonalRegularizer(KernelRegularizer, name="double_soft_orthogonal"):
    """`factor * (||W^T W - I||_F^2 + ||W W^T - I||_F^2)`: penalizes columns and rows.

    Only one of them can be orthonormal in a matrix that is not square, so its penalty is at least `factor * |f_in - f_out|`.

    Args:
        factor, layout, groups: See `OrthonormalRegularizer`.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)), double soft orthogonality.
    """

    def penalty(self, kernel):
        matrices = as_matrices(at_least_float32(kernel), self.layout, self.groups)
        count, f_in, f_out = matrices.shape
        # ||W W^T - I||^2 = ||W^T W - I||^2 + f_in - f_out for each matrix: the smaller Gram matrix gives both.
        small = gram_deviation(matrices if f_out <= f_in else ops.swapaxes(matrices, -1, -2))
        return 2 * ops.sum(ops.square(small)) + count * abs(f_in - f_out)


class MutualCoherenceRegularizer(KernelRegularizer, name="mutual_coherence"):
    """`factor * max |W^T W - I|`: the largest entry, so only the worst pair of filters, or the worst norm, gets a gradient.

    The penalty is the sum over a kernel's matrices and groups of columns, as in `OrthonormalRegularizer` (the groups are ours).

    Args:
        factor, layout, groups: See `OrthonormalRegularizer`.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)), mutual coherence.
    """

    def penalty(self, kernel):
        deviations = gram_deviations(kernel, self.layout, self.groups)
        return add_all([ops.sum(ops.max(ops.abs(deviation), axis=(-2, -1))) for deviation in deviations])


class SRIPRegularizer(KernelRegularizer, name="srip"):
    """`factor * sigma(W^T W - I)`: the spectral norm, estimated as `|D v| / |v|` with `D = W^T W - I`.

    v is a fixed start after `iterations` products with D (power iteration). The penalty is the sum over a kernel's matrices and
    groups of columns (ours). The gradient takes v as constant, which is exact where the iteration has converged.

    Args:
        factor, layout, groups: See `OrthonormalRegularizer`.
        iterations: int, at least 1. The paper uses 2, which underestimates the norm.
        seed: int, at least 0. The seed of the start, a normal vector.

    Raises:
        ValueError: If an argument is none of the above.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)); their start is random at each step.
    """

    def __init__(self, factor=1e-4, layout="standard", groups=1, iterations=2, seed=0):
        super().__init__(factor, layout, groups)
        self.iterations = check_number("iterations", iterations, least=1, integer=True)
        self.seed = check_number("seed", seed, least=0, integer=True)

    def penalty(self, kernel):
        return add_all([self._norms(deviation) for deviation in gram_deviations(kernel, self.layout, self.groups)])

    def _norms(self, deviation):
        fixed = ops.stop_gradient(deviation)
        start = np.random.default_rng(self.seed).normal(size=(deviation.shape[-1], 1))  # XLA would draw other numbers
        vector = ops.broadcast_to(ops.cast(start, deviation.dtype), (*deviation.shape[:-1], 1))
        for _ in range(self.iterations):
            image = ops.matmul(fixed, vector)
            length = _length(image)
            vector = ops.where(length > 0, ops.divide_no_nan(image, length), vector)
        # |D v| / |v|, whose derivative by D is (D v) v^T / (|D v| |v|). The signed v^T D v would cancel where D, as near an
        # orthonormal kernel, has eigenvalues of both signs.
        image = ops.matmul(deviation, vector)
        direction = ops.stop_gradient(ops.divide_no_nan(image, _length(image)))
        return ops.sum(image * direction)  # v has length 1, or D v is 0

    def get_config(self):
        return {**super().get_config(), "iterations": self.iterations, "seed": self.seed}


def _length(vectors):
    return ops.sqrt(ops.sum(ops.square(vectors), axis=(-2, -1), keepdims=True))


class ConvOrthogonalRegularizer(KernelRegularizer, name="conv_orthogonal"):
    """`factor * ||K * K - I||_F^2`: the convolution, not only its kernel as a matrix, should preserve norms.

    `K * K` is every filter convolved with every filter at each shift that the stride allows, and I is 1 where a filter meets
    itself unshifted. At 0 the convolution of a large image is an orthogonal map. Where `cout > cin * prod(strides)`, the rows
    should be orthonormal instead of the columns; the formula is the same up to a constant, which is subtracted. Where a stride
    exceeds the kernel's size, with more filters than `cin * prod(min(size, stride))`, no orthogonal convolution exists: the
    penalty cannot reach 0, and a warning says so.

    Args:
        factor: See `OrthonormalRegularizer`.
        strides: int or tuple of ints. The layer's strides. A dense layer's kernel counts as a 1x1 convolution of stride 1.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If an argument is none of the above, or the kernel is not of rank 2 to 5 or does not fit the strides.

    Reference:
        Wang, Chen, Chakraborty, Yu 2020 ([arXiv:1911.12207](https://arxiv.org/abs/1911.12207)); the constant, and
        where an orthogonal convolution exists: Achour, Malgouyres, Mamalet 2022
        ([arXiv:2108.05623](https://arxiv.org/abs/2108.05623)), for equal sizes and strides.
    """

    def __init__(self, factor=1e-4, strides=1, groups=1):
        super().__init__(factor, "standard", groups)
        strides = tuple(strides) if isinstance(strides, (list, tuple)) and strides else (strides,)
        self.strides = tuple(check_number("strides", stride, least=1, integer=True) for stride in strides)

    @classmethod
    def for_kernel(cls, factor, kernel):
        if kernel.layout != "standard":
            raise ValueError(f"{cls.__name__} is defined for kernels of layout 'standard' only, not {kernel.layout!r}")
        pointwise = kernel.regularizer_attribute == "pointwise_regularizer"  # the strides are those of the depthwise part
        return cls(factor, 1 if pointwise else getattr(kernel.layer, "strides", 1), kernel.groups)

    def _window(self, shape):
        """Returns the kernel's sizes along the axes of the image, and the strides."""
        dense = len(shape) == 2 and len(self.strides) == 1  # a convolution of one pixel
        window, strides = ((1,), (1,)) if dense else (tuple(shape[:-2]), self.strides)
        strides = strides * len(window) if len(strides) == 1 else strides
        if not 1 <= len(window) <= 3 or len(strides) != len(window):
            received = f"a kernel of shape {tuple(shape)}, strides={self.strides!r}"
            raise ValueError(f"`strides` must fit a kernel of rank 2 to 5, one number for each axis. Received: {received}")
        matrix_shape(shape, "standard", self.groups)
        return window, strides

    def obstacle(self, shape):
        """Returns why no convolution with a kernel of this shape is orthogonal, or an empty string where one is."""
        window, strides = self._window(shape)
        most = self.groups * shape[-2] * math.prod(map(min, window, strides))
        if shape[-1] <= most or all(stride <= size for size, stride in zip(window, strides)):
            return ""
        kernel = f"a kernel of shape {tuple(shape)} and strides {strides}"
        return f"{kernel} cannot be orthogonal: at most {most} filters, or strides of at most the kernel's size, would fit"

    def penalty(self, kernel):
        kernel = at_least_float32(kernel)
        obstacle = self.obstacle(kernel.shape)
        if obstacle:
            warnings.warn(f"ConvOrthogonalRegularizer: a convolution with {obstacle}", stacklevel=2)
        window, strides = self._window(kernel.shape)
        kernel = ops.reshape(kernel, (*window, *kernel.shape[-2:]))
        cin, own = kernel.shape[-2], kernel.shape[-1] // self.groups
        unshifted = [(size - 1) // stride for size, stride in zip(window, strides)]
        padding = [(0, 0), *((index * stride, index * stride) for index, stride in zip(unshifted, strides)), (0, 0)]
        total = -float(self.groups * max(0, own - cin * math.prod(strides)))
        for filters in ops.split(kernel, self.groups, axis=-1):
            images = ops.pad(ops.transpose(filters, (len(window) + 1, *range(len(window) + 1))), padding)
            products = ops.conv(images, filters, strides, "valid", "channels_last")  # (own, *shifts, own)
            places = [[index, *unshifted, index] for index in range(own)]
            identity = ops.scatter(np.array(places), ops.ones(own, kernel.dtype), tuple(products.shape))
            total += ops.sum(ops.square(products - identity))
        return total

    def get_config(self):
        return {"factor": self.factor, "strides": self.strides, "groups": self.groups}
