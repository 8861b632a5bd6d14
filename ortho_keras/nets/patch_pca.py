"""Where the first convolution starts: the principal components of the images' patches."""

import operator

import keras
import numpy as np
import tensorflow as tf

CHUNK = 250 * 32 * 32 * 27  # numbers in patches at a time
LEAST_VARIANCE = 1e-6  # of the first component's: less is rounding, which BatchNormalization would blow up


@keras.saving.register_keras_serializable(package="ortho_keras")
class PatchPCAInitializer(keras.initializers.Initializer):
    """Starts a net's first convolution as the principal components of the images' patches, the largest variance first.

    Neighbouring pixels and the three colours are nearly the same number, so random filters nearly all show brightness:
    the channels are copies of each other, and orthonormal layers hand the copies on. Principal components are uncorrelated,
    and a BatchNormalization behind them brings each to variance 1: the net begins with whitened patches. The components are
    orthonormal, so `OrthonormalRegularizer`'s gradient is 0 at them.

    Made from images by `PatchPCAInitializer.from_images`, and for one kernel size. A kernel with more filters than there are
    components takes their negatives next, then the components again; these are not orthonormal to each other, unless all
    directions vary and so the components are a whole group of `OrthonormalRegularizer`'s.

    Args:
        components: Array or nested lists `(kh, kw, channels, n)`, n at least 1: filters, as they come.

    Raises:
        ValueError: If `components` is not of rank 4 or not finite, or a kernel of other patches is asked for.

    Example:

    >>> images = np.random.default_rng(0).normal(size=(10, 8, 8, 3))
    >>> initializer = PatchPCAInitializer.from_images(images, kernel_size=3)
    >>> layer = keras.layers.Conv2D(16, 3, kernel_initializer=initializer)

    Reference:
        Ours, after Coates and Ng 2012, "Learning feature representations with k-means", who whiten patches, and Jordan 2024
        ([arXiv:2404.00498](https://arxiv.org/abs/2404.00498)), whose first layer is frozen at scaled components. Not a part of
        Xie et al. 2017.
    """

    def __init__(self, components):
        components = np.asarray(components, np.float64)
        if components.ndim != 4 or not components.size or not np.isfinite(components).all():
            raise ValueError(
                "`components` must be finite numbers of shape (kh, kw, channels, n). "
                f"Received: components of shape {components.shape}"
            )
        self.components = components

    @classmethod
    def from_images(cls, images, kernel_size=3):
        """Returns the initializer whose components are those of all patches within the images.

        Args:
            images: Array `(batch, height, width, channels)`, as they reach the convolution: normalized, if the net does so.
                A few thousand are enough.
            kernel_size: int, or tuple of two: height and width of the kernel.

        Raises:
            ValueError: If the images are not numbers of rank 4, are smaller than the kernel, not finite, or all patches are the
                same; or if `kernel_size` is not one or two positive integers.
        """
        images = np.asarray(images)
        if images.dtype.kind not in "uif":
            raise ValueError(f"`images` must be real numbers. Received: images of type {images.dtype}")
        try:
            size = tuple(map(operator.index, np.broadcast_to(kernel_size, 2)))
        except (TypeError, ValueError):
            size = (0, 0)
        if min(size) < 1 or isinstance(kernel_size, bool):
            raise ValueError(f"`kernel_size` must be a positive integer or two. Received: kernel_size={kernel_size!r}")
        if images.ndim != 4 or not images.size or images.shape[1] < size[0] or images.shape[2] < size[1]:
            raise ValueError(
                f"`images` must be (batch, height, width, channels), no smaller than the kernel, {size[0]}x{size[1]}. "
                f"Received: images of shape {images.shape}"
            )
        covariance = _patch_covariance(images, size)
        if not np.isfinite(covariance).all() or covariance.max() <= 1e-12 * np.square(images, dtype=np.float64).mean():
            raise ValueError(
                "`images` must be finite, and not all of their patches the same. "
                f"Received: images of shape {images.shape} from {images.min()} to {images.max()}"
            )
        vectors = _components(covariance)
        largest = np.take_along_axis(vectors, np.abs(vectors).argmax(0)[np.newaxis], 0)
        return cls((vectors * np.sign(largest)).reshape(*size, images.shape[-1], -1))

    def __call__(self, shape, dtype=None):
        *expected, count = self.components.shape
        if len(shape) != 4 or list(shape[:-1]) != expected:
            raise ValueError(
                f"PatchPCAInitializer holds patches of shape {tuple(expected)}: a kernel must be {(*expected, 'filters')}. "
                f"Received: shape={tuple(shape)}"
            )
        turn, component = np.divmod(np.arange(shape[-1]), count)
        kernel = self.components[..., component] * np.where(turn % 2, -1.0, 1.0)
        return tf.cast(tf.constant(kernel), keras.backend.standardize_dtype(dtype))

    def get_config(self):
        return {"components": self.components.tolist()}


def _components(covariance):
    """The eigenvectors as columns, the largest eigenvalue first; none below `LEAST_VARIANCE` of that."""
    variances, vectors = np.linalg.eigh(covariance)  # rising
    return vectors[:, variances > LEAST_VARIANCE * variances[-1]][:, ::-1]


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
    mean, moments = total / count, squares / count
    return moments - np.outer(mean, mean)
