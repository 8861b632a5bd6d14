"""An initializer of the first convolution: the principal components of the images' patches."""

import keras
import numpy as np
from keras import ops

from ortho_keras.method.checks import check_number

CHUNK = 250 * 32 * 32 * 27  # numbers in patches at a time
LEAST_VARIANCE = 1e-6  # of the first component's: less is rounding, which BatchNormalization would amplify


@keras.saving.register_keras_serializable(package="ortho_keras")
class PatchPCAInitializer(keras.initializers.Initializer):
    """Sets the first convolution to the principal components of the images' patches, in the order of falling variance.

    Neighbouring pixels and the three colours are highly correlated, so nearly all random filters show brightness: their
    channels are copies of each other, and orthonormal layers pass the copies on. Principal components are uncorrelated, and
    the BatchNormalization that follows scales each to variance 1: the network starts with whitened patches. The components are
    orthonormal, so the gradient of `OrthonormalRegularizer` is 0 at them.

    An instance is made by `from_images`, for one kernel size. A kernel with more filters than there are components continues
    with their negatives, then with the components again. These are not orthonormal to each other, unless all directions vary,
    so that the components fill one of the regularizer's groups.

    Args:
        components: Array or nested lists `(kh, kw, channels, n)` of filters, n at least 1.

    Raises:
        ValueError: If `components` are not finite or not of rank 4, or if a kernel for patches of another shape is requested.

    Example:

    >>> images = np.random.default_rng(0).normal(size=(10, 8, 8, 3))
    >>> initializer = PatchPCAInitializer.from_images(images, kernel_size=3)
    >>> layer = keras.layers.Conv2D(16, 3, kernel_initializer=initializer)

    Reference:
        Ours, after Coates and Ng 2012, "Learning feature representations with k-means", who whiten patches, and Jordan 2024
        ([arXiv:2404.00498](https://arxiv.org/abs/2404.00498)), whose first layer is fixed at scaled components. Not a part of
        Xie et al. 2017.
    """

    def __init__(self, components):
        self.components = np.asarray(components, np.float64)
        if self.components.ndim != 4 or not self.components.size or not np.isfinite(self.components).all():
            raise ValueError(
                "`components` must be finite numbers of shape (kh, kw, channels, n). "
                f"Received: components of shape {self.components.shape}"
            )

    @classmethod
    def from_images(cls, images, kernel_size=3):
        """Returns the initializer whose components are those of all patches within the images.

        Args:
            images: Array `(batch, height, width, channels)` as it reaches the convolution: normalized, if the network does so.
                A few thousand images are enough.
            kernel_size: int, or tuple of two: height and width of the kernel.

        Raises:
            ValueError: If `images` are not finite real numbers of rank 4 or are smaller than the kernel, if all patches are the
                same, or if `kernel_size` is not one or two positive integers.
        """
        images = np.asarray(images)
        size = kernel_size if np.ndim(kernel_size) else (kernel_size, kernel_size)
        size = tuple(check_number("kernel_size", side, least=1, integer=True) for side in size)
        if len(size) != 2:
            raise ValueError(f"`kernel_size` must be an integer or a tuple of two. Received: kernel_size={kernel_size!r}")
        numbers = images.dtype.kind in "uif" and images.ndim == 4 and images.size
        if not numbers or images.shape[1] < size[0] or images.shape[2] < size[1]:
            raise ValueError(
                f"`images` must be real numbers (batch, height, width, channels), not smaller than the kernel {size}. "
                f"Received: images of shape {images.shape} and type {images.dtype}"
            )
        covariance = _patch_covariance(images, size)
        if not np.isfinite(covariance).all() or covariance.max() <= 1e-12 * np.square(images, dtype=np.float64).mean():
            raise ValueError(
                "`images` must be finite, and not all of their patches the same. "
                f"Received: images of shape {images.shape} from {images.min()} to {images.max()}"
            )
        variances, vectors = np.linalg.eigh(covariance)  # in rising order
        vectors = vectors[:, variances > LEAST_VARIANCE * variances[-1]][:, ::-1]
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[np.newaxis], 0)
        return cls((vectors * np.sign(largest)).reshape(*size, images.shape[-1], -1))

    def __call__(self, shape, dtype=None):
        *expected, count = self.components.shape
        if list(shape[:-1]) != expected:
            raise ValueError(
                f"`shape` must be {(*expected, 'filters')}, as the patches of this PatchPCAInitializer. "
                f"Received: shape={tuple(shape)}"
            )
        turn, component = np.divmod(np.arange(shape[-1]), count)
        kernel = self.components[..., component] * np.where(turn % 2, -1.0, 1.0)
        return ops.cast(kernel, keras.backend.standardize_dtype(dtype))

    def get_config(self):
        return {"components": self.components.tolist()}


def _patch_covariance(images, size):
    """Returns the covariance matrix of all patches, float64, their entries in the order of a kernel's axes."""
    length = size[0] * size[1] * images.shape[-1]
    centre = images.mean((0, 1, 2), dtype=np.float64)
    count, total, squares = 0, np.zeros(length), np.zeros((length, length))
    step = max(1, CHUNK // (images.shape[1] * images.shape[2] * length))
    for start in range(0, len(images), step):
        chunk = images[start : start + step].astype(np.float64) - centre
        patches = np.lib.stride_tricks.sliding_window_view(chunk, size, axis=(1, 2))  # batch, rows, columns, channels, kh, kw
        patches = patches.transpose(0, 1, 2, 4, 5, 3).reshape(-1, length)
        count, total, squares = count + len(patches), total + patches.sum(0), squares + patches.T @ patches
    mean = total / count
    return squares / count - np.outer(mean, mean)
