"""Adds the orthonormal regularizer to a model that exists already."""

import dataclasses

import keras

from ortho_keras.method.checks import check_built, check_number
from ortho_keras.method.kernels import layer_kernels, matrix_shape, walk_layers
from ortho_keras.method.regularizers import KernelRegularizer, find_regularizer


@dataclasses.dataclass(frozen=True)
class CoveredKernel:
    """One kernel that `orthonormalize` gave the regularizer."""

    path: str  # the variable's path, "block1/conv/kernel"
    layer_type: str
    shape: tuple
    matrices: tuple  # (count, f_in, f_out), how the kernel reads
    regularizer: KernelRegularizer
    replaced: str  # the penalty that it had before, or ""
    note: str


@dataclasses.dataclass(frozen=True)
class SkippedWeight:
    """One weight of rank 2 or more that `orthonormalize` left alone."""

    path: str
    layer_type: str
    shape: tuple
    reason: str


@dataclasses.dataclass(frozen=True)
class OrthonormalizeReport:
    """What `orthonormalize` did. `print(report)` gives one line for each kernel."""

    covered: list
    skipped: list

    @property
    def regularizers(self):
        """The distinct regularizers, one for each layout; set `.factor` on each for a warm-up or a schedule."""
        return list({id(kernel.regularizer): kernel.regularizer for kernel in self.covered}.values())

    def __str__(self):
        lines = [f"orthonormalize: {len(self.covered)} kernels covered, {len(self.skipped)} weights skipped"]
        for kernel in self.covered:
            count, f_in, f_out = kernel.matrices
            size = f"{f_in} x {f_out}" if count == 1 else f"{count} of {f_in} x {f_out}"
            split = f", in groups of {f_in} columns" if f_out > f_in else ""
            notes = "; ".join(filter(None, [kernel.replaced and f"replaces {kernel.replaced}", kernel.note]))
            lines.append(
                f"  covered  {kernel.path} ({kernel.layer_type}) {kernel.shape}: layout {kernel.regularizer.layout}, "
                f"{size}{split}{' [' + notes + ']' if notes else ''}"
            )
        lines += [f"  skipped  {w.path} ({w.layer_type}) {w.shape}: {w.reason}" for w in self.skipped]
        return "\n".join(lines)


def orthonormalize(model, factor=1e-4, verbose=True, regularizer="orthonormal"):
    """Puts the orthonormal regularizer on every kernel of a built model, in place.

    Covers the kernels of Dense, EinsumDense, Conv1D/2D/3D, their transposed, depthwise and separable kin, in nested models
    and composite layers too, each with the layout that fits it. A penalty which a kernel had (L1, L2) is replaced,
    since the paper discourages mixing; biases and the like keep theirs. Weights and outputs stay as they are. A compiled
    model stays compiled, and its next step uses the penalty. All kernels of one layout share one regularizer.

    Args:
        model: A built `keras.Model`, Functional or Sequential (for instance from `keras.applications`).
        factor: float, at least 0. See `OrthonormalRegularizer`.
        verbose: bool. Prints the report.

    Returns:
        An `OrthonormalizeReport`: `covered`, `skipped` (with the reason) and `regularizers`.

    Raises:
        ValueError: If `model` is not a built Keras model, or `factor` is negative or not finite.

    Example:

    >>> model = keras.applications.MobileNetV2(weights=None)
    >>> report = orthonormalize(model, factor=1e-4, verbose=False)
    >>> report.covered[0].path, report.covered[0].matrices
    ('Conv1/kernel', (1, 27, 32))

    Reference:
        Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): all convolutional and fully connected
        layers. The other kinds of layer are ours.
    """
    check_built(model)
    check_number("factor", factor, least=0)
    kind = find_regularizer(regularizer)
    shared = {}  # config -> regularizer
    covered, skipped, seen = [], [], set()
    for layer, owners in walk_layers(model):
        for kernel in layer_kernels(layer):
            seen.add(id(kernel.variable))
            own = kernel.path, type(layer).__name__, tuple(kernel.variable.shape)
            try:
                made = kind.for_kernel(factor, kernel)
            except ValueError as error:
                skipped.append(SkippedWeight(*own, str(error)))
                continue
            made = shared.setdefault(str(made.get_config()), made)
            before = kernel.variable.regularizer
            replaced = "" if before is None else type(before).__name__
            matrices = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
            kernel.variable.regularizer = made
            setattr(layer, kernel.regularizer_attribute, made)
            covered.append(CoveredKernel(*own, matrices, made, replaced, _note(kernel, owners)))
        for variable in _own_variables(layer):
            if id(variable) not in seen and len(variable.shape) > 1:
                seen.add(id(variable))
                own = variable.path, type(layer).__name__, tuple(variable.shape)
                skipped.append(SkippedWeight(*own, _reason(layer, variable)))
    if model.compiled:
        for function, remake in (
            (model.train_function, model.make_train_function),
            (model.test_function, model.make_test_function),
        ):
            if function is not None:  # traced already, with the old penalties
                remake(force=True)
    report = OrthonormalizeReport(covered, skipped)
    if verbose:
        print(report)
    return report


def _own_variables(layer):
    """The variables of a layer itself, without those of the layers in it."""
    inner = {id(v) for child, _ in walk_layers(layer) if child is not layer for v in child.variables}
    return [v for v in layer.variables if id(v) not in inner]


def _note(kernel, owners):
    if not kernel.variable.trainable:
        return "frozen: no penalty until it is trainable"
    composite = [o for o in owners if not isinstance(o, (keras.Function, keras.Sequential, keras.layers.Wrapper))]
    if composite:
        return f"inside {type(composite[0]).__name__}, whose config does not hold it: call again after loading"
    return ""


def _reason(layer, variable):
    if not keras.backend.is_float_dtype(variable.dtype):
        return f"not a float weight ({variable.dtype})"
    if isinstance(layer, keras.layers.Embedding):
        return "an embedding is a table, not a linear map"
    if "bias" in variable.name:
        return "a bias"
    if getattr(layer, "lora_enabled", False):
        return f"{type(layer).__name__} with LoRA: its kernel is a sum, which no penalty on one part makes orthonormal"
    if isinstance(layer, keras.layers.EinsumDense):
        return f"the equation {layer.equation} makes it no matrix from input axes to output axes, or its rank is above 5"
    if getattr(layer, "quantization_mode", None):
        return f"a part of a quantized ({layer.quantization_mode}) kernel"
    return f"{type(layer).__name__} is no convolution, dense or einsum layer: its layout is not known"
