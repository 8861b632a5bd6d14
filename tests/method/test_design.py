"""check_design: how kernels are read, which changes are advised, and what is noted."""

import re

import keras
import numpy as np
import pytest
from keras import layers

from ortho_keras import OrthonormalRegularizer, check_design, orthonormalize, plain_cnn

pytestmark = pytest.mark.every_backend


def model_of(*stack, shape=(8, 8, 3)):
    return keras.Sequential([keras.Input(shape), *stack])


def only(layer, shape=(8, 8, 3)):
    (design,) = check_design(model_of(layer, shape=shape)).layers
    return design


def test_a_kernel_that_does_not_fit():
    design = only(layers.Conv2D(32, 3, name="stem"))
    assert (design.layer, design.kind, design.path) == ("stem", "Conv2D", "sequential/stem/kernel")
    advice = "at most 27 filters, a 5x5 kernel or at least 4 input channels would fit; until then: 1 group of 27 and 1 of 5"
    assert design.advice == advice


@pytest.mark.parametrize(
    ("layer", "shape", "matrices", "groups", "advice"),
    [
        (layers.Conv2D(27, 3), (8, 8, 3), (1, 27, 27), ((1, 27),), ""),
        (layers.Conv2D(54, 3), (8, 8, 3), (1, 27, 54), ((2, 27),), "a 5x5 kernel or at least 6 input"),
        (layers.Conv1D(7, 2), (9, 2), (1, 4, 7), ((1, 4), (1, 3)), "at most 4 filters, a kernel of 5 or at least 4 input"),
        (layers.Conv3D(10, 1), (4, 4, 4, 3), (1, 3, 10), ((3, 3), (1, 1)), "a 3x3x3 kernel or at least 10 input"),
        (layers.Conv2DTranspose(20, 2), (4, 4, 3), (1, 12, 20), ((1, 12), (1, 8)), "at most 12 filters, a 3x3 kernel"),
        (layers.Conv2D(8, 1, groups=2), (4, 4, 4), (2, 2, 4), ((2, 2),), "at most 4 filters, a 3x3 kernel or at least 8 input"),
        (layers.DepthwiseConv2D(2, depth_multiplier=5), (4, 4, 3), (3, 4, 5), ((1, 4), (1, 1)), "at most 4 or a 3x3 kernel"),
        (layers.Dense(7), (3,), (1, 3, 7), ((2, 3), (1, 1)), "at most 3 units or at least 7 input features"),
        (layers.EinsumDense("ab,bcd->acd", (2, 3)), (4,), (1, 4, 6), ((1, 4), (1, 2)), "at most 4 outputs or at least 6 input"),
    ],
)  # fmt: skip
def test_layers_by_hand(layer, shape, matrices, groups, advice):
    design = only(layer, shape)
    assert (design.count, design.f_in, design.f_out) == matrices and design.groups == groups
    assert advice in design.advice and bool(design.advice) != design.fits
    assert ("in each of its" in design.advice) == (design.count > 1)


def test_the_two_kernels_of_a_separable_convolution():
    depthwise, pointwise = check_design(model_of(layers.SeparableConv2D(12, 3, depth_multiplier=2))).layers
    assert (depthwise.count, depthwise.f_in, depthwise.f_out, depthwise.fits) == (3, 9, 2, True)
    assert pointwise.advice.startswith("at most 6 filters or at least 12 input channels times depth_multiplier would fit")


