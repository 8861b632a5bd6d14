"""Plain and residual networks for photographs: He et al.'s four stages, with shortcuts and without."""

import keras

from ortho_keras.method.graphs import allow_deep_graphs
from ortho_keras.nets.layer_builder import STEM, LayerBuilder, check_sizes

# Blocks of each stage: pairs of 3x3 convolutions; with 101 layers bottlenecks of 1x1, 3x3 and 1x1, the last four times as wide.
# Both are He et al.'s; how the paper's 44 layers are spread over the stages is not known to us.
BLOCKS = {34: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK_DEPTHS = (101,)
EXPANSION = 4


def plain_imagenet(
    depth=34,
    input_shape=(224, 224, 3),
    num_classes=1000,
    width=64,
    regularizer="orthonormal",
    initializer="orthonormal",
    stem_initializer=None,
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds a plain network of 34 or 101 layers for photographs: Conv-BN-ReLU repeated, no shortcut of any kind.

    A 7x7 convolution of stride 2, max pooling of stride 2, four stages of `width`, `2 * width`, `4 * width` and `8 * width`
    filters, each after the first with stride 2 at its start, global average pooling, and one Dense layer. With 34
    layers a stage is made of 3x3 convolutions; with 101 of 1x1, 3x3 and 1x1 in turn, the last with four times the filters.
    There f_in < f_out, so the regularizer and the initializer take its filters in groups (`check_design` names them). The
    layers are named `stem_conv`, `stage1_block01_conv1` ... `classifier`; BN and ReLU carry `_bn` and `_relu` behind.

    Args:
        depth: 34 or 101. Counts convolutions and the Dense layer.
        input_shape: Tuple `(height, width, channels)`; height and width may be `None`.
        num_classes: int, at least 2.
        width: int, at least 1. Filters of the stem and the first stage.
        regularizer: See `plain_cnn`.
        initializer: See `plain_cnn`.
        stem_initializer: See `plain_cnn`.
        relu_shift: See `plain_cnn`.
        bn_synchronized: See `plain_cnn`.
        seed: See `plain_cnn`.
        preprocessing: See `plain_cnn`.
        name: String. Defaults to `plain<depth>_imagenet`.

    Returns:
        A Functional model from `(batch, height, width, channels)` to logits `(batch, num_classes)`; the logits are in the
        variables' type (float32 under a mixed policy).

    Raises:
        ValueError: If an argument is outside its range.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), Table 1: 34 and 101 layers. Xie, Xiong, Pu 2017
        ([arXiv:1703.01827](https://arxiv.org/abs/1703.01827)) train plain nets of 34, 44 and 101; how their 44 are spread over
        the stages is not known to us.
    """
    settings = (regularizer, initializer, stem_initializer, relu_shift, bn_synchronized, seed)
    return _build(settings, False, depth, input_shape, num_classes, width, preprocessing, name)


def residual_imagenet(
    depth=34,
    input_shape=(224, 224, 3),
    num_classes=1000,
    width=64,
    regularizer="orthonormal",
    initializer="orthonormal",
    stem_initializer=None,
    relu_shift=0.0,
    bn_synchronized=False,
    seed=None,
    preprocessing=None,
    name=None,
):
    """Builds the residual twin of `plain_imagenet`: the same layers with a shortcut around every block.

    The shortcuts are identities, and 1x1 convolutions with BatchNormalization where the shape changes (option B of He et al.),
    which have parameters and do not count as layers: `stage2_block01_shortcut` ... The additions are `stage1_block01_add` ...

    Args:
        depth: See `plain_imagenet`.
        input_shape: See `plain_imagenet`.
        num_classes: See `plain_imagenet`.
        width: See `plain_imagenet`.
        regularizer: See `plain_cnn`.
        initializer: See `plain_cnn`.
        stem_initializer: See `plain_cnn`.
        relu_shift: See `plain_cnn`.
        bn_synchronized: See `plain_cnn`.
        seed: See `plain_cnn`.
        preprocessing: See `plain_cnn`.
        name: String. Defaults to `residual<depth>_imagenet`.

    Returns:
        See `plain_imagenet`. With 34 layers and 1,000 classes 21.8 million trainable parameters, with 101 44.5 million.

    Raises:
        ValueError: See `plain_imagenet`.

    Reference:
        He et al. 2016 ([arXiv:1512.03385](https://arxiv.org/abs/1512.03385)), Table 1, option B.
    """
    settings = (regularizer, initializer, stem_initializer, relu_shift, bn_synchronized, seed)
    return _build(settings, True, depth, input_shape, num_classes, width, preprocessing, name)


def _build(settings, residual, depth, input_shape, num_classes, width, preprocessing, name):
    if isinstance(depth, bool) or depth not in BLOCKS:
        raise ValueError(f"`depth` must be one of {', '.join(map(str, BLOCKS))}. Received: depth={depth!r}")
    check_sizes(input_shape, num_classes=(num_classes, 2), width=(width, 1))
    builder = LayerBuilder(depth, *settings)
    allow_deep_graphs(4 * depth)
    inputs = keras.Input(input_shape, name="image")
    x = inputs if preprocessing is None else preprocessing(inputs)
    x = builder.relu(builder.convolution(x, width, 2, STEM, size=7), f"{STEM}_relu")
    x = keras.layers.MaxPooling2D(3, 2, padding="same", name="stem_pool")(x)
    for stage, blocks in enumerate(BLOCKS[depth], 1):
        filters = width * 2 ** (stage - 1)
        sizes = ((3, filters), (3, filters))
        if depth in BOTTLENECK_DEPTHS:
            sizes = ((1, filters), (3, filters), (1, EXPANSION * filters))
        for block in range(1, blocks + 1):
            x = _block(builder, x, sizes, 2 if stage > 1 and block == 1 else 1, f"stage{stage}_block{block:02d}", residual)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    kind = "residual" if residual else "plain"
    return keras.Model(inputs, builder.classifier(x, num_classes), name=name or f"{kind}{depth}_imagenet")


def _block(builder, x, sizes, strides, name, residual):
    """Convolutions of `sizes`, pairs of size and filters, the first with `strides`; around them a shortcut where `residual`."""
    shortcut = x
    for number, (size, filters) in enumerate(sizes, 1):
        if number > 1:
            x = builder.relu(x, f"{name}_conv{number - 1}_relu")
        x = builder.convolution(x, filters, strides if number == 1 else 1, f"{name}_conv{number}", size)
    if residual:
        if shortcut.shape[-1] != filters or strides > 1:
            shortcut = builder.convolution(shortcut, filters, strides, f"{name}_shortcut", size=1)
        x = keras.layers.Add(name=f"{name}_add")([x, shortcut])
    return builder.relu(x, f"{name}_conv{len(sizes)}_relu")
