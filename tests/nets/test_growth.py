"""A grown network computes what the shallower one did: against that one, and against statistics taken by hand."""

import keras
import numpy as np
import pytest
from keras import layers

from ortho_keras import BatchNormalizationEstimator, grow, modulate, plain_cnn

pytestmark = pytest.mark.every_backend


def disturbed(model, rng):
    """A model as if it had been trained: every trainable weight differs from its initial value."""
    for variable in model.trainable_variables:
        spread = 0.3 if variable.path.endswith(("gamma", "beta")) else 0.1
        variable.assign(variable + spread * rng.normal(size=variable.shape))
    return model


def outputs(model, x, training=False):
    return np.asarray(keras.tree.flatten(model(x, training=training))[0], np.float64)


@pytest.mark.parametrize("seed", range(3))
def test_outputs_and_penalty_stay_what_they_were(seed):
    rng = np.random.default_rng(seed)
    few = int(rng.integers(1, 3))
    many = few + int(rng.integers(1, 3))
    settings = {
        "input_shape": (int(rng.integers(7, 10)), int(rng.integers(7, 10)), int(rng.integers(1, 5))),
        "width": int(rng.integers(1, 5)),
        "relu_shift": (0.0, 0.7, 2.0)[seed],
        "initializer": ("orthonormal", "dirac", "he_normal")[seed],
    }
    model, deeper = plain_cnn(6 * few + 2, **settings, seed=seed), plain_cnn(6 * many + 2, **settings, seed=seed + 1)
    disturbed(model, rng)
    x = rng.normal(size=(40, *settings["input_shape"])).astype("float32")
    BatchNormalizationEstimator(model)([x])
    before = model.get_weights()
    grow(model, deeper, keras.ops.convert_to_tensor(x))
    for mine, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)
    new = rng.normal(size=(5, *settings["input_shape"])).astype("float32")
    np.testing.assert_allclose(outputs(deeper, new), outputs(model, new), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs(deeper, x, True), outputs(model, x, True), rtol=2e-3, atol=2e-3)
    assert float(sum(deeper.losses)) == pytest.approx(float(sum(model.losses)), rel=1e-4, abs=1e-7)


def test_where_the_new_layers_are_and_what_they_hold():
    rng = np.random.default_rng(0)
    model, deeper = (plain_cnn(depth, (8, 8, 3), width=2, relu_shift=1.0) for depth in (14, 32))
    x = rng.normal(size=(40, 8, 8, 3)).astype("float32")
    BatchNormalizationEstimator(disturbed(model, rng))([x])
    grow(model, deeper, x)
    # 4 convolutions become 10: in stage 1 evenly, in the others the one with strides and 3 that become 9.
    old = {"stem_conv": "stem_conv", "classifier": "classifier"}
    for stage, places in ((1, (1, 3, 6, 8)), (2, (1, 2, 5, 8)), (3, (1, 2, 5, 8))):
        old |= {f"stage{stage}_conv{place:02d}": f"stage{stage}_conv{number:02d}" for number, place in enumerate(places, 1)}
    previous = None
    for layer in deeper.layers:
        if layer.name in old:
            previous = old[layer.name]
            for mine, expected in zip(layer.get_weights(), model.get_layer(previous).get_weights(), strict=True):
                np.testing.assert_array_equal(mine, expected)
        elif isinstance(layer, layers.Conv2D):
            kernel = np.zeros(layer.kernel.shape)
            kernel[1, 1] = np.eye(kernel.shape[-1])
            np.testing.assert_array_equal(layer.kernel, kernel)
            inputs = outputs(keras.Model(model.input, model.get_layer(f"{previous}_relu").output), x)
            gamma, beta, mean, variance = deeper.get_layer(f"{layer.name}_bn").get_weights()
            np.testing.assert_allclose(mean, inputs.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(variance, inputs.var((0, 1, 2)), rtol=1e-4)
            np.testing.assert_array_equal(beta, mean)
            np.testing.assert_allclose(gamma, np.sqrt(variance + 1e-5), rtol=1e-6)


def mlp(count, activation="relu", units=6, bias=True, first=()):
    hidden = [layers.Dense(units, activation=activation, use_bias=bias) for _ in range(count)]
    return keras.Sequential([keras.Input((6,)), *first, *hidden, layers.Dense(3)])


def convolutions(*counts, groups=1):
    """Convolutions with biases and activations, one pixel wide without padding too; a pooling; and Dense layers."""
    block = {"filters": 4, "padding": "same", "activation": "relu", "groups": groups}
    net = [keras.Input((8, 8, 4)), *(layers.Conv2D(kernel_size=3, **block) for _ in range(counts[0])), layers.MaxPooling2D()]
    net += [
        *(layers.Conv2D(kernel_size=4, **block) for _ in range(counts[1])),
        layers.Conv2D(4, 2, strides=2, activation="relu"),
    ]
    net += [layers.Conv2D(4, 1, activation="relu") for _ in range(counts[2])]
    net += [layers.Flatten(), *(layers.Dense(16, "relu") for _ in range(counts[3])), layers.Dense(16)]
    return keras.Sequential(net)


@pytest.mark.parametrize(("few", "many", "groups"), [((2, 3, 1, 1), (3, 4, 1, 3), 1), ((1, 1, 2, 1), (3, 1, 3, 1), 2)])
def test_each_run_of_like_layers_grows(few, many, groups):
    rng = np.random.default_rng(4)
    model, deeper = disturbed(convolutions(*few, groups=groups), rng), convolutions(*many, groups=groups)
    x = rng.normal(size=(50, 8, 8, 4)).astype("float32")  # more than are compared at a time
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-5, atol=1e-5)
    assert np.abs(outputs(model, x)).max() > 0.1


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_a_modulated_network_in_half_precision(precision):
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(1)
    model, deeper = (modulate(plain_cnn(depth, (8, 8, 3), width=2, relu_shift=1.0)) for depth in (8, 20))
    x = rng.normal(size=(64, 8, 8, 3)).astype("float32")
    BatchNormalizationEstimator(disturbed(model, rng))([x])
    grow(model, deeper, x)
    np.testing.assert_array_equal(outputs(deeper, x), outputs(model, x))  # a rounded value is rounded to itself