@pytest.mark.parametrize("seed", range(3))
def test_the_advice_is_enough_and_less_is_not(seed):
    random = np.random.default_rng(seed)
    groups, side, channels = (int(random.integers(1, high)) for high in (4, 4, 5))
    filters = side**2 * channels + int(random.integers(1, 40))

    def fits(filters, side, channels):
        layer = layers.Conv2D(groups * filters, side, groups=groups)
        layer.build((None, 9, 9, groups * channels))
        vectors = np.reshape(layer.kernel, (-1, groups * filters))[:, :filters]  # of the first group
        return np.linalg.matrix_rank(vectors) == filters  # random filters are independent wherever that is possible

    design = only(layers.Conv2D(groups * filters, side, groups=groups), (9, 9, groups * channels))
    numbers = re.match(r"at most (\d+) filters, a (\d+)x\2 kernel or at least (\d+) input", design.advice).groups()
    most, wider, least = map(int, numbers)
    assert most % groups == least % groups == 0 and wider % 2
    assert not fits(filters, side, channels)
    assert fits(most // groups, side, channels) and not fits(most // groups + 1, side, channels)
    assert fits(filters, side, least // groups) and not fits(filters, side, least // groups - 1)
    assert fits(filters, wider, channels) and not fits(filters, wider - 2, channels)
    assert sum(many * size for many, size in design.groups) == filters
    assert all(size <= side**2 * channels for _, size in design.groups)


def test_mobile_net():
    report = check_design(keras.applications.MobileNetV2(weights=None, input_shape=(32, 32, 3)))
    wide = [design.layer for design in report.layers if not design.fits]
    assert len(report.layers) == 53 and not report.fits and report.notes == []
    assert wide == ["Conv1", *(f"block_{block}_expand" for block in range(1, 17)), "Conv_1"]
    title, *rows = str(report).split("\n")
    assert title.startswith("18 of 53 kernels have more filters than inputs (f_in < f_out)")
    assert len(rows) == 18 and len({row.index(" at most ") for row in rows}) == 1  # aligned


def test_a_model_that_fits():
    report = check_design(plain_cnn(8))
    assert report.fits and str(report) == "all 8 kernels can be orthonormal: f_in >= f_out everywhere"
    grey = check_design(plain_cnn(8, input_shape=(8, 8, 1)))
    assert str(grey).startswith("1 of 8 kernels has more filters") and "stem_conv/kernel" in str(grey)


def test_other_penalties_in_addition_to_orthonormal_ones_are_noted():
    def dense(name, regularizer, trainable=True):
        return layers.Dense(4, kernel_regularizer=regularizer, name=name, trainable=trainable)

    ours = OrthonormalRegularizer(1e-3)
    stack = dense("ours", ours), dense("decayed", keras.regularizers.L2(0.1)), dense("bare", None), dense("frozen", None, False)
    decayed, bare = check_design(model_of(*stack, shape=(4,))).notes
    assert decayed.startswith("L2 on 1 kernel (") and "decayed/kernel" in decayed and "discourages mixing" in decayed
    assert bare.startswith("no regularizer on 1 kernel (") and "bare/kernel" in bare
    assert check_design(model_of(dense("a", ours), dense("b", ours), shape=(4,))).notes == []
    assert check_design(model_of(dense("a", None), dense("b", keras.regularizers.L2(0.1)), shape=(4,))).notes == []


def test_convolutions_that_cannot_be_orthogonal_are_noted():
    stack = [layers.Conv2D(4, 1, strides, padding="same", name=f"strides{strides}") for strides in (1, 2)]
    model = model_of(*stack)
    orthonormalize(model, verbose=False, regularizer="conv_orthogonal")
    assert check_design(model).notes == []  # 4 inputs are enough for 4 filters
    model = model_of(*reversed([layers.Conv2D.from_config(layer.get_config()) for layer in stack]))
    orthonormalize(model, verbose=False, regularizer="conv_orthogonal")
    (note,) = check_design(model).notes
    assert re.search(r"strides2/kernel: .* shape \(1, 1, 3, 4\) and strides \(2, 2\) cannot be orthogonal: at most 3", note)


def test_wrong_models():
    for wrong in (keras.Sequential(), layers.Dense(3), "model"):
        with pytest.raises(ValueError, match="`model` must be a built Keras model"):
            check_design(wrong)
    with pytest.raises(ValueError, match="must have a convolution, dense or einsum kernel"):
        check_design(model_of(layers.ReLU()))
