import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import FusedBatchNormalization, load_model, plain_cnn


def fused_layer(shape, dtype="float32", seed=0, kind=FusedBatchNormalization, **arguments):
    """A built layer whose variables are drawn at random."""
    layer = kind(momentum=0.7, epsilon=1e-3, dtype=dtype, **arguments)
    layer.build((None, *shape[1:]))
    rng = np.random.default_rng(seed)
    for weight in layer.weights:
        weight.assign(rng.uniform(0.5, 2, size=weight.shape))
    return layer


def outcome(layer, x, cotangent, training=True):
    """Output, gradients of the input and of the trainable variables, and the averages, each a float64 array."""
    with tf.GradientTape() as tape:
        inputs = tf.cast(x, layer.compute_dtype)
        tape.watch(inputs)
        y = layer(inputs, training=training)
        loss = tf.reduce_sum(tf.cast(y, tf.float64) * cotangent)
    gradients = tape.gradient(loss, [inputs, *(v.value for v in layer.trainable_variables)])
    assert y.dtype == layer.compute_dtype
    return [np.asarray(tf.cast(v, tf.float64)) for v in (y, *gradients, layer.moving_mean, layer.moving_variance)]


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (2, 1, 1, 7), (1, 3, 1, 1), (1, 1, 1, 4)])
def test_fused_training_equals_the_oracle(shape):
    rng = np.random.default_rng(4)
    x, cotangent = rng.normal(1.5, 2, size=shape).astype("float32").astype("float64"), rng.normal(size=shape)
    layer = fused_layer(shape)
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
    for found, wanted in zip(outcome(layer, x, cotangent), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=2e-4 if m > 1 else 1e-3)


@pytest.mark.parametrize("known", [True, False])
def test_fused_averages_are_finite_where_a_gpu_gives_none(known, monkeypatch):
    operation = tf.raw_ops.FusedBatchNormV3

    def as_on_a_gpu(**arguments):  # NVIDIA's (cuDNN 9.19, an H100): the unbiased variance of one value is 0 / 0
        outputs, mean, variance, *rest = operation(**arguments)
        return outputs, mean, variance * np.nan, *rest

    monkeypatch.setattr(tf.raw_ops, "FusedBatchNormV3", as_on_a_gpu)
    layer = fused_layer((1, 1, 1, 4))
    before = np.asarray(layer.moving_variance)
    signature = [tf.TensorSpec((1, 1, 1, 4) if known else (None, None, None, 4), tf.float32)]
    tf.function(lambda inputs: layer(inputs, training=True), signature)(np.float32([[[[1, 2, 3, 4]]]]))
    np.testing.assert_allclose(layer.moving_variance, 0.7 * before, rtol=1e-6)


@pytest.mark.parametrize("shape", [(6, 5, 4, 3), (1, 1, 1, 4)])
def test_fused_averages_are_the_same_where_shapes_are_not_known(shape):
    x = np.random.default_rng(8).normal(1.5, 2, size=shape).astype("float32")
    layer, expected = fused_layer(shape), fused_layer(shape)
    signature = [tf.TensorSpec((None, None, None, shape[-1]), tf.float32)]
    tf.function(lambda inputs: layer(inputs, training=True), signature)(x)
    expected(x, training=True)
    for found, wanted in zip(layer.weights, expected.weights, strict=True):
        np.testing.assert_allclose(found.numpy(), wanted.numpy(), rtol=1e-6, atol=1e-6)


