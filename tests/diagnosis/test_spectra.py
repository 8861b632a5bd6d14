"""Singular values against those of the whole linear map, written out as a matrix in NumPy."""

import numpy as np
import pytest
from keras import layers

from ortho_keras.diagnosis.spectra import convolution_extremes, mean_cosines, operator_extremes


def whole_map(kernel, groups, sizes, strides, dilations):
    """The matrix of a convolution with periodic borders: one row for each output, one column for each input."""
    axes = len(sizes)
    window, (group_in, cout) = kernel.shape[:axes], kernel.shape[axes:]
    outputs = [size // stride for size, stride in zip(sizes, strides)]
    inputs = np.arange(np.prod(sizes) * group_in * groups).reshape(*sizes, group_in * groups)
    matrix = np.zeros((np.prod(outputs) * cout, inputs.size))
    row = 0
    for place in np.ndindex(*outputs):
        for out in range(cout):
            group = out // (cout // groups)
            for offset in np.ndindex(*window):
                pixel = tuple((p * s + o * d) % n for p, s, o, d, n in zip(place, strides, offset, dilations, sizes))
                for channel in range(group_in):
                    matrix[row, inputs[(*pixel, group * group_in + channel)]] += kernel[(*offset, channel, out)]
            row += 1
    return matrix


CASES = [
    ((3, 3, 2, 5), 1, (4, 4), (2, 1), (1, 1)),
    ((3, 3, 2, 6), 3, (4, 4), (2, 2), (1, 1)),
    ((5, 2, 3), 1, (4,), (1,), (1,)),  # the window is wider than the image
    ((2, 2, 2, 2, 3), 1, (2, 4, 2), (1, 2, 1), (1, 1, 1)),
]


@pytest.mark.parametrize(("shape", "groups", "sizes", "strides", "dilations"), CASES)
def test_convolution_extremes_equal_the_whole_maps(shape, groups, sizes, strides, dilations):
    kernel = np.random.default_rng(3).normal(size=shape)
    values = np.linalg.svd(whole_map(kernel, groups, sizes, strides, dilations), compute_uv=False)
    smallest, largest = convolution_extremes(kernel, groups, sizes, strides, dilations)
    np.testing.assert_allclose(largest, values[0], rtol=1e-10)
    np.testing.assert_allclose(smallest, values[-1], rtol=1e-5, atol=1e-7 * values[0])


LAYERS = [
    (layers.Conv2D(3, 3, strides=2), (6, 6, 2), lambda w: whole_map(w, 1, (6, 6), (2, 2), (1, 1))),
    (layers.Conv2D(3, 3, data_format="channels_first"), (2, 6, 7), lambda w: whole_map(w, 1, (6, 7), (1, 1), (1, 1))),
    (layers.Conv2DTranspose(3, 3, 2, "same"), (3, 3, 2), lambda w: whole_map(w, 1, (6, 6), (2, 2), (1, 1))),
    (layers.DepthwiseConv2D(3), (6, 6, 3), lambda w: whole_map(w.reshape(3, 3, 1, 3), 3, (6, 6), (1, 1), (1, 1))),
    (layers.Conv1D(3, 3, dilation_rate=2), (10, 2), lambda w: whole_map(w, 1, (10,), (1,), (2,))),
    (layers.Dense(3), (5,), lambda w: w),
]


@pytest.mark.parametrize(("layer", "shape", "whole"), LAYERS)
def test_operator_extremes_of_layers(layer, shape, whole):
    layer.use_bias = False
    layer.build((None, *shape))
    values = np.linalg.svd(whole(*(np.asarray(weight, np.float64) for weight in layer.get_weights())), compute_uv=False)
    np.testing.assert_allclose(operator_extremes(layer, (None, *shape)), [values[-1], values[0]], rtol=1e-4, atol=1e-6)


BORDERED = [
    (layers.Conv2D(3, 3, padding="same", dilation_rate=4), (8, 8, 2)),
    (layers.Conv2D(4, 5), (8, 8, 2)),
    (layers.Conv2D(6, 3, 2, "same", groups=2), (3, 5, 4)),
    (layers.DepthwiseConv2D(3, padding="same", depth_multiplier=2), (2, 3, 3)),
    (layers.SeparableConv2D(5, 3, padding="same", depth_multiplier=2), (3, 3, 2)),
    (layers.Conv1D(3, 3, padding="causal", dilation_rate=2), (5, 2)),
    (layers.Conv2DTranspose(3, 3, 2, "same"), (2, 2, 2)),
    (layers.Conv3D(2, 3, padding="same"), (2, 3, 2, 2)),
]


@pytest.mark.parametrize(("layer", "shape"), BORDERED)
def test_a_map_that_is_nearly_all_border_is_the_layers_own(layer, shape):
    layer.use_bias = False
    size = int(np.prod(shape))
    matrix = np.asarray(layer(np.eye(size, dtype=np.float32).reshape(size, *shape)), np.float64).reshape(size, -1)
    values = np.linalg.svd(matrix, compute_uv=False)
    smallest, largest = operator_extremes(layer, (None, *shape))
    np.testing.assert_allclose(largest, values[0], rtol=1e-5)
    np.testing.assert_allclose(smallest, values[-1], rtol=1e-4, atol=1e-6)


def test_what_is_left_out_and_rounded():
    wide, strided = layers.Conv2D(4, 3, padding="same"), layers.Conv2D(3, 3, strides=2)
    wide.build((None, 3, 3, 256))
    strided.build((None, 7, 7, 2))
    assert np.isnan(operator_extremes(wide, (None, 3, 3, 256))).all()  # nearly all border, and wide
    assert operator_extremes(wide, (None, 8, 8, 256))[1] > 0
    assert np.isnan(operator_extremes(layers.ReLU(), (None, 4))).all()
    assert operator_extremes(strided, (None, 7, 7, 2)) == operator_extremes(strided, (None, 8, 8, 2))


def test_mean_cosines_pair_by_pair():
    matrices = np.random.default_rng(0).normal(size=(3, 4, 7))
    pairs = [(a, b) for matrix in matrices for at, a in enumerate(matrix.T) for b in matrix.T[at + 1 :]]
    cosines = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairs]
    np.testing.assert_allclose(mean_cosines([matrices]), (np.mean(cosines), np.mean(np.abs(cosines))), rtol=1e-12)
    assert mean_cosines([[[[1.0, -2.0, 0.0], [0.0, 0.0, 5.0]]]]) == pytest.approx((-1 / 3, 1 / 3))  # cosines -1, 0, 0
    assert np.isnan(mean_cosines([np.ones((5, 9, 1))])).all()
