"""Checks a network against the paper's design principle: no kernel with more filters than inputs."""

import dataclasses
import math

import keras

from ortho_keras.method.checks import check_built
from ortho_keras.method.graphs import Graph, has_own_call
from ortho_keras.method.kernels import kernel_axes, layer_kernels, matrix_shape, model_kernels, walk_layers
from ortho_keras.method.regularizers import KernelRegularizer


@dataclasses.dataclass(frozen=True)
class LayerDesign:
    """How one kernel is read as matrices of shape `(f_in, f_out)`, and whether their columns can all be orthonormal."""

    path: str  # the variable's path, "block1/conv/kernel"
    layer: str  # the layer's name
    kind: str  # the layer's type, "Conv2D"
    f_in: int
    f_out: int
    count: int  # matrices in the kernel: 1, or one for each group or channel
    groups: tuple  # (number of groups, filters in each) of a matrix: ((1, 27), (1, 5))
    advice: str  # which changes would make it fit; empty where it does

    @property
    def fits(self):
        return self.f_in >= self.f_out


@dataclasses.dataclass(frozen=True)
class DesignReport:
    """What `check_design` found. `print(report)` gives a summary and a table of the kernels that do not fit."""

    layers: list  # a LayerDesign for each kernel, in the model's order
    notes: list  # strings, other departures from the paper's advice

    @property
    def fits(self):
        return all(layer.fits for layer in self.layers)

    def __str__(self):
        wide = [layer for layer in self.layers if not layer.fits]
        lines = [f"all {len(self.layers)} kernels can be orthonormal: f_in >= f_out everywhere"]
        if wide:
            lines = [
                f"{len(wide)} of {len(self.layers)} kernels {'has' if len(wide) == 1 else 'have'} more filters than inputs "
                "(f_in < f_out): those filters can be orthonormal in groups only"
            ]
        table = [(layer.path, layer.kind, f"{layer.f_in} x {layer.f_out}", layer.advice) for layer in wide]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def check_design(model):
    """Checks a model against the paper's design principle, f_in >= f_out at every kernel, and says which changes would fit.

    A kernel read as a matrix `(f_in, f_out)`, `f_in = kh * kw * cin` for a convolution, has f_out filters in a space of f_in
    dimensions. More than f_in vectors cannot be orthogonal: `OrthonormalRegularizer` and `OrthonormalInitializer` then split
    them into groups of f_in and one of the remainder, orthonormal within each group.

    The notes list what else the model shows: trainable kernels with another penalty than most, or with none, in addition to a
    `KernelRegularizer`, and (in Functional and Sequential models) biases of convolutions that a BatchNormalization cancels.

    Args:
        model: A built `keras.Model` of any kind, nested ones included.

    Returns:
        A `DesignReport`: `layers`, a list of one `LayerDesign` for each kernel; `notes`, a list of strings; `fits`, whether all
        kernels fit. `print(report)` gives a table of those that do not.

    Raises:
        ValueError: If `model` is not a built Keras model, or has no convolution, dense or einsum kernel.

    Example:

    >>> report = check_design(keras.applications.MobileNetV2(weights=None))
    >>> len(report.layers), sum(not layer.fits for layer in report.layers)
    (53, 18)
    >>> report.layers[0].advice
    'at most 27 filters, a 5x5 kernel or at least 4 input channels would fit; until then: 1 group of 27 and 1 of 5'

    Reference:
        Xie, Xiong, Pu 2017, on Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): the principle, the groups, and the
        advice against mixing. The note on biases is ours.
    """
    kernels = model_kernels(check_built(model))
    if not kernels:
        raise ValueError(f"`model` must have a convolution, dense or einsum kernel. Received: model={model.name!r}")
    return DesignReport([_design(kernel) for kernel in kernels], _regularizer_notes(kernels) + _bias_notes(model))


def _design(kernel):
    count, f_in, f_out = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
    full, rest = divmod(f_out, f_in)
    groups = ((1, f_out),)
    advice = ""
    if f_out > f_in:
        groups = ((full, f_in), (1, rest)) if rest else ((full, f_in),)
        split = f"{full} group{'s' * (full > 1)} of {f_in}" + f" and 1 of {rest}" * (rest > 0)
        each = f" in each of its {count} matrices" * (count > 1)
        advice = f"{_would_fit(kernel, f_in, f_out)} would fit; until then: {split}{each}"
    return LayerDesign(kernel.path, kernel.layer.name, type(kernel.layer).__name__, f_in, f_out, count, groups, advice)


