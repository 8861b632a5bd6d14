"""Plain and residual networks for small images, from one block function."""

import keras

from ortho_keras.method.graphs import allow_deep_graphs
from ortho_keras.nets.layer_builder import STEM, LayerBuilder, check_sizes

STAGES = 3


def plain_cnn(
    depth,
    input_shape=(32, 32, 3),
    num_classes=10,
    width=16,
    regularizer="orthonormal",
    initializer="orthonormal",
    stem_initializer=None,
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds a plain network: Conv-BN-ReLU repeated, no shortcut of any kind.

    `depth = 6n + 2`: one 3x3 convolution, three stages of 2n 3x3 convolutions with `width`, `2 * width` and `4 * width`
    filters, each after the first with stride 2 at its start, global average pooling, and one Dense layer. The layers
    are named `stem_conv`, `stage1_conv01` ... `stage3_conv14`, `classifier`; BN and ReLU carry `_bn` and `_relu` behind.

    Args:
        depth: int, 6n + 2 with n at least 1: 8, 14, 20, ..., 44, ..., 110. Counts convolutions and the Dense layer.
        input_shape: Tuple `(height, width, channels)`.
        num_classes: int, at least 2.
        width: int, at least 1. Filters of the first stage.
        regularizer: The penalty of every kernel: `"orthonormal"`, `OrthonormalRegularizer()` with its default factor, or
            whatever `keras.regularizers.get` takes; `None` for none. One object is shared by all layers.
        initializer: `"orthonormal"`; `"delta_orthonormal"` or `"dirac"` (for convolutions; the Dense layer is orthonormal); or
            whatever `keras.initializers.get` takes; `None` is Keras's default. Each layer gets a copy with a seed of its own.
        stem_initializer: How the first convolution starts: whatever `keras.initializers.get` takes, a `PatchPCAInitializer`
            (ours), say. `None`: as the others.
        relu_shift: float, at least 0, or `"auto"`. The activations are `max(x, -relu_shift)`, see `ShiftedReLU`: the same
            without the harm at the borders (ours). 0 is the paper's ReLU; `"auto"` is `shift_for_depth(depth)`.
        bn_synchronized: bool. Under a `tf.distribute` strategy, BatchNormalization's statistics are those of all replicas.
        seed: int, at least 0, or `None`. Fixes all kernels.
        preprocessing: A layer that is applied to the input first, a `Normalization`, say, so that the model takes raw pixels.
        name: String. Defaults to `plain<depth>`.

    Returns:
        A Functional model from `(batch, height, width, channels)` to logits `(batch, num_classes)`; the logits are in the
        variables' type (float32 under a mixed policy).

    Raises:
        ValueError: If an argument is outside its range. A wrong depth names the nearest right ones.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), section 4.2; Xie, Xiong, Pu 2017
        ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)). `relu_shift` is
        ours, `"delta_orthonormal"` is Xiao et al.'s and `"dirac"` after DiracNets (see the initializers).
    """
    settings = (regularizer, initializer, stem_initializer, relu_shift, bn_synchronized, seed)
    return _build(settings, False, depth, input_shape, num_classes, width, preprocessing, name or f"plain{depth}")


def residual_cnn(
    depth,
    input_shape=(32, 32, 3),
    num_classes=10,
    width=16,
    regularizer="orthonormal",
    initializer="orthonormal",
    stem_initializer=None,
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds the residual twin of `plain_cnn`: the same layers and parameters, with a shortcut around every two convolutions.

    The shortcuts have no parameters: identity, and at the start of a stage every second pixel with zeros for the new
    channels (option A of He et al.). Convolutions carry the names of the plain twin's; additions are `stage1_add01` ...

    Args:
        depth: See `plain_cnn`.
        input_shape: See `plain_cnn`.
        num_classes: See `plain_cnn`.
        width: See `plain_cnn`.
        regularizer: See `plain_cnn`.
        initializer: See `plain_cnn`.
        stem_initializer: See `plain_cnn`.
        relu_shift: See `plain_cnn`.
        bn_synchronized: See `plain_cnn`.
        seed: See `plain_cnn`.
        preprocessing: See `plain_cnn`.
        name: String. Defaults to `residual<depth>`.

    Returns:
        See `plain_cnn`.

    Raises:
        ValueError: See `plain_cnn`.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), section 4.2, option A.
    """
    settings = (regularizer, initializer, stem_initializer, relu_shift, bn_synchronized, seed)
    return _build(settings, True, depth, input_shape, num_classes, width, preprocessing, name or f"residual{depth}")


def check_depth(depth):
    """Returns n of `depth = 6n + 2`, or raises `ValueError` with the nearest right depths."""
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 8 or (depth - 2) % 6:
        near = ""
        if isinstance(depth, int) and depth > 8:
            below = depth - (depth - 2) % 6
            near = f"; the nearest are {below} and {below + 6}"
        raise ValueError(f"`depth` must be 6n + 2, at least 8{near}. Received: depth={depth!r}")
    return (depth - 2) // 6


def _build(settings, residual, depth, input_shape, num_classes, width, preprocessing, name):
    pairs = check_depth(depth)
    check_sizes(input_shape, num_classes=(num_classes, 2), width=(width, 1))
    builder = LayerBuilder(depth, *settings)
    allow_deep_graphs(4 * depth)
    inputs = keras.Input(input_shape, name="image")
    x = inputs if preprocessing is None else preprocessing(inputs)
    x = builder.convolution(x, width, 1, STEM)
    x = builder.relu(x, f"{STEM}_relu")
    for stage in range(1, STAGES + 1):
        filters = width * 2 ** (stage - 1)
        for pair in range(1, pairs + 1):
            strides = 2 if stage > 1 and pair == 1 else 1
            first, second = (f"stage{stage}_conv{conv:02d}" for conv in (2 * pair - 1, 2 * pair))
            shortcut = x
            x = builder.convolution(x, filters, strides, first)
            x = builder.relu(x, f"{first}_relu")
            x = builder.convolution(x, filters, 1, second)
            if residual:
                x = keras.layers.Add(name=f"stage{stage}_add{pair:02d}")([x, _shortcut(shortcut, filters, strides)])
            x = builder.relu(x, f"{second}_relu")
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    return keras.Model(inputs, builder.classifier(x, num_classes), name=name)


def _shortcut(x, filters, strides):
    """Option A: every `strides`-th pixel, and zeros for the channels that are new."""
    if strides == 1:
        return x
    x = keras.layers.AveragePooling2D(1, strides, padding="same")(x)
    return keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, filters - x.shape[-1]]])
