"""How a kernel is read as matrices: the one home of axes, groups and layouts.

The paper (Xie et al. 2017, Eq. 3) speaks of a matrix W of shape `(f_in, f_out)`. Keras stores kernels of rank
2 to 5 in several orders, so a *layout* says which axes are inputs, which are outputs, and which are shared by
both (a depthwise convolution has one small matrix for each channel).
"""

import dataclasses
import math

import keras
import tensorflow as tf

# Layout name -> (shared axes, output axes), counted from the end; every other axis is an input axis.
LAYOUTS = {
    "standard": ((), (-1,)),  # (..., in, out): Dense, Conv1D/2D/3D
    "transposed": ((), (-2,)),  # (..., out, in): Conv1D/2D/3DTranspose
    "depthwise": ((-2,), (-1,)),  # (..., channels, multiplier): DepthwiseConv1D/2D
}


def standardize_layout(layout):
    """Returns `layout` in the one form that is stored and serialized, or raises `ValueError`.

    A string of `LAYOUTS` stays as it is. A sequence of output axes becomes a tuple of ints, and a pair of
    sequences `(shared axes, output axes)` a pair of tuples (JSON turns tuples into lists: both are accepted).
    """
    message = (
        f"`layout` must be one of {sorted(LAYOUTS)}, a tuple of the kernel's output axes, or a pair of tuples "
        f"(shared axes, output axes). Received: layout={layout!r}"
    )
    if isinstance(layout, str):
        if layout not in LAYOUTS:
            raise ValueError(message)
        return layout
    if not isinstance(layout, (list, tuple)) or not layout:
        raise ValueError(message)
    if isinstance(layout[0], (list, tuple)):
        if len(layout) != 2 or not isinstance(layout[1], (list, tuple)) or not layout[1]:
            raise ValueError(message)
        standard = tuple(tuple(axes) for axes in layout)
        flat = standard[0] + standard[1]
    else:
        standard = flat = tuple(layout)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in flat):
        raise ValueError(message)
    return standard


def standardize_groups(groups):
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"`groups` must be a positive integer. Received: groups={groups!r}")
    return groups


