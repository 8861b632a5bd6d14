"""fold_batchnorm: the same outputs, without BatchNormalization and modulation wherever that can be."""

import keras
import numpy as np
import pytest

import ortho_keras
from ortho_keras import ErrorModulation, fold_batchnorm, modulate, plain_cnn, residual_cnn

L = keras.layers


def disturbed(model, seed=0):
    """The model with averages, gamma and beta as after a training: nothing is 0 or 1."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            disturbed(layer, seed + 1)
        if isinstance(layer, L.BatchNormalization):
            weights = [rng.uniform(0.5, 1.5, w.shape) * rng.choice([1, 1, -1], w.shape) for w in layer.get_weights()]
            layer.set_weights([*weights[:-1], np.abs(weights[-1])])  # the last is the variance
    return model


def kinds(model):
    return [type(layer) for layer in model.layers]


def check(model, *shape, normalizations=0, **tolerance):
    x = np.random.default_rng(1).normal(size=(4, *shape)).astype("float32")
    deployed = fold_batchnorm(model)
    assert sum(issubclass(kind, L.BatchNormalization) for kind in kinds(deployed)) == normalizations
    expected = model.predict(x, verbose=0)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(deployed.predict(x, verbose=0), expected, rtol=0, atol=1e-4 * scale, **tolerance)
    return deployed


@pytest.mark.parametrize("builder", [plain_cnn, residual_cnn])
def test_the_projects_nets(builder):
    model = disturbed(builder(20, (16, 16, 3), relu_shift=1.0, initializer="dirac", seed=0))
    deployed = check(model, 16, 16, 3)
    assert len(deployed.layers) == len(model.layers) - 19 and not deployed.losses
    assert {layer.name for layer in deployed.layers} == {x.name for x in model.layers if not x.name.endswith("_bn")}


def test_modulation_goes_and_the_model_stays_as_it_was():
    chain = plain_cnn(14, (8, 8, 1), seed=0)
    model = disturbed(modulate(chain))
    before = [np.copy(w) for w in model.get_weights()]
    deployed = check(model, 8, 8, 1)
    assert ErrorModulation not in kinds(deployed) and deployed.name == model.name
    deployed.compile("sgd", "mse")
    deployed.fit(np.ones((4, 8, 8, 1)), np.ones((4, 10)), verbose=0)
    for mine, kept in zip(model.get_weights(), before):
        np.testing.assert_array_equal(mine, kept)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: L.Conv1D(4, 3, strides=2, padding="same"), (9, 3)),
        (lambda: L.Conv2D(4, 3, dilation_rate=2, use_bias=True, bias_initializer="normal"), (9, 9, 3)),
        (lambda: L.Conv2D(6, 3, groups=3), (9, 9, 3)),
        (lambda: L.Conv3D(2, 2), (5, 5, 5, 2)),
        (lambda: L.Conv1DTranspose(3, 3, strides=2), (6, 4)),
        (lambda: L.Conv2DTranspose(5, 3, strides=2, bias_initializer="normal"), (6, 6, 4)),
        (lambda: L.Conv3DTranspose(2, 2), (3, 3, 3, 4)),
        (lambda: L.DepthwiseConv1D(3, depth_multiplier=2), (8, 3)),
        (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, bias_initializer="normal"), (8, 8, 3)),
        (lambda: L.SeparableConv1D(5, 3, depth_multiplier=2), (8, 3)),
        (lambda: L.SeparableConv2D(5, 3, bias_initializer="normal"), (8, 8, 3)),
        (lambda: L.Dense(7, bias_initializer="normal"), (5,)),
        (lambda: L.Dense(7, use_bias=False), (3, 5)),
    ],
)
@pytest.mark.parametrize("options", [{}, {"scale": False}, {"center": False, "epsilon": 0.1}])
def test_every_kind_of_layer(layer, shape, options):
    model = keras.Sequential([keras.Input(shape), layer(), L.BatchNormalization(**options), L.ReLU()])
    check(disturbed(model), *shape)


def branch(x):
    y = L.Conv2D(3, 3, padding="same")(x)
    return L.Add()([L.BatchNormalization()(y), y])  # the convolution's own output is needed too


def shared(x):
    normalization = L.BatchNormalization()
    return L.Add()([normalization(L.Conv2D(3, 1)(x)), normalization(L.Conv2D(3, 1)(x))])


def twice(x):
    convolution = L.Conv2D(3, 1)
    return L.Add()([L.BatchNormalization()(convolution(x)), L.BatchNormalization()(convolution(x))])


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (branch, 1),
        (shared, 1),
        (twice, 2),
        (lambda x: L.BatchNormalization()(L.Conv2D(3, 3, activation="relu")(x)), 1),
        (lambda x: L.BatchNormalization()(x), 1),
        (lambda x: L.BatchNormalization()(L.ReLU()(L.Conv2D(3, 3)(x))), 1),
        (lambda x: L.BatchNormalization(axis=1)(L.Conv2D(3, 3, padding="same")(x)), 1),
        (lambda x: L.BatchNormalization()(L.BatchNormalization()(L.Conv2D(3, 3)(x))), 1),
        (lambda x: L.BatchNormalization()(keras.ops.abs(L.Conv2D(3, 3)(x))), 1),
    ],
)
def test_what_cannot_be_folded_stays(body, left):
    inputs = keras.Input((6, 6, 3))
    check(disturbed(keras.Model(inputs, body(inputs))), 6, 6, 3, normalizations=left)


class Standardized(L.Conv2D):
    def call(self, x):
        mean, deviation = keras.ops.mean(self.kernel, (0, 1, 2)), keras.ops.std(self.kernel, (0, 1, 2))
        return keras.ops.conv(x, (self.kernel - mean) / deviation, padding="valid")


class Cut(L.Dense):
    def call(self, x):
        return keras.ops.relu(super().call(x))


class Doubled(L.BatchNormalization):
    def call(self, x, training=None):
        return 2 * super().call(x, training=training)


@pytest.mark.parametrize(
    "chain",
    [
        lambda: [Standardized(4, 3, use_bias=False), L.BatchNormalization()],
        lambda: [Cut(4), L.BatchNormalization()],
        lambda: [L.Conv2D(4, 3), Doubled()],
    ],
)
def test_a_subclass_with_a_call_of_its_own_stays(chain):
    check(disturbed(keras.Sequential([keras.Input((6, 6, 3)), *chain()])), 6, 6, 3, normalizations=1)


def test_what_is_an_output_too_stays():
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3)(inputs)
    y = L.Conv2D(4, 3)(L.BatchNormalization()(x))
    model = disturbed(keras.Model(inputs, {"pyramid": x, "top": L.BatchNormalization()(y)}))
    deployed = fold_batchnorm(model)
    assert kinds(deployed).count(L.BatchNormalization) == 1
    images = np.random.default_rng(1).normal(size=(4, 6, 6, 3)).astype("float32")
    for name, expected in model.predict(images, verbose=0).items():
        np.testing.assert_allclose(deployed.predict(images, verbose=0)[name], expected, rtol=1e-4, atol=1e-5)


def test_what_a_layer_learned_apart_from_its_weights_goes_along():
    rng = np.random.default_rng(0)
    pixels, words = rng.normal(3, 2, (20, 6, 6, 3)).astype("float32"), np.array([[5], [7], [9]])
    scale, index = L.Normalization(), L.IntegerLookup()
    scale.adapt(pixels)
    index.adapt(words)
    images, word = keras.Input((6, 6, 3)), keras.Input((1,), dtype="int64")
    x = L.Flatten()(L.BatchNormalization()(L.Conv2D(4, 3)(scale(images))))
    y = L.Flatten()(L.TimeDistributed(scale)(keras.ops.expand_dims(images, 1)))
    model = disturbed(keras.Model([images, word], L.Concatenate()([x, y, L.Flatten()(L.Embedding(6, 4)(index(word)))])))
    deployed = fold_batchnorm(model)
    batch = [pixels[:3], words]
    np.testing.assert_allclose(deployed(batch), model(batch), rtol=1e-4, atol=1e-5)


def test_nested_models_several_inputs_and_outputs():
    inner = keras.Sequential([keras.Input((6, 6, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU()], name="inner")
    a, b = keras.Input((6, 6, 3), name="a"), keras.Input((4, 4, 4), name="b")
    x = inner(a) + b
    y = L.BatchNormalization()(L.Conv2D(2, 1)(x))
    model = disturbed(keras.Model({"a": a, "b": b}, [x, y]))
    rng = np.random.default_rng(0)
    batch = {"a": rng.normal(size=(2, 6, 6, 3)).astype("float32"), "b": rng.normal(size=(2, 4, 4, 4)).astype("float32")}
    deployed = fold_batchnorm(model)
    assert L.BatchNormalization not in kinds(deployed)
    for mine, expected in zip(deployed.predict(batch, verbose=0), model.predict(batch, verbose=0)):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-5)


def test_a_net_of_keras_applications():
    model = disturbed(keras.applications.MobileNetV2(input_shape=(32, 32, 3), weights=None, classes=5))
    deployed = fold_batchnorm(model)
    assert L.BatchNormalization not in kinds(deployed)
    x = np.random.default_rng(1).random((2, 32, 32, 3)).astype("float32")
    np.testing.assert_allclose(deployed.predict(x, verbose=0), model.predict(x, verbose=0), rtol=1e-3, atol=1e-4)


def test_a_deployed_net_comes_back_from_a_file(tmp_path):
    model = disturbed(
        plain_cnn(14, (8, 8, 1), relu_shift=1.0, seed=0, preprocessing=L.Normalization(mean=[5.0], variance=[9.0]))
    )
    deployed = check(model, 8, 8, 1)
    deployed.save(tmp_path / "deployed.keras")
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 1))
    loaded = ortho_keras.load_model(tmp_path / "deployed.keras")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), deployed.predict(x, verbose=0))


def test_a_net_of_half_precision_becomes_one_of_float32():
    full = plain_cnn(14, (8, 8, 1), relu_shift=1.0, seed=0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    half = disturbed(plain_cnn(14, (8, 8, 1), relu_shift=1.0, seed=0))
    keras.config.set_dtype_policy("float32")
    full.set_weights(half.get_weights())
    deployed = fold_batchnorm(half, dtype="float32")
    assert {layer.compute_dtype for layer in deployed.layers} == {"float32"}
    x = np.random.default_rng(2).normal(size=(3, 8, 8, 1))
    expected = full.predict(x, verbose=0)
    np.testing.assert_allclose(deployed.predict(x, verbose=0), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert "mixed_bfloat16" in {layer.dtype_policy.name for layer in fold_batchnorm(half).layers}


def test_what_is_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    subclassed = Subclassed()
    subclassed(np.ones((1, 2)))
    for model, message in (
        (keras.Sequential([L.Dense(2)]), "must be a built"),
        (3, "must be a built"),
        (subclassed, "Functional"),
    ):
        with pytest.raises(ValueError, match=message):
            fold_batchnorm(model)
