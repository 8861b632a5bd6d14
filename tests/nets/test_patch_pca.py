"""The first convolution's principal components against patches that are cut out and decomposed one by one."""

import dataclasses

import keras
import numpy as np
import pytest
import references

from ortho_keras import OrthonormalRegularizer, PatchPCAInitializer, plain_cnn, residual_cnn
from ortho_keras.trainer.build import build_model
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.recipes import find_preset


def correlated_images(shape=(40, 9, 8, 3), seed=0):
    """Images whose neighbouring pixels and channels go together, as those of photographs do."""
    images = np.random.default_rng(seed).normal(size=shape)
    images = images + np.roll(images, 1, 1) + np.roll(images, 1, 2)
    return images + 3 * images.mean(-1, keepdims=True) + 5


def all_patches(images, height, width):
    """Every patch within the images as a row, in the order of a kernel's axes."""
    _, rows, columns, _ = images.shape
    return np.array(
        [
            image[top : top + height, left : left + width].ravel()
            for image in images
            for top in range(rows - height + 1)
            for left in range(columns - width + 1)
        ]
    )


@pytest.mark.parametrize(
    ("shape", "size"), [((40, 9, 8, 3), 3), ((300, 6, 6, 1), (3, 3)), ((12, 7, 9, 2), (2, 3)), ((9, 5, 5, 4), 1)]
)
def test_components_diagonalize_the_patches_covariance(shape, size):
    images = correlated_images(shape)
    height, width = (size, size) if isinstance(size, int) else size
    components = PatchPCAInitializer.from_images(images, size).components
    assert components.shape == (height, width, shape[-1], height * width * shape[-1])
    matrix = components.reshape(-1, components.shape[-1])
    covariance = np.cov(all_patches(images, height, width).T, bias=True).reshape(len(matrix), -1)
    along = matrix.T @ covariance @ matrix
    np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-9 * along[0, 0])
    assert (np.diff(np.diag(along)) <= 1e-9 * along[0, 0]).all()  # the largest variance first
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(len(matrix)), atol=1e-10)
    assert (np.take_along_axis(matrix, np.abs(matrix).argmax(0)[np.newaxis], 0) > 0).all()


def test_components_of_images_and_their_mirror_images():
    x = np.random.default_rng(0).normal(size=(60, 8, 7, 3))
    x = x + 0.7 * np.roll(x, 1, 2) + 0.2 * np.roll(x, 2, 1)
    components = PatchPCAInitializer.from_images(x, 3, mirrored=True).components
    for index in range(18):  # of 27 a third is odd: 9 pairs
        sign = 1 if index % 2 == 0 else -1
        np.testing.assert_allclose(components[:, ::-1, :, index], sign * components[..., index], atol=1e-12)
    patches = np.lib.stride_tricks.sliding_window_view(np.concatenate([x, x[:, :, ::-1]]), (3, 3), (1, 2))
    matrix = components.reshape(27, 27)
    along = matrix.T @ np.cov(patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, 27).T, bias=True) @ matrix
    np.testing.assert_allclose(along, np.diag(np.diag(along)), atol=1e-9 * along.max())
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(27), atol=1e-10)
    even, odd = np.r_[0:18:2, 18:27], slice(1, 18, 2)
    assert all((np.diff(np.diag(along)[kind]) < 0).all() for kind in (even, odd))  # each kind by variance


def test_two_pixels_by_hand():
    """Pixels a and b of variance 1 and covariance 0.5: their mean has variance 1.5, their difference 0.5."""
    a, b = np.array([1.0, 1, -1, -1]), np.array([1.0, -1, 1, -1])
    pixels = np.stack([a, 0.5 * a + np.sqrt(0.75) * b], 1)
    components = PatchPCAInitializer.from_images(pixels.reshape(4, 1, 2, 1), (1, 2)).components
    np.testing.assert_allclose(np.abs(components[0, :, 0]), np.full((2, 2), np.sqrt(0.5)), rtol=1e-12)
    np.testing.assert_allclose(components[0, 0, 0, 0], components[0, 1, 0, 0], rtol=1e-12)


def test_channels_behind_a_batchnormalization_are_white_inside_the_image():
    images = correlated_images().astype("float32")
    layer = keras.layers.Conv2D(16, 3, use_bias=False, kernel_initializer=PatchPCAInitializer.from_images(images))
    outputs = np.asarray(layer(images), np.float64).reshape(-1, 16)
    outputs = (outputs - outputs.mean(0)) / outputs.std(0)
    np.testing.assert_allclose(outputs.T @ outputs / len(outputs), np.eye(16), atol=1e-4)
    _, gradient = references.penalty_and_gradient(np.asarray(layer.kernel), "standard", 1.0)
    assert np.abs(gradient).max() < 1e-5
    assert float(OrthonormalRegularizer(1.0)(layer.kernel)) < 1e-10


def test_more_filters_than_components_take_negatives_then_the_components_again():
    components = np.random.default_rng(1).normal(size=(3, 3, 1, 4))
    kernel = np.asarray(PatchPCAInitializer(components)((3, 3, 1, 10), dtype="float64"))
    np.testing.assert_array_equal(kernel[..., :4], components)
    np.testing.assert_array_equal(kernel[..., 4:8], -components)
    np.testing.assert_array_equal(kernel[..., 8:], components[..., :2])


