"""A deeper net that begins as what a shallower one has learned."""

import itertools

import keras
import numpy as np

from ortho_keras.method.errors import first_line
from ortho_keras.method.graphs import Graph
from ortho_keras.method.initializers import DiracInitializer
from ortho_keras.method.modulation import ErrorModulation
from ortho_keras.method.state import copy_rest, copy_state

TOLERANCE = 1e-3  # of the largest output, far above rounding: half precision gives back what it rounded
_SLICE = 32  # inputs that the outputs are compared on at a time
_SETTINGS = ("strides", "padding", "dilation_rate", "groups", "axis", "epsilon")  # beside shapes, what a layer of a kind shares


def grow(model, deeper, x):
    """Sets a deeper net's weights so that it computes what `model` does: the layers that are new become identities.

    `deeper` has the layers of `model` in their order, and between them more convolutions (or `Dense` layers) of the kinds that
    are there: in each run of one kind (class, settings, shapes), those of `model` are spread evenly. A new one's kernel is
    the identity, for which the orthonormal penalty is 0, and its BatchNormalization's gamma and beta are deviation and mean
    of what comes in, so that it gives back what it takes. The ReLU behind it, shifted or not, changes nothing, as its input
    went through one already: that needs no shortcut.

    In inference both nets compute the same, up to rounding. In training mode, BatchNormalization makes a difference as
    far as a batch's statistics differ from those of `x`, which are taken with the averages of `model`: `x` should be like a
    training batch, of all classes, and a `BatchNormalizationEstimator` should have set the averages.

    Args:
        model: A built Functional or Sequential model with one input and one output, whose layers form a chain; trained,
            say. It is not changed.
        deeper: A built model of the same layers, and more of them. Its weights are set.
        x: Array or tensor `(batch, ...)`, inputs as the models take them: a few hundred of the training images.

    Raises:
        ValueError: If an argument is none of the above, if `deeper` is not `model` with more layers (or as many), if a new
            one cannot be an identity, or if the outputs differ then, as with an activation that is not idempotent. The
            weights of `deeper` are what they were before.

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
    for name, net in (("model", model), ("deeper", deeper)):
        if not isinstance(net, keras.Model) or not net.built:
            raise ValueError(f"`{name}` must be a built Keras model (call `model.build(...)`). Received: {name}={net!r}")
    graphs = Graph(model), Graph(deeper)
    for name, net in (("model", model), ("deeper", deeper)):
        if len(net.inputs) != 1 or len(net.outputs) != 1:
            raise ValueError(f"`{name}` must have one input and one output. Received: {net.name!r}")
    if not hasattr(x, "shape") or not len(x.shape) or not x.shape[0]:
        told = f"an array of shape {tuple(x.shape)}" if hasattr(x, "shape") else f"a {type(x).__name__}"
        raise ValueError(f"`x` must be an array or a tensor of at least one input. Received: {told}")
    for name, arrays in (("x", [x]), ("model", model.get_weights())):
        if not all(map(_is_finite, arrays)):
            raise ValueError(f"`{name}` must be finite. Received: {name} with inf or NaN")
    pairs, new = _matched(*(_units(name, graph, x) for name, graph in zip(("model", "deeper"), graphs)))
    before = deeper.get_weights()
    try:
        for unit, copy in pairs:
            for layer, copied in zip(unit, copy):
                copy_state(layer, copied)
        _make_identities(graphs[1], new, x)
        _check_constraints(deeper)
        _check_outputs(model, deeper, x)
    except BaseException:
        deeper.set_weights(before)
        copy_rest(deeper, deeper)
        raise


def _is_finite(array):
    array = np.asarray(array)
    return array.dtype.kind in "OSU" or bool(np.isfinite(array.astype(np.float64)).all())


def _check_constraints(deeper):
    for variable in deeper.trainable_variables:
        value = np.asarray(variable, np.float64)
        if variable.constraint is None:
            continue
        held = np.asarray(variable.constraint(variable), np.float64)
        if not np.abs(held - value).max() <= TOLERANCE * np.abs(value).max():
            raise ValueError(
                "`deeper` must have no constraints that the weights of `model` do not meet: its first step would change them "
                f"Received: {variable.path} with {type(variable.constraint).__name__}"
            )


def _check_outputs(model, deeper, x):
    error = largest = 0.0
    for start in range(0, len(x), _SLICE):
        outputs = (keras.tree.flatten(net(x[start : start + _SLICE], training=False)) for net in (model, deeper))
        wanted, made = (np.asarray(own, np.float64) for (own,) in outputs)
        error, largest = max(error, np.abs(made - wanted).max()), max(largest, np.abs(wanted).max())
    if not error <= TOLERANCE * largest:
        raise ValueError(
            "`deeper` must compute what `model` does while its new layers are identities: both must be chains, with "
            "activations that change nothing the second time (ReLU, ShiftedReLU) behind all convolutions. "
            f"Received: outputs of up to {largest:.3g} that differ by {error:.3g}"
        )


class _Unit(list):
    """A layer with weights and the BatchNormalization behind it; `kind` is what two units share that may be matched."""

    section = 0  # how often the shape has been changed before it by a layer without weights

    @property
    def kind(self):
        return [self.section, *map(_kind, self)]


def _units(name, graph, x):
    """The layers with weights in the order of their calls, as units."""
    units, sections = [], 0

    def call(layer, *args, **kwargs):
        nonlocal sections
        outputs = layer(*args, **kwargs)
        if isinstance(layer, keras.layers.BatchNormalization) and units:
            units[-1].append(layer)
        elif isinstance(layer, keras.Layer) and layer.weights and not isinstance(layer, ErrorModulation):
            units.append(_Unit([layer]))
            units[-1].section = sections
        elif [tensor.shape for tensor in keras.tree.flatten(outputs)[:1]] != [_input(args, kwargs).shape]:
            sections += 1  # pooling, flattening
        return outputs

    try:
        graph.run(x[:1], call, training=False)
    except Exception as error:  # a layer may raise anything
        raise ValueError(f"`x` must suit `{name}`. Received: x of shape {tuple(x.shape)} ({first_line(error)})") from error
    return units


def _input(args, kwargs):
    return keras.tree.flatten((args, kwargs))[0]


def _kind(layer):
    activation = getattr(layer, "activation", None)
    settings = {name: getattr(layer, name) for name in _SETTINGS if hasattr(layer, name)}
    settings |= {"weights": [tuple(v.shape) for v in layer.weights]}
    settings |= {} if activation is None else {"activation": getattr(activation, "__name__", type(activation).__name__)}
    return type(layer).__name__, settings


def _matched(units, deeper):
    """Returns the pairs of units that compute the same, and the list of those that only the deeper net has."""
    runs, longer = ([list(run) for _, run in itertools.groupby(net, lambda unit: unit.kind)] for net in (units, deeper))
    for few, many in itertools.zip_longest(runs, longer):
        if few is None or many is None or few[0].kind != many[0].kind or len(few) > len(many):
            raise ValueError(
                "`deeper` must have the layers of `model` in their order, and more of the same kinds next to them. "
                f"Received: {_told(many)} in `deeper`, where {_told(few)} in `model`"
            )
    pairs, new = [], []
    for few, many in zip(runs, longer):
        taken = [index * len(many) // len(few) for index in range(len(few))]
        pairs += zip(few, (many[index] for index in taken))
        new += [unit for index, unit in enumerate(many) if index not in taken]
    return pairs, new


def _told(run):
    if run is None:
        return "the end is"
    first = "".join(f", {name} {settings}" for name, settings in map(_kind, run[0]))
    return f"{len(run)} layer(s) from {run[0][0].name!r} on{first} are"


def _make_identities(graph, units, x):
    """Makes each of the units an identity of what comes in when the net is called on `x`."""
    of_layer = {id(unit[0]): unit for unit in units}

    def call(layer, *args, **kwargs):
        unit = of_layer.get(id(layer))
        if unit is not None:
            _make_identity(unit, np.asarray(_input(args, kwargs), np.float64))
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
