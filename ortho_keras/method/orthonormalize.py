"""Adds a regularizer of kernels to an existing model."""

import dataclasses
import random

import keras

from ortho_keras.method.checks import check_built, check_number
from ortho_keras.method.initializers import OrthonormalInitializer
from ortho_keras.method.kernels import layer_kernels, matrix_shape, model_kernels, walk_layers
from ortho_keras.method.regularizers import KernelRegularizer, find_regularizer


@dataclasses.dataclass(frozen=True)
class CoveredKernel:
    """One kernel that `orthonormalize` gave the regularizer."""

    path: str  # the variable's path, "block1/conv/kernel"
    layer_type: str
    shape: tuple
    matrices: tuple  # (count, f_in, f_out), how the kernel is read
    regularizer: KernelRegularizer
    replaced: str  # the regularizer that it had before, or ""
    note: str


@dataclasses.dataclass(frozen=True)
class SkippedWeight:
    """One weight of rank 2 or more that `orthonormalize` did not change."""

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
            size = f"{count} of " * (count > 1) + f"{f_in} x {f_out}" + f", in groups of {f_in} columns" * (f_out > f_in)
            notes = "".join(f" [{note}]" for note in (kernel.replaced and f"replaces {kernel.replaced}", kernel.note) if note)
            layout = f"layout {kernel.regularizer.layout}"
            lines.append(f"  covered  {kernel.path} ({kernel.layer_type}) {kernel.shape}: {layout}, {size}{notes}")
        lines += [f"  skipped  {w.path} ({w.layer_type}) {w.shape}: {w.reason}" for w in self.skipped]
        return "\n".join(lines)


def orthonormalize(model, factor=1e-4, verbose=True, regularizer="orthonormal", initialize=False):
    """Puts the orthonormal regularizer, or another one, on every kernel of a built model, in place.

    Covers the kernels of Dense, EinsumDense, Conv1D/2D/3D and of transposed, depthwise and separable convolutions, in nested
    models and composite layers too, each with the layout that fits it. A kernel's previous regularizer (L1, L2) is replaced;
    other weights, such as biases, keep theirs. Weights and outputs do not change, unless `initialize` is True. A compiled model
    stays compiled, and its next training step uses the penalty; another compiled model that shares its layers must be compiled
    again. Kernels of one layout share one regularizer.

    Args:
        model: A built `keras.Model` (for instance from `keras.applications`).
        factor: float, at least 0. The strength, see `OrthonormalRegularizer`.
        verbose: bool. Whether to print the report.
        regularizer: `"orthonormal"`, `"double_soft_orthogonal"`, `"mutual_coherence"`, `"srip"`, `"conv_orthogonal"`, the name
            of a custom `KernelRegularizer`, or a subclass of it. Kernels for which it is not defined are skipped.
        initialize: bool. Whether to set the covered kernels to orthonormal ones, by the layouts found. The layers' own
            initializers cannot know these: `MultiHeadAttention(kernel_initializer=OrthonormalInitializer())` uses one layout
            for queries, keys, values and outputs, and so does its `kernel_regularizer`.

    Returns:
        An `OrthonormalizeReport`: `covered`, `skipped` (with the reason) and `regularizers`.

    Raises:
        ValueError: If an argument is none of the above. The model is then unchanged.

    Example:

    >>> model = keras.applications.MobileNetV2(weights=None)
    >>> report = orthonormalize(model, factor=1e-4, verbose=False)
    >>> report.covered[0].path, report.covered[0].matrices
    ('Conv1/kernel', (1, 27, 32))

    Reference:
        Xie, Xiong, Pu 2017, Eq. 3 ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)): all convolutional and fully connected
        layers. The other types of layers are ours.
    """
    check_built(model)
    check_number("factor", factor, least=0)
    kind = find_regularizer(regularizer)
    shared, holders = {}, {}  # config -> regularizer, id of a weight -> the innermost layer that holds it
    set_on, skipped = [], []
    for layer, owners in walk_layers(model):
        holders |= {id(weight): layer for weight in layer.weights}
        for kernel in layer_kernels(layer):
            own = kernel.path, type(layer).__name__, tuple(kernel.variable.shape)
            try:
                made = kind.for_kernel(factor, kernel)
            except ValueError as error:
                skipped.append(SkippedWeight(*own, str(error)))
                continue
            made = shared.setdefault(str(made.get_config()), made)
            replaced = type(kernel.variable.regularizer).__name__ if kernel.variable.regularizer else ""
            matrices = matrix_shape(kernel.variable.shape, kernel.layout, kernel.groups)
            kernel.variable.regularizer = made
            if initialize:
                initializer = OrthonormalInitializer(layout=kernel.layout, groups=kernel.groups)
                kernel.variable.assign(initializer(kernel.variable.shape, kernel.variable.dtype))
            setattr(layer, kernel.regularizer_attribute, made)
            set_on.append((kernel, owners, (*own, matrices, made, replaced)))
    rebuilt = {}  # id of a layer -> the layers in it after a round trip through its configuration
    covered = [CoveredKernel(*values, _note(kernel, owners, rebuilt)) for kernel, owners, values in set_on]
    kernels = {id(kernel.variable) for kernel in model_kernels(model)}
    for weight in model.weights:
        if len(weight.shape) > 1 and id(weight) not in kernels:
            layer = holders[id(weight)]
            skipped.append(SkippedWeight(weight.path, type(layer).__name__, tuple(weight.shape), _reason(layer, weight)))
    if model.train_function is not None:  # traced with the previous penalties
        model.make_train_function(force=True)
    model.test_function = None
    report = OrthonormalizeReport(covered, skipped)
    if verbose:
        print(report)
    return report


