"""Where the convolutions that widen a net start: the principal components of the patches that they get."""

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.graphs import Graph
from ortho_keras.mirror import MirrorConstraint, symmetric_start
from ortho_keras.patch_pca import PatchPCAInitializer


def start_from_patches(model, images, layers=None):
    """Sets convolutions' kernels to the principal components of the patches that they get of some images, in place.

    An identity (`DiracInitializer`) hands on what it gets, but a convolution that widens the net, from 16 to 32 channels,
    say, cannot be one. Random filters there mostly see what varies most, all of them, and an orthonormal net hands on those
    copies. Principal components are uncorrelated, and the BatchNormalization behind them brings each to variance 1; they are
    orthonormal, so `OrthonormalRegularizer`'s gradient is 0 at them. The layers are taken in order: each sees what comes
    of the kernels that were set before it, with BatchNormalization by the statistics of these images.

    A kernel under a `MirrorConstraint` (`symmetrize` comes first) starts symmetric: every two partners are the sum and the
    difference of a component that is its own mirror image and of one that is the negative of it.

    Args:
        model: A built Functional or Sequential model of images `(batch, height, width, channels)`.
        images: Array `(batch, height, width, channels)`, as the model takes them. A thousand of 32x32 pixels are enough: what
            the layers make of all of them is in memory at once.
        layers: List of names of Conv2D layers, of one group and channels last. By default those of more than one pixel that
            have more filters than input channels, but for the model's first, which `PatchPCAInitializer` is for.

    Returns:
        The names of the layers, in the order in which they were set.

    Raises:
        ValueError: If an argument is none of the above, if `layers` names what is no such Conv2D in the model, or if what a
            layer gets is smaller than its kernel, not finite, or the same at all patches. Nothing is changed then.

    Example:

    >>> model = ortho_keras.plain_cnn(44, relu_shift=1.0, initializer="dirac")
    >>> ortho_keras.start_from_patches(model, images)
    ['stage2_conv01', 'stage3_conv01']

    Reference:
        Ours, after Chan et al. 2015, "PCANet" ([arXiv:1404.3606](https://arxiv.org/abs/1404.3606)), whose cascaded filters are
        the components of patches, untrained. Not a part of Xie et al. 2017.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
    images = np.asarray(images)
    if images.ndim != 4 or not images.size or images.dtype.kind in "OSUc":
        raise ValueError(
            "`images` must be real numbers (batch, height, width, channels). "
            f"Received: images of shape {images.shape} and type {images.dtype}"
        )
    if layers is not None and (not isinstance(layers, (list, tuple)) or not all(isinstance(name, str) for name in layers)):
        raise ValueError(f"`layers` must be a list of names. Received: layers={layers!r}")
    graph = Graph(model)
    before, first = {}, True

    def call(layer, *args, **kwargs):
        nonlocal first
        if isinstance(layer, keras.layers.Conv2D):
            if _is_chosen(layer, layers, first) and id(layer) not in before:
                before[id(layer)] = layer, layer.kernel.numpy()
                layer.kernel.assign(_components(layer, args[0] if args else kwargs["inputs"]))
            first = False
        if isinstance(layer, keras.layers.BatchNormalization):
            return _normalized(layer, args[0] if args else kwargs["inputs"])
        return layer(*args, **kwargs)

    try:
        graph.run(tf.convert_to_tensor(images), call, training=False)
        names = [layer.name for layer, _ in before.values()]
        missing = [name for name in layers or () if name not in names]
        if missing:
            wanted = "Conv2D layers of one group, channels last, in the model"
            raise ValueError(f"`layers` must name {wanted}. Received: {', '.join(missing)}")
    except BaseException:
        for layer, value in before.values():
            layer.kernel.assign(value)
        raise
    return names


def _is_chosen(layer, layers, first):
    if layer.groups != 1 or layer.data_format != "channels_last" or getattr(layer, "lora_enabled", False):
        return False
    if layers is not None:
        return layer.name in layers
    *size, channels, filters = layer.kernel.shape
    return not first and max(size) > 1 and filters > channels


def _components(layer, x):
    """The kernel that a convolution starts with, of its inputs `(batch, height, width, channels)`."""
    constraint = layer.kernel_constraint
    mirrored = isinstance(constraint, MirrorConstraint)
    try:
        features = _undilated(np.asarray(tf.cast(x, tf.float32)), layer)
        initializer = PatchPCAInitializer.from_images(features, layer.kernel_size, mirrored, mirrored and constraint.inputs)
    except ValueError as error:
        raise ValueError(f"`images` must give every layer patches that differ. Received, at {layer.name!r}: {error}") from error
    kernel = initializer(layer.kernel.shape, "float64")
    return symmetric_start(layer, kernel, constraint) if mirrored else kernel


def _undilated(features, layer):
    """Takes every `rate`-th row and column, from each start, for an image: a dilated patch is a whole one there."""
    down, across = rates = layer.dilation_rate
    height, width = (size // rate for size, rate in zip(features.shape[1:3], rates))
    if max(rates) > 1 and (height < layer.kernel_size[0] or width < layer.kernel_size[1]):
        kernel = f"a kernel of {layer.kernel_size[0]}x{layer.kernel_size[1]} with a dilation of {down}x{across}"
        raise ValueError(f"{features.shape[1]}x{features.shape[2]} pixels, too few for {kernel}")
    parts = features[:, : height * down, : width * across].reshape(-1, height, down, width, across, features.shape[-1])
    return parts.transpose(0, 2, 4, 1, 3, 5).reshape(-1, height, width, features.shape[-1])


def _normalized(layer, x):
    """What a BatchNormalization gives of a batch in training; its averages are not touched."""
    values = tf.cast(x, tf.float32)
    axes = [axis for axis in range(len(x.shape)) if axis != layer.axis % len(x.shape)]
    mean, variance = tf.nn.moments(values, axes, keepdims=True)
    shape = mean.shape
    gamma, beta = (None if one is None else tf.reshape(tf.cast(one, tf.float32), shape) for one in (layer.gamma, layer.beta))
    return tf.cast(tf.nn.batch_normalization(values, mean, variance, beta, gamma, layer.epsilon), x.dtype)
