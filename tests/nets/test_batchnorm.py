"""BatchNormalizationEstimator against statistics taken layer by layer in float64."""

import keras
import numpy as np
import pytest
from keras import layers

from ortho_keras import BatchNormalizationEstimator, FusedBatchNormalization
from ortho_keras.method import backend

pytestmark = pytest.mark.every_backend

if backend.NAME == "tensorflow":
    import tensorflow as tf

NAMES = ("bn1", "bn2")
tensorflow_only = pytest.mark.skipif(backend.NAME != "tensorflow", reason="of TensorFlow alone")


def batches_of(*sizes, seed=0):
    """Batches that differ in mean and scale, so that a wrong weighting shows."""
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(), rng.uniform(0.5, 3), size=(size, 5, 4, 3)).astype("float32") for size in sizes]


def two_normalizations(kind=layers.BatchNormalization):
    """Conv-BN-ReLU twice: the input of the second depends on the first's statistics of the same batch."""
    net = [keras.Input((5, 4, 3))]
    for number, momentum in ((1, 0.9), (2, 0.6)):
        net += [layers.Conv2D(4, 1, name=f"conv{number}"), kind(momentum=momentum, epsilon=1e-3, name=f"bn{number}")]
        net += [layers.ReLU()]
    model = keras.Sequential([*net, layers.GlobalAveragePooling2D()])
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "kernel":
            weight.assign(rng.uniform(0.5, 1.5, size=weight.shape))
    return model


def statistics(model, batch):
    """Mean and variance of one batch in each BatchNormalization, `(2, 2, 4)`."""
    x, found = np.asarray(batch, np.float64), []
    for number in (1, 2):
        convolution, normalization = model.get_layer(f"conv{number}"), model.get_layer(f"bn{number}")
        variables = (convolution.kernel, convolution.bias, normalization.gamma, normalization.beta)
        kernel, bias, gamma, beta = (np.asarray(v, np.float64) for v in variables)
        x = x @ kernel[0, 0] + bias
        found.append((x.mean((0, 1, 2)), x.var((0, 1, 2))))
        x = np.maximum((x - found[-1][0]) / np.sqrt(found[-1][1] + 1e-3) * gamma + beta, 0)
    return np.array(found)


def averages(model):
    found = [model.get_layer(name) for name in NAMES]
    return np.array([[bn.moving_mean.numpy(), bn.moving_variance.numpy()] for bn in found])


def assert_averages_are_those_of(model, batches):
    expected = np.mean([statistics(model, batch) for batch in batches], axis=0)
    np.testing.assert_allclose(averages(model), expected, rtol=1e-4, atol=1e-5)
    assert [model.get_layer(name).momentum for name in NAMES] == [0.9, 0.6]


@pytest.mark.parametrize("kind", [layers.BatchNormalization, FusedBatchNormalization])
@pytest.mark.parametrize(
    ("sizes", "given"),
    [
        ((1, 5, 2), list),
        ((4, 4, 4), np.stack),
        ((4, 4, 2), iter),
        pytest.param(
            (4, 4, 2),
            lambda batches: tf.data.Dataset.from_tensor_slices(np.concatenate(batches)).batch(4),
            marks=tensorflow_only,
        ),
    ],
)
def test_averages_equal_the_oracle(kind, sizes, given):
    model, batches = two_normalizations(kind), batches_of(*sizes)
    kept = [weight.numpy() for weight in model.trainable_weights]
    assert BatchNormalizationEstimator(model)(given(batches)) is None
    assert_averages_are_those_of(model, batches)
    for weight, before in zip(model.trainable_weights, kept, strict=True):
        np.testing.assert_array_equal(weight, before)


def test_estimating_again_does_not_depend_on_the_averages_before():
    model = two_normalizations()
    estimator = BatchNormalizationEstimator(model)
    for seed in range(3):
        model.get_layer("conv1").kernel.assign(np.random.default_rng(seed).normal(size=(1, 1, 3, 4)))
        model.get_layer("bn1").moving_mean.assign([np.nan, np.inf, -np.inf, 0])
        model.get_layer("bn2").moving_variance.assign([0, np.nan, np.inf, 3e38])
        batches = batches_of(6, 6, seed=seed)
        estimator(batches)
        assert_averages_are_those_of(model, batches)
        once = averages(model)
        estimator(batches)
        np.testing.assert_array_equal(averages(model), once)


def test_training_continues_with_its_own_momentum_optimizer_and_metrics():
    model, (batch, other) = two_normalizations(), batches_of(8, 8)
    model.compile(keras.optimizers.SGD(0.0, momentum=0.9), "mse")
    target = np.zeros((8, 4))
    model.fit(batch, target, verbose=0)
    estimator = BatchNormalizationEstimator(model)
    for _ in range(2):
        others = [*model.optimizer.variables, *model.metrics_variables]
        kept = [variable.numpy() for variable in others]
        estimator([batch])
        for variable, value in zip(others, kept, strict=True):
            np.testing.assert_array_equal(variable, value)
        before = averages(model)
        model.train_on_batch(other, target)
        momentum = np.array([0.9, 0.6])[:, None, None]
        expected = momentum * before + (1 - momentum) * statistics(model, other)
        np.testing.assert_allclose(averages(model), expected, rtol=1e-4, atol=1e-5)


