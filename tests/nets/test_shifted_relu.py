"""ShiftedReLU, the gradient's growth in theory and in a network, and the shift for a depth."""

import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import OrthonormalInitializer, ShiftedReLU, error_growth, plain_cnn, shift_for_depth, signal_report


def test_values_by_hand():
    x = tf.constant([-3.0, -1.5, 0.0, 2.0])
    np.testing.assert_array_equal(ShiftedReLU(1.5)(x), [-1.5, -1.5, 0.0, 2.0])
    np.testing.assert_array_equal(ShiftedReLU(0)(x), tf.nn.relu(x))


@pytest.mark.parametrize(
    ("dtype", "jit_compile"), [("float16", False), ("bfloat16", False), ("float32", True), ("float64", False)]
)
def test_first_and_second_order_gradients_are_those_of_a_maximum(dtype, jit_compile):
    rng = np.random.default_rng(0)
    x, upstream = (tf.constant(np.append(rng.normal(size=40), -0.5), dtype) for _ in range(2))
    layer = ShiftedReLU(0.5, dtype=dtype)

    @tf.function(jit_compile=jit_compile)
    def gradients(x, upstream):
        with tf.GradientTape(persistent=True) as tape:
            tape.watch([x, upstream])
            first = tape.gradient(layer(x), x, upstream)
            total = tf.reduce_sum(first)
        return first, tape.gradient(total, upstream)

    first, second = (np.asarray(tf.cast(g, tf.float64)) for g in gradients(x, upstream))
    passes = np.asarray(tf.cast(x, tf.float64)) > -0.5  # at the corner the gradient is 0
    np.testing.assert_array_equal(first, np.where(passes, tf.cast(upstream, tf.float64), 0.0))
    np.testing.assert_array_equal(second, passes)


def test_it_is_a_relu_network_with_another_border():
    # max(x, -s) before a zero-padded convolution and BN = relu(x + s) before the same convolution padded with s, and BN.
    x = tf.constant(np.random.default_rng(0).normal(size=(4, 6, 6, 3)), tf.float32)
    convolution, inner = (layers.Conv2D(5, 3, padding=padding, use_bias=False) for padding in ("same", "valid"))
    shifted = convolution(ShiftedReLU(0.7)(x))
    inner.build((None, 8, 8, 3))
    inner.kernel.assign(convolution.kernel)
    relu = inner(tf.pad(tf.nn.relu(x + 0.7), [[0, 0], [1, 1], [1, 1], [0, 0]], constant_values=0.7))
    normalized = [layers.BatchNormalization()(h, training=True) for h in (shifted, relu)]
    np.testing.assert_allclose(*normalized, atol=1e-5)


def test_error_growth_is_that_of_sampled_preactivations():
    z = np.random.default_rng(0).normal(size=2_000_000)
    for shift in (0.0, 0.5, 1.0, 3.0):
        expected = np.sqrt(np.mean(z > -shift) / np.var(np.maximum(z, -shift)))
        assert error_growth(shift) == pytest.approx(expected, rel=2e-3)
    assert error_growth(0) == pytest.approx(math.sqrt(math.pi / (math.pi - 1)))


def test_error_growth_is_what_backpropagation_finds():
    width, shift, net = 256, 0.5, []
    for seed in range(12):
        dense = layers.Dense(width, use_bias=False, kernel_initializer=OrthonormalInitializer(seed=seed))
        net += [dense, layers.BatchNormalization(), ShiftedReLU(shift)]
    model = keras.Sequential([keras.Input((width,)), *net, layers.Dense(10)])
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(512, width)).astype("float32"), rng.integers(10, size=512)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    report = signal_report(model, x, y, loss, singular_values=False)
    errors = [math.sqrt(layer.backward_moment) for layer in report.layers[1:-2]]
    growth = (errors[0] / errors[-1]) ** (1 / (len(errors) - 1))
    assert growth == pytest.approx(error_growth(shift), rel=0.01)


def test_shift_for_depth():
    assert shift_for_depth(1) == shift_for_depth(5) == 0  # 1.211^5 = 2.6
    depths = (8, 20, 44, 110, 1004, 10**6)
    shifts = [shift_for_depth(depth) for depth in depths]
    assert shifts == sorted(set(shifts))
    for depth, shift in zip(depths[:5], shifts):
        assert error_growth(shift) ** depth == pytest.approx(3)
    assert shift_for_depth(44, growth=2) > shift_for_depth(44)
    model = plain_cnn(14, (8, 8, 1), width=2, relu_shift="auto")
    assert {layer.shift for layer in model.layers if isinstance(layer, ShiftedReLU)} == {shift_for_depth(14)}


def test_arguments_out_of_range():
    for shift in (-1, math.nan, True, "1", None):
        for function in (ShiftedReLU, error_growth):
            with pytest.raises(ValueError, match="`shift` must be a finite number, at least 0. Received: shift="):
                function(shift)
    with pytest.raises(ValueError, match="`growth` must be a finite number, above 1. Received: growth=1"):
        shift_for_depth(44, growth=1)
    with pytest.raises(ValueError, match="`depth` must be an integer, at least 1. Received: depth=0"):
        shift_for_depth(0)
