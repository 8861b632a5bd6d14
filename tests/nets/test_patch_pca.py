"""PatchPCAInitializer against patches that are cut out one by one and decomposed."""

import dataclasses

import keras
import numpy as np
import pytest

from ortho_keras import OrthonormalRegularizer, PatchPCAInitializer, plain_cnn
from ortho_keras.trainer.build import build_model
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.recipes import find_preset


def correlated_images(shape=(40, 9, 8, 3)):
    """Images whose neighbouring pixels and channels are correlated, as those of photographs are."""
    images = np.random.default_rng(0).normal(size=shape)
    images = images + np.roll(images, 1, 1) + np.roll(images, 1, 2)
    return images + 3 * images.mean(-1, keepdims=True) + 5


def all_patches(images, height, width):
    """Every patch within the images as a row, in the order of a kernel's axes."""
    _, rows, columns, _ = images.shape
    tops, lefts = range(rows - height + 1), range(columns - width + 1)
    return np.array([i[top : top + height, left : left + width].ravel() for i in images for top in tops for left in lefts])


@pytest.mark.parametrize(
    ("shape", "size", "offset"), [((40, 9, 8, 3), 3, 0), ((300, 6, 6, 1), (3, 3), 1e5), ((12, 7, 9, 2), (2, 3), 0)]
)
def test_components_diagonalize_the_patches_covariance(shape, size, offset):
    images = correlated_images(shape)
    height, width = (size, size) if isinstance(size, int) else size
    components = PatchPCAInitializer.from_images(images + offset, size).components
    assert components.shape == (height, width, shape[-1], height * width * shape[-1])
    matrix = components.reshape(-1, components.shape[-1])
    along = matrix.T @ np.cov(all_patches(images, height, width).T, bias=True) @ matrix
    np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-9 * along[0, 0])
    assert (np.diff(np.diag(along)) <= 1e-9 * along[0, 0]).all()  # the largest variance first
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-10)
    assert (np.take_along_axis(matrix, np.abs(matrix).argmax(0)[np.newaxis], 0) > 0).all()


def test_two_pixels_by_hand():
    """Pixels a and b of variance 1 and covariance 0.5: their mean has variance 1.5, their difference 0.5."""
    a, b = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    pixels = np.stack([a, 0.5 * a + np.sqrt(0.75) * b], 1)
    components = PatchPCAInitializer.from_images(pixels.reshape(4, 1, 2, 1), (1, 2)).components
    np.testing.assert_allclose(np.abs(components[0, :, 0]), np.full((2, 2), np.sqrt(0.5)), rtol=1e-12)
    np.testing.assert_allclose(components[0, 0, 0, 0], components[0, 1, 0, 0], rtol=1e-12)


def test_channels_after_a_batchnormalization_are_white_inside_the_image():
    images = correlated_images().astype("float32")
    layer = keras.layers.Conv2D(16, 3, use_bias=False, kernel_initializer=PatchPCAInitializer.from_images(images))
    outputs = np.asarray(layer(images), np.float64).reshape(-1, 16)
    outputs = (outputs - outputs.mean(0)) / outputs.std(0)
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), np.eye(16), atol=1e-4)
    assert float(OrthonormalRegularizer(1.0)(layer.kernel)) < 1e-10


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_more_filters_than_components_take_negatives_then_the_components_again(dtype):
    components = np.random.default_rng(1).integers(-3, 4, size=(3, 3, 1, 4))
    kernel = PatchPCAInitializer(components)((3, 3, 1, 10), dtype=dtype)
    expected = np.concatenate([components, -components, components[..., :2]], -1)
    np.testing.assert_array_equal(np.asarray(kernel, np.float64), expected)
    assert kernel.dtype == dtype


def test_directions_without_variance_are_left_out():
    images = correlated_images((50, 6, 6, 3))
    images[..., 2] = 0.3 * images[..., 0] - images[..., 1]
    assert PatchPCAInitializer.from_images(images, 1).components.shape == (1, 1, 3, 2)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (np.ones((4, 8, 8)), 3, "`images` must be .* Received: images of shape .4, 8, 8."),
        (np.ones((0, 8, 8, 3)), 3, "`images` must be .* Received: images of shape .0, 8, 8, 3."),
        (np.ones((4, 8, 2, 3)), 3, "not smaller than the kernel .3, 3.. Received: images of shape .4, 8, 2, 3."),
        (np.ones((4, 8, 8, 3), complex), 3, "`images` must be real numbers .* and type complex128"),
        (np.full((4, 8, 8, 3), np.nan), 3, "`images` must be finite"),
        (np.full((4, 8, 8, 3), 0.1, np.float32), 3, "not all of their patches the same"),
        (np.ones((4, 8, 8, 3)), 3.0, "`kernel_size` must be an integer, at least 1. Received: kernel_size=3.0"),
        (np.ones((4, 8, 8, 3)), (3, 0), "`kernel_size` must be an integer, at least 1. Received: kernel_size=0"),
        (
            np.ones((4, 8, 8, 3)),
            (3, 3, 3),
            "`kernel_size` must be an integer or a tuple of two. Received: kernel_size=.3, 3, 3.",
        ),
    ],
)
def test_images_without_components(images, size, message):
    with pytest.raises(ValueError, match=message):
        PatchPCAInitializer.from_images(images, size)


def test_wrong_components_and_kernels_of_another_shape():
    for components in (np.ones((3, 3, 4)), np.ones((3, 3, 1, 0)), np.full((1, 1, 1, 1), np.inf)):
        with pytest.raises(ValueError, match="`components` must be finite numbers of shape .kh, kw, channels, n.. Received: "):
            PatchPCAInitializer(components)
    for shape in ((5, 5, 3, 16), (3, 3, 1, 16), (27, 16)):
        with pytest.raises(ValueError, match="`shape` must be .3, 3, 3, 'filters'.* Received: shape="):
            PatchPCAInitializer(np.ones((3, 3, 3, 2)))(shape)


def test_only_the_first_convolution_starts_so_and_the_model_is_saved_with_it(tmp_path):
    initializer = PatchPCAInitializer(np.random.default_rng(0).normal(size=(3, 3, 3, 5)))
    model, same = (plain_cnn(8, (8, 8, 3), width=4, stem_initializer=one, seed=1) for one in (initializer, None))
    np.testing.assert_allclose(model.get_layer("stem_conv").kernel, initializer.components[..., :4], rtol=1e-6)
    for mine, other in zip(model.weights[1:], same.weights[1:], strict=True):
        np.testing.assert_array_equal(mine, other)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras").get_layer("stem_conv").kernel_initializer
    np.testing.assert_array_equal(again((3, 3, 3, 9)), initializer((3, 3, 3, 9)))


def test_a_recipes_components_are_those_of_its_normalized_training_images():
    recipe = dataclasses.replace(find_preset("digits").recipe, image_size=0, depth=8, stem_initializer="pca")
    data = load_data("digits")
    model = build_model(recipe, data)
    images = np.asarray(model.get_layer("normalization")(data.train.images.astype("float32")))
    _, vectors = np.linalg.eigh(np.cov(all_patches(images.astype(np.float64), 3, 3).T))
    kernel = np.asarray(model.get_layer("stem_conv").kernel, np.float64).reshape(9, 16)[:, :9]
    np.testing.assert_allclose(np.abs(np.diag(kernel.T @ vectors[:, ::-1])), 1, atol=1e-4)