def _note(kernel, owners, rebuilt):
    if not kernel.variable.trainable:
        return "frozen: no penalty until it is trainable"
    for owner in owners:
        holds_layers = isinstance(owner, (keras.Function, keras.Sequential, keras.layers.Wrapper))
        if not holds_layers or not type(owner).get_config.__module__.startswith("keras."):
            lost = f"not in the config of {type(owner).__name__}: call orthonormalize again after loading"
            return "" if _survives(kernel, owner, rebuilt) else lost
    return ""


def _survives(kernel, owner, rebuilt):
    """Whether a kernel's regularizer is still there when its owner is rebuilt, as loading does, from its configuration."""
    before = [layer for layer, _ in walk_layers(owner)]
    if id(owner) not in rebuilt:
        state = random.getstate()  # Keras seeds new layers from it
        try:
            rebuilt[id(owner)] = [layer for layer, _ in walk_layers(type(owner).from_config(owner.get_config()))]
        except Exception:  # a custom class may raise anything, and cannot be loaded then
            rebuilt[id(owner)] = []
        finally:
            random.setstate(state)
    after = rebuilt[id(owner)]
    if list(map(type, after)) != list(map(type, before)):
        return False
    place = next(place for place, layer in enumerate(before) if layer is kernel.layer)
    regularizer = getattr(after[place], kernel.regularizer_attribute, None)
    held = getattr(kernel.layer, kernel.regularizer_attribute)
    return type(regularizer) is type(held) and regularizer.get_config() == held.get_config()


def _reason(layer, variable):
    if not keras.backend.is_float_dtype(variable.dtype):
        return f"not a float weight ({variable.dtype})"
    if isinstance(layer, keras.layers.Embedding):
        return "an embedding is a table, not a linear map"
    if "bias" in variable.name:
        return "a bias"
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None):
        return f"{type(layer).__name__} with LoRA or quantization: its kernel is not one float weight"
    if isinstance(layer, keras.layers.EinsumDense):
        return f"the equation {layer.equation} makes it no matrix, or its rank is above 5"
    return f"{type(layer).__name__} is not a convolution, dense or einsum layer: its layout is unknown"
