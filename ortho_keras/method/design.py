"""Checks a network against the paper's design principle: no kernel with more filters than inputs."""

import dataclasses
import math

import keras

from ortho_keras.method.checks import check_built
from ortho_keras.method.kernels import kernel_axes, matrix_shape, model_kernels
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
        lines = [f"all {len(self.layers)} kernels can be orthonormal: f_in >= f_out everywhere"]
        wide = [layer for layer in self.layers if not layer.fits]
        if wide:
            more = "has more filters than inputs" if len(wide) == 1 else "have more filters than inputs"
            lines = [f"{len(wide)} of {len(self.layers)} kernels {more} (f_in < f_out): orthonormal in groups only"]
        table = [(layer.path, layer.kind, f"{layer.f_in} x {layer.f_out}", layer.advice) for layer in wide]
        widths = [max(map(len, column)) for column in zip(*table)]
        lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def check_design(model):
    """Checks a model against the paper's design principle, f_in >= f_out at every kernel, and says which changes would fit.

    A kernel read as a matrix `(f_in, f_out)`, `f_in = kh * kw * cin` for a convolution, has f_out filters in a space of f_in
    dimensions. More than f_in vectors cannot be orthogonal: `OrthonormalRegularizer` and `OrthonormalInitializer` then split
    them into groups of f_in and one of the remainder, orthonormal within each group.

    Args:
        model: A built `keras.Model` of any kind, nested ones included.

    Returns:
        A `DesignReport`: `layers`, a list of one `LayerDesign` for each kernel; `notes`, strings about trainable kernels with
        another penalty than most, or with none, in addition to a `KernelRegularizer`, and about convolutions that
        `ConvOrthogonalRegularizer` cannot make orthogonal; `fits`, whether all kernels fit.

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
        advice against mixing.
    """
    kernels = model_kernels(check_built(model))
    if not kernels:
        raise ValueError(f"`model` must have a convolution, dense or einsum kernel. Received: model={model.name!r}")
    return DesignReport([_design(kernel) for kernel in kernels], _notes(kernels))


def _design(kernel):
    count, f_in, f_out = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
    full, rest = divmod(f_out, f_in)
    groups = tuple(group for group in ((full, f_in), (1, rest)) if all(group))
    advice = ""
    if f_out > f_in:
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


def _notes(kernels):
    """Notes kernels whose regularizer cannot reach 0, and trainable ones without the `KernelRegularizer` that most have."""
    by_kind = {}
    for kernel in kernels:
        if kernel.variable.trainable:
            by_kind.setdefault(type(kernel.variable.regularizer), []).append(kernel.path)
    ours = [kind for kind in by_kind if issubclass(kind, KernelRegularizer)]
    notes = []
    for kernel in kernels:
        obstacle = getattr(kernel.variable.regularizer, "obstacle", lambda shape: "")(kernel.variable.shape)
        notes += [f"{kernel.path}: a convolution with {obstacle}"] if obstacle else []
    main = max(ours, key=lambda kind: len(by_kind[kind]), default=None)
    for kind, paths in by_kind.items():
        if main not in (None, kind):
            bare = kind is type(None)
            name, paper = ("no regularizer", "regularizes all") if bare else (kind.__name__, "discourages mixing")
            listed = ", ".join(paths[:3]) + f" and {len(paths) - 3} more" * (len(paths) > 3)
            kernels = f"{len(paths)} kernel{'s' * (len(paths) > 1)} ({listed})"
            notes.append(f"{name} on {kernels}, in addition to {main.__name__} on {len(by_kind[main])}: the paper {paper}")
    return notes
