"""FusedBatchNormalization against a float64 oracle and against Keras's own layer."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import FusedBatchNormalization

SHAPE = (4, 3, 3, 3)


def built(shape=SHAPE, dtype="float32", kind=FusedBatchNormalization, **arguments):
    """A layer whose variables are drawn at random."""
    layer = kind(momentum=0.7, epsilon=1e-3, dtype=dtype, **arguments)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(0)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 2, size=weight.shape))
    return layer


def outcome(layer, x, cotangent, training=True, **arguments):
    """Output, gradients of the input and of the trainable variables, and the averages, each a float64 array."""
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, training=training, **arguments)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) * cotangent)
    gradients = tape.gradient(loss, [x, *(v.value for v in layer.trainable_variables)])
    return [np.asarray(tf.cast(v, tf.float64)) for v in (y, *gradients, layer.moving_mean, layer.moving_variance)]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (1, 3, 1, 1), (1, 1, 1, 4)])
def test_training_equals_the_oracle(shape):
    rng = np.random.default_rng(4)
    x, cotangent = rng.normal(1.5, 2, size=shape).astype("float32").astype("float64"), rng.normal(size=shape)
    layer = built(shape)
    gamma, beta, old_mean, old_variance = (np.asarray(v, np.float64) for v in layer.weights)
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    sigma, m = np.sqrt(variance + 1e-3), x[..., 0].size
    normal = (x - mean) / sigma
    by_gamma, by_beta = (cotangent * normal).sum((0, 1, 2)), cotangent.sum((0, 1, 2))
    expected = [
        normal * gamma + beta,
        gamma / sigma * (cotangent - (by_beta + normal * by_gamma) / m),
        by_gamma,
        by_beta,
        0.7 * old_mean + 0.3 * mean,
        0.7 * old_variance + 0.3 * variance,
    ]
    for found, wanted in zip(outcome(layer, tf.constant(x, tf.float32), cotangent), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-4 if m > 1 else 1e-3)


@pytest.mark.parametrize(("shape", "gpu"), [((6, 5, 4, 3), False), ((1, 1, 1, 4), True)])
def test_averages_where_shapes_are_unknown_and_a_gpu_returns_nan(shape, gpu, monkeypatch):
    operation = tf.raw_ops.FusedBatchNormV3

    def as_on_a_gpu(**arguments):  # NVIDIA's (cuDNN 9.19, an H100): the unbiased variance of one value is 0 / 0
        outputs, mean, variance, *rest = operation(**arguments)
        return outputs, mean, variance * np.nan if gpu else variance, *rest

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", as_on_a_gpu)
    x, layer = np.random.default_rng(8).normal(1.5, 2, size=shape), built(shape)
    expected = [0.7 * np.asarray(v) + 0.3 * f(x, (0, 1, 2)) for v, f in zip(layer.weights[2:], (np.mean, np.var))]
    signature = [tf.TensorSpec((None, None, None, shape[-1]), tf.float32)]
    tf.function(lambda inputs: layer(inputs, training=True), signature)(x.astype("float32"))
    np.testing.assert_allclose([layer.moving_mean, layer.moving_variance], expected, rtol=1e-5)


def test_an_empty_batch_changes_nothing():
    layer = built()
    before = layer.get_weights()
    _, _, by_gamma, by_beta, *after = outcome(layer, tf.zeros((0, *SHAPE[1:])), np.zeros((0, *SHAPE[1:])))
    np.testing.assert_array_equal([by_gamma, by_beta], np.zeros((2, 3)))
    np.testing.assert_array_equal(after, before[2:])


def fused_operations(layer, x, **arguments):
    """How many fused operations one training call of a layer is made of."""
    traced = tf.function(lambda: layer(x, training=True, **arguments)).get_concrete_function()
    return sum(operation.type == "FusedBatchNormV3" for operation in traced.graph.get_operations())


@pytest.mark.gpu
@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("arguments", [{}, {"scale": False}, {"center": False}, {"axis": 3}])
def test_one_operation_equals_keras_own_layer_up_to_rounding(policy, arguments):
    rng = np.random.default_rng(5)
    x = tf.constant(rng.normal(-1, 3, size=SHAPE), keras.DTypePolicy(policy).compute_dtype)
    cotangent = rng.normal(size=SHAPE)
    tolerance = 1e-5 if policy == "float32" else 1e-2  # one rounding of a half-precision output
    for training in (True, False):
        own, keras_own = (
            built(SHAPE, policy, kind, **arguments) for kind in (FusedBatchNormalization, layers.BatchNormalization)
        )
        assert fused_operations(built(SHAPE, policy, **arguments), x) == 1 and own(x).dtype == x.dtype
        found, wanted = (outcome(layer, x, cotangent, training) for layer in (own, keras_own))
        for mine, other in zip(found, wanted, strict=True):
            np.testing.assert_allclose(mine, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("shape", "policy", "input_type", "arguments"),
    [
        (SHAPE, "float32", "float32", {"axis": 1}),
        (SHAPE, "float32", "float32", {"renorm": True}),
        (SHAPE, "float32", "float32", {"synchronized": True}),
        (SHAPE, "float64", "float64", {}),
        (SHAPE, "bfloat16", "bfloat16", {}),
        (SHAPE, "float32", "float64", {"autocast": False}),
        (SHAPE, "mixed_bfloat16", "float32", {"autocast": False}),
        ((8, 3), "float32", "float32", {}),
        ((2, 2, 2, 2, 3), "float32", "float32", {}),
    ],
)
def test_everything_else_is_left_to_keras(shape, policy, input_type, arguments):
    rng = np.random.default_rng(6)
    x, cotangent = tf.constant(rng.normal(size=shape), input_type), rng.normal(size=shape)
    assert fused_operations(built(shape, policy, **arguments), x) == 0
    own, keras_own = (
        outcome(built(shape, policy, kind, **arguments), x, cotangent)
        for kind in (FusedBatchNormalization, layers.BatchNormalization)
    )
    for found, wanted in zip(own, keras_own, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_mask_is_left_to_keras():
    mask = np.array([1, 1, 1, 0], bool)[:, None, None] & np.ones(SHAPE[:3], bool)
    assert fused_operations(built(), tf.ones(SHAPE), mask=mask) == 0


def test_a_frozen_layer_uses_and_keeps_its_averages():
    layer = built()
    layer.trainable = False
    before = gamma, beta, mean, variance = [w.numpy() for w in layer.weights]
    x = np.random.default_rng(7).normal(size=SHAPE).astype("float32")
    expected = (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta
    np.testing.assert_allclose(layer(x, training=True), expected, rtol=1e-5, atol=1e-5)
    for weight, value in zip(layer.weights, before):
        np.testing.assert_array_equal(weight, value)
