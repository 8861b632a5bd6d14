"""How kernels are read as matrices, and which kernels layers and models have."""

import itertools

import keras
import numpy as np
import pytest
import references
from keras import layers

from ortho_keras import orthonormality_error
from ortho_keras.method import kernels

pytestmark = pytest.mark.every_backend


def random_layout(rng, rank):
    """A named layout, output axes, or a pair (shared axes, output axes), at random; some axes counted from the end."""
    named = ["standard", "transposed", *(["depthwise"] if rank > 2 else [])]
    axes = [int(axis) - rank * int(rng.integers(2)) for axis in rng.permutation(rank)]
    outputs = int(rng.integers(1, rank))
    shared = int(rng.integers(0, rank - outputs))
    pair = (tuple(axes[outputs : outputs + shared]), tuple(axes[:outputs]))
    return [named[rng.integers(len(named))], pair[1], pair][rng.integers(3)]


def test_round_trip_of_random_kernels():
    rng = np.random.default_rng(1)
    for _ in range(80):
        shape = tuple(int(size) for size in rng.integers(1, 5, size=rng.integers(2, 6)))
        layout, groups = random_layout(rng, len(shape)), int(rng.integers(1, 4))
        f_out = kernels.matrix_shape(shape, layout)[2]
        groups = groups if f_out % groups == 0 else 1
        kernel = rng.normal(size=shape).astype("float32")
        matrices = kernels.as_matrices(keras.ops.convert_to_tensor(kernel), layout, groups)
        assert matrices.shape == kernels.matrix_shape(shape, layout, groups)
        assert sorted(np.asarray(matrices).ravel()) == sorted(kernel.ravel())
        np.testing.assert_array_equal(kernels.as_kernel(matrices, shape, layout, groups), kernel)


def test_sets_of_columns_equal_the_oracle():
    shapes = [(2, 3, 9), (5, 2, 2), (2, 3, 4, 7), (1, 1, 6, 2), (2, 1, 3, 4, 3)]
    layouts = ["standard", "transposed", "depthwise", (0,), (1, 2), (2, 0), (-1, 1)]
    for shape, layout in itertools.product(shapes, layouts):
        kernel = np.arange(np.prod(shape)).reshape(shape)  # each entry is its own place
        sets = [np.asarray(part) for part in kernels.column_sets(keras.ops.convert_to_tensor(kernel), layout)]
        sets = [columns.tolist() for part in sets for columns in (part if part.ndim == 3 else part[np.newaxis])]
        assert sorted(sets) == sorted(columns.tolist() for columns in references.kernel_columns(kernel, layout))


def test_orthonormality_error():
    eye = np.eye(3, dtype="float32")
    assert orthonormality_error(eye[:, :2]) == 0
    assert orthonormality_error(0 * eye) == 1  # a deviation may be negative
    assert orthonormality_error([[1.0, 1.0], [0.0, 0.0]]) == 1  # off the diagonal
    assert orthonormality_error([[1.0, 1.0], [0.0, 0.0]], groups=2) == 0
    assert orthonormality_error(np.concatenate([eye, eye, eye[:, :1]], axis=1)) == 0  # equal columns in different groups
    assert orthonormality_error(np.concatenate([eye, 2 * eye[:, :1]], axis=1)) == 3  # the remainder counts
    assert orthonormality_error(np.stack([eye, 3 * eye]), layout=((0,), (2,))) == 8
    assert orthonormality_error(keras.Variable(2 * eye, dtype="bfloat16")) == 3
    assert orthonormality_error(eye[np.newaxis, :, :2], "transposed") == 1  # three outputs, the last a column of zeros
    for column in (0, 2):  # the third is a remainder
        assert np.isnan(orthonormality_error(np.where(np.arange(3) == column, np.nan, eye[:2])))


@pytest.mark.parametrize(
    ("equation", "output_shape", "input_shape", "layout"),
    [
        ("abc,cde->abde", (None, 5, 2), (3, 4), (1, 2)),
        ("abcd,cde->abe", (None, 6), (3, 4, 5), (2,)),
        ("...x,xy->...y", 5, (3, 4), (1,)),
        ("ab, ob -> ao", 5, (4,), (0,)),  # the output first
        ("abc,bcd->abd", (3, 5), (3, 4), ((0,), (2,))),
    ],
)
def test_einsum_layout_maps_inputs_to_outputs(equation, output_shape, input_shape, layout):
    layer = layers.EinsumDense(equation.replace(" ", ""), output_shape)
    x = np.random.default_rng(4).normal(size=(2, *input_shape)).astype("float32")
    y = np.asarray(layer(x))
    assert kernels.einsum_layout(equation, len(layer.kernel.shape)) == layout
    matrices = np.asarray(kernels.as_matrices(layer.kernel, layout))
    if equation == "abc,bcd->abd":  # a matrix for each b
        mapped = np.stack([x[:, b] @ matrices[b] for b in range(3)], axis=1)
    else:
        mapped = x.reshape(-1, matrices.shape[1]) @ matrices[0]
    np.testing.assert_allclose(mapped.reshape(y.shape), y, rtol=1e-5, atol=1e-6)


def matrices_of(layer):
    found = kernels.layer_kernels(layer)
    return [np.asarray(kernels.as_matrices(kernel.variable, kernel.layout, kernel.groups)) for kernel in found]


def normal(*shape):
    return np.random.default_rng(5).normal(size=shape).astype("float32")


