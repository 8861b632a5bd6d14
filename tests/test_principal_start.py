"""The start of the convolutions that widen a net, against the features that they get, patch by patch."""

import dataclasses

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_patch_pca import all_patches, correlated_images

import ortho_keras
from ortho_keras import start_from_patches
from ortho_keras.data import load_data
from ortho_keras.errors import InputError
from ortho_keras.recipe_model import build_model
from ortho_keras.recipes import find_preset

WIDENING = ["stage2_conv01", "stage3_conv01"]


def net(**changes):
    settings = {"input_shape": (15, 13, 3), "width": 4, "initializer": "dirac", "relu_shift": 1.0, "seed": 3}
    return ortho_keras.plain_cnn(14, **{**settings, **changes})


def images_for(model, count=20):
    return correlated_images((count, *model.input_shape[1:])).astype("float32")


def covariance_before(model, name, images):
    """Float64 covariance of the patches that a layer gets, BatchNormalization by its batch; their mirror images not counted."""
    features = keras.Model(model.input, model.get_layer(name).input)(images, training=True)
    return np.cov(all_patches(np.asarray(features, np.float64), 3, 3).T)


def kernel_of(model, name):
    return np.asarray(model.get_layer(name).kernel, np.float64)


def values_of(model):
    return {weight.path: weight.numpy() for weight in model.weights}


def test_kernels_are_the_components_of_what_the_layers_get_one_after_the_other():
    model = net()
    images = images_for(model)
    assert start_from_patches(model, images) == WIDENING
    for name in WIDENING:
        kernel, covariance = kernel_of(model, name), covariance_before(model, name, images)
        matrix = kernel.reshape(-1, kernel.shape[-1])
        largest = np.linalg.eigvalsh(covariance)[::-1][: matrix.shape[1]]
        np.testing.assert_allclose(matrix.T @ covariance @ matrix, np.diag(largest), atol=1e-4 * largest[0])
        assert ortho_keras.orthonormality_error(kernel) < 1e-5


def test_nothing_else_changes():
    model = net()
    model(images_for(model), training=True)  # averages that are not those of a new net
    before = values_of(model)
    start_from_patches(model, images_for(model) + 1)
    changed = {path for path, value in values_of(model).items() if not np.array_equal(value, before[path])}
    assert changed == {f"{name}/kernel" for name in WIDENING}


def test_named_layers_in_the_nets_order():
    model = net()
    names = ["stage3_conv02", "stem_conv"]
    assert start_from_patches(model, images_for(model), names) == names[::-1]
    expected = ortho_keras.PatchPCAInitializer.from_images(images_for(model))((3, 3, 3, 4))
    np.testing.assert_allclose(kernel_of(model, "stem_conv"), expected, atol=1e-6)


def test_a_symmetric_net_stays_symmetric():
    model = net(input_shape=(17, 17, 3))  # strides of 2 keep the same columns of both views
    ortho_keras.symmetrize(model)
    images = images_for(model)
    both = np.concatenate([images, images[:, :, ::-1]])  # BatchNormalization's statistics are then alike for partners
    start_from_patches(model, both)
    np.testing.assert_allclose(model(images[:, :, ::-1]), model(images), atol=1e-4)
    for name in WIDENING:
        kernel, covariance = kernel_of(model, name), covariance_before(model, name, both)
        assert ortho_keras.orthonormality_error(kernel) < 1e-5
        matrix = kernel.reshape(-1, kernel.shape[-1])
        even, odd = matrix[:, ::2] + matrix[:, 1::2], matrix[:, ::2] - matrix[:, 1::2]
        order = np.arange(len(matrix)).reshape(3, 3, -1)[:, ::-1]
        order = order[..., np.arange(order.shape[-1]) ^ 1].ravel()
        for components, sign in ((even, 1), (odd, -1)):
            np.testing.assert_allclose(components[order], sign * components, atol=1e-6)
            spread = components.T @ covariance @ components / 2
            np.testing.assert_allclose(spread, np.diag(np.diag(spread)), atol=1e-4 * spread.max())
            assert np.all(np.diff(np.diag(spread)) < 0)


def test_a_dilated_convolution_gets_dilated_patches():
    inputs = keras.Input((15, 14, 3))
    layer = keras.layers.Conv2D(5, 3, dilation_rate=(2, 3), name="dilated")
    model = keras.Model(inputs, layer(inputs))
    images = images_for(model)
    assert start_from_patches(model, images, ["dilated"]) == ["dilated"]
    # What the layer's whole taps see, of as many rows and columns as the rates divide.
    patches = np.stack([images[:, y : y + 10, x : x + 6] for y in (0, 2, 4) for x in (0, 3, 6)], 3)[:, :10, :6]
    covariance = np.cov(patches.reshape(-1, 27).astype(np.float64).T)
    matrix = kernel_of(model, "dilated").reshape(27, 5)
    largest = np.linalg.eigvalsh(covariance)[::-1][:5]
    np.testing.assert_allclose(matrix.T @ covariance @ matrix, np.diag(largest), atol=1e-4 * largest[0])


