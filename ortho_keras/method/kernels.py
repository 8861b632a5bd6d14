"""How a kernel is read as matrices `(f_in, f_out)`, and which kernels a layer or a model has.

A *layout* says which of a kernel's axes are inputs, outputs, or shared (a depthwise convolution has a matrix for each channel).
"""

import dataclasses
import math

import keras
import numpy as np
from keras import layers, ops

from ortho_keras.method.backend import gram

# Layout name -> (shared axes, output axes), counted from the end; every other axis is an input axis.
LAYOUTS = {
    "standard": ((), (-1,)),  # (..., in, out): Dense, Conv1D/2D/3D
    "transposed": ((), (-2,)),  # (..., out, in): Conv1D/2D/3DTranspose
    "depthwise": ((-2,), (-1,)),  # (..., channels, multiplier): DepthwiseConv1D/2D
}


def standardize_layout(layout):
    """Returns `layout` with tuples in place of lists (JSON turns tuples into lists), or raises `ValueError`."""
    if isinstance(layout, str) and layout in LAYOUTS:
        return layout
    if isinstance(layout, (list, tuple)):
        is_pair = len(layout) == 2 and all(isinstance(axes, (list, tuple)) for axes in layout)
        shared, outputs = map(tuple, layout if is_pair else ((), layout))
        if outputs and all(type(axis) is int for axis in shared + outputs):
            return (shared, outputs) if is_pair else outputs
    kinds = f"one of {sorted(LAYOUTS)}, a tuple of output axes, or a pair of tuples (shared axes, output axes)"
    raise ValueError(f"`layout` must be {kinds}. Received: layout={layout!r}")


def kernel_axes(layout, rank):
    """Returns `(shared, inputs, outputs)`, tuples of axes of a kernel of this rank, counted from 0."""
    layout = standardize_layout(layout)
    if not 2 <= rank <= 5:
        raise ValueError(f"A kernel must have rank 2 to 5. Received: a tensor of rank {rank}")
    if isinstance(layout, str):
        shared, outputs = LAYOUTS[layout]
    else:
        shared, outputs = layout if isinstance(layout[0], tuple) else ((), layout)
    if any(not -rank <= axis < rank for axis in shared + outputs):
        raise ValueError(f"`layout` has an axis out of range for a rank-{rank} kernel. Received: layout={layout!r}")
    shared, outputs = (tuple(axis % rank for axis in axes) for axes in (shared, outputs))
    inputs = tuple(axis for axis in range(rank) if axis not in shared + outputs)
    if len(set(shared + outputs)) != len(shared + outputs) or not inputs:
        message = "must list each axis at most once and leave at least one input axis"
        raise ValueError(f"`layout` {message} of a rank-{rank} kernel. Received: layout={layout!r}")
    return shared, inputs, outputs


def matrix_shape(shape, layout="standard", groups=1):
    """Returns `(count, f_in, f_out)`: how many matrices a kernel of this shape holds, and their shape."""
    shape = tuple(shape)
    axes = kernel_axes(layout, len(shape))
    if any(not size for size in shape):
        raise ValueError(f"A kernel must have a known shape without empty axes. Received: shape={shape}")
    count, f_in, f_out = (math.prod(shape[axis] for axis in part) for part in axes)
    if f_out % groups:
        raise ValueError(f"`groups` must divide the {f_out} outputs of the kernel. Received: groups={groups}")
    return count * groups, f_in, f_out // groups


