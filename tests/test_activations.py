"""ShiftedReLU, and what it claims to be."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras


def test_values_and_gradient_by_hand():
    layer = ortho_keras.ShiftedReLU(1.5)
    x = tf.constant([-3.0, -1.0, 0.0, 2.0])
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x)
    np.testing.assert_array_equal(y, [-1.5, -1.0, 0.0, 2.0])
    np.testing.assert_array_equal(tape.gradient(y, x), [0, 1, 1, 1])
    np.testing.assert_array_equal(ortho_keras.ShiftedReLU(0)(x), tf.nn.relu(x))


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
