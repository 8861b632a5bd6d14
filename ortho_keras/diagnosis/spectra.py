"""Singular values of kernels as matrices and of layers as linear maps, and cosines between filters."""

import math

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.method.kernels import as_matrices, layer_kernels

WRITTEN_OUT = 2048  # inputs of the largest map whose matrix is written out


def mean_cosines(kernels):
    """Returns the mean cosine similarity over all pairs of columns, and the mean of its absolute values, two floats.

    `kernels` are arrays `(count, f_in, f_out)`; columns of different matrices make no pair. NaN where there is no pair.
    """
    total, absolute, pairs = 0.0, 0.0, 0
    for matrices in kernels:
        columns = np.asarray(matrices, np.float64)
        norms = np.linalg.norm(columns, axis=1, keepdims=True)
        columns = columns / np.where(norms > 0, norms, 1)
        count, _, number = columns.shape
        for start in range(0, number, 1024):  # a head of 50,000 classes has too many pairs to hold at once
            block = columns[:, :, start : start + 1024]
            cosines = block.swapaxes(1, 2) @ columns
            own = np.square(block).sum()  # each column with itself
            total, absolute = total + (cosines.sum() - own) / 2, absolute + (np.abs(cosines).sum() - own) / 2
        pairs += count * number * (number - 1) // 2
    return (float(total / pairs), float(absolute / pairs)) if pairs else (math.nan, math.nan)


def kernel_extremes(kernel, layout="standard", groups=1):
    """Returns the smallest and the largest singular value of a kernel read as matrices, two floats; NaN if it is not finite."""
    matrices = np.asarray(as_matrices(np.asarray(kernel, np.float64), layout, groups))
    if not np.isfinite(matrices).all():
        return math.nan, math.nan
    values = np.linalg.svd(matrices, compute_uv=False)
    return float(values.min()), float(values.max())


def operator_extremes(layer, input_shape):
    """Returns the smallest and the largest singular value of a convolution's or Dense layer's map on one size; else NaN, NaN.

    A convolution with periodic borders is block-diagonal over frequencies: its singular values are those of the kernel's
    Fourier transform at each frequency, where those that a stride folds onto each other share a matrix; an input size that the
    stride does not divide is rounded up. For inputs less than twice as wide as the window, which are nearly all border, the
    whole matrix with the layer's padding is used, up to 2,048 inputs; above, NaN. So it is for a kernel that is not finite. A
    value below 1e-7 of the largest is not resolved.

    Reference:
        Sedghi, Gupta, Long 2019 ([arXiv:1805.10408](https://arxiv.org/abs/1805.10408)), theorem 6; strides are ours.
    """
    if isinstance(layer, keras.layers.Dense):
        return kernel_extremes(layer.kernel)
    kernels = layer_kernels(layer)
    if not kernels or isinstance(layer, keras.layers.EinsumDense):
        return math.nan, math.nan
    shape, padding = (1, *input_shape[1:]), layer.padding
    if kernels[0].layout == "transposed":  # the adjoint has the same singular values
        shape = layer.compute_output_shape(shape)
    sizes = tuple(shape[2:] if layer.data_format == "channels_first" else shape[1:-1])
    kernel, groups = _as_grouped(kernels)
    if not np.isfinite(kernel).all():
        return math.nan, math.nan
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel.shape, layer.dilation_rate)]
    if any(span > 1 and size < 2 * span for size, span in zip(sizes, spans)):
        return _bordered_extremes(kernel, groups, sizes, layer.strides, layer.dilation_rate, padding)
    return convolution_extremes(kernel, groups, sizes, layer.strides, layer.dilation_rate)


def convolution_extremes(kernel, groups, sizes, strides, dilations):
    """Returns the smallest and the largest singular value of a convolution with periodic borders.

    `kernel` is an array `(*window, cin / groups, cout)`; `sizes`, the input's, `strides` and `dilations` have an int per axis.
    """
    kernel = np.asarray(kernel, np.float64)
    axes = len(sizes)
    if all(size == 1 for size in (*kernel.shape[:axes], *strides)):  # the same matrix at every frequency
        sizes = (1,) * axes
    folded = [-(-size // stride) for size, stride in zip(sizes, strides)]
    kept = [*folded[:-1], folded[-1] // 2 + 1]  # the kernel is real: the other frequencies are conjugates of these
    frequencies = _grid(kept)
    # Frequencies f, f + m, f + 2m, ... (m = size / stride) fall onto each other: their matrices stand side by side.
    aliases = _grid(strides) * folded
    offsets = _grid(kernel.shape[:axes]) * dilations / np.multiply(folded, strides)
    taps = kernel.reshape(len(offsets), *kernel.shape[axes:])
    rows, extremes = math.prod(strides) * kernel.shape[axes], []
    step = max(1, 4_000_000 // (rows * kernel.shape[-1]))  # matrices at a time: a wide layer has large ones
    for start in range(0, len(frequencies), step):
        each = frequencies[start : start + step, np.newaxis] + aliases
        matrices = np.tensordot(np.exp(-2j * np.pi * each @ offsets.T), taps, 1)
        matrices = matrices.reshape(len(each), rows, groups, kernel.shape[-1] // groups)
        extremes.append(_gram_extremes(matrices.swapaxes(1, 2)))
    lows, highs = np.transpose(extremes) / math.sqrt(math.prod(strides))
    return float(lows.min()), float(highs.max())


def _bordered_extremes(kernel, groups, sizes, strides, dilations, padding):
    """The same with a layer's padding, from each group's whole matrix."""
    inputs = math.prod(sizes) * kernel.shape[-2]
    if inputs > WRITTEN_OUT:
        return math.nan, math.nan
    basis = np.eye(inputs).reshape(inputs, *sizes, kernel.shape[-2])
    if padding == "causal":
        basis, padding = np.pad(basis, [(0, 0), ((kernel.shape[0] - 1) * dilations[0], 0), (0, 0)]), "valid"
    # All groups read the same inputs here, so one convolution gives every group's rows.
    rows = tf.nn.convolution(basis, kernel, strides, padding.upper(), dilations=dilations).numpy()
    rows = rows.reshape(inputs, -1, groups, kernel.shape[-1] // groups)
    return _gram_extremes(np.moveaxis(rows, 2, 0).reshape(groups, inputs, -1))


def _gram_extremes(matrices):
    """The same of stacked matrices, from the eigenvalues of the smaller Gram matrices."""
    if matrices.shape[-2] < matrices.shape[-1]:
        matrices = matrices.swapaxes(-2, -1)
    values = np.linalg.eigvalsh(np.conj(matrices.swapaxes(-2, -1)) @ matrices)
    return math.sqrt(max(0.0, values.min())), math.sqrt(max(0.0, values.max()))


def _grid(counts):
    """All tuples of indices below `counts`, an array `(number, axes)`."""
    return np.stack([axis.ravel() for axis in np.indices(counts)], axis=-1)


def _as_grouped(kernels):
    """A convolution's kernel as `(*window, cin / groups, cout)`, and its number of groups."""
    kernel, *pointwise = (np.asarray(each.variable, np.float64) for each in kernels)
    if pointwise:  # separable
        pointwise = pointwise[0].reshape(*kernel.shape[-2:], -1)  # (cin, multiplier, cout)
        return np.einsum("...cm,cmo->...co", kernel, pointwise), 1
    if kernels[0].layout == "depthwise":
        return kernel.reshape(*kernel.shape[:-2], 1, -1), kernel.shape[-2]
    return kernel, kernels[0].groups  # a transposed kernel (..., out, in) is the adjoint's (..., in, out)
