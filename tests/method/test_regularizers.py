import keras
import numpy as np
import pytest
import references
import tensorflow as tf

from ortho_keras import OrthonormalRegularizer, orthonormality_error

CASES = [
    ((7, 3), "standard"),
    ((5, 5), "standard"),
    ((3, 8), "standard"),  # wide: 3 + 3 + 2
    ((3, 9), "standard"),  # wide without a remainder
    ((1, 4), "standard"),
    ((3, 2, 9), "standard"),
    ((3, 3, 4, 6), "standard"),
    ((1, 1, 4, 19), "standard"),
    ((2, 3, 2, 2, 5), "standard"),
    ((6, 4), "transposed"),
    ((3, 9, 2), "transposed"),
    ((3, 3, 6, 2), "transposed"),
    ((1, 1, 7, 3), "transposed"),
    ((2, 2, 2, 3, 4), "transposed"),
    ((5, 3, 2), "depthwise"),
    ((3, 3, 4, 1), "depthwise"),
    ((1, 2, 3, 5), "depthwise"),  # wide
    ((4, 2, 3), (1, 2)),
    ((2, 3, 4), (2,)),
    ((2, 7, 2, 2), (1, -1)),
]


@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_value_and_gradient_equal_the_oracle(shape, layout):
    kernel = np.random.default_rng(1).normal(size=shape).astype("float32")
    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        penalty = OrthonormalRegularizer(0.37, layout)(variable)
    gradient = tape.gradient(penalty, variable)
    expected, expected_gradient = references.penalty_and_gradient(kernel, layout, 0.37)
    assert penalty.shape == () and penalty.dtype == tf.float32
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)
    scale = np.abs(expected_gradient).max()
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-5 * scale)


def test_random_shapes_equal_the_oracle():
    rng = np.random.default_rng(2)
    for _ in range(60):
        rank = rng.integers(2, 6)
        layouts = ["standard", "transposed", *(["depthwise"] if rank > 2 else []), (int(rng.integers(rank)),)]
        layout = layouts[rng.integers(len(layouts))]
        kernel = rng.normal(size=rng.integers(1, 6, size=rank))
        penalty = OrthonormalRegularizer(1.0, layout)(tf.constant(kernel, tf.float32))
        np.testing.assert_allclose(penalty, references.penalty_and_gradient(kernel, layout, 1.0)[0], rtol=1e-5, atol=1e-6)


def test_gradient_equals_finite_differences():
    kernel = np.random.default_rng(3).normal(size=(2, 2, 3, 17))  # wide
    regularizer = OrthonormalRegularizer(0.5)
    variable = tf.Variable(kernel)  # float64 stays float64
    with tf.GradientTape() as tape:
        penalty = regularizer(variable)
    gradient = tape.gradient(penalty, variable).numpy()
    direction = np.random.default_rng(4).normal(size=kernel.shape)
    ahead, behind = (float(regularizer(tf.constant(kernel + s * 1e-5 * direction))) for s in (1, -1))
    np.testing.assert_allclose((ahead - behind) / 2e-5, np.sum(gradient * direction), rtol=1e-7)


@pytest.mark.parametrize("shape", [(3, 3, 2, 7), (2, 9)])  # the second is wide
@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivative_equals_finite_differences(shape, compiled):
    rng = np.random.default_rng(4)
    kernel, direction = rng.normal(size=shape), rng.normal(size=shape)
    regularizer = OrthonormalRegularizer(0.5)

    def along(point):
        with tf.GradientTape() as outer:
            outer.watch(point)
            with tf.GradientTape() as inner:
                inner.watch(point)
                penalty = regularizer(point)
            slope = tf.reduce_sum(inner.gradient(penalty, point) * direction)
        return outer.gradient(slope, point)

    found = (tf.function(along) if compiled else along)(tf.constant(kernel))
    above, below = (references.penalty_and_gradient(kernel + h * direction, "standard", 0.5)[1] for h in (1e-5, -1e-5))
    expected = (above - below) / 2e-5
    np.testing.assert_allclose(found, expected, atol=1e-6 * np.abs(expected).max())


@pytest.mark.parametrize("size", [1, 4, 33])
def test_cases_done_by_hand(size):
    assert float(OrthonormalRegularizer(3.0)(tf.eye(size))) == 0
    assert float(OrthonormalRegularizer(3.0)(2 * tf.eye(size))) == 3 / 2 * 9 * size


def test_grouped_convolution_is_one_matrix_a_group():
    # Two groups that use the same filters: orthonormal within each group, identical across.
    one = np.linalg.qr(np.random.default_rng(5).normal(size=(18, 4)))[0].reshape(3, 3, 2, 4).astype("float32")
    kernel = np.concatenate([one, one], axis=-1)
    assert float(OrthonormalRegularizer(1.0, groups=2)(kernel)) < 1e-10
    np.testing.assert_allclose(OrthonormalRegularizer(1.0)(kernel), 0.5 * 8, rtol=1e-5)  # 8 off-diagonal ones


