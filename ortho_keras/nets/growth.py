"""A deeper network that starts as what a shallower one has learned."""

import itertools

import keras
import numpy as np
from keras import ops

from ortho_keras.method.checks import check_built
from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph
from ortho_keras.method.initializers import DiracInitializer
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import copy_rest, copy_state

TOLERANCE = 1e-3  # of the largest output, far above rounding
_SLICE = 32  # inputs on which the outputs are compared at a time
_KERNEL_LAYERS = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)
_SETTINGS = ("activation", "strides", "padding", "dilation_rate", "groups", "axis", "epsilon")


def grow(model, deeper, x):
    """Sets a deeper network's weights so that it computes what `model` does: the added layers become identities.

    `deeper` has the layers of `model` in their order, and between them more convolutions or `Dense` layers like their
    neighbours: in each run of layers of the same class, settings and shapes, those of `model` are spread evenly. The kernel of
    an added layer is the identity, for which the orthonormal penalty is 0. Gamma and beta of its BatchNormalization are the
    standard deviation and mean of the layer's input, so that it returns its input. The ReLU that follows, shifted or not,
    changes nothing, since its input has passed a ReLU before. No shortcut is needed.

    In inference both networks compute the same up to rounding. In training mode they differ as far as a batch's statistics
    differ from those of `x`, so `x` should be like a training batch, and a `BatchNormalizationEstimator` should have set the
    moving averages of `model`.

    Args:
        model: A built Functional or Sequential model with one input and one output, whose layers form a chain. Not changed.
        deeper: A built model of the same layers and more of them. Its weights are set.
        x: Array or tensor `(batch, ...)`, inputs of the models: a few hundred training images.

    Raises:
        ValueError: If an argument is none of the above, if `deeper` is not `model` with more layers (or as many), if an added
            layer cannot be an identity, or if the outputs differ afterwards, as with an activation that is not idempotent.
            The weights of `deeper` are then unchanged.

    Example:

    >>> shallow = ortho_keras.plain_cnn(20, relu_shift=1.0)
    >>> ...  # train it
    >>> deep = ortho_keras.plain_cnn(44, relu_shift=1.0)
    >>> ortho_keras.grow(shallow, deep, images[:512])

    Reference:
        "Net2DeeperNet": Chen, Goodfellow, Shlens 2016 ([arXiv:1511.05641](https://arxiv.org/abs/1511.05641)), section 2.3.
        Not a part of Xie et al. 2017.
    """
    for name, net in (("model", model), ("deeper", deeper)):
        if len(check_built(net, name).inputs) != 1 or len(net.outputs) != 1:
            raise ValueError(f"`{name}` must have one input and one output. Received: {net.name!r}")
    shape = tuple(getattr(x, "shape", ()))
    if not shape or not shape[0]:
        raise ValueError(
            f"`x` must be an array or tensor of at least one input. Received: a {type(x).__name__} of shape {shape}"
        )
    kept, added = _match(_units("model", model, x), _units("deeper", deeper, x))
    before = deeper.get_weights()
    try:
        for unit, copy in kept:
            for layer, copied in zip(unit, copy):
                copy_state(layer, copied)
        of_first = {id(unit[0]): unit for unit in added}
        _visit(deeper, x, lambda layer, inputs: _make_identity(of_first.get(id(layer)), inputs))
        _check_outputs(model, deeper, x)
    except BaseException:
        deeper.set_weights(before)
        copy_rest(deeper, deeper)
        raise


def _visit(net, x, visit):
    """Calls a network on `x`, and `visit(layer, inputs)` before each of its layers."""

    def call(layer, *args, **kwargs):
        visit(layer, keras.tree.flatten((args, kwargs))[0])
        return layer(*args, **kwargs)

    Graph(net).run(x, call, training=False)


def _units(name, net, x):
    """Returns `(kind, layers)` for each layer with weights, in the order of calls: it and the BatchNormalization after it.

    Units of one kind have the same classes, settings and shapes of inputs and weights.
    """
    units = []

    def visit(layer, inputs):
        kind = type(layer), *(getattr(layer, setting, None) for setting in _SETTINGS)
        if isinstance(layer, keras.layers.BatchNormalization) and units:
            units[-1][0].append(kind)
            units[-1][1].append(layer)
        elif isinstance(layer, keras.Layer) and layer.weights and not isinstance(layer, ErrorModulation):
            units.append(([kind, [tuple(tensor.shape) for tensor in (inputs, *layer.weights)]], [layer]))

    try:
        _visit(net, x[:1], visit)
    except Exception as error:  # a layer may raise anything
        raise ValueError(f"`x` must suit `{name}`. Received: x of shape {tuple(x.shape)} ({first_line(error)})") from error
    return units


def _match(units, deeper):
    """Returns the pairs of lists of layers that compute the same, and the lists of those that only `deeper` has."""
    runs, longer = ([list(run) for _, run in itertools.groupby(net, lambda unit: unit[0])] for net in (units, deeper))
    kept, added = [], []
    for few, many in itertools.zip_longest(runs, longer, fillvalue=()):
        if not few or not many or few[0][0] != many[0][0] or len(few) > len(many):
            received = (f"{len(run)} from {run[0][1][0].name!r} on" if run else "no more layers" for run in (many, few))
            raise ValueError(
                "`deeper` must have the layers of `model` in their order, and more layers like them next to them. Received: "
                "{} in `deeper`, where `model` has {}".format(*received)
            )
        taken = [index * len(many) // len(few) for index in range(len(few))]
        kept += [(one[1], many[index][1]) for one, index in zip(few, taken)]
        added += [unit[1] for index, unit in enumerate(many) if index not in taken]
    return kept, added


def _make_identity(unit, inputs):
    """Makes a layer and its BatchNormalization the identity of these inputs."""
    if unit is None:
        return
    layer, *normalizations = unit
    if not isinstance(layer, _KERNEL_LAYERS) or any(not (one.scale and one.center) for one in normalizations):
        raise ValueError(
            "Each layer that only `deeper` has must be a convolution or Dense, and its BatchNormalization must have gamma and "
            f"beta. Received: {layer.name}"
        )
    identity = DiracInitializer(groups=getattr(layer, "groups", 1))
    layer.kernel.assign(identity(layer.kernel.shape, layer.kernel.dtype))
    if layer.use_bias:
        layer.bias.assign(np.zeros(layer.bias.shape))
    for one in normalizations:
        values = np.moveaxis(np.asarray(ops.convert_to_numpy(inputs), np.float64), one.axis, -1).reshape(
            -1, inputs.shape[one.axis]
        )
        mean, variance = values.mean(0), values.var(0)
        one.set_weights([np.sqrt(variance + one.epsilon), mean, mean, variance])


def _check_outputs(model, deeper, x):
    def outputs(net):
        slices = (x[start : start + _SLICE] for start in range(0, len(x), _SLICE))
        found = (ops.convert_to_numpy(keras.tree.flatten(net(inputs, training=False))[0]) for inputs in slices)
        return np.concatenate([np.asarray(one, np.float64) for one in found])

    wanted, made = outputs(model), outputs(deeper)
    error, largest = np.abs(made - wanted).max(), np.abs(wanted).max()
    if not error <= TOLERANCE * largest:
        raise ValueError(
            "`deeper` must compute what `model` does while its added layers are identities: both must be chains of finite "
            "weights with an idempotent activation (ReLU, ShiftedReLU) after each convolution. "
            f"Received: outputs up to {largest:.3g} that differ by {error:.3g}"
        )
