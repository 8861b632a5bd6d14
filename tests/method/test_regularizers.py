import keras
import numpy as np
import pytest
import references
import tensorflow as tf

from ortho_keras import OrthonormalRegularizer, orthonormality_error


def test_value_and_gradient_equal_the_oracle():
    rng = np.random.default_rng(2)
    for _ in range(40):
        shape = tuple(rng.integers(1, 6, size=rng.integers(2, 6)))  # tall and wide
        axes = [int(axis) for axis in rng.permutation(len(shape))[: rng.integers(1, len(shape))]]
        layouts = ["standard", "transposed", *["depthwise"][: len(shape) - 2], tuple(axes)]
        layout = layouts[rng.integers(len(layouts))]
        kernel = rng.normal(size=shape).astype("float32")
        variable = tf.Variable(kernel)
        with tf.GradientTape() as tape:
            penalty = OrthonormalRegularizer(0.37, layout)(variable)
        expected, gradient = references.penalty_and_gradient(kernel, layout, 0.37)
        assert penalty.shape == () and penalty.dtype == tf.float32
        np.testing.assert_allclose(penalty, expected, rtol=1e-5, atol=1e-6, err_msg=f"{shape} {layout}")
        scale = np.abs(gradient).max()
        found = tape.gradient(penalty, variable)
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-5 * scale, err_msg=f"{shape} {layout}")


def test_second_derivative_equals_finite_differences():
    kernel, direction = np.random.default_rng(4).normal(size=(2, 2, 9))  # wide
    regularizer = OrthonormalRegularizer(0.5)

    @tf.function
    def along(point):
        with tf.GradientTape() as outer:
            outer.watch(point)
            with tf.GradientTape() as inner:
                inner.watch(point)
                penalty = regularizer(point)
            slope = tf.reduce_sum(inner.gradient(penalty, point) * direction)
        return outer.gradient(slope, point)

    above, below = (references.penalty_and_gradient(kernel + h * direction, "standard", 0.5)[1] for h in (1e-5, -1e-5))
    expected = (above - below) / 2e-5
    np.testing.assert_allclose(along(tf.constant(kernel)), expected, atol=1e-6 * np.abs(expected).max())


def test_cases_done_by_hand():
    assert float(OrthonormalRegularizer(3.0)(tf.eye(33))) == 0
    assert float(OrthonormalRegularizer(3.0)(2 * tf.eye(33))) == 3 / 2 * 9 * 33
    # Two groups that use the same filters: orthonormal within each group, identical across.
    one = np.linalg.qr(np.random.default_rng(5).normal(size=(18, 4)))[0].reshape(3, 3, 2, 4).astype("float32")
    kernel = np.concatenate([one, one], axis=-1)
    assert float(OrthonormalRegularizer(1.0, groups=2)(kernel)) < 1e-10
    np.testing.assert_allclose(OrthonormalRegularizer(1.0)(kernel), 0.5 * 8, rtol=1e-5)  # 8 off-diagonal ones


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_kernels_are_computed_in_float32(dtype):
    kernel = tf.cast(np.random.default_rng(7).normal(size=(60, 50)) * 90, dtype)  # squares overflow float16
    penalty = OrthonormalRegularizer(1e-3)(kernel)
    expected = references.penalty_and_gradient(kernel.numpy().astype("float64"), "standard", 1e-3)[0]
    assert penalty.dtype == tf.float32
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def test_wide_kernels_form_only_small_gram_matrices():
    kernel = tf.zeros((1, 1, 4, 1022))
    graph = tf.function(OrthonormalRegularizer(1.0)).get_concrete_function(kernel).graph
    products = [op for op in graph.get_operations() if "MatMul" in op.type]
    assert [product.outputs[0].shape for product in products] == [(255, 4, 4), (2, 2)]


def test_fit_makes_a_kernel_orthonormal():
    layer = keras.layers.Conv2D(8, 3, kernel_regularizer=OrthonormalRegularizer(0.1))
    model = keras.Sequential([keras.Input((5, 5, 2)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    assert orthonormality_error(layer.kernel) > 0.1
    model.fit(np.zeros((200, 5, 5, 2)), np.zeros((200, 3, 3, 8)), batch_size=1, verbose=0)
    assert orthonormality_error(layer.kernel) < 1e-4


def test_wrong_arguments():
    for factor in (-1e-9, float("nan"), "much", None, True):
        with pytest.raises(ValueError, match="`factor` must be a finite number, at least 0. Received: factor="):
            OrthonormalRegularizer(factor)
    regularizer = OrthonormalRegularizer(0.5)
    with pytest.raises(ValueError, match="`factor` must be"):
        regularizer.factor = -1
    assert regularizer.factor == 0.5
    for layout in ("upright", (), [[1], []], [[1], 2], (1.0,), 3, None, (True,)):
        with pytest.raises(ValueError, match="`layout` must be one of"):
            OrthonormalRegularizer(layout=layout)
    with pytest.raises(ValueError, match="`groups` must be an integer, at least 1. Received: groups=0"):
        OrthonormalRegularizer(groups=0)


def test_kernel_that_does_not_fit_the_layout():
    for shape, layout, message in [
        ((3,), "standard", "rank 2 to 5"),
        ((3, 0), "standard", "known shape without empty axes"),
        ((1,) * 6, "standard", "rank 2 to 5"),
        ((3, 3), "depthwise", "at least one input axis"),
        ((3, 3), (0, 1), "at least one input axis"),
        ((3, 3), (2,), "axis out of range for a rank-2 kernel"),
        ((3, 3, 3), (1, -2), "each axis at most once"),
    ]:
        with pytest.raises(ValueError, match=message):
            OrthonormalRegularizer(layout=layout)(tf.zeros(shape))
