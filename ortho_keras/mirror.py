"""A net that sees an object and its mirror image alike, by weights that are each other's mirror images."""

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.activations import ShiftedReLU
from ortho_keras.graphs import Graph
from ortho_keras.kernels import orthonormality_error
from ortho_keras.modulation import ErrorModulation

# Of the layers without weights, those that treat the two halves of an image, and every channel, alike.
_EVEN_HANDED = (
    keras.layers.InputLayer,
    keras.layers.Normalization,
    keras.layers.Rescaling,
    keras.layers.Activation,
    keras.layers.ReLU,
    keras.layers.LeakyReLU,
    keras.layers.ELU,
    keras.layers.Dropout,
    keras.layers.SpatialDropout2D,
    keras.layers.GaussianNoise,
    keras.layers.Add,
    keras.layers.Average,
    keras.layers.MaxPooling2D,
    keras.layers.AveragePooling2D,
    keras.layers.GlobalAveragePooling2D,
    keras.layers.GlobalMaxPooling2D,
    keras.layers.ZeroPadding2D,
    keras.layers.UpSampling2D,
    ErrorModulation,
    ShiftedReLU,
)
_WEIGHTED = (keras.layers.Conv2D, keras.layers.Dense, keras.layers.BatchNormalization)
ORTHONORMAL = 1e-3  # a kernel's distance from orthonormal up to which it was meant to be
LEAST = 1e-6  # of the largest singular value: less is rounding


@keras.saving.register_keras_serializable(package="ortho_keras")
class MirrorConstraint(keras.constraints.Constraint):
    """Holds a weight to mirror symmetry: channels 0 and 1, 2 and 3, ... are what the other would be for a mirror image.

    A Conv2D kernel `(kh, kw, cin, cout)`, reversed along its width and with the channels of each pair exchanged, is then
    itself; so is, without the reversal, a Dense kernel `(inputs, outputs)`, and a vector of channels: a bias, or gamma and beta
    of a BatchNormalization. The constraint takes the mean of the weight and of its mirror image, the symmetric weight that
    is nearest. `symmetrize` puts it where it belongs in a model.

    Args:
        inputs: bool. Whether a kernel's input channels are such pairs; those of an image are not.
        outputs: bool. Whether its output channels are, or a vector's; classes are not.

    Raises:
        ValueError: If the weight is not of rank 1, 2 or 4, or a number of channels that are to be pairs is odd.

    Reference:
        A layer that is equivariant to a group of two in its regular representation: Cohen and Welling 2016
        ([arXiv:1602.07576](https://arxiv.org/abs/1602.07576)). Ours as a constraint. Not a part of Xie et al. 2017.
    """

    def __init__(self, inputs=True, outputs=True):
        self.inputs = bool(inputs)
        self.outputs = bool(outputs)

    def __call__(self, w):
        w = tf.convert_to_tensor(w)
        rank = len(w.shape)
        if rank not in (1, 2, 4):
            raise ValueError(f"MirrorConstraint takes weights of rank 1, 2 or 4. Received: one of shape {tuple(w.shape)}")
        axes = [rank - 2] * (self.inputs and rank > 1) + [rank - 1] * self.outputs
        for axis in axes:
            if w.shape[axis] % 2:
                raise ValueError(
                    f"MirrorConstraint needs an even number of channels along axis {axis}. "
                    f"Received: a weight of shape {tuple(w.shape)}"
                )
        mirrored = tf.reverse(w, [1]) if rank == 4 else w
        for axis in axes:
            mirrored = tf.gather(mirrored, np.arange(w.shape[axis]) ^ 1, axis=axis)
        return (w + mirrored) / 2

    def get_config(self):
        return {"inputs": self.inputs, "outputs": self.outputs}


