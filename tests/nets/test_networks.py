"""The plain and residual networks: their layers, parameters and kernels, and that they train and are saved."""

import itertools
import sys

import keras
import numpy as np
import pytest
import references
from keras import layers

from ortho_keras import (
    FusedBatchNormalization,
    OrthonormalInitializer,
    OrthonormalRegularizer,
    ShiftedReLU,
    check_design,
    load_model,
    modulate,
    plain_cnn,
    plain_imagenet,
    residual_cnn,
    residual_imagenet,
)

pytestmark = pytest.mark.every_backend

SMALL = {"input_shape": (8, 8, 3), "width": 4}
PHOTOGRAPHS = {"input_shape": (64, 64, 3), "width": 2, "num_classes": 5}
CIFAR, IMAGENET = (plain_cnn, residual_cnn), (plain_imagenet, residual_imagenet)
BUILDERS = CIFAR + IMAGENET


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def names(model, kind):
    return [layer.name for layer in of_type(model, kind)]


def kernels(model):
    return {layer.name: layer.kernel.numpy() for layer in of_type(model, (layers.Conv2D, layers.Dense))}


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def shake(model):
    """Gives every weight but the kernels random values, so that no two layers are the same by chance."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "kernel":
            weight.assign(rng.uniform(0.5, 1.5, size=weight.shape))
    return model


@pytest.mark.parametrize(
    ("build", "depth", "unknown"), [(plain_cnn, 8, False), (residual_cnn, 20, False), (plain_cnn, 8, True)]
)
def test_layers_of_the_networks_for_small_images(build, depth, unknown):
    model = build(depth, (None, None, 3) if unknown else (32, 32, 3), num_classes=7, width=3, initializer="zeros")
    n = (depth - 2) // 6
    expected = ["stem_conv", *(f"stage{stage}_conv{number:02d}" for stage in (1, 2, 3) for number in range(1, 2 * n + 1))]
    assert names(model, layers.Conv2D) == expected and len(expected) + 1 == depth
    assert names(model, FusedBatchNormalization) == [f"{name}_bn" for name in expected]
    assert names(model, layers.ReLU) == [f"{name}_relu" for name in expected]
    assert {(bn.momentum, bn.epsilon) for bn in of_type(model, FusedBatchNormalization)} == {(0.9, 1e-5)}  # Torch's
    assert all(c.kernel_size == (3, 3) and c.padding == "same" for c in of_type(model, layers.Conv2D))
    for stage, (size, filters) in {1: (32, 3), 2: (16, 6), 3: (8, 12)}.items():  # He et al. 2016, section 4.2
        for number in range(1, 2 * n + 1):
            layer = model.get_layer(f"stage{stage}_conv{number:02d}")
            assert layer.strides == ((2, 2) if stage > 1 and number == 1 else (1, 1))
            assert layer.output.shape == (None, *((None, None) if unknown else (size, size)), filters)
    assert model.name == f"{'plain' if build is plain_cnn else 'residual'}{depth}"
    assert model.layers[0].name == "image" and model.layers[-1].name == "classifier" and model.output_shape == (None, 7)
    channels = [3, 3] + 2 * n * [3] + 2 * n * [6] + 2 * n * [12]
    parameters = sum(9 * before * after for before, after in itertools.pairwise(channels))
    assert model.count_params() == parameters + 4 * sum(channels[1:]) + 12 * 7 + 7


@pytest.mark.parametrize(
    ("build", "arguments", "published", "tolerance"),
    [
        (residual_cnn, {"depth": 20}, 270_000, 5_000),  # He et al. 2016, Table 6, in millions
        (residual_cnn, {"depth": 44}, 660_000, 5_000),
        (residual_imagenet, {"depth": 34}, 21_797_672, 0),
        (residual_imagenet, {"depth": 101}, 44_549_160, 0),
    ],
)
def test_published_parameters(build, arguments, published, tolerance):
    model = build(**arguments, initializer="zeros", regularizer=None)
    assert abs(sum(int(np.prod(weight.shape)) for weight in model.trainable_weights) - published) <= tolerance


@pytest.mark.parametrize("build", IMAGENET)
def test_layers_of_the_networks_for_imagenet(build):
    model = build(101, initializer="dirac", **PHOTOGRAPHS)
    blocks = [f"stage{stage}_block{number:02d}" for stage, n in enumerate((3, 4, 23, 3), 1) for number in range(1, n + 1)]
    expected = ["stem_conv", *(f"{block}_conv{number}" for block in blocks for number in (1, 2, 3))]
    shortcuts = [f"stage{stage}_block01_shortcut" for stage in (1, 2, 3, 4)]
    convolutions = [name for name in names(model, layers.Conv2D) if not name.endswith("_shortcut")]
    assert convolutions == expected and len(expected) + 1 == 101
    assert names(model, layers.Add) == [f"{block}_add" for block in blocks if build is residual_imagenet]
    assert set(names(model, layers.Conv2D)) - set(expected) == (set(shortcuts) if build is residual_imagenet else set())
    assert model.name == f"{'plain' if build is plain_imagenet else 'residual'}101_imagenet"
    for stage, (size, filters) in {1: (16, 8), 2: (8, 16), 3: (4, 32), 4: (2, 64)}.items():
        assert model.get_layer(f"stage{stage}_block02_conv3").output.shape == (None, size, size, filters)
    strided = {layer.name for layer in of_type(model, layers.Conv2D) if layer.strides == (2, 2)} - set(shortcuts)
    assert strided == {"stem_conv", *(f"stage{stage}_block01_conv1" for stage in (2, 3, 4))}
    wide = [layer.layer for layer in check_design(model).layers if not layer.fits]
    assert [name for name in wide if name not in shortcuts] == [f"{block}_conv3" for block in blocks]


def test_a_plain_network_is_a_chain():
    model = shake(plain_cnn(8, **SMALL, seed=1))
    kinds = 7 * [layers.Conv2D, FusedBatchNormalization, layers.ReLU]
    kinds = [layers.InputLayer, *kinds, layers.GlobalAveragePooling2D, layers.Dense]
    assert [type(layer) for layer in model.layers] == kinds and len(model.operations) == len(kinds)
    x = y = keras.ops.convert_to_tensor(images(2, 8, 8, 3))
    for layer in model.layers[1:]:
        y = layer(y)
    np.testing.assert_allclose(model(x), y, rtol=1e-6)


@pytest.mark.parametrize("shape", [(8, 8, 3), (9, 7, 3), (None, None, 3)])
def test_residual_shortcuts_for_small_images_are_option_a(shape):
    model = shake(residual_cnn(14, shape, width=4, seed=1))
    additions = [f"stage{stage}_add{number:02d}" for stage in (1, 2, 3) for number in (1, 2)]
    assert names(model, layers.Add) == additions
    probe = of_type(model, (layers.ReLU, layers.Add, layers.BatchNormalization))
    x = images(2, *(side or 9 for side in shape[:2]), 3)
    out = {name: np.asarray(y) for name, y in keras.Model(model.input, {op.name: op.output for op in probe})(x).items()}
    before = out["stem_conv_relu"]
    for name in additions:
        stage, number = name[: len("stage1")], int(name[-2:])
        shortcut = before
        if number == 1 and stage != "stage1":  # every second pixel, zeros for the added channels
            shortcut = np.zeros_like(out[name])
            shortcut[..., : before.shape[-1]] = before[:, ::2, ::2]
        np.testing.assert_array_equal(out[name], out[f"{stage}_conv{2 * number:02d}_bn"] + shortcut)
        before = out[f"{stage}_conv{2 * number:02d}_relu"]
        np.testing.assert_array_equal(before, np.maximum(out[name], 0))


def test_residual_shortcuts_for_imagenet_are_option_b():
    model = shake(residual_imagenet(34, **PHOTOGRAPHS, seed=0))
    last = ("stage1_block03", "stage2_block01", "stage2_block02")
    ends = [f"{block}_{part}" for block in last for part in ("conv2_relu", "add", "conv2_bn")]
    probe = {name: model.get_layer(name).output for name in [*ends, "stage2_block01_shortcut_bn"]}
    out = {name: np.asarray(y) for name, y in keras.Model(model.input, probe)(images(2, 64, 64, 3)).items()}
    projection = model.get_layer("stage2_block01_shortcut")(out["stage1_block03_conv2_relu"])
    projected = np.asarray(model.get_layer("stage2_block01_shortcut_bn")(projection))
    for block, shortcut in (("stage2_block01", projected), ("stage2_block02", out["stage2_block01_conv2_relu"])):
        np.testing.assert_allclose(out[f"{block}_add"], out[f"{block}_conv2_bn"] + shortcut, atol=1e-5)


def test_plain_and_residual_networks_have_the_same_weights_for_a_seed():
    keras.utils.set_random_seed(3)
    expected = keras.random.normal((3,))
    keras.utils.set_random_seed(3)
    plain, residual = (build(8, **SMALL, seed=3) for build in CIFAR)
    np.testing.assert_array_equal(keras.random.normal((3,)), expected)  # the global seed is not touched
    assert [w.path for w in plain.weights] == [w.path for w in residual.weights]
    for ours, theirs in zip(plain.get_weights(), residual.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    x = images(2, 8, 8, 3)
    assert np.abs(plain(x) - residual(x)).max() > 1e-3


def test_seeds_of_the_layers_are_those_of_older_runs():
    """The kernels of a recipe must not change: these were drawn when the networks were first released."""
    for model, seeds in (
        (plain_cnn(8, **SMALL, seed=0), {"stem_conv": 1982462498, "stage2_conv01": 937182424, "classifier": 1513215994}),
        (residual_imagenet(34, **PHOTOGRAPHS, seed=0), {"stage2_block01_shortcut": 1793958483, "classifier": 38876398}),
    ):
        assert {name: model.get_layer(name).kernel_initializer.seed for name in seeds} == seeds


def generator():
    return keras.random.SeedGenerator(5)


@pytest.mark.parametrize(
    ("make", "own_seed"),
    [
        (lambda: "delta_orthonormal", False),
        (lambda: None, False),
        (lambda: keras.initializers.HeNormal(seed=5), True),
        (lambda: OrthonormalInitializer(seed=generator()), True),
    ],
)
def test_kernels_are_determined_by_the_seed_and_differ_between_layers(make, own_seed):
    first, again, other = (kernels(plain_cnn(8, **SMALL, initializer=make(), seed=seed)) for seed in (7, 7, 8))
    unseeded, anew = (kernels(plain_cnn(8, **SMALL, initializer=make())) for _ in range(2))
    for name, kernel in first.items():
        np.testing.assert_array_equal(again[name], kernel, err_msg=name)
        assert isinstance(make(), OrthonormalInitializer) or np.abs(other[name] - kernel).max() > 1e-3, name
        assert (np.abs(anew[name] - unseeded[name]).max() < 1e-9) == own_seed, name
    for drawn in (first, unseeded):
        pairs = itertools.combinations(drawn.values(), 2)
        assert all(one.size != two.size or np.abs(one.ravel() - two.ravel()).max() > 1e-3 for one, two in pairs)


@pytest.mark.parametrize(("build", "depth"), [(residual_cnn, 8), (plain_imagenet, 34)])
def test_channels_are_last_whatever_the_configuration_of_keras_says(build, depth):
    keras.config.set_image_data_format("channels_first")
    try:
        model = build(depth, (32, 48, 3), width=2)
    finally:
        keras.config.set_image_data_format("channels_last")
    assert model.get_layer("stem_conv").kernel.shape[2] == 3
    assert {layer.data_format for layer in model.layers if hasattr(layer, "data_format")} == {"channels_last"}


@pytest.mark.parametrize("build", BUILDERS)
def test_arguments_out_of_range(build):
    cifar = build in CIFAR
    wrong_depths = ((45, "; the nearest are 44 and 50"), (9, "; the nearest are 8 and 14"), (7, ""), ("20", ""), (True, ""))
    for depth, nearest in wrong_depths if cifar else ((44, ""), (True, "")):
        expected = ("6n . 2" if nearest else "an integer, at least 8") if cifar else "one of 34, 101"
        with pytest.raises(ValueError, match=f"`depth` must be {expected}{nearest}. Received: depth={depth!r}"):
            build(depth)
    wrong = {"num_classes": [1], "width": [0], "seed": [-1], "relu_shift": [-1], "input_shape": [(32, 32), (9, 9, None)]}
    for argument, value in ((argument, value) for argument, values in wrong.items() for value in values):
        with pytest.raises(ValueError, match=f"`{argument}` must be .*Received: {argument}="):
            build(20 if cifar else 34, **{argument: value})
    for argument in ("regularizer", "initializer"):
        with pytest.raises(ValueError, match="upright"):
            build(20 if cifar else 34, **{argument: "upright"})


@pytest.mark.parametrize(("regularizer", "factor"), [("orthonormal", 1e-4), (OrthonormalRegularizer(0.5), 0.5)])
def test_every_kernel_has_the_penalty(regularizer, factor):
    model = residual_cnn(8, **SMALL, initializer="he_normal", regularizer=regularizer)
    (shared,) = {
        id(r): r for r in (layer.kernel_regularizer for layer in of_type(model, (layers.Conv2D, layers.Dense)))
    }.values()
    assert len(model.losses) == 8 and (isinstance(regularizer, str) or shared is regularizer)
    expected = sum(references.penalty_and_gradient(kernel, "standard", factor)[0] for kernel in kernels(model).values())
    np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)
    assert len(plain_cnn(8, **SMALL, regularizer="l2").losses) == 8 and not plain_cnn(8, **SMALL, regularizer=None).losses


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("build", CIFAR)
def test_dtypes_preprocessing_and_saved_files(build, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    mean, variance = np.array([0.5, -1, 2], "float32"), np.array([1, 4, 0.25], "float32")
    scaling = layers.Normalization(mean=mean, variance=variance)
    synchronized, x = keras.config.backend() == "tensorflow", images(2, 8, 8, 3)  # Keras has it there only
    model = build(8, **SMALL, seed=1, relu_shift=2.0, bn_synchronized=synchronized, preprocessing=scaling)
    assert {layer.shift for layer in of_type(model, ShiftedReLU)} == {2.0} and not names(model, layers.ReLU)
    assert all(layer.synchronized == synchronized for layer in of_type(model, FusedBatchNormalization))
    shake(model)
    logits = model(x)
    assert model.get_layer("stage1_conv01").output.dtype == policy.removeprefix("mixed_")
    found = [keras.backend.standardize_dtype(tensor.dtype) for tensor in (logits, sum(model.losses))]
    assert found == ["float32"] * 2 and {weight.dtype for weight in model.weights} == {"float32"}
    rounded = keras.ops.cast(keras.ops.cast(logits, policy.removeprefix("mixed_")), "float32")
    assert policy == "float32" or np.any(np.asarray(logits) != np.asarray(rounded))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    np.testing.assert_array_equal(loaded(x), logits)
    assert float(sum(loaded.losses)) == float(sum(model.losses)) and len(loaded.losses) == 8
    keras.config.set_dtype_policy("float32")
    inner = shake(build(8, **SMALL, seed=1, relu_shift=2.0))
    tolerance = 1e-5 if policy == "float32" else 0.1 * np.abs(logits).max()
    np.testing.assert_allclose(logits, inner((x - mean) / np.sqrt(variance)), rtol=1e-4, atol=tolerance)


def test_a_network_for_imagenet_trains_and_is_saved(tmp_path):
    model = modulate(plain_imagenet(34, (32, 32, 3), 5, 2, seed=0))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.01, 0.9), loss, run_eagerly=True)
    before = kernels(model)
    x, y = images(4, 32, 32, 3), np.arange(4)
    assert np.isfinite(model.fit(x, y, verbose=0).history["loss"]).all()
    assert all(np.any(kernel != before[name]) for name, kernel in kernels(model).items())
    model.save(tmp_path / "net.keras")
    np.testing.assert_array_equal(load_model(tmp_path / "net.keras")(x), model(x))


def test_a_network_deeper_than_pythons_recursion_limit_is_built_modulated_saved_and_loaded(tmp_path):
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(400)
        model = plain_cnn(140, input_shape=(4, 4, 1), num_classes=3, width=1, regularizer=None, initializer="he_normal", seed=0)
        modulate(model)
        model.save(tmp_path / "deep.keras")
        sys.setrecursionlimit(400)
        loaded = load_model(tmp_path / "deep.keras")
    finally:
        sys.setrecursionlimit(limit)
    np.testing.assert_array_equal(loaded(images(2, 4, 4, 1)), model(images(2, 4, 4, 1)))
    assert len(kernels(loaded)) == 140
