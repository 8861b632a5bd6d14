"""Plain and residual networks, for small images such as CIFAR's and for ImageNet, from one block function."""

import keras

from ortho_keras.method.checks import check_number
from ortho_keras.method.graphs import allow_deep_graphs
from ortho_keras.nets.layers import CHANNELS, LayerBuilder

# Blocks of each stage of an ImageNet network: He et al. 2016, Table 1.
BLOCKS = {34: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_DEPTHS = (101,)
# Kernel size of each convolution of a block, and its filters over those of the stage.
PAIR = ((3, 1), (3, 1))
BOTTLENECK = ((1, 1), (3, 1), (1, 4))


def plain_cnn(
    depth,
    input_shape=(32, 32, 3),
    num_classes=10,
    width=16,
    regularizer="orthonormal",
    initializer="orthonormal",
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds a plain network for small images: Conv-BN-ReLU repeated, without shortcuts.

    `depth = 6n + 2`: one 3x3 convolution, three stages of 2n 3x3 convolutions with `width`, `2 * width` and `4 * width`
    filters, global average pooling, and one Dense layer. The second and third stage start with stride 2. The layers are
    named `stem_conv`, `stage1_conv01` ... `stage3_conv14`, `classifier`; BN and ReLU append `_bn` and `_relu`.

    Args:
        depth: int, 6n + 2 with n at least 1: 8, 14, 20, ..., 44, ..., 110. Counts convolutions and the Dense layer.
        input_shape: Tuple `(height, width, channels)`; height and width may be `None`.
        num_classes: int, at least 2.
        width: int, at least 1. Filters of the first stage.
        regularizer: Penalty of every kernel: `"orthonormal"` is `OrthonormalRegularizer()`; otherwise anything that
            `keras.regularizers.get` takes, `None` for no penalty. All layers share one object.
        initializer: `"orthonormal"`, `"delta_orthonormal"`, `"dirac"`, or anything that `keras.initializers.get` takes;
            `None` is Keras's default. Each layer gets a copy with its own seed.
        relu_shift: float, at least 0, or `"auto"`. The activations are `max(x, -relu_shift)`, see `ShiftedReLU` (ours).
            0 is the paper's ReLU; `"auto"` is `shift_for_depth(depth)`.
        bn_synchronized: bool. Whether BatchNormalization's statistics are those of all replicas of a `tf.distribute` strategy.
        seed: int, at least 0, or `None`. Determines all kernels.
        preprocessing: Layer applied to the input first, such as an adapted `Normalization`, or `None`.
        name: String. Defaults to `plain<depth>`.

    Returns:
        A Functional model from `(batch, height, width, channels)` to logits `(batch, num_classes)`. The logits have the
        variables' dtype (float32 under a mixed policy).

    Raises:
        ValueError: If an argument is out of range. For a wrong depth, the message lists the nearest valid ones.

    Example:

    >>> model = plain_cnn(44, input_shape=(28, 28, 1), seed=0)

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), section 4.2; Xie, Xiong, Pu 2017
        ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)).
    """
    settings = regularizer, initializer, relu_shift, bn_synchronized, seed
    return _build("cifar", False, depth, input_shape, num_classes, width, settings, preprocessing, name)


def residual_cnn(
    depth,
    input_shape=(32, 32, 3),
    num_classes=10,
    width=16,
    regularizer="orthonormal",
    initializer="orthonormal",
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds the residual counterpart of `plain_cnn`: the same layers with a shortcut around every two convolutions.

    The shortcuts have no parameters: identities, and where a stage starts with stride 2, every second pixel with zeros for the
    added channels (option A of He et al.). The additions are named `stage1_add01` ...

    Args:
        depth, input_shape, num_classes, width: As in `plain_cnn`.
        regularizer, initializer, relu_shift, bn_synchronized, seed, preprocessing: As in `plain_cnn`.
        name: String. Defaults to `residual<depth>`.

    Returns:
        A Functional model, as `plain_cnn`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), section 4.2, option A.
    """
    settings = regularizer, initializer, relu_shift, bn_synchronized, seed
    return _build("cifar", True, depth, input_shape, num_classes, width, settings, preprocessing, name)


