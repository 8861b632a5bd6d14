"""Independent oracles in float64 NumPy: written from the formulas, sharing no code with the package."""

import itertools

import numpy as np


def kernel_columns(kernel, layout):
    """All sets of columns that should be orthonormal: for each an array (f_in, n) of indices into the flat kernel."""
    index = np.arange(kernel.size).reshape(kernel.shape)
    if layout == "standard":
        matrices = [index.reshape(-1, kernel.shape[-1])]
    elif layout == "transposed":
        matrices = [np.stack([index[..., out, :].ravel() for out in range(kernel.shape[-2])], axis=1)]
    elif layout == "depthwise":
        matrices = [index[..., channel, :].reshape(-1, kernel.shape[-1]) for channel in range(kernel.shape[-2])]
    else:
        ranges = [range(kernel.shape[axis]) for axis in layout]
        columns = []
        for point in itertools.product(*ranges):
            place = [slice(None)] * kernel.ndim
            for axis, at in zip(layout, point):
                place[axis] = at
            columns.append(index[tuple(place)].ravel())
        matrices = [np.stack(columns, axis=1)]
    sets = []
    for matrix in matrices:
        f_in, f_out = matrix.shape
        sets += [matrix[:, at : at + f_in] for at in range(0, f_out, f_in)] if f_out > f_in else [matrix]
    return sets


def penalty_and_gradient(kernel, layout, factor):
    """factor / 2 * sum ||W^T W - I||^2 over the sets, and its gradient 2 * factor * W (W^T W - I)."""
    flat = np.asarray(kernel, np.float64).ravel()
    penalty, gradient = 0.0, np.zeros_like(flat)
    for columns in kernel_columns(np.asarray(kernel), layout):
        w = flat[columns]
        deviation = w.T @ w - np.eye(w.shape[1])
        penalty += factor / 2 * np.sum(deviation**2)
        gradient[columns] = 2 * factor * w @ deviation
    return penalty, gradient.reshape(np.shape(kernel))


def largest_deviation(kernel, layout, gain=1.0):
    flat = np.asarray(kernel, np.float64).ravel()
    sets = [flat[columns] for columns in kernel_columns(np.asarray(kernel), layout)]
    return max(np.abs(w.T @ w - gain**2 * np.eye(w.shape[1])).max() for w in sets)


def scale_and_reference(own, above, tolerance, max_scale, reference):
    """One layer's scale, and the magnitude handed down, from its own magnitude and the one from above (None: none)."""
    if own == 0 or not np.isfinite(own):
        return 1.0, above
    if above is None:
        return 1.0, own
    scale = above / own
    scale = float(np.clip(scale, 1 / max_scale, max_scale)) if not 1 / tolerance <= scale <= tolerance else 1.0
    return scale, own * scale if reference == "neighbour" else above


def related_penalties(kernel, layout="standard"):
    """Bansal et al.'s: double soft orthogonality, mutual coherence, and the exact spectral norm that SRIP estimates."""
    kernel = np.asarray(kernel, np.float64)
    sets = [kernel.ravel()[index] for index in kernel_columns(kernel, layout)]
    deviations = [w.T @ w - np.eye(w.shape[1]) for w in sets]
    whole = sets if layout == "depthwise" else [np.concatenate(sets, axis=1)]  # the sets of one matrix, side by side again
    grams = [gram for w in whole for gram in (w.T @ w, w @ w.T)]
    return {
        "double_soft": sum(np.sum((gram - np.eye(len(gram))) ** 2) for gram in grams),
        "coherence": sum(np.abs(deviation).max() for deviation in deviations),
        "spectral": sum(np.linalg.norm(deviation, 2) for deviation in deviations),
    }


def circular_matrix(kernel, sizes, strides):
    """The convolution with periodic borders as a matrix (outputs, inputs), one entry at a time."""
    *window, cin, cout = kernel.shape
    folded = [size // stride for size, stride in zip(sizes, strides)]
    matrix = np.zeros((*folded, cout, *sizes, cin))
    for place in itertools.product(*map(range, folded)):
        for tap in itertools.product(*map(range, window)):
            source = tuple((p * s + t) % size for p, s, t, size in zip(place, strides, tap, sizes))
            matrix[(*place, slice(None), *source)] += kernel[tap].T
    return matrix.reshape(np.prod(folded) * cout, -1)


def convolutional_penalty(kernel, sizes, strides):
    """For each output pixel: ||A A^T - I||^2, or ||A^T A - I||^2 where there are more outputs than inputs (Achour et al.)."""
    matrix = circular_matrix(kernel, sizes, strides)
    outputs, inputs = matrix.shape
    gram = matrix @ matrix.T if outputs <= inputs else matrix.T @ matrix
    return np.sum((gram - np.eye(len(gram))) ** 2) / (outputs / kernel.shape[-1])