def test_directions_without_variance_are_left_out():
    images = correlated_images((50, 6, 6, 3))
    images[..., 2] = 0.3 * images[..., 0] - images[..., 1]
    assert PatchPCAInitializer.from_images(images, 1).components.shape == (1, 1, 3, 2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_every_float_dtype(dtype):
    assert PatchPCAInitializer.from_images(correlated_images())((3, 3, 3, 8), dtype=dtype).dtype == dtype


def test_a_large_offset_does_not_blur_the_components():
    images = correlated_images()
    plain, offset = (PatchPCAInitializer.from_images(x).components[..., :8] for x in (images, (images + 1e5).astype("float64")))
    np.testing.assert_allclose(plain, offset, atol=1e-6)


@pytest.mark.parametrize(
    ("images", "size", "message"),
    [
        (np.ones((4, 8, 8)), 3, "`images` must be .* Received: images of shape .4, 8, 8."),
        (np.ones((0, 8, 8, 3)), 3, "`images` must be .* Received: images of shape .0, 8, 8, 3."),
        (np.ones((4, 8, 2, 3)), 3, "no smaller than the kernel, 3x3. Received: images of shape .4, 8, 2, 3."),
        (np.ones((4, 8, 8, 3)), 3, "`images` must be finite, and not all of their patches the same"),
        (np.full((4, 8, 8, 3), np.nan), 3, "`images` must be finite"),
        (np.full((4, 8, 8, 3), 0.1, np.float32), 3, "not all of their patches the same"),
        (np.ones((4, 8, 8, 3), complex), 3, "`images` must be real numbers. Received: images of type complex128"),
        (np.ones((4, 8, 8, 3)), 3.0, "`kernel_size` must be a positive integer or two. Received: kernel_size=3.0"),
        (np.ones((4, 8, 8, 3)), True, "`kernel_size` must be a positive integer or two. Received: kernel_size=True"),
        (np.ones((4, 8, 8, 3)), None, "`kernel_size` must be a positive integer or two. Received: kernel_size=None"),
        (np.ones((4, 8, 8, 3)), 0, "`kernel_size` must be a positive integer or two. Received: kernel_size=0"),
        (np.ones((4, 8, 8, 3)), (3, 3, 3), "`kernel_size` must be .* Received: kernel_size=.3, 3, 3."),
    ],
)
def test_images_that_have_no_components(images, size, message):
    with pytest.raises(ValueError, match=message):
        PatchPCAInitializer.from_images(images, size)


@pytest.mark.parametrize("components", [np.ones((3, 3, 4)), np.ones((3, 3, 1, 0)), np.full((1, 1, 1, 1), np.inf)])
def test_components_that_are_none(components):
    with pytest.raises(ValueError, match="`components` must be finite numbers of shape .kh, kw, channels, n.. Received: "):
        PatchPCAInitializer(components)


@pytest.mark.parametrize("shape", [(5, 5, 3, 16), (3, 3, 1, 16), (27, 16)])
def test_a_kernel_of_another_shape(shape):
    with pytest.raises(ValueError, match="holds patches of shape .3, 3, 3.: a kernel must be .* Received: shape="):
        PatchPCAInitializer.from_images(correlated_images())(shape)


def test_a_stems_random_kernel_is_fixed_by_the_nets_seed():
    kernels = [
        plain_cnn(8, (8, 8, 3), stem_initializer="he_normal", seed=seed).get_layer("stem_conv").kernel for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(kernels[0], kernels[1])
    assert np.abs(np.asarray(kernels[0]) - np.asarray(kernels[2])).max() > 0.01


@pytest.mark.parametrize("builder", [plain_cnn, residual_cnn])
def test_only_the_first_convolution_starts_so_and_the_model_is_saved_with_it(tmp_path, builder):
    images = correlated_images()
    initializer = PatchPCAInitializer.from_images(images)
    model = builder(8, (8, 8, 3), width=4, stem_initializer=initializer, seed=1)
    same = builder(8, (8, 8, 3), width=4, seed=1)
    np.testing.assert_allclose(model.get_layer("stem_conv").kernel, initializer.components[..., :4], rtol=1e-6)
    for mine, other in zip(model.layers, same.layers):
        if mine.name != "stem_conv":
            for one, two in zip(mine.get_weights(), other.get_weights()):
                np.testing.assert_array_equal(one, two)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(loaded(images[:, :8]), model(images[:, :8]))
    again = loaded.get_layer("stem_conv").kernel_initializer
    np.testing.assert_array_equal(again((3, 3, 3, 4)), initializer((3, 3, 3, 4)))


def test_a_recipes_components_are_those_of_its_normalized_training_images():
    recipe = dataclasses.replace(find_preset("digits").recipe, image_size=0, depth=8, stem_initializer="pca")
    data = load_data("digits")
    model = build_model(recipe, data)
    images = np.asarray(model.get_layer("normalization")(data.train.images.astype("float32")))
    patches = all_patches(images.astype(np.float64), 3, 3)
    _, vectors = np.linalg.eigh(np.cov(patches.T))
    cosines = np.abs(np.asarray(model.get_layer("stem_conv").kernel, np.float64).reshape(9, 16)[:, :9].T @ vectors[:, ::-1])
    np.testing.assert_allclose(np.diag(cosines), 1, atol=1e-4)
