"""fold_batchnorm: the same outputs, without modulation, and without BatchNormalization wherever it can be folded."""

import keras
import numpy as np
import pytest

import ortho_keras
from ortho_keras import ErrorModulation, fold_batchnorm, modulate, plain_cnn, residual_cnn

pytestmark = pytest.mark.every_backend
L = keras.layers


def disturbed(model, seed=0):
    """The model with averages, gamma and beta as after a training: none is 0 or 1, some gammas are negative."""
    rng = np.random.default_rng(seed)
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            disturbed(layer, seed + 1)
        if isinstance(layer, L.BatchNormalization):
            weights = [rng.uniform(0.5, 1.5, w.shape) * rng.choice([1, 1, -1], w.shape) for w in layer.get_weights()]
            layer.set_weights([*weights[:-1], np.abs(weights[-1])])  # the last is the variance
    return model


def check(model, batch, normalizations=0):
    """Folds a disturbed model and compares its outputs, in any structure, with the model's."""
    deployed = fold_batchnorm(disturbed(model))
    assert sum(isinstance(layer, L.BatchNormalization) for layer in deployed.layers) == normalizations
    expected, found = model(batch, training=False), deployed(batch, training=False)
    keras.tree.assert_same_structure(found, expected)
    for mine, theirs in zip(keras.tree.flatten(found), keras.tree.flatten(expected)):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    return deployed


def noise(*shape):
    return np.random.default_rng(1).normal(size=(4, *shape)).astype("float32")


@pytest.mark.parametrize("builder", [plain_cnn, residual_cnn])
def test_the_projects_nets(builder):
    model = builder(14, (16, 16, 3), width=4, relu_shift=1.0, initializer="dirac", seed=0)
    deployed = check(model, noise(16, 16, 3))
    assert not deployed.losses
    assert {layer.name for layer in deployed.layers} == {x.name for x in model.layers if not x.name.endswith("_bn")}


def test_modulation_is_removed_and_the_model_stays_as_it_was(tmp_path):
    scaling = L.Normalization(mean=[5.0], variance=[9.0])
    model = modulate(plain_cnn(8, (8, 8, 1), width=2, relu_shift=1.0, seed=0, preprocessing=scaling))
    x = 3 * noise(8, 8, 1) + 5
    deployed = check(model, x)
    assert ErrorModulation not in map(type, deployed.layers) and deployed.name == model.name
    deployed.save(tmp_path / "deployed.keras")
    loaded = ortho_keras.load_model(tmp_path / "deployed.keras")
    np.testing.assert_array_equal(loaded(x), deployed(x))
    before = [np.copy(w) for w in model.get_weights()]
    deployed.compile("sgd", "mse")
    deployed.train_on_batch(x, np.ones((4, 10)))
    for mine, kept in zip(model.get_weights(), before):
        np.testing.assert_array_equal(mine, kept)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (lambda: L.Conv1D(4, 3, strides=2, padding="same"), (9, 3)),
        (lambda: L.Conv2D(4, 3, dilation_rate=2, use_bias=True, bias_initializer="normal"), (9, 9, 3)),
        (lambda: L.Conv2D(6, 3, groups=3), (9, 9, 3)),
        (lambda: L.Conv2DTranspose(5, 3, strides=2, bias_initializer="normal"), (6, 6, 4)),
        (lambda: L.Conv3DTranspose(2, 2), (3, 3, 3, 4)),
        (lambda: L.DepthwiseConv2D(3, depth_multiplier=2, bias_initializer="normal"), (8, 8, 3)),
        (lambda: L.SeparableConv2D(5, 3, bias_initializer="normal"), (8, 8, 3)),
        (lambda: L.Dense(7, use_bias=False), (3, 5)),
    ],
)
def test_every_kind_of_layer(layer, shape):
    for options in ({}, {"scale": False}, {"center": False, "epsilon": 0.1}):
        model = keras.Sequential([keras.Input(shape), layer(), L.BatchNormalization(**options), L.ReLU()])
        check(model, noise(*shape))


class Standardized(L.Conv2D):
    def call(self, x):
        mean, deviation = keras.ops.mean(self.kernel, (0, 1, 2)), keras.ops.std(self.kernel, (0, 1, 2))
        return keras.ops.conv(x, (self.kernel - mean) / deviation, padding="valid")