def symmetrize(model):
    """Makes a convolutional net treat an image and its mirror image (left to right) alike, in place.

    Every weight gets a `MirrorConstraint`, which training keeps, and starts symmetric: each channel has a partner, which
    answers to the mirror image as it does to the image, and the classifier hears both the same. Layers, shapes and what a
    step costs stay as they are; half of the numbers are free. So the net need not learn each thing twice, and its answer is
    nearly the mean of those for both views. Only nearly, where a stride of 2 keeps every second column of an even number: the
    mirror image keeps the others; and while BatchNormalization's averages of two partners differ.

    An orthonormal kernel stays orthonormal, and an identity (`DiracInitializer`) what it is. Others keep their norm. For a
    first layer of principal patches see `PatchPCAInitializer.from_images(mirrored=True)`.

    Args:
        model: A built Functional or Sequential model from an image to one answer: Conv2D, Dense and BatchNormalization, and
            layers without weights that keep channels and sides apart (ReLU, pooling, `Add`), no `Flatten`. The first layer
            with a kernel takes the image, the last one gives the answer. All others have even numbers of channels.

    Raises:
        ValueError: If it is not; the message names the layer. Nothing is changed then.

    Example:

    >>> model = ortho_keras.plain_cnn(44, relu_shift=1.0, initializer="dirac")
    >>> ortho_keras.symmetrize(model)
    >>> model.fit(...)

    Reference:
        Ours, after Cohen and Welling 2016 ([arXiv:1602.07576](https://arxiv.org/abs/1602.07576)), and Bökman et al. 2025
        ([arXiv:2502.05169](https://arxiv.org/abs/2502.05169)) for mirroring alone. Not a part of Xie et al. 2017.
    """
    if not isinstance(model, keras.Model) or not model.built:
        raise ValueError(f"`model` must be a built Keras model (call `model.build(...)`). Received: model={model!r}")
    layers = _layers(Graph(model))
    kernels = [layer for layer in layers if isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))]
    if len(kernels) < 2:
        raise ValueError(f"`model` must have at least two layers with a kernel. Received: {model.name!r} with {len(kernels)}")
    new = []
    for layer in layers[layers.index(kernels[0]) :]:
        for name, variable in _weights(layer):
            constraint = MirrorConstraint(layer is not kernels[0], layer is not kernels[-1])
            new.append((layer, name, variable, constraint, _start(layer, variable, constraint)))
    for layer, name, variable, constraint, value in new:
        setattr(layer, f"{name}_constraint", constraint)
        variable.constraint = constraint
        variable.assign(value)
    if model.compiled and model.train_function is not None:  # traced already, without the constraints
        model.make_train_function(force=True)


def alike_for_partners(normalization, values):
    """Statistics of a BatchNormalization's channels; under a `MirrorConstraint` each is the mean of two partners'."""
    for constraint in (normalization.beta_constraint, normalization.gamma_constraint):
        if isinstance(constraint, MirrorConstraint):
            return constraint(values)
    return values


def _layers(graph):
    """The layers in the order of their first calls, each one checked."""
    layers = []
    for layer, *_ in graph.steps:
        if isinstance(layer, Graph):
            layers += _layers(layer)
            continue
        _check(layer)
        layers.append(layer)
    return list(dict.fromkeys(layers))


def _check(layer):
    last = getattr(layer, "data_format", "channels_last") == "channels_last"
    weighted = isinstance(layer, _WEIGHTED) and getattr(layer, "groups", 1) == 1 and last
    if not (weighted or isinstance(layer, _EVEN_HANDED) or _adds_pairs(layer)):
        raise ValueError(
            "`model` must consist of Conv2D (channels last, without groups), Dense, BatchNormalization, and layers without "
            "weights that keep channels and sides apart (ReLU, pooling, Add). "
            f"Received: {layer.name!r}, a {type(layer).__name__}"
        )


def _adds_pairs(layer):
    """Whether it is `keras.ops.pad` that adds channels, an even number in front and behind: a shortcut's, say."""
    widths = getattr(layer, "pad_width", ()) if type(layer).__name__ == "Pad" else ()
    return len(widths) > 1 and not np.any(widths[:-1]) and not np.any(np.mod(widths[-1], 2))


def _weights(layer):
    """Names and variables of a layer's weights, without averages."""
    names = ("gamma", "beta") if isinstance(layer, keras.layers.BatchNormalization) else ("kernel", "bias")
    return [(name, getattr(layer, name)) for name in names if getattr(layer, name, None) is not None]


def _start(layer, variable, constraint):
    """The symmetric weight that a layer starts with: orthonormal if the one it had was, else of the same norm."""
    value = np.asarray(variable, np.float64)
    try:
        symmetric = np.asarray(constraint(value))
    except ValueError as error:
        raise ValueError(
            "`model` must have even numbers of channels between the image and the answer. "
            f"Received: {layer.name!r}, {tuple(variable.shape)}"
        ) from error
    if value.ndim == 1:
        return symmetric
    left, sizes, right = np.linalg.svd(symmetric.reshape(-1, symmetric.shape[-1]), full_matrices=False)
    independent, tall = sizes[-1] > LEAST * sizes[0], len(left) >= right.shape[1]
    if constraint.outputs and tall and not independent and sizes[0]:
        raise ValueError(
            "`model` must have kernels whose filters still differ when each pair of them is the mean of one and of the "
            f"other's mirror image. Received: {layer.name!r}, where they then depend on each other"
        )
    if tall and independent and orthonormality_error(value) < ORTHONORMAL:
        return (left @ right).reshape(value.shape)
    return symmetric * (np.linalg.norm(value) / np.linalg.norm(symmetric) if sizes[0] else 1.0)