def kernel_axes(layout, rank):
    """Returns `(shared, inputs, outputs)`, tuples of axes of a kernel of this rank, from 0 up."""
    layout = standardize_layout(layout)
    if not 2 <= rank <= 5:
        raise ValueError(f"A kernel must have rank 2 to 5. Received: a tensor of rank {rank}")
    if isinstance(layout, str):
        shared, outputs = LAYOUTS[layout]
    elif isinstance(layout[0], tuple):
        shared, outputs = layout
    else:
        shared, outputs = (), layout
    if any(not -rank <= axis < rank for axis in shared + outputs):
        raise ValueError(f"`layout` names an axis that a kernel of rank {rank} has not. Received: layout={layout!r}")
    shared, outputs = (tuple(axis % rank for axis in axes) for axes in (shared, outputs))
    inputs = tuple(axis for axis in range(rank) if axis not in shared + outputs)
    if len(set(shared + outputs)) != len(shared + outputs) or not inputs:
        raise ValueError(
            f"`layout` must name each axis once and leave at least one input axis of a kernel of rank {rank}. "
            f"Received: layout={layout!r}"
        )
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
    """Reads a kernel of rank 2 to 5 as a batch of matrices of shape `(count, f_in, f_out)`.

    `groups` is a grouped convolution's number of groups: its output channels fall into that many
    runs, each with input channels of its own, so each run is a matrix of its own.
    """
    count, f_in, f_out = matrix_shape(kernel.shape, layout, groups)
    shared, inputs, outputs = kernel_axes(layout, len(kernel.shape))
    order = shared + inputs + outputs
    if groups == 1 and order == tuple(range(len(order))):  # most kernels: nothing moves
        return tf.reshape(kernel, (count, f_in, f_out))
    matrices = tf.transpose(kernel, order)
    matrices = tf.reshape(matrices, (count // groups, f_in, groups, f_out))
    return tf.reshape(tf.transpose(matrices, (0, 2, 1, 3)), (count, f_in, f_out))


def as_kernel(matrices, shape, layout="standard", groups=1):
    """The inverse of `as_matrices`: matrices `(count, f_in, f_out)` to a kernel of the given shape."""
    count, f_in, f_out = matrix_shape(shape, layout, groups)
    shared, inputs, outputs = kernel_axes(layout, len(shape))
    order = shared + inputs + outputs
    kernel = tf.reshape(matrices, (count // groups, groups, f_in, f_out))
    kernel = tf.reshape(tf.transpose(kernel, (0, 2, 1, 3)), [shape[axis] for axis in order])
    return tf.transpose(kernel, [order.index(axis) for axis in range(len(shape))])


def orthonormal_groups(matrices):
    """Splits matrices `(count, f_in, f_out)` into the sets of columns that can be orthonormal.

    Where `f_out <= f_in` that is the whole matrix. Where `f_out > f_in`, more than `f_in` orthogonal vectors
    cannot exist: the paper splits the columns into `floor(f_out / f_in)` full groups of `f_in` vectors and one
    group of the remainder. Returns a list of one or two tensors of shape `(count, f_in, columns)`.
    """
    count, f_in, f_out = matrices.shape
    if f_out <= f_in:
        return [matrices]
    full, rest = divmod(f_out, f_in)
    square = tf.reshape(matrices[..., : full * f_in], (count, f_in, full, f_in))
    square = tf.reshape(tf.transpose(square, (0, 2, 1, 3)), (count * full, f_in, f_in))
    return [square, matrices[..., full * f_in :]] if rest else [square]


def column_sets(kernel, layout="standard", groups=1):
    """Returns a kernel's `orthonormal_groups`, each of `(rows, columns)` where it is one matrix.

    A plain product takes half the time of a batch of one.
    """
    count, f_in, f_out = matrix_shape(kernel.shape, layout, groups)
    _, _, outputs = kernel_axes(layout, len(kernel.shape))
    if count == 1 and f_out <= f_in and outputs == tuple(range(len(kernel.shape)))[-len(outputs) :]:
        return [tf.reshape(kernel, (f_in, f_out))]  # most kernels: one node of a graph
    sets = orthonormal_groups(as_matrices(kernel, layout, groups))
    return [tf.squeeze(columns, 0) if columns.shape[0] == 1 else columns for columns in sets]


def gram_deviations(kernel, layout="standard", groups=1):
    """Returns `W^T W - I` of each set of columns, a list of tensors `(count, columns, columns)`.

    In float32 for a half-precision kernel. The Gram matrices are never larger than `min(f_in, f_out)` a side.
    """
    return [gram_deviation(columns) for columns in orthonormal_groups(as_matrices(at_least_float32(kernel), layout, groups))]


def gram_deviation(columns):
    """Returns `W^T W - I` of matrices `(count, rows, columns)`, or of one matrix `(rows, columns)`."""
    if len(columns.shape) == 3 and columns.shape[0] == 1:  # a plain product takes half the time of a batch of one
        return tf.expand_dims(gram_deviation(tf.squeeze(columns, 0)), 0)
    return tf.matmul(columns, columns, transpose_a=True) - tf.eye(columns.shape[-1], dtype=columns.dtype)


def at_least_float32(kernel):
    kernel = tf.convert_to_tensor(kernel)
    return tf.cast(kernel, tf.float32) if kernel.dtype.size < 4 else kernel


def orthonormality_error(kernel, layout="standard", groups=1):
    """Returns the largest `|W^T W - I|` entry of a kernel, a float: 0 where all its columns are orthonormal.

    Args:
        kernel: Tensor or variable of rank 2 to 5.
        layout: See `OrthonormalRegularizer`.
        groups: See `OrthonormalRegularizer`.

    Raises:
        ValueError: If the kernel has another rank, or layout or groups do not fit it.
    """
    largest = [tf.reduce_max(tf.abs(deviation)) for deviation in gram_deviations(kernel, layout, groups)]
    return float(tf.reduce_max(tf.stack(largest)))  # Python's max would lose a NaN


@dataclasses.dataclass(frozen=True)
class LayerKernel:
    """One kernel of a layer, and how it reads."""

    layer: keras.Layer
    variable: keras.Variable
    regularizer_attribute: str  # the layer's attribute that holds this kernel's regularizer
    layout: str | tuple
    groups: int = 1

    @property
    def path(self):
        return self.variable.path


def einsum_layout(equation, rank):
    """Returns the layout of an `EinsumDense` kernel: a tuple of output axes, with shared axes where it has them."""
    operands, result = equation.replace("...", "0").replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    outputs = tuple(axis for axis in range(rank) if kernel[axis] in result and kernel[axis] not in inputs)
    shared = tuple(axis for axis in range(rank) if kernel[axis] in result and kernel[axis] in inputs)
    return (shared, outputs) if shared else outputs


def layer_kernels(layer):
    """Returns the `LayerKernel`s of one built convolution, dense or einsum layer; an empty list for any other.

    An `EinsumDense` kernel that is no linear map between axes of its own (no output axis, no input axis) or whose rank is
    above 5 is none.
    """
    layers = keras.layers
    if not layer.built:
        return []
    if isinstance(layer, (layers.Conv1DTranspose, layers.Conv2DTranspose, layers.Conv3DTranspose)):
        found = [("kernel", "kernel_regularizer", "transposed", 1)]
    elif isinstance(layer, (layers.SeparableConv1D, layers.SeparableConv2D)):
        found = [
            ("depthwise_kernel", "depthwise_regularizer", "depthwise", 1),
            ("pointwise_kernel", "pointwise_regularizer", "standard", 1),
        ]
    elif isinstance(layer, (layers.DepthwiseConv1D, layers.DepthwiseConv2D)):
        found = [("kernel", "depthwise_regularizer", "depthwise", 1)]
    elif isinstance(layer, (layers.Conv1D, layers.Conv2D, layers.Conv3D)):
        found = [("kernel", "kernel_regularizer", "standard", layer.groups)]
    elif isinstance(layer, layers.Dense):
        found = [("kernel", "kernel_regularizer", "standard", 1)]
    elif isinstance(layer, layers.EinsumDense):
        layout = einsum_layout(layer.equation, len(layer.kernel.shape))
        try:
            matrix_shape(layer.kernel.shape, layout)
        except ValueError:
            return []
        found = [("kernel", "kernel_regularizer", layout, 1)]
    else:
        return []
    kernels = [(getattr(layer, name), attribute, layout, groups) for name, attribute, layout, groups in found]
    return [
        LayerKernel(layer, variable, attribute, layout, groups)
        for variable, attribute, layout, groups in kernels
        if isinstance(variable, keras.Variable) and keras.backend.is_float_dtype(variable.dtype)
    ]


def walk_layers(layer, inside=()):
    """Yields `(layer, owners)` for a layer or model and every layer in it, depth first, each once.

    `owners` is the tuple of layers from the root down to the layer's owner.
    """
    seen = set()

    def walk(layer, owners):
        if id(layer) in seen:
            return
        seen.add(id(layer))
        yield layer, owners
        for child in layer.layers if isinstance(layer, keras.Model) else held(vars(layer)):
            yield from walk(child, (*owners, layer))

    def held(value):
        if isinstance(value, keras.Layer):
            yield value
        elif isinstance(value, (dict, list, tuple, set, frozenset)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from held(item)

    yield from walk(layer, tuple(inside))


def model_kernels(model):
    """Returns the `LayerKernel`s of a whole model, in the order of its layers, each kernel once."""
    return [kernel for layer, _ in walk_layers(model) for kernel in layer_kernels(layer)]