def plain_imagenet(
    depth=34,
    input_shape=(224, 224, 3),
    num_classes=1000,
    width=64,
    regularizer="orthonormal",
    initializer="orthonormal",
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds a plain network for ImageNet, of 34 or 101 layers: Conv-BN-ReLU repeated, without shortcuts.

    A 7x7 convolution of stride 2, max pooling of stride 2, four stages of `width`, `2 * width`, `4 * width` and `8 * width`
    filters, global average pooling, and one Dense layer. All stages but the first start with stride 2. With 34 layers, a block
    is two 3x3 convolutions; with 101, convolutions of 1x1, 3x3 and 1x1, the last with four times as many filters. That one has
    f_in < f_out, so the regularizer and the initializer take its filters in groups (see `check_design`). The layers are
    named `stem_conv`, `stage1_block01_conv1` ... `classifier`; BN and ReLU append `_bn` and `_relu`.

    Args:
        depth: 34 or 101. Counts convolutions and the Dense layer.
        input_shape: Tuple `(height, width, channels)`; height and width may be `None`.
        num_classes: int, at least 2.
        width: int, at least 1. Filters of the stem and the first stage.
        regularizer, initializer, relu_shift, bn_synchronized, seed, preprocessing: As in `plain_cnn`.
        name: String. Defaults to `plain<depth>_imagenet`.

    Returns:
        A Functional model, as `plain_cnn`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), Table 1. Xie, Xiong, Pu 2017
        ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)) train plain networks of 34, 44 and 101 layers; how their 44 are
        spread over the stages is not published.
    """
    settings = regularizer, initializer, relu_shift, bn_synchronized, seed
    return _build("imagenet", False, depth, input_shape, num_classes, width, settings, preprocessing, name)


def residual_imagenet(
    depth=34,
    input_shape=(224, 224, 3),
    num_classes=1000,
    width=64,
    regularizer="orthonormal",
    initializer="orthonormal",
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds the residual counterpart of `plain_imagenet`: the same layers, and a shortcut around every block.

    The shortcuts are identities, and where the shape changes, 1x1 convolutions with BatchNormalization (option B of He et al.).
    These are named `stage2_block01_shortcut` ... and do not count as layers. The additions are named `stage1_block01_add` ...
    For 1,000 classes there are 21.8 million trainable parameters with 34 layers, and 44.5 million with 101.

    Args:
        depth, input_shape, num_classes, width: As in `plain_imagenet`.
        regularizer, initializer, relu_shift, bn_synchronized, seed, preprocessing: As in `plain_cnn`.
        name: String. Defaults to `residual<depth>_imagenet`.

    Returns:
        A Functional model, as `plain_cnn`.

    Raises:
        ValueError: If an argument is out of range.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), Table 1, option B.
    """
    settings = regularizer, initializer, relu_shift, bn_synchronized, seed
    return _build("imagenet", True, depth, input_shape, num_classes, width, settings, preprocessing, name)


def _build(family, residual, depth, input_shape, num_classes, width, settings, preprocessing, name):
    imagenet = family == "imagenet"
    if imagenet and depth not in BLOCKS:
        raise ValueError(f"`depth` must be one of {', '.join(map(str, BLOCKS))}. Received: depth={depth!r}")
    stages = BLOCKS[depth] if imagenet else 3 * (_pairs(depth),)
    kernels = BOTTLENECK if imagenet and depth in BOTTLENECK_DEPTHS else PAIR
    check_number("num_classes", num_classes, least=2, integer=True)
    check_number("width", width, least=1, integer=True)
    if not isinstance(input_shape, (list, tuple)) or len(input_shape) != 3 or not input_shape[-1]:
        raise ValueError(f"`input_shape` must be (height, width, channels). Received: input_shape={input_shape!r}")
    layers = LayerBuilder(depth, *settings)
    allow_deep_graphs(4 * depth)
    inputs = keras.Input(input_shape, name="image")
    x = inputs if preprocessing is None else preprocessing(inputs)
    x = layers.stem(x, width, size=7 if imagenet else 3, strides=2 if imagenet else 1)
    if imagenet:
        x = keras.layers.MaxPooling2D(3, 2, "same", CHANNELS, name="stem_pool")(x)
    for stage, blocks in enumerate(stages, 1):
        for block in range(1, blocks + 1):
            names, addition = [f"stage{stage}_conv{2 * block + at:02d}" for at in (-1, 0)], f"stage{stage}_add{block:02d}"
            projection = None
            if imagenet:
                prefix = f"stage{stage}_block{block:02d}"
                names, addition = [f"{prefix}_conv{number}" for number in (1, 2, 3)], f"{prefix}_add"
                projection = f"{prefix}_shortcut"
            filters = width * 2 ** (stage - 1)
            convolutions = [(name, size, times * filters) for name, (size, times) in zip(names, kernels)]
            strides = 2 if stage > 1 and block == 1 else 1
            x = _block(layers, x, convolutions, strides, addition if residual else None, projection)
    default = f"{'residual' if residual else 'plain'}{depth}{'_imagenet' if imagenet else ''}"
    return keras.Model(inputs, layers.classifier(x, num_classes), name=name or default)


def _pairs(depth):
    """Returns the number n of blocks in each stage of a network of 6n + 2 layers."""
    check_number("depth", depth, least=8, integer=True)
    below = depth - (depth - 2) % 6
    if below != depth:
        raise ValueError(f"`depth` must be 6n + 2; the nearest are {below} and {below + 6}. Received: depth={depth!r}")
    return (depth - 2) // 6


def _block(layers, inputs, convolutions, strides, addition, projection):
    """Applies convolutions `(name, kernel size, filters)`, the first with `strides`.

    `addition` names the addition of the shortcut, `None` for a plain block. `projection` names the shortcut's convolution.
    """
    x = inputs
    for number, (name, size, filters) in enumerate(convolutions, 1):
        x = layers.convolution(x, filters, size, strides if number == 1 else 1, name)
        if addition and number == len(convolutions):
            x = keras.layers.Add(name=addition)([x, _shortcut(layers, inputs, filters, strides, projection)])
        x = layers.relu(x, f"{name}_relu")
    return x


def _shortcut(layers, x, filters, strides, projection):
    """Where the shape changes, option B of He et al. with a name for its convolution, option A without."""
    if strides == 1 and x.shape[-1] == filters:
        return x
    if projection:
        return layers.convolution(x, filters, 1, strides, projection)
    x = keras.layers.AveragePooling2D(1, strides, "same", CHANNELS)(x)  # every second pixel
    return keras.ops.pad(x, [[0, 0], [0, 0], [0, 0], [0, filters - x.shape[-1]]])