def test_a_dilated_kernel_that_does_not_fit():
    inputs = keras.Input((4, 4, 3))
    model = keras.Model(inputs, keras.layers.Conv2D(5, 3, padding="same", dilation_rate=2, name="dilated")(inputs))
    told = "Received, at 'dilated': 4x4 pixels, too few for a kernel of 3x3 with a dilation of 2x2"
    with pytest.raises(ValueError, match=told):
        start_from_patches(model, images_for(model), ["dilated"])


def test_images_in_half_precision():
    model, other = net(), net()
    images = tf.cast(images_for(model), "bfloat16")
    assert start_from_patches(model, images) == WIDENING
    start_from_patches(other, tf.cast(images, tf.float32))
    for name in WIDENING:
        np.testing.assert_allclose(kernel_of(model, name), kernel_of(other, name), atol=1e-6)


def test_layers_that_share_a_name():
    nested = [keras.Sequential([keras.layers.Conv2D(count, 3, name="same")], name=f"part{count}") for count in (4, 8, 16)]
    model = keras.Sequential([keras.Input((12, 12, 3)), *nested])
    before = [part.layers[0].kernel.numpy() for part in nested]
    assert start_from_patches(model, images_for(model)) == ["same", "same"]
    changed = [not np.array_equal(part.layers[0].kernel, value) for part, value in zip(nested, before)]
    assert changed == [False, True, True]


def test_channels_first_is_no_choice():
    inputs = keras.Input((4, 12, 4))
    model = keras.Model(inputs, keras.layers.Conv2D(8, 3, data_format="channels_first", name="first")(inputs))
    with pytest.raises(ValueError, match="`layers` must name Conv2D layers of one group, channels last, .* Received: first"):
        start_from_patches(model, images_for(model), ["first"])


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"images": [np.zeros((4, 15, 13, 3))]},
            r"`images` must be real numbers .* Received: images of shape \(1, 4, 15, 13, 3\)",
        ),
        ({"images": np.zeros((0, 15, 13, 3))}, r"`images` must be real numbers .* shape \(0, 15, 13, 3\)"),
        ({"images": np.full((4, 15, 13, 3), "a")}, "`images` must be real numbers .* type <U1"),
        ({"layers": "stem_conv"}, "`layers` must be a list of names. Received: layers='stem_conv'"),
        ({"layers": 3}, "`layers` must be a list of names. Received: layers=3"),
        ({"model": keras.Sequential([keras.layers.Conv2D(4, 3)])}, "`model` must be a built Keras model"),
    ],
)
def test_other_arguments_are_told(given, told):
    model = net()
    with pytest.raises(ValueError, match=told):
        start_from_patches(**{"model": model, "images": images_for(model), **given})


@pytest.mark.parametrize(
    ("layers", "change", "told"),
    [
        (["stage2_conv01", "pool", "nowhere"], 1.0, "`layers` must name Conv2D layers .* Received: pool, nowhere"),
        (None, 0.0, "`images` must give every layer patches that differ. Received, at 'stage2_conv01'"),
        (None, np.nan, "`images` must give every layer patches that differ. Received, at 'stage2_conv01'"),
    ],
)
def test_wrong_input_changes_nothing(layers, change, told):
    model = net()
    before = values_of(model)
    with pytest.raises(ValueError, match=told):
        start_from_patches(model, images_for(model) * np.float32(change), layers)
    assert all(np.array_equal(value, before[path]) for path, value in values_of(model).items())


def test_features_smaller_than_the_kernel():
    model = net(input_shape=(4, 4, 3))  # the third stage's convolution gets 2x2 pixels
    with pytest.raises(ValueError, match="Received, at 'stage3_conv01': .* no smaller than the kernel, 3x3"):
        start_from_patches(model, images_for(model))


def recipe(**changes):
    return dataclasses.replace(find_preset("digits").recipe, depth=8, image_size=8, widening_initializer="pca", **changes)


@pytest.mark.parametrize("mirror_symmetry", [False, True])
def test_a_recipes_net_starts_so(mirror_symmetry):
    data = load_data("digits", None, 8)
    stem = {"mirror_symmetry": True, "stem_initializer": "pca", "width": 4} if mirror_symmetry else {}
    model = build_model(recipe(**stem), data)
    other = build_model(dataclasses.replace(recipe(**stem), widening_initializer="same"), data)
    changed = {name for name in (layer.name for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
               if not np.array_equal(kernel_of(model, name), kernel_of(other, name))}  # fmt: skip
    assert changed == set(WIDENING)
    start_from_patches(other, data.train.images.astype("float32"))
    for name in WIDENING:
        np.testing.assert_allclose(kernel_of(model, name), kernel_of(other, name), atol=1e-6)


def test_images_without_patches_name_the_flag():
    data = load_data("digits", None, 8)
    train = dataclasses.replace(data.train, images=np.zeros_like(data.train.images))
    with pytest.raises(InputError, match="--widening_initializer=pca must have"):
        build_model(recipe(), dataclasses.replace(data, train=train))
