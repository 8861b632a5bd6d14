"""ShiftedReLU, and what it claims to be."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras
from ortho_keras import error_growth, shift_for_depth


def test_values_and_gradient_by_hand():
    layer = ortho_keras.ShiftedReLU(1.5)
    x = tf.constant([-3.0, -1.0, 0.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    np.testing.assert_array_equal(y, [-1.5, -1.0, 0.0, 2.0])
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 1, 1, 1])
    np.testing.assert_array_equal(ortho_keras.ShiftedReLU(0)(x), tf.nn.relu(x))


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_gradient_is_that_of_a_maximum(dtype, jit_compile):
    rng = np.random.default_rng(0)
    x, upstream = (tf.constant(rng.normal(size=(4, 5, 6, 3)), dtype) for _ in range(2))
    layer = ortho_keras.ShiftedReLU(0.6, dtype=dtype)

    @tf.function(jit_compile=jit_compile)
    def gradients(x, upstream):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, upstream])
            first = tape.gradient(layer(x), x, upstream)
            total = tf.reduce_sum(first)
        return first, tape.gradient(total, upstream)

    first, second = (np.asarray(tf.cast(g, tf.float64)) for g in gradients(x, upstream))
    passes = np.asarray(tf.cast(x, tf.float64)) > -0.6
    np.testing.assert_array_equal(first, np.where(passes, tf.cast(upstream, tf.float64), 0.0))
    np.testing.assert_array_equal(second, passes)


def test_it_is_a_relu_net_with_another_border():
    # max(x, -s) before a zero-padded convolution and BN = relu(x + s) before the same convolution padded with s, and BN.
    rng = np.random.default_rng(0)
    x = tf.constant(rng.normal(size=(4, 6, 6, 3)), tf.float32)
    convolution = keras.layers.Conv2D(5, 3, padding="same", use_bias=False)
    inner = keras.layers.Conv2D(5, 3, padding="valid", use_bias=False)
    shifted = convolution(ortho_keras.ShiftedReLU(0.7)(x))
    inner.build((None, 8, 8, 3))
    inner.kernel.assign(convolution.kernel)
    relu = inner(tf.pad(tf.nn.relu(x + 0.7), [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=0.7))
    normalized = [keras.layers.BatchNormalization()(h, training=True) for h in (shifted, relu)]
    np.testing.assert_allclose(*normalized, atol=1e-5)


@pytest.mark.parametrize("shift", [0.0, 0.5, 1.0, 2.0, 3.0])
def test_error_growth_is_that_of_a_wide_dense_net(shift):
    # One layer's rule, sampled: the variance of the next pre-activation, and the share of the error that passes.
    z = np.random.default_rng(0).normal(size=4_000_000)
    expected = np.sqrt(np.mean(z > -shift) / np.var(np.maximum(z, -shift)))
    assert error_growth(shift) == pytest.approx(expected, rel=1e-3)


def test_error_growth_is_what_backpropagation_finds():
    width, depth, shift = 256, 20, 0.5
    layers = [keras.Input((width,))]
    for _ in range(depth):
        kernel = ortho_keras.OrthonormalInitializer(seed=len(layers))
        dense = keras.layers.Dense(width, use_bias=False, kernel_initializer=kernel)
        layers += [dense, keras.layers.BatchNormalization(), ortho_keras.ShiftedReLU(shift)]
    model = keras.Sequential([*layers, keras.layers.Dense(10)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(512, width)).astype("float32"), rng.integers(10, size=512)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = ortho_keras.signal_report(model, x, y, loss, singular_values=False)
    errors = [math.sqrt(layer.backward_moment) for layer in report.layers[1:-2]]
    growth = (errors[0] / errors[-1]) ** (1 / (len(errors) - 1))
    assert growth == pytest.approx(error_growth(shift), rel=0.01)


def test_shift_for_depth():
    assert error_growth(0) == pytest.approx(math.sqrt(math.pi / (math.pi - 1)))
    assert shift_for_depth(1) == shift_for_depth(5) == 0  # 1.211^5 = 2.6
    shifts = [shift_for_depth(depth) for depth in (8, 20, 44, 110, 1004, 10**6)]
    assert shifts == sorted(shifts) and len(set(shifts)) == 6
    for depth, shift in zip((8, 20, 44, 110, 1004), shifts):
        assert error_growth(shift) ** depth == pytest.approx(3)
    assert shift_for_depth(44, growth=2) > shift_for_depth(44)
    model = ortho_keras.plain_cnn(44, (8, 8, 1), width=2, relu_shift="auto")
    assert {layer.shift for layer in model.layers if isinstance(layer, ortho_keras.ShiftedReLU)} == {shift_for_depth(44)}
    with pytest.raises(ValueError, match="`growth` must be above 1. Received: growth=1"):
        shift_for_depth(44, growth=1)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_net_with_it_saves_and_loads(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    model = ortho_keras.plain_cnn(8, (8, 8, 1), relu_shift=2.0, seed=0)
    model.save(tmp_path / "model.keras")
    loaded = ortho_keras.load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype("float32")
    np.testing.assert_array_equal(model(x), loaded(x))
    assert {layer.shift for layer in loaded.layers if isinstance(layer, ortho_keras.ShiftedReLU)} == {2.0}
    assert not any(isinstance(layer, keras.layers.ReLU) for layer in loaded.layers)


@pytest.mark.parametrize("shift", [-1, float("nan"), float("inf"), True, "1", None])
def test_a_wrong_shift(shift):
    with pytest.raises(ValueError, match="`shift` must be a finite number, at least 0. Received: shift="):
        ortho_keras.ShiftedReLU(shift)
    with pytest.raises(ValueError, match="`relu_shift` must be a finite number, at least 0. Received: relu_shift="):
        ortho_keras.plain_cnn(8, relu_shift=shift)