def branch(x):
    y = L.Conv2D(3, 3, padding="same")(x)
    return L.Add()([L.BatchNormalization()(y), y])  # the convolution's own output is needed too


def shared(x):
    normalization = L.BatchNormalization()
    return L.Add()([normalization(L.Conv2D(3, 1)(x)), normalization(L.Conv2D(3, 1)(x))])


def twice(x):
    convolution = L.Conv2D(3, 1)
    return L.Add()([L.BatchNormalization()(convolution(x)), L.BatchNormalization()(convolution(x))])


def pyramid(x):
    y = L.Conv2D(4, 3)(x)  # an output of the model too
    return {"pyramid": y, "top": L.BatchNormalization()(L.Conv2D(4, 3)(L.BatchNormalization()(y)))}


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (branch, 1),
        (shared, 1),
        (twice, 2),
        (pyramid, 1),
        (lambda x: L.BatchNormalization()(L.Conv2D(3, 3, activation="relu")(x)), 1),
        (lambda x: L.BatchNormalization(axis=1)(L.Conv2D(3, 3, padding="same")(x)), 1),
        (lambda x: L.BatchNormalization()(keras.ops.abs(L.Conv2D(3, 3)(x))), 1),
        (lambda x: L.BatchNormalization()(Standardized(4, 3, use_bias=False)(x)), 1),
    ],
)
def test_what_cannot_be_folded_stays(body, left):
    inputs = keras.Input((6, 6, 3))
    check(keras.Model(inputs, body(inputs)), noise(6, 6, 3), normalizations=left)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="IntegerLookup is of TensorFlow alone")
def test_state_that_is_no_weight_is_copied():
    words = np.array([[5], [7], [9], [5]])
    scale, index = L.Normalization(), L.IntegerLookup()
    scale.adapt(3 + 2 * noise(6, 6, 3))
    index.adapt(words)
    images, word = keras.Input((6, 6, 3)), keras.Input((1,), dtype="int64")
    x = L.Flatten()(L.BatchNormalization()(L.Conv2D(4, 3)(scale(images))))
    y = L.Flatten()(L.TimeDistributed(scale)(keras.ops.expand_dims(images, 1)))
    model = keras.Model([images, word], L.Concatenate()([x, y, L.Flatten()(L.Embedding(6, 4)(index(word)))]))
    check(model, [noise(6, 6, 3), words])


def test_nested_models_several_inputs_and_outputs():
    inner = keras.Sequential([keras.Input((6, 6, 3)), L.Conv2D(4, 3), L.BatchNormalization(), L.ReLU()])
    a, b = keras.Input((6, 6, 3), name="a"), keras.Input((4, 4, 4), name="b")
    x = inner(a) + b
    model = keras.Model({"a": a, "b": b}, [x, L.BatchNormalization()(L.Conv2D(2, 1)(x))])
    check(model, {"a": noise(6, 6, 3), "b": noise(4, 4, 4)})


class Scale(L.Layer):
    """A layer that its configuration does not rebuild: `name` and `dtype` are not arguments."""

    def __init__(self):
        super().__init__()

    def build(self, shape):
        self.scale = 2.0

    def call(self, x):
        return self.scale * x

    def get_config(self):
        return {**super().get_config(), "by": 2.0}


class Weighted(Scale):
    def build(self, shape):
        self.scale = self.add_weight(shape=(shape[-1],), initializer="ones")


def test_a_layer_that_cannot_be_copied():
    model, weighted = (
        keras.Sequential([keras.Input((8, 8, 1)), one, L.Conv2D(4, 3), L.BatchNormalization()]) for one in (Scale(), Weighted())
    )
    check(model, noise(8, 8, 1))
    fold_batchnorm(model, dtype="float32")
    message = "`model` must have layers that .* copies. Received: '{}', a {} .*deserializing"
    with pytest.raises(ValueError, match=message.format("weighted", "Weighted")):
        fold_batchnorm(weighted)
    with pytest.raises(ValueError, match=message.format("scale", "Scale")):
        fold_batchnorm(model, dtype="bfloat16")


def test_what_is_refused():
    class Subclassed(keras.Model):
        def call(self, x):
            return x

    subclassed = Subclassed()
    subclassed(np.ones((1, 2)))
    for model, message in ((keras.Sequential([L.Dense(2)]), "must be a built"), (subclassed, "Functional")):
        with pytest.raises(ValueError, match=message):
            fold_batchnorm(model)