POLICIES = ["float32", "mixed_bfloat16", "mixed_float16", "float64", "float16", "bfloat16"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("arguments", [{}, {"scale": False}, {"center": False}, {"axis": 3}, {"axis": 1}, {"renorm": True}])
@pytest.mark.parametrize("training", [True, False])
def test_fused_is_keras_own_layer_up_to_rounding(policy, arguments, training):
    shape = (4, 3, 3, 3)
    rng = np.random.default_rng(5)
    x, cotangent = rng.normal(-1, 3, size=shape), rng.normal(size=shape)
    own = outcome(fused_layer(shape, policy, **arguments), x, cotangent, training)
    keras_own = outcome(fused_layer(shape, policy, kind=layers.BatchNormalization, **arguments), x, cotangent, training)
    tolerance = {"float32": 1e-5, "float64": 1e-12}.get(policy, 1e-2)  # one rounding of a half-precision output
    for found, wanted in zip(own, keras_own, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=tolerance, atol=tolerance)


def fused_operations(layer, x, **arguments):
    """How many fused operations one training call of a layer is made of."""
    traced = tf.function(lambda: layer(x, training=True, **arguments)).get_concrete_function()
    return sum(operation.type == "FusedBatchNormV3" for operation in traced.graph.get_operations())


@pytest.mark.parametrize("policy", POLICIES)
def test_fused_is_one_operation_where_it_can_be(policy):
    shape = (4, 3, 3, 2)
    x = tf.ones(shape, keras.DTypePolicy(policy).compute_dtype)
    covered = policy in ("float32", "mixed_bfloat16", "mixed_float16")
    for arguments in ({}, {"axis": 3}, {"scale": False}, {"center": False}):
        assert fused_operations(fused_layer(shape, policy, **arguments), x) == covered
    for arguments in ({"axis": 1}, {"renorm": True}, {"synchronized": True}):
        assert fused_operations(fused_layer(shape, policy, **arguments), x) == 0


def test_fused_leaves_masks_and_other_types_to_keras():
    shape = (4, 3, 3, 2)
    x, mask = (
        np.random.default_rng(9).normal(size=shape),
        np.array([1, 1, 1, 0], bool)[:, None, None] & np.ones(shape[:3], bool),
    )
    assert fused_operations(fused_layer(shape), tf.constant(x, "float32"), mask=mask) == 0
    for layer_type, input_type in (("float64", "float32"), ("float32", "float64"), ("mixed_bfloat16", "float32")):
        given = tf.constant(x, input_type)
        own, keras_own = (
            fused_layer(shape, layer_type, kind=kind, autocast=False)(given, training=True)
            for kind in (FusedBatchNormalization, layers.BatchNormalization)
        )
        assert own.dtype == keras_own.dtype
        np.testing.assert_array_equal(tf.cast(own, "float64"), tf.cast(keras_own, "float64"))


@pytest.mark.parametrize("shape", [(8, 3), (8, 5, 3), (2, 2, 2, 2, 3)])
def test_fused_takes_inputs_of_any_rank(shape):
    x = np.random.default_rng(6).normal(size=shape)
    own, keras_own = (
        outcome(fused_layer(shape, kind=kind), x, x) for kind in (FusedBatchNormalization, layers.BatchNormalization)
    )
    for found, wanted in zip(own, keras_own, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_fused_leaves_a_frozen_layer_as_it_is():
    layer = fused_layer((4, 3, 3, 2))
    layer.trainable = False
    before = [w.numpy() for w in layer.weights]
    x = np.random.default_rng(7).normal(size=(4, 3, 3, 2)).astype("float32")
    gamma, beta, mean, variance = before
    np.testing.assert_allclose(
        layer(x, training=True), (x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, rtol=1e-5, atol=1e-5
    )
    for weight, value in zip(layer.weights, before):
        np.testing.assert_array_equal(weight, value)


def test_fused_survives_a_file_and_is_what_the_networks_use(tmp_path):
    model = plain_cnn(8, (6, 6, 1), 3, width=4, seed=0)
    assert sum(type(layer) is FusedBatchNormalization for layer in model.layers) == 7
    x = np.random.default_rng(8).normal(size=(4, 6, 6, 1)).astype("float32")
    for _ in range(3):
        model(x, training=True)
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    assert sum(type(layer) is FusedBatchNormalization for layer in loaded.layers) == 7
    np.testing.assert_array_equal(loaded(x), model(x))