def test_shared_axes_are_one_matrix_each():
    kernel = np.random.default_rng(6).normal(size=(3, 5, 4)).astype("float32")
    together = OrthonormalRegularizer(1.0, ((0,), (2,)))(kernel)
    apart = sum(references.penalty_and_gradient(kernel[i], "standard", 1.0)[0] for i in range(3))
    np.testing.assert_allclose(together, apart, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_kernels_are_computed_in_float32(dtype):
    kernel = tf.cast(np.random.default_rng(7).normal(size=(300, 200)) * 40, dtype)  # squares overflow float16
    penalty = OrthonormalRegularizer(1e-3)(kernel)
    expected = references.penalty_and_gradient(kernel.numpy().astype("float64"), "standard", 1e-3)[0]
    assert penalty.dtype == tf.float32
    np.testing.assert_allclose(penalty, expected, rtol=1e-5)


def test_wide_kernels_form_only_small_gram_matrices():
    kernel = tf.zeros((1, 1, 4, 1022))
    graph = tf.function(OrthonormalRegularizer(1.0)).get_concrete_function(kernel).graph
    products = [op for op in graph.get_operations() if "MatMul" in op.type]
    multiply_adds = 0
    for product in products:
        columns, f_in = product.outputs[0].shape[-1], product.inputs[0].shape[-2]
        multiply_adds += np.prod(product.outputs[0].shape[:-2]) * f_in * columns**2
    assert products and multiply_adds <= 4 * 1022 * 4


def test_factor_changes_without_retracing():
    regularizer = OrthonormalRegularizer(1.0)
    traces = []

    @tf.function
    def penalty(kernel):
        traces.append(1)
        return regularizer(kernel)

    kernel = 2 * tf.eye(4)
    assert float(penalty(kernel)) == 18
    regularizer.factor = 0.5
    assert float(penalty(kernel)) == 9
    assert len(traces) == 1 and regularizer.get_config()["factor"] == 0.5


def test_a_callback_warms_the_factor_up_during_fit():
    regularizer = OrthonormalRegularizer(0.0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, kernel_regularizer=regularizer)])
    model.compile(keras.optimizers.SGD(0.0), "mse")

    class WarmUp(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            regularizer.factor = float(epoch)

    kernel = model.layers[0].kernel.numpy()
    model.layers[0].kernel.assign(kernel * 3)
    x = np.zeros((8, 4), "float32")  # outputs and targets are 0, so the loss is the penalty
    losses = model.fit(x, np.zeros((8, 3)), epochs=3, verbose=0, callbacks=[WarmUp()]).history["loss"]
    unit = references.penalty_and_gradient(kernel * 3, "standard", 1.0)[0]
    np.testing.assert_allclose(losses, [0, unit, 2 * unit], rtol=1e-5)


def test_fit_makes_a_kernel_orthonormal():
    layer = keras.layers.Conv2D(8, 3, kernel_regularizer=OrthonormalRegularizer(0.1))
    model = keras.Sequential([keras.Input((5, 5, 2)), layer])
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = np.zeros((4, 5, 5, 2), "float32")
    assert orthonormality_error(layer.kernel) > 0.1
    model.fit(x, np.zeros((4, 3, 3, 8)), epochs=200, verbose=0)
    assert orthonormality_error(layer.kernel) < 1e-4


@pytest.mark.parametrize("layout", ["standard", "transposed", (1, 2), ((0,), (2,))])
def test_survives_a_saved_model(tmp_path, layout):
    layer = keras.layers.EinsumDense("abc,cde->abde", (None, 3, 2), kernel_regularizer=OrthonormalRegularizer(0.25, layout))
    model = keras.Sequential([keras.Input((6, 4)), layer])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    regularizer = loaded.layers[0].kernel_regularizer
    assert type(regularizer) is OrthonormalRegularizer
    assert (regularizer.factor, regularizer.layout, regularizer.groups) == (0.25, layout, 1)
    assert float(loaded.losses[0]) == float(model.losses[0])


@pytest.mark.parametrize("factor", [-1e-9, float("nan"), float("inf"), "much", None])
def test_wrong_factor(factor):
    with pytest.raises(ValueError, match="`factor` must be a finite number, at least 0. Received: factor="):
        OrthonormalRegularizer(factor)
    regularizer = OrthonormalRegularizer(0.5)
    with pytest.raises(ValueError, match="`factor` must be"):
        regularizer.factor = factor
    assert regularizer.factor == 0.5


@pytest.mark.parametrize("layout", ["upright", (), [[1], []], (1.0,), 3, None, (True,)])
def test_wrong_layout(layout):
    with pytest.raises(ValueError, match="`layout` must be one of"):
        OrthonormalRegularizer(layout=layout)


@pytest.mark.parametrize(
    ("shape", "layout", "message"),
    [
        ((3,), "standard", "rank 2 to 5"),
        ((1,) * 6, "standard", "rank 2 to 5"),
        ((3, 3), "depthwise", "at least one input axis"),
        ((3, 3), (0, 1), "at least one input axis"),
        ((3, 3), (2,), "names an axis"),
        ((3, 3, 3), (1, -2), "each axis once"),
    ],
)
def test_kernel_that_does_not_fit_the_layout(shape, layout, message):
    with pytest.raises(ValueError, match=message):
        OrthonormalRegularizer(layout=layout)(tf.zeros(shape))