def assert_close(actual, expected):
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_convolution_s_matrix_maps_patches_to_pixels_and_a_transposed_one_s_flipped_patches(rank):
    x = normal(4, *(3,) * rank, 2)
    convolution = (layers.Conv1D, layers.Conv2D, layers.Conv3D)[rank - 1](5, 3)
    transposed = (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)[rank - 1](5, 3)
    y = np.asarray(convolution(x)).reshape(4, 5)
    assert_close(x.reshape(4, -1) @ matrices_of(convolution)[0][0], y)
    y = transposed(x)[(slice(None), *(2,) * rank)]  # the middle pixel sees all of x
    assert_close(np.flip(x, axis=tuple(range(1, rank + 1))).reshape(4, -1) @ matrices_of(transposed)[0][0], y)


def test_a_grouped_convolution_s_matrices_map_their_own_channels():
    x = normal(4, 3, 2, 6)
    layer = layers.Conv2D(12, (3, 2), groups=3)
    y = np.asarray(layer(x)).reshape(4, 12)
    for group, matrix in enumerate(matrices_of(layer)[0]):
        own = x[..., 2 * group : 2 * group + 2].reshape(4, -1)
        assert_close(own @ matrix, y[:, 4 * group : 4 * group + 4])


@pytest.mark.parametrize("rank", [1, 2])
def test_depthwise_matrices_map_one_channel_each_and_pointwise_ones_all(rank):
    x = normal(4, *(3,) * rank, 5)
    depthwise = (layers.DepthwiseConv1D, layers.DepthwiseConv2D)[rank - 1](3, depth_multiplier=2)
    separable = (layers.SeparableConv1D, layers.SeparableConv2D)[rank - 1](7, 3, depth_multiplier=2)
    for layer, outputs in ((depthwise, 10), (separable, 7)):
        y = np.asarray(layer(x)).reshape(4, outputs)
        channels, *pointwise = matrices_of(layer)
        mapped = np.concatenate([x[..., i].reshape(4, -1) @ matrix for i, matrix in enumerate(channels)], axis=1)
        assert_close(mapped @ pointwise[0][0] if pointwise else mapped, y)


def test_layer_kernels():
    for layer, input_shape, attributes in [
        (layers.Conv2D(6, 2, groups=2), (5, 5, 4), ["kernel_regularizer"]),
        (type("Mine", (layers.Conv2DTranspose,), {})(3, 2), (5, 5, 4), ["kernel_regularizer"]),
        (layers.DepthwiseConv2D(2), (5, 5, 4), ["depthwise_regularizer"]),
        (layers.SeparableConv2D(3, 2), (5, 5, 4), ["depthwise_regularizer", "pointwise_regularizer"]),
        (layers.EinsumDense("abc,bcd->abd", (5, 3)), (5, 4), ["kernel_regularizer"]),
        (layers.Embedding(7, 3), (4,), []),
        (layers.LSTM(3), (5, 4), []),
    ]:
        layer(keras.Input(input_shape))
        assert [kernel.regularizer_attribute for kernel in kernels.layer_kernels(layer)] == attributes, layer
        assert set(attributes) <= layer.get_config().keys()  # where Keras saves it


class Composite(layers.Layer):
    """Holds layers as an attribute, in a list and in a dictionary, whose keys no order exists for."""

    def __init__(self):
        super().__init__()
        self.first = layers.Dense(3)
        self.stack = [layers.Dense(4), layers.Dense(5)]
        self.named = {"last": layers.Dense(6), 1: None}

    def build(self, input_shape):
        for layer in (self.first, *self.stack, self.named["last"]):
            layer.build(input_shape)
            input_shape = layer.compute_output_shape(input_shape)

    def call(self, x):
        return self.named["last"](self.stack[1](self.stack[0](self.first(x))))


def nested_model():
    inner = keras.Sequential([keras.Input((4,)), layers.Dense(4), layers.BatchNormalization()], name="inner")
    innermost = keras.Sequential([keras.Input((4,)), inner, layers.Dense(3)], name="innermost")
    x = keras.Input((5, 4))
    shared = layers.Dense(4)
    y = layers.TimeDistributed(inner)(shared(shared(x)))
    y = layers.MultiHeadAttention(2, 3)(y, y)
    return keras.Model(x, [Composite()(innermost(y[:, 0])), inner(y[:, 1])])


def test_model_kernels_of_nested_models():
    model = nested_model()
    found = kernels.model_kernels(model)
    assert {kernel.path for kernel in found} == {weight.path for weight in model.weights if weight.name == "kernel"}
    assert len(found) == 1 + 1 + 4 + 1 + 4  # shared, inner, attention, innermost, composite
    layouts = {kernel.layer.name: kernel.layout for kernel in found if isinstance(kernel.layer, layers.EinsumDense)}
    assert layouts == {"query": (1, 2), "key": (1, 2), "value": (1, 2), "attention_output": (2,)}


def test_walk_layers_names_the_owners():
    model = nested_model()
    walked = list(kernels.walk_layers(model))
    assert walked[0] == (model, ()) and len({id(layer) for layer, _ in walked}) == len(walked)
    owners = {id(layer): within for layer, within in walked}
    attention, composite = (model.get_layer(name) for name in ("multi_head_attention", "composite"))
    assert owners[id(attention)] == (model,)
    assert owners[id(attention.query_dense)] == (model, attention)
    assert owners[id(composite.stack[1])] == owners[id(composite.named["last"])] == (model, composite)
    (wrapper,) = (layer for layer in model.layers if isinstance(layer, layers.TimeDistributed))
    assert owners[id(wrapper.layer.layers[0])] == (model, wrapper, wrapper.layer)