def test_functional_models_with_keyword_calls_and_an_output_in_a_dict():
    inputs = keras.Input((6,))
    hidden = inputs
    for _ in range(3):
        hidden = layers.Dense(6, "relu")(inputs=hidden)
    deeper, model = keras.Model(inputs, {"only": layers.Dense(3)(hidden)}), disturbed(mlp(1), np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(9, 6)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-6)


def test_an_adapted_normalization_is_copied_and_restored_after_an_error():
    def adapted(mean):
        layer = layers.Normalization()
        layer.adapt(np.random.default_rng(0).normal(mean, 1, (32, 6)))
        return layer

    x = np.random.default_rng(1).normal(500, 1, size=(8, 6)).astype("float32")
    for deeper in (mlp(3, first=[layers.Normalization()]), mlp(3, first=[adapted(2)])):
        model = mlp(1, first=[adapted(500)])
        grow(model, deeper, x)
        np.testing.assert_allclose(outputs(deeper, x + 1), outputs(model, x + 1), rtol=1e-5, atol=1e-6)
    deeper = mlp(3, "tanh", first=[adapted(2)])
    before = outputs(deeper, x)
    with pytest.raises(ValueError, match="`deeper` must compute what `model` does"):
        grow(disturbed(mlp(1, "tanh", first=[adapted(500)]), np.random.default_rng(1)), deeper, x)
    np.testing.assert_array_equal(outputs(deeper, x), before)


def two_outputs():
    inputs = keras.Input((6,))
    return keras.Model(inputs, {"a": layers.Dense(3)(inputs), "b": layers.Dense(3)(inputs)})


def without_scale(count):
    block = [layer for _ in range(count) for layer in (layers.Dense(6), layers.BatchNormalization(scale=False), layers.ReLU())]
    return keras.Sequential([keras.Input((6,)), *block, layers.Dense(3)])


X = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")


@pytest.mark.parametrize(
    ("model", "deeper", "x", "expected"),
    [
        (mlp(1, "tanh"), mlp(2, "tanh"), X, "`deeper` must compute what `model` does"),
        (mlp(1), mlp(2), np.full_like(X, np.nan), "`deeper` must compute what `model` does"),
        (mlp(2), mlp(1), X, "Received: 1 from 'dense.*' on in `deeper`, where `model` has 2 from 'dense.*' on"),
        (mlp(1), mlp(2, units=7), X, "`deeper` must have the layers of `model` in their order"),
        (mlp(1, units=7), mlp(1, units=7, bias=False), X, "`deeper` must have the layers of `model` in their order"),
        (mlp(1, units=7), mlp(1, "tanh", units=7), X, "`deeper` must have the layers of `model` in their order"),
        (without_scale(1), without_scale(2), X, "must have gamma and beta. Received: dense"),
        (two_outputs(), mlp(2), X, "`model` must have one input and one output"),
        (keras.Sequential([layers.Dense(6)]), mlp(2), X, "`model` must be a built Keras model"),
        (mlp(1), mlp(2), np.zeros((4, 5)), r"`x` must suit `model`. Received: x of shape \(4, 5\) \(.*expected axis -1"),
        (mlp(1), mlp(2), np.zeros((0, 6)), "`x` must be an array or tensor of at least one input. Received: a ndarray"),
        (mlp(1), mlp(2), [[0.0] * 6], "`x` must be an array or tensor of at least one input. Received: a list"),
    ],
)
def test_what_cannot_grow_raises_and_nothing_changes(model, deeper, x, expected):
    if model.built:
        disturbed(model, np.random.default_rng(1))
    before = deeper.get_weights()
    with pytest.raises(ValueError, match=expected):
        grow(model, deeper, x)
    for mine, was in zip(deeper.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, was)
