"""A deeper net that begins as what a shallower one has learned."""

import itertools

import keras
import numpy as np

from ortho_keras.graphs import Graph
from ortho_keras.initializers import DiracInitializer
from ortho_keras.modulation import ErrorModulation

TOLERANCE = 0.05  # of the largest output, which the type's rounding, layer by layer, stays below


def grow(model, deeper, x):
    """Sets a deeper net's weights so that it computes what `model` does: the layers that are new become identities.

    `deeper` has the convolutions of `model` in their order, and more of them: in each run of convolutions of the same kind
    (settings and shapes), those of `model` are spread evenly. A new one's kernel is the identity, for which the orthonormal
    penalty is 0, and its BatchNormalization's gamma and beta are deviation and mean of what comes in, so that it gives back
    what it takes. The ReLU behind it, shifted or not, changes nothing, as its input went through one already: that needs no
    shortcut. `Dense` layers can be new as well.

    In inference both nets compute the same, up to rounding. In training mode, BatchNormalization makes a difference as
    far as a batch's statistics differ from those of `x`, which are taken with the averages of `model`: let a
    `BatchNormalizationEstimator` set these first.

    Args:
        model: A built Functional or Sequential model whose layers form a chain, trained, say. It is not changed.
        deeper: A built model of the same layers and more of them. Its weights are set.
        x: A batch of inputs, as the models take it; a few hundred of the training images.

    Raises:
        ValueError: If `deeper` is not `model` with more layers, if a new one cannot be an identity, or if the outputs differ
            then, as with an activation that is not idempotent. The weights of `deeper` are what they were before.

    Example:

    >>> shallow = ortho_keras.plain_cnn(20, relu_shift=1.0)
    >>> ...  # trained
    >>> deep = ortho_keras.plain_cnn(44, relu_shift=1.0)
    >>> ortho_keras.grow(shallow, deep, images[:512])

    Reference:
        "Net2DeeperNet": Chen, Goodfellow, Shlens 2016 ([arXiv:1511.05641](https://arxiv.org/abs/1511.05641)), section 2.3.
        That a deeper net can be a shallower one with identities, and training does not find it, is the degradation that He et
        al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)) answer with shortcuts. Not a part of Xie et al. 2017.
    """
    graph = Graph(deeper)
    pairs, new = _matched(_units(Graph(model), x), _units(graph, x))
    before = deeper.get_weights()
    try:
        for unit, copy in pairs:
            for layer, copied in zip(unit, copy):
                copied.set_weights(layer.get_weights())
        _make_identities(graph, new, x)
        wanted, made = (np.asarray(net(x, training=False), np.float64) for net in (model, deeper))
        error, largest = np.abs(made - wanted).max(), np.abs(wanted).max()
        if not error <= TOLERANCE * largest:
            raise ValueError(
                "`deeper` must compute what `model` does while its new layers are identities, which takes activations that "
                "change nothing the second time (ReLU, ShiftedReLU). "
                f"Received: outputs of up to {largest:.3g} that differ by {error:.3g}"
            )
    except ValueError:
        deeper.set_weights(before)
        raise


def _units(graph, x):
    """The layers with weights in the order of their calls: a list of lists, each one with the BatchNormalization behind it."""
    units = []

    def call(layer, *args, **kwargs):
        if isinstance(layer, keras.layers.BatchNormalization) and units:
            units[-1].append(layer)
        elif isinstance(layer, keras.Layer) and layer.weights and not isinstance(layer, ErrorModulation):
            units.append([layer])
        return layer(*args, **kwargs)

    graph.run(x[:1], call, training=False)
    return units


def _kind(unit):
    settings = ("strides", "padding", "dilation_rate", "groups", "axis", "epsilon")
    return [
        (type(layer), [tuple(v.shape) for v in layer.weights], [getattr(layer, name, None) for name in settings])
        for layer in unit
    ]


def _matched(units, deeper):
    """Returns the pairs of units that compute the same, and the list of those that only the deeper net has."""
    runs, longer = ([(kind, list(run)) for kind, run in itertools.groupby(net, _kind)] for net in (units, deeper))
    if [kind for kind, _ in runs] != [kind for kind, _ in longer] or any(
        len(few) > len(many) for (_, few), (_, many) in zip(runs, longer)
    ):
        told = (", ".join(f"{len(run)} of {kind[0][1][0]}" for kind, run in net) for net in (runs, longer))
        raise ValueError(
            "`deeper` must have the layers of `model` in their order, and more of the same kinds next to them. "
            "Received: kernels {} in `deeper`, {} in `model`".format(*reversed(list(told)))
        )
    pairs, new = [], []
    for (_, few), (_, many) in zip(runs, longer):
        taken = [index * len(many) // len(few) for index in range(len(few))]
        pairs += zip(few, (many[index] for index in taken))
        new += [unit for index, unit in enumerate(many) if index not in taken]
    return pairs, new


def _make_identities(graph, units, x):
    """Makes each of the units an identity of what comes in when the net is called on `x`."""
    of_layer = {id(unit[0]): unit for unit in units}

    def call(layer, *args, **kwargs):
        unit = of_layer.get(id(layer))
        if unit is not None:
            _make_identity(unit, np.asarray(args[0], np.float64))
        return layer(*args, **kwargs)

    graph.run(x, call, training=False)


def _make_identity(unit, inputs):
    layer, *normalizations = unit
    kernels = (keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D, keras.layers.Dense)
    keeps = isinstance(layer, kernels) and layer.kernel.shape[-1] == layer.kernel.shape[-2]
    if keeps and not isinstance(layer, keras.layers.Dense):
        keeps = layer.groups == 1 and set(layer.strides) == {1} and (layer.padding == "same" or set(layer.kernel_size) == {1})
    if not keeps or any(not (one.scale and one.center) for one in normalizations):
        raise ValueError(
            "Each layer that only `deeper` has must be a convolution or Dense that keeps shape and channels, without groups, "
            f"and its BatchNormalization must have gamma and beta. Received: {', '.join(one.name for one in unit)}"
        )
    layer.kernel.assign(DiracInitializer()(layer.kernel.shape, layer.kernel.dtype))
    if layer.use_bias:
        layer.bias.assign(np.zeros(layer.bias.shape))
    for one in normalizations:
        axes = tuple(axis for axis in range(inputs.ndim) if axis != one.axis % inputs.ndim)
        mean, variance = inputs.mean(axes), inputs.var(axes)
        variables = (one.gamma, one.beta, one.moving_mean, one.moving_variance)
        for variable, value in zip(variables, (np.sqrt(variance + one.epsilon), mean, mean, variance)):
            variable.assign(value)
