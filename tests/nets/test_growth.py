"""A deeper net computes what the shallower one did: against that one, and against statistics taken by hand."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import BatchNormalizationEstimator, grow, modulate, plain_cnn, plain_imagenet


def disturbed(model, rng):
    """A model as if it had been trained: no trainable weight is what it was at the start."""
    for variable in model.trainable_variables:
        spread = 0.3 if variable.path.endswith(("gamma", "beta")) else 0.1
        variable.assign(variable + spread * rng.normal(size=variable.shape))
    return model


def outputs(model, x, training=False):
    return np.asarray(model(x, training=training), np.float64)


@pytest.mark.parametrize("seed", range(6))
def test_outputs_and_penalty_stay_what_they_were(seed):
    rng = np.random.default_rng(seed)
    few = int(rng.integers(1, 4))
    many = few + int(rng.integers(1, 5))
    settings = {
        "input_shape": (int(rng.integers(7, 13)), int(rng.integers(7, 13)), int(rng.integers(1, 5))),
        "width": int(rng.integers(1, 7)),
        "relu_shift": float(rng.choice([0.0, 0.7, 2.0])),
        "initializer": str(rng.choice(["orthonormal", "dirac", "he_normal"])),
        "num_classes": int(rng.integers(2, 7)),
    }
    model, deeper = plain_cnn(6 * few + 2, **settings, seed=seed), plain_cnn(6 * many + 2, **settings, seed=seed + 1)
    disturbed(model, rng)
    x = rng.normal(size=(int(rng.integers(16, 64)), *settings["input_shape"])).astype("float32")
    BatchNormalizationEstimator(model)([x])
    before = model.get_weights()
    grow(model, deeper, x)
    for mine, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)
    new = rng.normal(size=(5, *settings["input_shape"])).astype("float32")
    np.testing.assert_allclose(outputs(deeper, new), outputs(model, new), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(outputs(deeper, x, True), outputs(model, x, True), rtol=2e-3, atol=2e-3)
    assert float(sum(deeper.losses)) == pytest.approx(float(sum(model.losses)), rel=1e-4, abs=1e-7)


def test_where_the_new_layers_are_and_what_they_hold():
    rng = np.random.default_rng(0)
    model, deeper = (plain_cnn(depth, (8, 8, 3), width=4, relu_shift=1.0) for depth in (14, 32))
    x = rng.normal(size=(40, 8, 8, 3)).astype("float32")
    disturbed(model, rng)
    BatchNormalizationEstimator(model)([x])
    grow(model, deeper, x)
    old = {
        "stem_conv": "stem_conv",
        "classifier": "classifier",
    }  # 4 convolutions among 10, with one that strides 1 + 3 among 1 + 9
    old |= {f"stage1_conv{mine:02d}": f"stage1_conv{theirs:02d}" for mine, theirs in zip((1, 3, 6, 8), (1, 2, 3, 4))}
    for stage in (2, 3):
        old |= {
            f"stage{stage}_conv{mine:02d}": f"stage{stage}_conv{theirs:02d}" for mine, theirs in zip((1, 2, 5, 8), (1, 2, 3, 4))
        }
    came_from = None
    for layer in deeper.layers:
        if layer.name in old:
            came_from = old[layer.name]
            for mine, expected in zip(layer.get_weights(), model.get_layer(came_from).get_weights(), strict=True):
                np.testing.assert_array_equal(mine, expected)
        elif isinstance(layer, layers.Conv2D):
            kernel = np.zeros(layer.kernel.shape)
            kernel[1, 1] = np.eye(kernel.shape[-1])
            np.testing.assert_array_equal(layer.kernel, kernel)
            coming = outputs(keras.Model(model.input, model.get_layer(f"{came_from}_relu").output), x)
            gamma, beta, mean, variance = deeper.get_layer(f"{layer.name}_bn").get_weights()
            np.testing.assert_allclose(mean, coming.mean((0, 1, 2)), rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(variance, coming.var((0, 1, 2)), rtol=1e-4)
            np.testing.assert_array_equal(beta, mean)
            np.testing.assert_allclose(gamma, np.sqrt(variance + 1e-5), rtol=1e-6)


def mlp(count, activation="relu", units=6, bias=True):
    hidden = [layers.Dense(units, activation=activation, use_bias=bias) for _ in range(count)]
    return keras.Sequential([keras.Input((6,)), *hidden, layers.Dense(3)])


def mixed_chain(counts):
    """Convolutions of rank 1, with an activation of their own and with a bias, also of one pixel without padding."""
    first, second, third = counts
    net = [keras.Input((9, 4))]
    net += [layers.Conv1D(4, 4, padding="same", activation="relu") for _ in range(first)]
    net += [layers.Conv1D(4, 3, strides=2, activation="relu")]
    net += [layers.Conv1D(4, 1, activation="relu") for _ in range(second)]
    net += [layers.Flatten(), *(layers.Dense(16, activation="relu") for _ in range(third)), layers.Dense(2)]
    return keras.Sequential(net)


def test_dense_layers_and_other_convolutions_grow():
    rng = np.random.default_rng(3)
    model, deeper = disturbed(mixed_chain((1, 2, 1)), rng), mixed_chain((4, 3, 3))
    x = rng.normal(size=(20, 9, 4)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-5, atol=1e-6)
    assert np.abs(outputs(model, x)).max() > 0.1


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision(precision):
    keras.config.set_dtype_policy(precision)
    rng = np.random.default_rng(1)
    model, deeper = (plain_cnn(depth, (8, 8, 3), width=4, relu_shift=1.0) for depth in (8, 44))
    x = rng.normal(size=(64, 8, 8, 3)).astype("float32")
    BatchNormalizationEstimator(disturbed(model, rng))([x])
    grow(model, deeper, x)
    np.testing.assert_array_equal(outputs(deeper, x), outputs(model, x))  # what was rounded once is rounded to the same again


def test_modulated_nets_and_photographs_grow():
    rng = np.random.default_rng(2)
    model, deeper = (modulate(plain_cnn(depth, (8, 8, 3), width=2)) for depth in (8, 14))
    x = rng.normal(size=(16, 8, 8, 3)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-4, atol=1e-5)
    model, deeper = (plain_imagenet(depth, (32, 32, 3), num_classes=4, width=2) for depth in (34, 44))
    x = rng.normal(size=(16, 32, 32, 3)).astype("float32")
    BatchNormalizationEstimator(model)([x])
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-4, atol=1e-4)


def pooled(first, second):
    block = {"filters": 4, "kernel_size": 3, "padding": "same", "activation": "relu"}
    net = [keras.Input((8, 8, 4)), *(layers.Conv2D(**block) for _ in range(first)), layers.MaxPooling2D()]
    net += [*(layers.Conv2D(**block) for _ in range(second)), layers.Flatten(), layers.Dense(16, "relu"), layers.Dense(16)]
    return keras.Sequential(net)


@pytest.mark.parametrize(("few", "many"), [((2, 3), (3, 4)), ((1, 1), (3, 1)), ((1, 2), (1, 5))])
def test_runs_end_at_a_pooling_and_at_another_activation(few, many):
    rng = np.random.default_rng(4)
    model, deeper = disturbed(pooled(*few), rng), pooled(*many)
    x = rng.normal(size=(50, 8, 8, 4)).astype("float32")  # more than are compared at a time
    grow(model, deeper, tf.constant(x))
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-5, atol=1e-5)


def test_a_layer_that_is_called_by_keyword():
    inputs = keras.Input((6,))
    hidden = inputs
    for _ in range(3):
        hidden = layers.Dense(6, "relu")(inputs=hidden)
    deeper, model = keras.Model(inputs, layers.Dense(3)(hidden)), disturbed(mlp(1), np.random.default_rng(0))
    x = np.random.default_rng(1).normal(size=(9, 6)).astype("float32")
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x), outputs(model, x), rtol=1e-6)


def two_outputs():
    inputs = keras.Input((6,))
    return keras.Model(inputs, {"a": layers.Dense(3)(inputs), "b": layers.Dense(3)(inputs)})


def without_scale(count):
    block = [layer for _ in range(count) for layer in (layers.Dense(6), layers.BatchNormalization(scale=False), layers.ReLU())]
    return keras.Sequential([keras.Input((6,)), *block, layers.Dense(3)])


@pytest.mark.parametrize(
    ("model", "deeper", "expected"),
    [
        (mlp(1, "gelu"), mlp(2, "gelu"), "`deeper` must compute what `model` does"),
        (mlp(2), mlp(1), "Received: 1 layer.s. from 'dense.*' on, Dense {.*} are in `deeper`, where 2 layer"),
        (mlp(1, "tanh"), mlp(2, "tanh"), "`deeper` must compute what `model` does"),
        (two_outputs(), mlp(2), "`model` must have one input and one output"),
        (mlp(1), mlp(2).layers[0], "`deeper` must be a built Keras model"),
        (keras.Sequential([layers.Dense(6)]), mlp(2), "`model` must be a built Keras model"),
        (mlp(1), mlp(2, units=7), "`deeper` must have the layers of `model` in their order"),
        (mlp(1, units=7), mlp(1, units=7, bias=False), "`deeper` must have the layers of `model` in their order"),
        (without_scale(1), without_scale(2), "must have gamma and beta. Received: dense"),
    ],
)
def test_what_cannot_grow_is_refused_and_nothing_changes(model, deeper, expected):
    if expected == "`deeper` must compute what `model` does":
        disturbed(model, np.random.default_rng(1))
    before = deeper.get_weights()
    with pytest.raises(ValueError, match=expected):
        grow(model, deeper, np.random.default_rng(0).normal(size=(8, 6)).astype("float32"))
    for mine, was in zip(deeper.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, was)


@pytest.mark.parametrize("x", [np.zeros((0, 6)), [[0.0] * 6], {"a": np.zeros((2, 6))}, None, np.float32(1)])
def test_what_is_no_batch_is_refused(x):
    with pytest.raises(ValueError, match="`x` must be an array or a tensor of at least one input. Received"):
        grow(mlp(1), mlp(2), x)


@pytest.mark.parametrize("place", ["x", "model"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_named(place, value):
    model, deeper, x = mlp(1), mlp(2), np.ones((4, 6), "float32")
    if place == "x":
        x[2, 3] = value
    else:
        model.layers[0].bias.assign(np.float32([0, value, 0, 0, 0, 0]))
    with pytest.raises(ValueError, match=f"`{place}` must be finite. Received: {place} with inf or NaN"):
        grow(model, deeper, x)


def test_inputs_of_another_size_are_told():
    with pytest.raises(ValueError, match=r"`x` must suit `model`. Received: x of shape \(4, 5\) \(.*expected axis -1"):
        grow(mlp(1), mlp(2), np.ones((4, 5), "float32"))


def test_an_adapted_normalization_goes_along():
    x = np.random.default_rng(0).normal(500, 100, (32, 6)).astype("float32")
    adapted = layers.Normalization()
    adapted.adapt(x)
    model, deeper = (
        keras.Sequential([keras.Input((6,)), scaling, *mlp(count).layers])
        for scaling, count in ((adapted, 1), (layers.Normalization(), 3))
    )
    grow(model, deeper, x)
    np.testing.assert_allclose(outputs(deeper, x[:5] + 1), outputs(model, x[:5] + 1), rtol=1e-5, atol=1e-6)


def test_a_refusal_leaves_a_normalization_as_it_was():
    adapted = [layers.Normalization() for _ in range(2)]
    for scaling, mean in zip(adapted, (500, 2)):
        scaling.adapt(np.random.default_rng(0).normal(mean, 1, (32, 6)))
    model, deeper = (
        keras.Sequential([keras.Input((6,)), scaling, *mlp(count, "tanh").layers]) for scaling, count in zip(adapted, (1, 2))
    )
    x = np.random.default_rng(1).normal(size=(8, 6)).astype("float32")
    before = outputs(deeper, x)
    with pytest.raises(ValueError, match="`deeper` must compute what `model` does"):
        grow(model, deeper, x)
    np.testing.assert_array_equal(outputs(deeper, x), before)


@pytest.mark.parametrize("pack", [lambda one: [one], lambda one: {"only": one}])
def test_one_output_in_a_list_or_dict(pack):
    model, deeper = (keras.Model(net.inputs, pack(net.outputs[0])) for net in (mlp(1), mlp(3)))
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    grow(model, deeper, x)
    (made,), (wanted,) = (keras.tree.flatten(net(x)) for net in (deeper, model))
    np.testing.assert_allclose(made, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"strides": 2}, {"padding": "valid"}, {"groups": 2}])
def test_a_layer_that_shrinks_or_groups_is_no_identity(settings):
    settings = {"padding": "same", **settings}

    def net(count):
        return keras.Sequential(
            [keras.Input((32, 2)), *(layers.Conv1D(2, 3, **settings) for _ in range(count)), layers.Flatten()]
        )

    with pytest.raises(ValueError, match="Each layer that only `deeper` has must be a convolution or Dense"):
        grow(net(1), net(2), np.zeros((4, 32, 2), "float32"))
