"""The penalties that others put on kernels in the name of orthogonality, with the interface of `OrthonormalRegularizer`.

None of them is a part of Xie et al. 2017. Each multiplies its paper's formula by `factor`, as that paper does, so factors do
not compare from one to another.
"""

import numpy as np
import tensorflow as tf

from ortho_keras.method.kernels import as_matrices, at_least_float32, gram_deviation, gram_deviations, matrix_shape
from ortho_keras.method.regularizers import KernelRegularizer


class DoubleSoftOrthogonalRegularizer(KernelRegularizer, name="double_soft_orthogonal"):
    """`factor * (||W^T W - I||_F^2 + ||W W^T - I||_F^2)`: columns and rows, of which one has more vectors than dimensions.

    So the penalty of a matrix that is not square is at least `factor * |f_in - f_out|`.

    Args:
        factor: See `OrthonormalRegularizer`.
        layout: See `OrthonormalRegularizer`.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: See `OrthonormalRegularizer`.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)), double soft orthogonality.
    """

    def penalty(self, kernel):
        matrices = as_matrices(at_least_float32(kernel), self.layout, self.groups)
        count, f_in, f_out = matrices.shape
        # ||W W^T - I||^2 = ||W^T W - I||^2 + f_in - f_out for each matrix: the smaller of the Gram matrices does for both.
        small = gram_deviation(matrices if f_out <= f_in else tf.linalg.matrix_transpose(matrices))
        return 2 * tf.reduce_sum(tf.square(small)) + count * abs(f_in - f_out)


class MutualCoherenceRegularizer(KernelRegularizer, name="mutual_coherence"):
    """`factor * max |W^T W - I|`: the largest entry, by which only the worst pair of filters, or the worst norm, is moved.

    Where `f_in < f_out` the columns are split into groups as by `OrthonormalRegularizer` (ours). The sum over a kernel's groups
    and matrices, each with its own largest entry; where two entries are equal, the gradient is shared between them.

    Args:
        factor: See `OrthonormalRegularizer`.
        layout: See `OrthonormalRegularizer`.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: See `OrthonormalRegularizer`.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)), mutual coherence.
    """

    def penalty(self, kernel):
        deviations = gram_deviations(kernel, self.layout, self.groups)
        return tf.add_n([tf.reduce_sum(tf.reduce_max(tf.abs(deviation), axis=(1, 2))) for deviation in deviations])