def _would_fit(kernel, f_in, f_out):
    """Returns the changes, in words, each of which would be enough."""
    layer, shape = kernel.layer, kernel.variable.shape
    if isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
        outputs = "units" if isinstance(layer, keras.layers.Dense) else "outputs"
        return f"at most {f_in} {outputs} or at least {f_out} input features"
    _, inputs, _ = kernel_axes(kernel.layout, len(shape))
    rank = len(shape) - 2
    channels = math.prod(shape[axis] for axis in inputs if axis >= rank)  # 1 in a depthwise kernel
    needed = math.ceil(f_out / math.prod(shape[:rank]))  # channels
    side = next(side for side in range(1, f_out + 2, 2) if side**rank * channels >= f_out)  # odd, as kernels are
    wider = f"a {'x'.join([str(side)] * rank)} kernel" if rank > 1 else f"a kernel of {side}"
    if kernel.layout == "depthwise":
        return f"a depth_multiplier of at most {f_in} or {wider}"
    if kernel.regularizer_attribute == "pointwise_regularizer":
        return f"at most {f_in} filters or at least {f_out} input channels times depth_multiplier"
    return f"at most {kernel.groups * f_in} filters, {wider} or at least {kernel.groups * needed} input channels"


def _regularizer_notes(kernels):
    """Notes trainable kernels whose regularizer is not the `KernelRegularizer` that most of them have."""
    by_kind = {}
    for kernel in kernels:
        if kernel.variable.trainable:
            by_kind.setdefault(type(kernel.variable.regularizer), []).append(kernel.path)
    ours = [kind for kind in by_kind if issubclass(kind, KernelRegularizer)]
    if not ours:
        return []
    main = max(ours, key=lambda kind: len(by_kind[kind]))
    notes = []
    for kind, paths in by_kind.items():
        if kind is not main:
            name, paper = kind.__name__, "discourages mixing"
            if kind is type(None):
                name, paper = "no regularizer", "regularizes all"
            kernels = _listed(paths, "kernel", "kernels")
            notes.append(f"{name} on {kernels}, in addition to {main.__name__} on {len(by_kind[main])}: the paper {paper}")
    return notes


def _bias_notes(model):
    """Notes biases of convolutions whose outputs only a BatchNormalization takes, which subtracts them with the mean."""
    convolutions = [layer for layer, _ in walk_layers(model) if _has_plain_bias(layer)]
    if not convolutions or not isinstance(model, (keras.Function, keras.Sequential)) or has_own_call(model):
        return []
    takers = {}  # id of a tensor -> the (layer, whether it is called with `training=False`) that take it
    made = {id(layer): [] for layer in convolutions}  # the outputs of a convolution's calls

    def call(layer, *args, **kwargs):
        for value in keras.tree.flatten((args, kwargs)):
            takers.setdefault(id(value), []).append((layer, any(flag is False for flag in (*args, *kwargs.values()))))
        outputs = layer(*args, **kwargs)
        made.setdefault(id(layer), []).append(outputs)
        return outputs

    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype) for tensor in model.inputs]
    for tensor in keras.tree.flatten(Graph(model).run(inputs if len(inputs) > 1 else inputs[0], call)):
        takers.setdefault(id(tensor), []).append((model, False))
    useless = []
    for layer in convolutions:
        taken = [takers.get(id(output), [(None, False)]) for output in made[id(layer)]]
        if taken and all(_cancels_bias(taker, layer, fixed) for takings in taken for taker, fixed in takings):
            useless.append(layer.bias.path)
    listed = _listed(useless, "bias", "biases")
    return [f"{listed} without effect: the next BatchNormalization subtracts it (use_bias=False)"] if useless else []


def _has_plain_bias(layer):
    """Whether a layer is a convolution that adds a bias last, without an activation."""
    if not layer_kernels(layer) or has_own_call(layer) or isinstance(layer, (keras.layers.Dense, keras.layers.EinsumDense)):
        return False
    return layer.use_bias and layer.activation is keras.activations.linear


def _cancels_bias(layer, convolution, inference):
    """Whether a layer is a BatchNormalization over the convolution's channels that uses the batch's mean in training."""
    if not isinstance(layer, keras.layers.BatchNormalization) or not layer.trainable or inference:
        return False
    rank = convolution.rank + 2
    return layer.axis % rank == (1 if convolution.data_format == "channels_first" else rank - 1)


def _listed(paths, one, many):
    """Returns "2 kernels (a, b)", with at most three paths."""
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return f"{len(paths)} {one if len(paths) == 1 else many} ({', '.join(paths[:3])}{more})"
