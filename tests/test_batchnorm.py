import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import BatchNormalizationEstimator, FusedBatchNormalization, load_model, plain_cnn


def batches_of(*sizes, seed=0):
    """Batches with a mean and a scale of their own, so that a wrong weighting shows."""
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(), rng.uniform(0.5, 3), size=(size, 5, 4, 3)).astype("float32") for size in sizes]


def two_normalizations():
    """Conv-BN-ReLU twice: the second sees what the first makes of each batch."""
    model = keras.Sequential(name="outer")
    model.add(keras.Input((5, 4, 3)))
    for number, momentum in ((1, 0.9), (2, 0.6)):
        model.add(layers.Conv2D(4, 1, name=f"conv{number}"))
        model.add(layers.BatchNormalization(momentum=momentum, epsilon=1e-3, name=f"bn{number}"))
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "kernel":
            weight.assign(rng.uniform(0.5, 1.5, size=weight.shape))
    return model


def statistics(model, batch):
    """Each BN's mean and variance of one batch, in float64."""
    x, found = np.asarray(batch, np.float64), {}
    for number in (1, 2):
        convolution, normalization = model.get_layer(f"conv{number}"), model.get_layer(f"bn{number}")
        variables = (convolution.kernel, convolution.bias, normalization.gamma, normalization.beta)
        kernel, bias, gamma, beta = (np.asarray(v, np.float64) for v in variables)
        x = x @ kernel[0, 0] + bias
        mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
        found[f"bn{number}"] = mean, variance
        x = np.maximum((x - mean) / np.sqrt(variance + 1e-3) * gamma + beta, 0)
    return found


def averages(model):
    found = {name: model.get_layer(name) for name in ("bn1", "bn2")}
    return {name: [bn.moving_mean.numpy(), bn.moving_variance.numpy()] for name, bn in found.items()}


def assert_averages_are_those_of(model, batches):
    found, expected = averages(model), [statistics(model, batch) for batch in batches]
    for name in ("bn1", "bn2"):
        for at in (0, 1):
            np.testing.assert_allclose(found[name][at], np.mean([e[name][at] for e in expected], axis=0), rtol=1e-4, atol=1e-5)


def momenta(model):
    return [layer.momentum for layer in model.layers if isinstance(layer, layers.BatchNormalization)]


@pytest.mark.parametrize("sizes", [(8, 8, 8), (8,), (8, 8, 3), (1, 5, 2)])
def test_averages_equal_the_oracle(sizes):
    model, batches = two_normalizations(), batches_of(*sizes)
    before = averages(model)
    kept = {weight.path: weight.numpy() for weight in model.weights if "moving" not in weight.name}
    assert BatchNormalizationEstimator(model)(batches) is None
    assert_averages_are_those_of(model, batches)
    assert np.abs(averages(model)["bn2"][1] - before["bn2"][1]).max() > 0.1
    assert momenta(model) == [0.9, 0.6]
    for weight in model.weights:
        if weight.path in kept:
            np.testing.assert_array_equal(weight, kept[weight.path])


def test_datasets_and_generators():
    batches = batches_of(4, 4, 2)
    for given in (tf.data.Dataset.from_tensor_slices(np.concatenate(batches)).batch(4), (batch for batch in batches)):
        model = two_normalizations()
        BatchNormalizationEstimator(model)(given)
        assert_averages_are_those_of(model, batches)


def test_again_with_other_weights_and_batches():
    model = two_normalizations()
    estimator = BatchNormalizationEstimator(model)
    for seed in range(3):
        model.get_layer("conv1").kernel.assign(np.random.default_rng(seed).normal(size=(1, 1, 3, 4)))
        batches = batches_of(6, 6, seed=seed)
        estimator(batches)
        assert_averages_are_those_of(model, batches)
        once = averages(model)
        estimator(batches)  # what was before does not count
        for name in once:
            np.testing.assert_array_equal(averages(model)[name], once[name])


def test_averages_that_are_no_numbers_are_replaced():
    model, batches = two_normalizations(), batches_of(8, 8)
    model.get_layer("bn1").moving_mean.assign([np.nan, np.inf, -np.inf, 0])
    model.get_layer("bn2").moving_variance.assign([0, np.nan, np.inf, 3e38])
    BatchNormalizationEstimator(model)(batches)
    assert_averages_are_those_of(model, batches)