class SRIPRegularizer(KernelRegularizer, name="srip"):
    """`factor * sigma(W^T W - I)`: the spectral norm, by the power iteration from a start that is the same at each step.

    The spectral restricted isometry property regularizer. Where `f_in < f_out` the columns are split into groups as by
    `OrthonormalRegularizer` (ours). The sum over a kernel's groups and matrices. The gradient takes the iteration's vector as
    given: where it has converged, that is the norm's.

    Args:
        factor: See `OrthonormalRegularizer`.
        layout: See `OrthonormalRegularizer`.
        groups: See `OrthonormalRegularizer`.
        iterations: int, at least 1. The paper's is 2, which finds less than the norm; each is a product with `W^T W - I`.
        seed: int. Of the start, a normal vector.

    Raises:
        ValueError: If `iterations` or `seed` is not such a number, and see `OrthonormalRegularizer`.

    Reference:
        Bansal, Chen, Wang 2018 ([arXiv:1810.09102](https://arxiv.org/abs/1810.09102)); their start is random at each step.
    """

    def __init__(self, factor=1e-4, layout="standard", groups=1, iterations=2, seed=0):
        super().__init__(factor, layout, groups)
        for name, value, least in (("iterations", iterations, 1), ("seed", seed, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` must be an integer, at least {least}. Received: {name}={value!r}")
        self.iterations = iterations
        self.seed = seed

    def penalty(self, kernel):
        return tf.add_n([self._norms(deviation) for deviation in gram_deviations(kernel, self.layout, self.groups)])

    def _norms(self, deviation):
        fixed = tf.stop_gradient(deviation)
        start = np.random.default_rng(self.seed).normal(size=(deviation.shape[-1], 1))  # XLA would draw another
        start = tf.constant(start, deviation.dtype)
        vector = tf.broadcast_to(start, (*deviation.shape[:-1], 1))
        for _ in range(self.iterations):
            image = tf.matmul(fixed, vector)
            length = tf.norm(image, axis=(1, 2), keepdims=True)
            vector = tf.where(length > 0, tf.math.divide_no_nan(image, length), vector)
        size = tf.reduce_sum(tf.square(vector), axis=(1, 2))
        # A symmetric matrix: the eigenvalue of largest magnitude is v^T D v / v^T v, whose derivative by D is v v^T.
        quotient = tf.reduce_sum(vector * tf.matmul(deviation, vector), axis=(1, 2)) / size
        return tf.reduce_sum(tf.abs(quotient))

    def get_config(self):
        return {**super().get_config(), "iterations": self.iterations, "seed": self.seed}


class ConvOrthogonalRegularizer(KernelRegularizer, name="conv_orthogonal"):
    """`factor * ||K * K - I||_F^2`: the convolution itself, not its kernel as a matrix, should keep norms.

    `K * K` is every filter convolved with every filter at each shift that the stride can make, and I is 1 where a filter meets
    itself unshifted. 0 means that the convolution, on a large image, is an orthogonal map: its transpose is its inverse on
    one side. Where there are more outputs than inputs, `cout > cin * prod(strides)`, the columns cannot all be orthonormal and
    the rows are asked to be, which the same formula does but for a constant, which is taken off.

    Args:
        factor: See `OrthonormalRegularizer`.
        strides: int or tuple of ints. The layer's. A dense layer's kernel counts as a convolution of one pixel, of stride 1.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If `strides` is not a positive integer or one for each axis of the window, the kernel is not of rank 2 to 5,
            and see `OrthonormalRegularizer`.

    Reference:
        Wang, Chen, Chakraborty, Yu 2020 ([arXiv:1911.12207](https://arxiv.org/abs/1911.12207)); the constant:
        Achour, Malgouyres, Mamalet 2022 ([arXiv:2108.05623](https://arxiv.org/abs/2108.05623)).
    """

    def __init__(self, factor=1e-4, strides=1, groups=1):
        super().__init__(factor, "standard", groups)
        self.strides = (strides,) if isinstance(strides, int) else tuple(strides) if isinstance(strides, (list, tuple)) else ()
        if not self.strides or any(isinstance(s, bool) or not isinstance(s, int) or s < 1 for s in self.strides):
            raise ValueError(f"`strides` must be a positive integer, or a tuple of them. Received: strides={strides!r}")

    @classmethod
    def for_kernel(cls, factor, kernel):
        if kernel.layout != "standard":
            raise ValueError(f"{cls.__name__} is defined for kernels of convolutions and dense layers with layout 'standard'")
        pointwise = (
            kernel.regularizer_attribute == "pointwise_regularizer"
        )  # a separable layer's strides are the depthwise part's
        return cls(factor, 1 if pointwise else getattr(kernel.layer, "strides", 1), kernel.groups)

    def penalty(self, kernel):
        kernel = at_least_float32(kernel)
        strides = self.strides
        if kernel.shape.rank == 2 and len(strides) == 1:
            kernel, strides = kernel[tf.newaxis], (1,)  # a dense layer is a convolution of one pixel
        window = kernel.shape[:-2]
        strides = strides * len(window) if len(strides) == 1 else strides
        if not 1 <= len(window) <= 3 or len(strides) != len(window):
            raise ValueError(
                "A kernel must have rank 2 to 5, and `strides` one number or one for each axis of its window. "
                f"Received: a kernel of shape {tuple(kernel.shape)}, strides={self.strides!r}"
            )
        matrix_shape(kernel.shape, "standard", self.groups)
        cin, cout = kernel.shape[-2:]
        own = cout // self.groups
        total = tf.zeros((), kernel.dtype)
        margins = [(size - 1) // stride * stride for size, stride in zip(window, strides)]
        shifts = [2 * margin // stride + 1 for margin, stride in zip(margins, strides)]
        unshifted = tf.scatter_nd(
            [[size // 2 for size in shifts]], tf.eye(own, dtype=kernel.dtype)[tf.newaxis], (*shifts, own, own)
        )
        for filters in tf.split(kernel, self.groups, axis=-1):
            images = tf.pad(tf.transpose(filters, (len(window) + 1, *range(len(window) + 1))), _padding(margins))
            products = tf.nn.convolution(images, filters, strides, "VALID")  # (own, *shifts, own)
            products = tf.transpose(products, (*range(1, len(window) + 1), 0, len(window) + 1))
            total += tf.reduce_sum(tf.square(products - unshifted))
        inputs = cin
        for stride in strides:
            inputs *= stride
        return total - self.groups * max(0, own - inputs)

    def get_config(self):
        return {"factor": self.factor, "strides": self.strides, "groups": self.groups}


def _padding(margins):
    return [(0, 0), *((margin, margin) for margin in margins), (0, 0)]
