import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import BatchNormalizationEstimator, FusedBatchNormalization


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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            np.zeros((4, 4, 4, 2), "float32"),
            r"`batches` must be what the model takes. Received: one of shape \(4, 4, 2\) \(",
        ),
        (
            [np.zeros((4, 4, 4, 9), "float32")],
            r"`batches` must be what the model takes. Received: one of shape \(4, 4, 4, 9\) \(",
        ),
    ],
)
def test_what_is_no_list_of_batches_is_told(given, told):
    model = two_normalizations()
    before = averages(model)
    with pytest.raises(ValueError, match=told):
        BatchNormalizationEstimator(model)(given)
    for name in before:
        np.testing.assert_array_equal(averages(model)[name], before[name])


def test_a_stacked_array_of_batches_and_what_is_no_fault_of_the_batch():
    x = np.random.default_rng(0).normal(size=(5, 16, 4)).astype("float32")
    model = keras.Sequential([keras.Input((4,)), keras.layers.BatchNormalization()])
    estimator = BatchNormalizationEstimator(model)
    estimator(x)
    np.testing.assert_allclose(model.layers[0].moving_mean, x.mean((0, 1)), atol=1e-5)

    def lost(images):
        raise tf.errors.UnavailableError(None, None, "a device went away")

    estimator._observe = lost
    with pytest.raises(tf.errors.UnavailableError):
        estimator(x)


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


class FrozenBackbone(keras.Model):
    def __init__(self):
        super().__init__()
        self.below, self.frozen, self.trained = layers.Dense(4), layers.BatchNormalization(), layers.BatchNormalization()

    def call(self, x, training=None):
        return self.trained(self.frozen(self.below(x), training=False), training=training)


def test_a_layer_called_in_inference_mode_keeps_its_averages():
    model, x = FrozenBackbone(), np.random.default_rng(0).normal(3, 2, (64, 3)).astype("float32")
    model(x)
    kept = [np.array([1.0, 2, 3, 4], "float32"), np.array([4.0, 3, 2, 1], "float32")]
    for variable, value in zip((model.frozen.moving_mean, model.frozen.moving_variance), kept):
        variable.assign(value)
    BatchNormalizationEstimator(model)([x] * 3)
    np.testing.assert_array_equal([model.frozen.moving_mean, model.frozen.moving_variance], kept)
    kernel, bias = (np.asarray(v, np.float64) for v in (model.below.kernel, model.below.bias))
    through = (x @ kernel + bias - kept[0]) / np.sqrt(kept[1] + 1e-3)
    np.testing.assert_allclose(model.trained.moving_mean, through.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.trained.moving_variance, through.var(0), rtol=1e-4)


def test_a_layer_that_is_called_several_times_gets_the_mean_over_its_calls():
    shared = layers.BatchNormalization(momentum=0.9)
    inputs = [keras.Input((3,)) for _ in range(3)]
    model = keras.Model(inputs, [shared(x) for x in inputs])
    rng = np.random.default_rng(0)
    batches = [[rng.normal(5 * at, 1 + at, (size, 3)) for at in range(3)] for size in (8, 4)]
    BatchNormalizationEstimator(model)(batches)
    for found, statistic in ((shared.moving_mean, np.mean), (shared.moving_variance, np.var)):
        np.testing.assert_allclose(found, np.mean([statistic(x, 0) for batch in batches for x in batch], 0), rtol=1e-4)
    assert shared.momentum == 0.9 and "call" not in vars(shared)


@pytest.mark.parametrize("model", [3, keras.Sequential([layers.Dense(2), layers.BatchNormalization()])])
def test_what_is_no_built_model(model):
    with pytest.raises(ValueError, match="`model` must be a built Keras model"):
        BatchNormalizationEstimator(model)


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
