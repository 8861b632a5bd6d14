"""The nets for photographs: their layers and parameters, and that they train."""

import keras
import numpy as np
import pytest
from keras import layers

from ortho_keras import check_design, load_model, modulate, plain_imagenet, residual_imagenet

BUILDERS = [plain_imagenet, residual_imagenet]
SMALL = {"input_shape": (64, 64, 3), "num_classes": 5, "width": 4, "seed": 0}
BLOCKS = {34: [3, 4, 6, 3], 44: [3, 4, 11, 3], 101: [3, 4, 23, 3]}


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def trainable(model):
    return sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)


@pytest.mark.parametrize(("depth", "published"), [(34, 21_797_672), (101, 44_549_160)])
def test_residual_nets_have_the_published_parameters(depth, published):
    assert trainable(residual_imagenet(depth, initializer="zeros")) == published


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("depth", BLOCKS)
def test_layers_and_parameters(build, depth):
    model = build(depth, initializer="zeros", **SMALL)
    names = [layer.name for layer in of_type(model, layers.Conv2D) if not layer.name.endswith("_shortcut")]
    assert len(names) + 1 == len(set(names)) + 1 == depth
    block = [(1, 1), (3, 1), (1, 4)] if depth == 101 else [(3, 1), (3, 1)]
    parameters, channels, shortcuts = 7 * 7 * 3 * 4 + 2 * 4, 4, 0
    for stage, blocks in enumerate(BLOCKS[depth]):
        for _ in range(blocks):
            before = channels
            for size, factor in block:
                filters = 4 * 2**stage * factor
                parameters += size * size * channels * filters + 2 * filters
                channels = filters
            if before != channels:
                shortcuts += before * channels + 2 * channels
    expected = parameters + channels * 5 + 5 + (shortcuts if build is residual_imagenet else 0)
    assert trainable(model) == expected
    assert len(of_type(model, layers.Add)) == (sum(BLOCKS[depth]) if build is residual_imagenet else 0)


def test_the_stages_halve_the_image():
    model = plain_imagenet(101, initializer="zeros", width=1, num_classes=2)
    sizes = [model.get_layer(f"stage{stage}_block02_conv3").output.shape[1] for stage in (1, 2, 3, 4)]
    assert sizes == [56, 28, 14, 7] and model.get_layer("stem_conv").output.shape[1] == 112
    strides = {layer.name for layer in of_type(model, layers.Conv2D) if layer.strides == (2, 2)}
    assert strides == {"stem_conv", *(f"stage{stage}_block01_conv1" for stage in (2, 3, 4))}


def test_a_residual_block_is_its_plain_twin_and_the_shortcut():
    """The stage's second block, whose shortcut is the identity: the addition's output less its input is the plain block's."""
    residual, plain = (build(34, **SMALL) for build in (residual_imagenet, plain_imagenet))
    for layer in of_type(plain, (layers.Conv2D, layers.BatchNormalization)):
        layer.set_weights(residual.get_layer(layer.name).get_weights())
    x = np.random.default_rng(0).uniform(size=(2, 16, 16, 8)).astype("float32")
    ends = {}
    for model, last in ((residual, "stage2_block02_add"), (plain, "stage2_block02_conv2_bn")):
        first = keras.Input((16, 16, 8))
        y = shortcut = first
        for name in ("conv1", "conv1_bn", "conv1_relu", "conv2", "conv2_bn"):
            y = model.get_layer(f"stage2_block02_{name}")(y)
        if last.endswith("_add"):
            y = model.get_layer(last)([y, shortcut])
        ends[last] = keras.Model(first, y)(x)
    difference = ends["stage2_block02_add"] - ends["stage2_block02_conv2_bn"]
    np.testing.assert_allclose(difference, x, atol=1e-5)


def test_bottlenecks_are_told_to_be_orthonormal_in_groups():
    report = check_design(plain_imagenet(101, **SMALL))
    wide = [layer for layer in report.layers if not layer.fits]
    assert [layer.layer for layer in wide] == [
        f"stage{stage}_block{block:02d}_conv3" for stage, blocks in enumerate(BLOCKS[101], 1) for block in range(1, blocks + 1)
    ]
    assert all(layer.groups == ((4, layer.f_in),) for layer in wide)
    assert check_design(plain_imagenet(44, **SMALL)).fits


def test_a_real_fit(tmp_path):
    """Of 34 layers; those of 101 run in test_imagenet_runs.py."""
    model = modulate(plain_imagenet(34, **SMALL))
    model.compile(keras.optimizers.SGD(0.01, 0.9), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 64, 64, 3)).astype("float32"), rng.integers(5, size=12)
    before = model.get_weights()
    losses = model.fit(x, y, batch_size=4, epochs=1, verbose=0).history["loss"]
    assert np.isfinite(losses).all() and model.output.dtype == "float32"
    assert all(np.any(old != new) for old, new in zip(before, model.get_weights()) if old.ndim == 4)
    model.save(tmp_path / "net.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "net.keras").predict(x, verbose=0), model.predict(x, verbose=0))


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"depth": 50}, "`depth` must be one of 34, 44, 101. Received: depth=50"),
        ({"depth": True}, "`depth` must be one of 34, 44, 101. Received: depth=True"),
        ({"width": 0}, "`width` must be an integer, at least 1. Received: width=0"),
        ({"num_classes": 1}, "`num_classes` must be an integer, at least 2. Received: num_classes=1"),
        ({"input_shape": (64, 64)}, r"`input_shape` must be \(height, width, channels\). Received: input_shape=\(64, 64\)"),
    ],
)
def test_wrong_arguments_are_named(build, wrong, message):
    with pytest.raises(ValueError, match=message):
        build(**wrong)