def as_matrices(kernel, layout="standard", groups=1):
    """Returns a kernel of rank 2 to 5 as matrices `(count, f_in, f_out)`; each group of a grouped convolution is a matrix."""
    count, f_in, f_out = matrix_shape(kernel.shape, layout, groups)
    shared, inputs, outputs = kernel_axes(layout, len(kernel.shape))
    matrices = ops.transpose(kernel, shared + inputs + outputs)
    matrices = ops.reshape(matrices, (count // groups, f_in, groups, f_out))
    return ops.reshape(ops.transpose(matrices, (0, 2, 1, 3)), (count, f_in, f_out))


def as_kernel(matrices, shape, layout="standard", groups=1):
    """Returns matrices `(count, f_in, f_out)` as a kernel of the given shape: the inverse of `as_matrices`."""
    count, f_in, f_out = matrix_shape(shape, layout, groups)
    shared, inputs, outputs = kernel_axes(layout, len(shape))
    order = shared + inputs + outputs
    kernel = ops.reshape(matrices, (count // groups, groups, f_in, f_out))
    kernel = ops.reshape(ops.transpose(kernel, (0, 2, 1, 3)), [shape[axis] for axis in order])
    return ops.transpose(kernel, [order.index(axis) for axis in range(len(shape))])


def column_sets(kernel, layout="standard", groups=1):
    """Splits a kernel's matrices into the sets of columns that can be orthonormal.

    Where `f_out <= f_in`, that is the whole matrix. Where `f_out > f_in`, the paper splits the columns into
    `floor(f_out / f_in)` groups of `f_in` vectors and one group of the remainder. Returns a list of one or two tensors
    `(count, f_in, columns)`, or `(f_in, columns)` where the count is 1: a plain product takes half the time of a batch of one.
    """
    count, f_in, f_out = matrix_shape(kernel.shape, layout, groups)
    if count == 1 and f_out <= f_in and layout == "standard":
        return [ops.reshape(kernel, (f_in, f_out))]  # most kernels: one node of a graph
    sets = [as_matrices(kernel, layout, groups)]
    if f_out > f_in:
        full, rest = divmod(f_out, f_in)
        square = as_matrices(sets[0][..., : full * f_in], ((0,), (2,)), full)
        sets = [square, sets[0][..., full * f_in :]] if rest else [square]
    return [ops.squeeze(columns, 0) if columns.shape[0] == 1 else columns for columns in sets]


def gram_deviation(columns):
    """Returns `W^T W - I` of matrices of shape `(..., rows, columns)`."""
    return gram(columns) - ops.eye(columns.shape[-1], dtype=columns.dtype)


def gram_deviations(kernel, layout="standard", groups=1):
    """Returns `W^T W - I` of each of a kernel's `column_sets`, in float32 for a half-precision kernel."""
    return [gram_deviation(columns) for columns in column_sets(at_least_float32(kernel), layout, groups)]


def at_least_float32(kernel):
    kernel = ops.convert_to_tensor(kernel)
    wide = keras.backend.standardize_dtype(kernel.dtype) in ("float32", "float64")
    return kernel if wide else ops.cast(kernel, "float32")


def orthonormality_error(kernel, layout="standard", groups=1):
    """Returns the largest entry of `|W^T W - I|` of a kernel, a float: 0 where all its columns are orthonormal.

    Args:
        kernel: Tensor or variable of rank 2 to 5.
        layout, groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If the kernel has another rank, or does not fit the layout or groups.
    """
    largest = [
        float(ops.convert_to_numpy(ops.max(ops.abs(deviation)))) for deviation in gram_deviations(kernel, layout, groups)
    ]
    return float(np.max(largest))  # Python's max would lose a NaN


@dataclasses.dataclass(frozen=True)
class LayerKernel:
    """One kernel of a layer, and how it is read."""

    layer: keras.Layer
    variable: keras.Variable
    regularizer_attribute: str  # the layer's attribute that holds this kernel's regularizer
    layout: str | tuple
    groups: int = 1

    @property
    def path(self):
        return self.variable.path


_SEPARABLE = (layers.SeparableConv1D, layers.SeparableConv2D)
_KERNELS = [  # types of layers, variable, regularizer's attribute, layout (of an EinsumDense: by its equation)
    ((layers.Dense, layers.Conv1D, layers.Conv2D, layers.Conv3D), "kernel", "kernel_regularizer", "standard"),
    ((layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose), "kernel", "kernel_regularizer", "transposed"),
    ((layers.DepthwiseConv1D, layers.DepthwiseConv2D), "kernel", "depthwise_regularizer", "depthwise"),
    (_SEPARABLE, "depthwise_kernel", "depthwise_regularizer", "depthwise"),
    (_SEPARABLE, "pointwise_kernel", "pointwise_regularizer", "standard"),
    (layers.EinsumDense, "kernel", "kernel_regularizer", None),
]


def einsum_layout(equation, rank):
    """Returns the layout of an `EinsumDense` kernel: a tuple of output axes, with shared axes where it has them."""
    operands, result = equation.replace("...", "0").replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    outputs = tuple(axis for axis in range(rank) if kernel[axis] in result and kernel[axis] not in inputs)
    shared = tuple(axis for axis in range(rank) if kernel[axis] in result and kernel[axis] in inputs)
    return (shared, outputs) if shared else outputs


def layer_kernels(layer):
    """Returns the `LayerKernel`s of one built convolution, dense or einsum layer; an empty list for any other."""
    found = []
    for types, name, attribute, layout in _KERNELS:
        variable = getattr(layer, name) if layer.built and isinstance(layer, types) else None
        if not isinstance(variable, keras.Variable) or not keras.backend.is_float_dtype(variable.dtype):
            continue  # another layer, or its kernel is quantized or a sum with LoRA
        if layout is None:
            layout = einsum_layout(layer.equation, len(variable.shape))
            try:
                matrix_shape(variable.shape, layout)
            except ValueError:  # it has no input axes or no output axes, or its rank is above 5
                continue
        groups = getattr(layer, "groups", 1) if layout == "standard" else 1
        found.append(LayerKernel(layer, variable, attribute, layout, groups))
    return found


def walk_layers(layer, owners=(), seen=None):
    """Yields `(layer, owners)` for a layer and every layer in it, depth first, each once; owners run from the root."""
    seen = set() if seen is None else seen
    if id(layer) not in seen:
        seen.add(id(layer))
        yield layer, owners
        for child in layer.layers if isinstance(layer, keras.Model) else _held_layers(vars(layer)):
            yield from walk_layers(child, (*owners, layer), seen)


def _held_layers(value):
    """Yields the layers in an attribute's value, in lists and dictionaries too."""
    if isinstance(value, keras.Layer):
        yield value
    elif isinstance(value, (dict, list, tuple, set, frozenset)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _held_layers(item)


def model_kernels(model):
    """Returns the `LayerKernel`s of a whole model, in the order of its layers, each kernel once."""
    return [kernel for layer, _ in walk_layers(model) for kernel in layer_kernels(layer)]
