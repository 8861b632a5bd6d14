"""A net that treats an image and its mirror image alike, by weights that are each other's mirror images."""

import keras
import numpy as np
import tensorflow as tf

from ortho_keras.graphs import Graph
from ortho_keras.kernels import orthonormality_error

# What the channels of a tensor are: an image's own, pairs of partners, or the answer's.
IMAGE, PAIRS, ANSWER = "image", "pairs", "answer"
SIDE = 32  # pixels a side of the images that a model of no fixed size is tried on
LEAST = 1e-6  # of a kernel's norm or largest singular value: less is rounding
ORTHONORMAL = 1e-3  # from orthonormal, up to a common factor, a kernel that was meant to be so
TOLERANCE = {"float32": 1e-3, "float64": 1e-6}  # of a layer's largest output; half precision: 0.1


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
        ValueError: If an argument is not a bool, the weight is not of rank 1, 2 or 4, or a number of channels that are to be
            pairs is odd.

    Reference:
        A layer that is equivariant to a group of two in its regular representation: Cohen and Welling 2016
        ([arXiv:1602.07576](https://arxiv.org/abs/1602.07576)). Ours as a constraint. Not a part of Xie et al. 2017.
    """

    def __init__(self, inputs=True, outputs=True):
        for argument, value in (("inputs", inputs), ("outputs", outputs)):
            if not isinstance(value, bool):
                raise ValueError(f"`{argument}` must be True or False. Received: {argument}={value!r}")
        self.inputs = inputs
        self.outputs = outputs

    def __call__(self, w):
        w = tf.convert_to_tensor(w)
        rank = len(w.shape)
        if rank not in (1, 2, 4):
            raise ValueError(f"MirrorConstraint takes weights of rank 1, 2 or 4. Received: one of shape {tuple(w.shape)}")
        mirrored = tf.reverse(w, [1]) if rank == 4 else w
        for axis in [rank - 2] * (self.inputs and rank > 1) + [rank - 1] * self.outputs:
            if w.shape[axis] % 2:
                raise ValueError(
                    f"MirrorConstraint needs an even number of channels along axis {axis}. "
                    f"Received: a weight of shape {tuple(w.shape)}"
                )
            mirrored = _exchanged(mirrored, axis)
        return (w + mirrored) / 2

    def get_config(self):
        return {"inputs": self.inputs, "outputs": self.outputs}


def symmetrize(model):
    """Makes a convolutional net treat an image and its mirror image (left to right) alike, in place.

    Every kernel, bias, gamma and beta between the image and the answer gets a `MirrorConstraint`, which training keeps, and
    starts symmetric: each channel has a partner, which answers to the mirror image as it does to the image, and the classifier
    hears both the same. Layers and shapes stay as they are; half of the numbers are free.

    The two answers are the same where every stride keeps the same columns of both views, as in `plain_cnn` with images 33
    pixels wide, where a stride of 2 meets 33 and 17. With 32 it keeps those columns of the mirror image that it drops of the
    image, and the answers differ as they do for an image that is moved by a pixel. In training, BatchNormalization takes each
    channel's own statistics; `BatchNormalizationEstimator` gives partners the same averages, `fit` nearly so.

    A kernel whose filters are orthonormal (times a factor) stays so where there are as many symmetric filters that are: 18 of
    3x3 pixels and 3 colours, and half as many pairs as inputs elsewhere. Others keep their norm. An identity
    (`DiracInitializer`) stays one. For a first layer of principal patches see `PatchPCAInitializer.from_images(mirrored=True)`.

    Weights come first, then `symmetrize`: those of a net that is not symmetric are changed by the next step.

    Args:
        model: A built Functional or Sequential model of images `(batch, height, width, channels)`, whose layers with weights
            are Conv2D, Dense and BatchNormalization. Every layer must treat both sides of an image alike (no `Flatten`), which
            is tried on random numbers; channels between the image and the answer are even in number. Branches may join by
            `Add` and the like.

    Raises:
        ValueError: If it is not so, or a weight has another constraint or is not finite; the message names the layer. Nothing
            is changed then.

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
    graph, x = Graph(model), _images(model)
    calls = _calls(graph, x)
    held = [(layer, *one) for layer, kind in {layer: kind for layer, *kind in calls}.items() for one in _held(layer, *kind)]
    held = [(layer, name, getattr(layer, name, None), constraint) for layer, name, constraint in held]
    before = [(variable, variable.numpy()) for _, _, variable, _ in held if variable is not None]
    try:
        for layer, _, variable, constraint in held:
            if variable is not None:
                variable.assign(symmetric_start(layer, variable, constraint))
        _check_layers(graph, x, calls)
    except BaseException:
        for variable, value in before:
            variable.assign(value)
        raise
    for layer, name, variable, constraint in held:
        if hasattr(layer, f"{name}_constraint"):  # an average has none
            setattr(layer, f"{name}_constraint", constraint)
            if variable is not None:
                variable.constraint = constraint
    if model.compiled and model.train_function is not None:  # traced already, without the constraints
        model.make_train_function(force=True)


def alike_for_partners(normalization, values):
    """Statistics of a BatchNormalization's channels; after `symmetrize` each is the mean of two partners'."""
    constraint = normalization.gamma_constraint
    return constraint(values) if isinstance(constraint, MirrorConstraint) else values


def _exchanged(tensor, axis):
    """A tensor with the channels of each pair along an axis exchanged."""
    return tf.gather(tensor, np.arange(tensor.shape[axis]) ^ 1, axis=axis)


def _images(model):
    """Random numbers for each of the model's inputs, one image each."""
    if any(len(tensor.shape) != 4 for tensor in model.inputs):
        shapes = ", ".join(str(tensor.shape) for tensor in model.inputs)
        raise ValueError(f"`model` must take images (batch, height, width, channels). Received: {model.name!r}, of {shapes}")
    rng = np.random.default_rng(0)
    shapes = [[1, *(side or SIDE for side in tensor.shape[1:])] for tensor in model.inputs]
    return [tf.cast(rng.normal(size=shape), tensor.dtype) for shape, tensor in zip(shapes, model.inputs)]


def _calls(graph, x):
    """Returns `(layer, kind of what it takes, kind of what it gives)` of each of the net's calls, in order."""
    made = []

    def call(layer, *args, **kwargs):
        outputs = layer(*args, **kwargs)
        made.append((layer, _tensors((args, kwargs)), _tensors(outputs)))
        return outputs

    graph.run(x, call, training=False)
    heard = set()  # tensors that a layer with a kernel gets to see, directly or not
    for layer, inputs, outputs in reversed(made):
        if _has_kernel(layer) or any(id(tensor) in heard for tensor in outputs):
            heard |= {id(tensor) for tensor in inputs}
    kinds, calls = {id(tensor): IMAGE for tensor in _tensors(x)}, []
    for layer, inputs, outputs in made:
        taken = {kinds[id(tensor)] for tensor in inputs if id(tensor) in kinds}
        if len(taken) > 1:
            raise ValueError(
                "`model` must not join images, features and answers with each other. "
                f"Received: {layer.name!r}, which takes {' and '.join(sorted(taken))}"
            )
        kind = given = next(iter(taken), IMAGE)
        if _has_kernel(layer):
            given = PAIRS if any(id(tensor) in heard for tensor in outputs) else ANSWER
        kinds |= {id(tensor): given for tensor in outputs}
        if getattr(layer, "weights", ()) and any(one is layer and other != [kind, given] for one, *other in calls):
            raise ValueError(
                f"`model` must use a layer with weights at one place. Received: {layer.name!r}, at two that differ"
            )
        calls.append((layer, kind, given))
    return calls


def _tensors(structure):
    return [value for value in keras.tree.flatten(structure) if tf.is_tensor(value)]


def _has_kernel(layer):
    return isinstance(layer, (keras.layers.Conv2D, keras.layers.Dense))


def _held(layer, taken, given):
    """Returns names and constraints of those weights of a layer that are to be symmetric."""
    if _has_kernel(layer):
        weights = [("kernel", MirrorConstraint(taken == PAIRS, given == PAIRS))]
        weights += [("bias", MirrorConstraint())] if given == PAIRS else []
    elif isinstance(layer, keras.layers.BatchNormalization):
        if layer.axis % layer.input_spec.ndim != layer.input_spec.ndim - 1:
            raise ValueError(f"`model` must have its channels last. Received: {layer.name!r} with axis={layer.axis}")
        names = ("gamma", "beta", "moving_mean", "moving_variance") if taken == PAIRS else ()
        weights = [(name, MirrorConstraint()) for name in names]
    elif getattr(layer, "trainable_weights", ()):
        raise ValueError(
            "`model` must have no trainable weights but those of Conv2D, Dense and BatchNormalization. "
            f"Received: {layer.name!r}, a {type(layer).__name__}"
        )
    else:
        weights = []
    for name, _ in weights:
        variable, other = getattr(layer, name, None), getattr(layer, f"{name}_constraint", None)
        if not isinstance(variable, (keras.Variable, type(None))):
            raise ValueError(f"`model` must hold its weights as they are (no LoRA). Received: {layer.name!r}")
        if not isinstance(other, (MirrorConstraint, type(None))):
            raise ValueError(f"`model` must have no other constraints. Received: {layer.name!r} with {type(other).__name__}")
    return weights


def symmetric_start(layer, value, constraint):
    """The symmetric weight that a layer starts with: orthonormal (times a factor) if the one it had was, else of its norm."""
    value = np.asarray(value, np.float64)
    if not np.isfinite(value).all():
        raise ValueError(f"`model` must have finite weights. Received: {layer.name!r} with inf or NaN")
    try:
        symmetric = np.asarray(constraint(value))
    except ValueError as error:
        raise ValueError(
            "`model` must have even numbers of channels between the image and the answer. "
            f"Received: {layer.name!r} with a weight of {value.shape}"
        ) from error
    if value.ndim == 1 or not symmetric.any():
        return symmetric
    matrix = symmetric.reshape(-1, symmetric.shape[-1])
    if constraint.outputs:
        differences = np.linalg.norm(matrix[:, ::2] - matrix[:, 1::2], axis=0)
        first = 2 * differences.argmin()
        if differences.min() < LEAST * np.linalg.norm(matrix):
            raise ValueError(
                "`model` must have filters that can differ from their own mirror images. "
                f"Received: {layer.name!r}, whose channels {first} and {first + 1} would be the same: filters 1 pixel wide, or "
                "principal patches without `mirrored=True`, or more of these than there are pairs of"
            )
    left, sizes, right = np.linalg.svd(matrix, full_matrices=False)
    length = np.linalg.norm(value) / np.sqrt(matrix.shape[1])
    independent = len(matrix) >= matrix.shape[1] and sizes[-1] > LEAST * sizes[0]
    if independent and orthonormality_error(value / length) < ORTHONORMAL:
        return (left @ right).reshape(value.shape) * length
    return symmetric * (np.linalg.norm(value) / np.linalg.norm(symmetric))


def _check_layers(graph, x, calls):
    """Raises `ValueError` at a layer that does not give, of a mirror image, the mirror image of what it gives."""
    kinds = iter(calls)

    def call(layer, *args, **kwargs):
        _, taken, given = next(kinds)
        # Where a stride meets an even number of columns it is tried with fewer: that is not the layer's own doing.
        if not any(_is_alike(layer, args, kwargs, taken, given, fewer) for fewer in range(_stride(layer))):
            raise ValueError(
                "`model` must have layers that treat the left and the right side of what they take alike. "
                f"Received: {layer.name!r}, a {type(layer).__name__}, which does not"
            )
        return layer(*args, **kwargs)

    graph.run(x, call, training=False)


def _stride(layer):
    return int(np.max(getattr(layer, "strides", 1)))


def _is_alike(layer, args, kwargs, taken, given, fewer):
    def cut(value):
        maps = tf.is_tensor(value) and len(value.shape) == 4
        return value[:, :, : max(1, value.shape[2] - fewer)] if maps else value

    inputs = keras.tree.map_structure(cut, (args, kwargs))
    views = inputs, keras.tree.map_structure(lambda value: _mirrored(value, taken), inputs)
    outputs, of_mirror_images = (_tensors(layer(*args, **kwargs)) for args, kwargs in views)
    for mine, other in zip(outputs, of_mirror_images):
        expected = _mirrored(mine, given)
        error, largest = (float(tf.reduce_max(tf.abs(tf.cast(value, "float64")))) for value in (other - expected, mine))
        if not error <= TOLERANCE.get(mine.dtype.name, 0.1) * largest:
            return False
    return True


def _mirrored(value, kind):
    """What a tensor is for the mirror image."""
    if not tf.is_tensor(value):
        return value
    value = tf.reverse(value, [2]) if len(value.shape) == 4 else value
    return _exchanged(value, -1) if kind == PAIRS and value.shape[-1] % 2 == 0 else value