def test_outputs_afterwards():
    """A net whose averages are those of one batch treats that batch as in training."""
    model, (batch,) = two_normalizations(), batches_of(16)
    expected = model(batch, training=True)
    assert np.abs(model(batch) - expected).max() > 0.1
    BatchNormalizationEstimator(model)([batch])
    np.testing.assert_allclose(model(batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fitted_before", [False, True])
def test_training_goes_on_with_its_own_momentum(fitted_before):
    model, (batch, other) = two_normalizations(), batches_of(8, 8)
    model.compile(keras.optimizers.SGD(0.0), "mse")
    target = np.zeros((8, 4))
    if fitted_before:
        model.fit(batch, target, verbose=0)
    estimator = BatchNormalizationEstimator(model)
    for _ in range(2):
        estimator([batch])
        before, own = averages(model), statistics(model, other)
        model.train_on_batch(other, target)
        for name, momentum in (("bn1", 0.9), ("bn2", 0.6)):
            for at in (0, 1):
                expected = momentum * before[name][at] + (1 - momentum) * own[name][at]
                np.testing.assert_allclose(averages(model)[name][at], expected, rtol=1e-4, atol=1e-5)


def test_a_batch_that_raises_changes_nothing():
    model = two_normalizations()
    estimator, before = BatchNormalizationEstimator(model), averages(model)

    def stops():
        yield from batches_of(4, 4)
        raise RuntimeError("no more")

    wrong_size = np.zeros((4, 5, 4, 2), "float32")
    for given, error in ((stops(), RuntimeError), ([*batches_of(4), wrong_size], (ValueError, tf.errors.OpError))):
        with pytest.raises(error):
            estimator(given)
        assert momenta(model) == [0.9, 0.6]
        for name in before:
            np.testing.assert_array_equal(averages(model)[name], before[name])
    batches = batches_of(4, 2)
    estimator(batches)  # still works
    assert_averages_are_those_of(model, batches)


def test_no_batch():
    model = two_normalizations()
    before = averages(model)
    for none in ([], iter(()), tf.data.Dataset.from_tensor_slices(batches_of(4)[0]).batch(4).take(0)):
        with pytest.raises(ValueError, match="`batches` must hold at least one batch"):
            BatchNormalizationEstimator(model)(none)
    assert momenta(model) == [0.9, 0.6]
    for name in before:
        np.testing.assert_array_equal(averages(model)[name], before[name])


def test_a_model_without_batch_normalization():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2), layers.LayerNormalization()])
    before = model.get_weights()
    assert BatchNormalizationEstimator(model)([np.ones((2, 3))]) is None
    for weight, kept in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(weight, kept)


def test_nested_models():
    inner = two_normalizations()
    x = keras.Input((5, 4, 3))
    batches = batches_of(4, 3)
    BatchNormalizationEstimator(keras.Model(x, inner(x)))(batches)
    assert_averages_are_those_of(inner, batches)


def test_a_frozen_layer_keeps_its_averages():
    model = two_normalizations()
    model.get_layer("bn2").trainable = False  # Keras runs it in inference mode then
    before = averages(model)["bn2"]
    batches = batches_of(4, 4, 4, 4, 4, 4, 4)
    BatchNormalizationEstimator(model)(batches)
    np.testing.assert_array_equal(averages(model)["bn2"], before)
    expected = np.mean([statistics(model, batch)["bn1"] for batch in batches], axis=0)
    np.testing.assert_allclose(averages(model)["bn1"], expected, rtol=1e-4, atol=1e-5)


def test_optimizer_and_metrics_stay():
    model, batches = two_normalizations(), batches_of(4, 4)
    model.compile("adam", "mse")
    model.fit(batches[0], np.zeros((4, 4)), verbose=0)
    before = [variable.numpy() for variable in (*model.optimizer.variables, *model.metrics_variables)]
    BatchNormalizationEstimator(model)(batches)
    after = [variable.numpy() for variable in (*model.optimizer.variables, *model.metrics_variables)]
    for value, kept in zip(after, before, strict=True):
        np.testing.assert_array_equal(value, kept)


def test_half_precision_averages_are_summed_exactly():
    keras.config.set_dtype_policy("bfloat16")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    batch = np.array([[1, 2, 3], [3, 4, 5]], "float32")  # its means and variances are bfloat16 numbers
    BatchNormalizationEstimator(model)([batch] * 300)
    np.testing.assert_array_equal(model.layers[0].moving_mean, [2, 3, 4])
    np.testing.assert_array_equal(model.layers[0].moving_variance, [1, 1, 1])


def test_replicas(two_replicas):
    strategy = two_replicas
    with strategy.scope():
        model = two_normalizations()
    batches = batches_of(4, 4, 4)
    given = tf.data.Dataset.from_tensor_slices(np.concatenate(batches)).batch(4)
    BatchNormalizationEstimator(model)(strategy.experimental_distribute_dataset(given))
    halves = [half for batch in batches for half in (batch[:2], batch[2:])]  # each replica has its own statistics
    assert_averages_are_those_of(model, halves)
    assert momenta(model) == [0.9, 0.6]


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


def test_fused_averages_are_re_estimated_too():
    model, batches = two_normalizations(), batches_of(4, 6)
    fused = keras.models.clone_model(
        model,
        clone_function=lambda layer: (
            FusedBatchNormalization.from_config(layer.get_config())
            if isinstance(layer, layers.BatchNormalization)
            else type(layer).from_config(layer.get_config())
        ),
    )
    fused.set_weights(model.get_weights())
    BatchNormalizationEstimator(fused)(batches)
    assert_averages_are_those_of(fused, batches)