def stops():
    yield from batches_of(4, 4)
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ([], ValueError, "`batches` must hold at least one batch"),
        (stops(), RuntimeError, "no more"),
        (
            [*batches_of(4), np.zeros((4, 5, 4, 2))],
            ValueError,
            r"what the model takes. Received: one of shape \(4, 5, 4, 2\) \(",
        ),
        (np.zeros((2, 4, 4, 2), "float32"), ValueError, r"what the model takes. Received: one of shape \(4, 4, 2\) \("),
    ],
)
def test_an_error_leaves_the_averages_unchanged(given, kind, message):
    model = two_normalizations()
    estimator, before = BatchNormalizationEstimator(model), averages(model)
    with pytest.raises(kind, match=message):
        estimator(given)
    np.testing.assert_array_equal(averages(model), before)
    batches = batches_of(4, 2)
    estimator(batches)
    assert_averages_are_those_of(model, batches)


@tensorflow_only
def test_a_lost_device_is_not_reported_as_a_wrong_batch(monkeypatch):
    def lost(images):
        raise tf.errors.UnavailableError(None, None, "a device went away")

    estimator = BatchNormalizationEstimator(two_normalizations())
    monkeypatch.setattr(estimator, "_observe", lost)
    with pytest.raises(tf.errors.UnavailableError):
        estimator(batches_of(2))


def test_a_frozen_layer_in_a_nested_model_keeps_its_averages():
    inner = two_normalizations()
    inner.get_layer("bn2").trainable = False  # Keras runs it in inference mode then
    before, batches = averages(inner), batches_of(4, 3)
    x = keras.Input((5, 4, 3))
    BatchNormalizationEstimator(keras.Model(x, inner(x)))(batches)
    np.testing.assert_array_equal(averages(inner)[1], before[1])
    np.testing.assert_allclose(averages(inner)[0], np.mean([statistics(inner, b)[0] for b in batches], 0), rtol=1e-4, atol=1e-5)


class FrozenBackbone(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.frozen, self.trained = layers.Dense(4), layers.BatchNormalization(), layers.BatchNormalization()

    def call(self, x, training=None):
        return self.trained(self.frozen(self.first(x), training=False), training=training)


def test_a_layer_called_in_inference_mode_keeps_its_averages():
    model, x = FrozenBackbone(), np.random.default_rng(0).normal(3, 2, (64, 3)).astype("float32")
    model(x)
    kept = np.array([[1, 2, 3, 4], [4, 3, 2, 1]], "float32")
    model.frozen.moving_mean.assign(kept[0])
    model.frozen.moving_variance.assign(kept[1])
    BatchNormalizationEstimator(model)([x] * 3)
    np.testing.assert_array_equal([model.frozen.moving_mean, model.frozen.moving_variance], kept)
    kernel, bias = (np.asarray(v, np.float64) for v in (model.first.kernel, model.first.bias))
    inputs = (x @ kernel + bias - kept[0]) / np.sqrt(kept[1] + 1e-3)
    np.testing.assert_allclose(model.trained.moving_mean, inputs.mean(0), rtol=1e-4)
    np.testing.assert_allclose(model.trained.moving_variance, inputs.var(0), rtol=1e-4)


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


def test_half_precision_averages_are_summed_exactly():
    keras.config.set_dtype_policy("bfloat16")
    model = keras.Sequential([keras.Input((3,)), layers.BatchNormalization()])
    batch = np.array([[1, 2, 3], [3, 4, 5]], "float32")  # its means and variances are bfloat16 numbers
    BatchNormalizationEstimator(model)([batch] * 300)
    np.testing.assert_array_equal(model.layers[0].moving_mean, [2, 3, 4])
    np.testing.assert_array_equal(model.layers[0].moving_variance, [1, 1, 1])


@tensorflow_only
def test_the_mean_over_replicas(two_replicas):
    with two_replicas.scope():
        model = two_normalizations()
    batches = batches_of(4, 4, 4)
    given = tf.data.Dataset.from_tensor_slices(np.concatenate(batches)).batch(4)
    estimator = BatchNormalizationEstimator(model)
    for _ in range(2):
        estimator(two_replicas.experimental_distribute_dataset(given))
        halves = [half for batch in batches for half in (batch[:2], batch[2:])]  # each replica has its own statistics
        assert_averages_are_those_of(model, halves)


def test_models_without_batch_normalization_and_arguments_that_are_no_built_model():
    model = keras.Sequential([keras.Input((3,)), layers.Dense(2)])
    assert BatchNormalizationEstimator(model)([np.ones((2, 3))]) is None
    for wrong in (3, keras.Sequential([layers.BatchNormalization()])):
        with pytest.raises(ValueError, match="`model` must be a built Keras model"):
            BatchNormalizationEstimator(wrong)
