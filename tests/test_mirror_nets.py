"""Which nets can be symmetric: by their answers to mirror images; which are refused, and by what words; and whole runs."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from test_mirror import assert_symmetric, images, net_of

from ortho_keras import BatchNormalizationEstimator, plain_cnn, plain_imagenet, residual_cnn, residual_imagenet, symmetrize
from ortho_keras.data import load_data
from ortho_keras.errors import InputError
from ortho_keras.experiment import run
from ortho_keras.recipe_model import build_model
from ortho_keras.recipes import find_preset
from ortho_keras.runtime import Runtime


def branched(build, shape=(6, 8, 3)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, build(inputs))


def two_heads(x, join):
    x = layers.Conv2D(8, 3)(x)
    pooled = layers.GlobalAveragePooling2D()
    return join([layers.Dense(5)(pooled(x)), layers.Dense(5)(pooled(layers.Conv2D(8, 3)(x)))])


def gated(x):
    x = layers.Conv2D(8, 3, padding="same", activation="gelu")(x)
    gates = layers.Dense(8, "sigmoid")(layers.Dense(4, "relu")(layers.GlobalAveragePooling2D()(x)))
    x = layers.Multiply()([x, layers.Reshape((1, 1, 8))(gates)])
    return layers.Dense(4)(layers.GlobalMaxPooling2D()(layers.Conv2D(6, 3)(x)))


def strided(kernel=3):
    return layers.Conv2D(6, kernel, strides=2, padding="same")


ACCEPTED = {
    "two heads that join": lambda: branched(lambda x: two_heads(x, layers.Add())),
    "two answers": lambda: branched(lambda x: two_heads(x, list)),
    "gates": lambda: branched(gated),
    "BatchNormalization behind the answer": lambda: net_of(
        layers.Conv2D(8, 3), layers.Conv2D(5, 1), layers.BatchNormalization(), layers.GlobalMaxPooling2D(), classes=0
    ),
    "BatchNormalization of the image": lambda: net_of(layers.BatchNormalization(), layers.Conv2D(8, 3), layers.Conv2D(4, 3)),
    "without gamma and beta": lambda: net_of(layers.Conv2D(8, 3), layers.BatchNormalization(scale=False, center=False)),
    "groups": lambda: net_of(layers.Conv2D(8, 3), layers.Conv2D(8, 3, groups=2, activation="relu")),
    "pooling": lambda: net_of(layers.Conv2D(8, 3, padding="same"), layers.MaxPooling2D(2), layers.AveragePooling2D(2)),
    "strides, odd": lambda: net_of(strided(), layers.ReLU(), strided(5), width=9),
    "strides, even, by even kernels": lambda: net_of(strided(4), layers.ReLU(), strided(2)),
    "a net in a net": lambda: net_of(keras.Sequential([layers.Conv2D(4, 3), layers.ReLU()]), layers.Conv2D(4, 3)),
    "one kernel": lambda: net_of(layers.Conv2D(3, 3), layers.ReLU(), layers.GlobalMaxPooling2D(), classes=0),
    "more classes than pairs": lambda: net_of(layers.Conv2D(8, 3), layers.ReLU(), classes=20),
    "a wide first layer": lambda: net_of(layers.Conv2D(40, 3, kernel_initializer="orthogonal"), layers.ReLU()),
    "plain_imagenet": lambda: plain_imagenet(34, (33, 33, 3), num_classes=5, width=4),
    "residual_imagenet": lambda: residual_imagenet(34, (33, 33, 3), num_classes=5, width=4),
    "residual_cnn": lambda: residual_cnn(8, (9, 9, 3), width=4),
    "a photograph of any size": lambda: plain_cnn(8, (None, None, 3), width=4),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_both_views_get_the_same_answers(name):
    model = ACCEPTED[name]()
    symmetrize(model)
    x = images(20, [side or 33 for side in model.input_shape[1:]])
    BatchNormalizationEstimator(model)([x])
    for mine, other in zip(keras.tree.flatten(model(x)), keras.tree.flatten(model(x[:, :, ::-1]))):
        assert np.std(mine, axis=0).max() > 1e-3
        np.testing.assert_allclose(other, mine, rtol=1e-3, atol=1e-4)


class Causal(layers.Conv2D):
    def call(self, x):
        return super().call(keras.ops.pad(x, [[0, 0], [1, 1], [2, 0], [0, 0]]))


def per_pixel():
    layer = layers.Normalization(axis=(1, 2, 3))
    layer.adapt(images(8, (6, 8, 3)))
    return layer


def shared(x):
    convolution = layers.Conv2D(4, 3)
    return layers.Dense(2)(layers.GlobalMaxPooling2D()(convolution(convolution(x))))


REFUSED = [
    (lambda: plain_cnn(8, (8, 8, 3), width=3), "even numbers of channels .* Received: 'stem_conv' with a weight of"),
    (lambda: net_of(layers.Conv2D(4, 3), layers.Flatten(), layers.Dense(2), classes=0), "left and the right .* a Flatten"),
    (lambda: net_of(layers.Conv2D(8, 3), layers.Conv2D(8, 3, groups=8)), "even numbers of channels"),
    (lambda: net_of(layers.Conv2D(8, 3), layers.DepthwiseConv2D(3)), "no trainable weights but .* a DepthwiseConv2D"),
    (lambda: net_of(layers.Conv2D(8, 3), layers.PReLU()), "no trainable weights but .* a PReLU"),
    (lambda: net_of(layers.Conv2D(8, 4, padding="same")), "left and the right .* a Conv2D"),
    (lambda: net_of(layers.ZeroPadding2D(((0, 0), (0, 1))), layers.Conv2D(8, 3)), "left and the right .* a ZeroPadding2D"),
    (lambda: net_of(per_pixel(), layers.Conv2D(8, 3)), "left and the right .* a Normalization"),
    (lambda: net_of(layers.Conv2D(8, 3), layers.Rescaling(np.arange(8.0))), "left and the right .* a Rescaling"),
    (lambda: net_of(Causal(8, 3)), "left and the right .* a Causal"),
    (lambda: net_of(layers.Conv2D(8, 3), layers.BatchNormalization(axis=2)), "channels last. .* with axis=2"),
    (lambda: branched(lambda x: layers.Add()([x, layers.Conv2D(4, 3, padding="same")(x)]), (6, 8, 4)),
     "must not join .* which takes answer and image"),
    (lambda: branched(shared, (6, 8, 4)), "layer with weights at one place"),
    (lambda: net_of(layers.Conv2D(8, 3, kernel_constraint="max_norm")), "no other constraints. .* with MaxNorm"),
    (lambda: net_of(layers.Conv2D(8, 3, kernel_initializer=keras.initializers.Constant(np.nan))), "finite weights"),
    (lambda: net_of(layers.Conv2D(8, 1)), "channels 0 and 1 would be the same: filters 1 pixel wide"),
    (lambda: keras.Sequential([keras.Input((4,)), layers.Dense(2)]), "must take images"),
    (lambda: keras.Sequential([layers.Dense(2)]), "built"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "told"), REFUSED)
def test_what_cannot_be_symmetric_is_refused(model, told):
    model = model()
    before, constraints = model.get_weights(), [variable.constraint for variable in model.variables]
    with pytest.raises(ValueError, match=told):
        symmetrize(model)
    for mine, expected in zip(model.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)
    assert [variable.constraint for variable in model.variables] == constraints


RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    depth=14,
    start_depth=8,
    grow_epoch=1,
    epochs=2,
    stem_initializer="pca",
    mirror_symmetry=True,
    optimizer="muon",
    learning_rate=0.01,
    width=4,
)


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_run_stays_symmetric(tmp_path, two_replicas, replicas):
    recipe, strategy = RECIPE, tf.distribute.get_strategy()
    if replicas == 2:
        recipe, strategy = dataclasses.replace(RECIPE, depth=8, start_depth=0, grow_epoch=0, max_steps=3), two_replicas
    run(recipe, tmp_path, runtime=Runtime(strategy), log=lambda line: None)
    model = keras.models.load_model(tmp_path / "final.keras")
    assert model.name == f"plain{recipe.depth}"
    assert_symmetric(model)
    for layer in model.layers:  # averages over both replicas' images, and over partners
        if isinstance(layer, layers.BatchNormalization):
            for average in (layer.moving_mean, layer.moving_variance):
                np.testing.assert_allclose(average[::2], average[1::2], rtol=1e-6)
    assert model.get_layer("stage1_conv02").kernel_constraint.get_config() == {"inputs": True, "outputs": True}


def test_recipes_that_cannot_be_symmetric():
    with pytest.raises(InputError, match="--width must be even with --mirror_symmetry. Received: 5"):
        dataclasses.replace(RECIPE, width=5).check()
    with pytest.raises(InputError, match="--mirror_symmetry must have a net that can be symmetric: .* 'stem_conv'"):
        build_model(dataclasses.replace(RECIPE, width=8), load_data("digits"))  # 9 patches of one channel: 3 are odd
