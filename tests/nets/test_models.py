import itertools
import sys

import keras
import numpy as np
import pytest
import references
import tensorflow as tf
from keras import layers

from ortho_keras import (
    FusedBatchNormalization,
    OrthonormalInitializer,
    OrthonormalRegularizer,
    load_model,
    modulate,
    plain_cnn,
    residual_cnn,
)

BUILDERS = [plain_cnn, residual_cnn]
SMALL = {"input_shape": (8, 8, 3), "width": 4}


def kernels(model):
    return {layer.name: layer.kernel for layer in model.layers if isinstance(layer, (layers.Conv2D, layers.Dense))}


def of_type(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


def images(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def shake(model):
    """Gives every weight but the kernels random values, so that no two layers do the same by chance."""
    rng = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name != "kernel":
            weight.assign(rng.uniform(0.5, 1.5, size=weight.shape))


@pytest.mark.parametrize("depth", [8, 20, 44, 110])
@pytest.mark.parametrize("build", BUILDERS)
def test_layers_and_parameters(build, depth):
    model = build(depth, input_shape=(32, 32, 3), num_classes=7, width=3, initializer="zeros")
    convolutions = of_type(model, layers.Conv2D)
    assert len(convolutions) + len(of_type(model, layers.Dense)) == depth == len(kernels(model))
    assert len(of_type(model, layers.BatchNormalization)) == len(of_type(model, layers.ReLU)) == depth - 1
    assert all(c.kernel_size == (3, 3) and c.padding == "same" for c in convolutions)

    n = (depth - 2) // 6
    channels = [3, 3] + 2 * n * [3] + 2 * n * [6] + 2 * n * [12]  # images, stem, and each of three stages
    parameters = sum(9 * before * after for before, after in itertools.pairwise(channels))
    assert model.count_params() == parameters + 4 * sum(channels[1:]) + 12 * 7 + 7  # 4 each of BN
    assert model.output_shape == (None, 7)


def test_parameters_in_millions_are_those_of_he_et_al():
    for depth, millions in ((20, 0.27), (44, 0.66), (110, 1.7)):  # their table 6
        model = residual_cnn(depth, initializer="zeros", regularizer=None)
        trainable = sum(np.prod(weight.shape) for weight in model.trainable_weights)
        assert abs(trainable / 1e6 - millions) < (0.05 if depth == 110 else 0.005)


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("depth", [8, 20])
def test_names_strides_and_sizes_of_the_maps(build, depth):
    model = build(depth, initializer="zeros")
    n = (depth - 2) // 6
    stages = {1: (32, 16), 2: (16, 32), 3: (8, 64)}  # He et al. 2016, section 4.2
    names = ["stem_conv"]
    for stage, (size, filters) in stages.items():
        for number in range(1, 2 * n + 1):
            name = f"stage{stage}_conv{number:02d}"
            names.append(name)
            assert model.get_layer(f"{name}_relu").output.shape == (None, size, size, filters)
            assert model.get_layer(name).strides == ((2, 2) if stage > 1 and number == 1 else (1, 1))
    assert model.get_layer("stem_conv_relu").output.shape == (None, 32, 32, 16)
    assert [layer.name for layer in of_type(model, layers.Conv2D)] == names
    assert [layer.name for layer in of_type(model, layers.BatchNormalization)] == [f"{name}_bn" for name in names]
    assert model.layers[-1].name == "classifier" and model.layers[0].name == "image"
    assert model.name == f"{'plain' if build is plain_cnn else 'residual'}{depth}"
    assert build(8, **SMALL, name="mine").name == "mine"


def test_a_plain_net_is_a_chain():
    model = plain_cnn(14, **SMALL, seed=1)
    shake(model)
    kinds = 13 * [layers.Conv2D, FusedBatchNormalization, layers.ReLU]
    kinds = [layers.InputLayer, *kinds, layers.GlobalAveragePooling2D, layers.Dense]
    assert [type(layer) for layer in model.layers] == kinds and len(model.operations) == len(kinds)
    x = y = tf.constant(images(2, 8, 8, 3))
    for layer in model.layers[1:]:
        assert len(layer._inbound_nodes) == len(layer._outbound_nodes) + (layer is model.layers[-1]) == 1
        y = layer(y)
    np.testing.assert_allclose(model(x), y, rtol=1e-6)


@pytest.mark.parametrize("depth", [8, 20])
def test_a_residual_net_has_a_shortcut_around_every_two_convolutions(depth):
    model = residual_cnn(depth, **SMALL, seed=1)
    n = (depth - 2) // 6
    names = [f"stage{stage}_add{number:02d}" for stage in (1, 2, 3) for number in range(1, n + 1)]
    assert [layer.name for layer in of_type(model, layers.Add)] == names
    shake(model)
    probe = keras.Model(
        model.input, {op.name: op.output for op in of_type(model, (layers.ReLU, layers.Add, layers.BatchNormalization))}
    )
    out = {name: value.numpy() for name, value in probe(images(2, 8, 8, 3)).items()}
    before = out["stem_conv_relu"]
    for name in names:
        stage, number = name[: len("stage1")], int(name[-2:])
        last = f"{stage}_conv{2 * number:02d}"
        shortcut = before
        if number == 1 and stage != "stage1":  # option A: every second pixel, zeros for the new channels
            shortcut = np.zeros_like(out[name])
            shortcut[..., : before.shape[-1]] = before[:, ::2, ::2]
        np.testing.assert_array_equal(out[name], out[f"{last}_bn"] + shortcut)
        before = out[f"{last}_relu"]
        np.testing.assert_array_equal(before, np.maximum(out[name], 0))


def test_option_a_with_odd_and_unknown_sizes():
    for shape in ((9, 7, 3), (None, None, 3)):
        model = residual_cnn(8, input_shape=shape, width=4, seed=1)
        probe = keras.Model(
            model.input,
            [model.get_layer(f"{name}").output for name in ("stage2_add01", "stage2_conv02_bn", "stage1_conv02_relu")],
        )
        total, branch, before = (value.numpy() for value in probe(images(2, 9, 7, 3)))
        expected = np.pad(before[:, ::2, ::2], [(0, 0)] * 3 + [(0, 4)])
        assert expected.shape == (2, 5, 4, 8)
        np.testing.assert_array_equal(total, branch + expected)


def test_the_twins_have_the_same_layers_and_weights():
    plain, residual = (build(14, **SMALL, seed=3) for build in BUILDERS)
    assert [(w.path, tuple(w.shape)) for w in plain.weights] == [(w.path, tuple(w.shape)) for w in residual.weights]
    for ours, theirs in zip(plain.get_weights(), residual.get_weights()):
        np.testing.assert_array_equal(ours, theirs)
    x = images(2, 8, 8, 3)
    assert np.abs(plain(x) - residual(x)).max() > 1e-3


def test_a_wrong_depth_names_the_nearest_right_ones():
    nearest = {45: (44, 50), 9: (8, 14), 13: (8, 14), 43: (38, 44), 109: (104, 110), 111: (110, 116)}
    for depth, (below, above) in nearest.items():
        for build in BUILDERS:
            with pytest.raises(ValueError) as error:
                build(depth)
            assert f"6n + 2, at least 8; the nearest are {below} and {above}." in str(error.value)
            assert f"depth={depth}" in str(error.value)


def test_a_depth_that_is_no_number_or_too_small():
    for depth in (7, 2, 1, 0, -4, 20.0, "20", None, True):
        with pytest.raises(ValueError, match=r"`depth` must be 6n \+ 2, at least 8\. Received: depth="):
            plain_cnn(depth)


@pytest.mark.parametrize(
    ("argument", "values"),
    [
        ("num_classes", (1, 0, -1, 2.0, None, True)),
        ("width", (0, -1, 1.0, None, True)),
        ("bn_shift", (float("nan"), float("inf"), "1", None, True)),
        ("seed", (-1, 1.0, "1", True)),
        ("input_shape", ((32, 32), (1, 32, 32, 3), (32, 32, None), (32, 32, 0), (), 32, None)),
    ],
)
def test_wrong_arguments(argument, values):
    for value in values:
        for build in BUILDERS:
            with pytest.raises(ValueError, match=f"`{argument}` must be .*Received: {argument}="):
                build(8, **{argument: value})


def test_unknown_regularizer_and_initializer():
    for build in BUILDERS:
        with pytest.raises(ValueError, match="upright"):
            build(8, regularizer="upright")
        with pytest.raises(ValueError, match="upright"):
            build(8, initializer="upright")


INITIALIZERS = {
    "orthonormal": lambda: "orthonormal",
    "delta_orthonormal": lambda: "delta_orthonormal",
    "he_normal": lambda: "he_normal",
    "None": lambda: None,
    "keras with a seed": lambda: keras.initializers.HeNormal(seed=5),
    "ours with a seed": lambda: OrthonormalInitializer(seed=5),
    "keras with a generator": lambda: keras.initializers.HeNormal(seed=keras.random.SeedGenerator(5)),
    "ours with a generator": lambda: OrthonormalInitializer(seed=keras.random.SeedGenerator(5)),
}


def values(model):
    return {name: kernel.numpy() for name, kernel in kernels(model).items()}


@pytest.mark.parametrize("initializer", INITIALIZERS)
def test_seeds(initializer):
    make = INITIALIZERS[initializer]
    first, again, other = (values(plain_cnn(14, **SMALL, initializer=make(), seed=seed)) for seed in (7, 7, 8))
    unseeded, anew = (values(plain_cnn(14, **SMALL, initializer=make())) for _ in range(2))
    for name, kernel in first.items():
        np.testing.assert_array_equal(again[name], kernel, err_msg=name)
        assert np.abs(other[name] - kernel).max() > 1e-3, name
        if "with" not in initializer:  # an initializer's own seed is one
            assert np.abs(anew[name] - unseeded[name]).max() > 1e-3, name
    for drawn in (first, unseeded):  # no two layers alike
        flat = [kernel.ravel() for kernel in drawn.values()]
        for at, kernel in enumerate(flat):
            for earlier in flat[:at]:
                assert kernel.size != earlier.size or np.abs(kernel - earlier).max() > 1e-3


def test_an_initializer_s_own_seed_fixes_the_kernels():
    for name in ("keras with a seed", "ours with a seed"):
        first, again = (values(plain_cnn(8, **SMALL, initializer=INITIALIZERS[name]())) for _ in range(2))
        for kernel, same in zip(first.values(), again.values(), strict=True):
            np.testing.assert_array_equal(kernel, same)


def test_a_seed_does_not_touch_the_global_one():
    keras.utils.set_random_seed(3)
    expected = keras.random.normal((3,))
    keras.utils.set_random_seed(3)
    plain_cnn(8, **SMALL, seed=1)
    np.testing.assert_array_equal(keras.random.normal((3,)), expected)


def test_bn_shift():
    for build, shift in itertools.product(BUILDERS, (0.0, 0.75, -1)):
        for layer in of_type(build(8, **SMALL, bn_shift=shift), layers.BatchNormalization):
            np.testing.assert_array_equal(layer.beta, np.full(layer.beta.shape, shift))
            np.testing.assert_array_equal(layer.gamma, np.ones(layer.gamma.shape))
            assert (layer.momentum, layer.epsilon) == (0.9, 1e-5)  # Torch's


def test_bn_synchronized():
    for synchronized in (False, True):
        model = plain_cnn(8, **SMALL, bn_synchronized=synchronized)
        assert {layer.synchronized for layer in of_type(model, layers.BatchNormalization)} == {synchronized}


@pytest.mark.parametrize("build", BUILDERS)
def test_every_kernel_has_the_penalty(build):
    for regularizer, factor in (("orthonormal", 1e-4), (OrthonormalRegularizer(0.5), 0.5)):
        model = build(8, **SMALL, initializer="he_normal", regularizer=regularizer)
        found = kernels(model).values()
        shared = {id(kernel.regularizer): kernel.regularizer for kernel in found}
        assert len(shared) == 1 and len(model.losses) == 8
        (shared,) = shared.values()
        assert isinstance(regularizer, str) or shared is regularizer
        expected = sum(references.penalty_and_gradient(kernel.numpy(), "standard", factor)[0] for kernel in found)
        np.testing.assert_allclose(sum(model.losses), expected, rtol=1e-5)
        shared.factor = 2 * factor
        np.testing.assert_allclose(sum(model.losses), 2 * expected, rtol=1e-5)


def test_other_penalties():
    model = plain_cnn(8, **SMALL, regularizer=keras.regularizers.L2(0.1))
    squares = sum(np.sum(np.square(kernel.numpy(), dtype="float64")) for kernel in kernels(model).values())
    np.testing.assert_allclose(sum(model.losses), 0.1 * squares, rtol=1e-5)
    assert len(plain_cnn(8, **SMALL, regularizer="l2").losses) == 8
    assert plain_cnn(8, **SMALL, regularizer=None).losses == []


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("build", BUILDERS)
def test_mixed_precision(build, policy, tmp_path):
    keras.config.set_dtype_policy(policy)
    model = build(8, **SMALL, seed=1)
    x = images(2, 8, 8, 3)
    logits = model(x)
    assert model.get_layer("stage1_conv01").output.dtype == policy[len("mixed_") :]
    assert logits.dtype == "float32" and model.get_layer("classifier").compute_dtype == "float32"
    assert {weight.dtype for weight in model.weights} == {"float32"} and sum(model.losses).dtype == "float32"
    half = tf.cast(tf.cast(logits, policy[len("mixed_") :]), "float32")
    assert np.any(logits != half)  # not float32 in name only
    keras.config.set_dtype_policy("float32")
    whole = build(8, **SMALL, seed=1)
    np.testing.assert_allclose(logits, whole(x), atol=0.1 * np.abs(whole(x)).max())
    model.save(tmp_path / "model.keras")
    np.testing.assert_array_equal(keras.models.load_model(tmp_path / "model.keras", safe_mode=True)(x), logits)


@pytest.mark.parametrize("build", BUILDERS)
def test_survives_a_saved_model(build, tmp_path):
    preprocessing = layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0])
    model = build(14, **SMALL, bn_shift=0.5, preprocessing=preprocessing)
    shake(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras", safe_mode=True)
    x = images(2, 8, 8, 3)
    np.testing.assert_array_equal(loaded(x), model(x))
    np.testing.assert_array_equal(loaded(x, training=True), model(x, training=True))
    assert float(sum(loaded.losses)) == float(sum(model.losses)) and len(loaded.losses) == 14
    assert type(loaded.get_layer("classifier").kernel_regularizer) is OrthonormalRegularizer
    weights = tmp_path / "model.weights.h5"
    model.save_weights(weights)
    fresh = build(14, **SMALL, preprocessing=layers.Normalization(mean=[0.1, 0.2, 0.3], variance=[1.0, 2.0, 3.0]))
    fresh.load_weights(weights)
    np.testing.assert_array_equal(fresh(x), model(x))


@pytest.mark.parametrize("build", BUILDERS)
def test_preprocessing(build):
    x = images(2, 8, 8, 3)
    mean, variance = np.array([0.5, -1, 2], "float32"), np.array([1, 4, 0.25], "float32")
    model = build(8, **SMALL, seed=1, preprocessing=layers.Normalization(mean=mean, variance=variance))
    inner = build(8, **SMALL, seed=1)
    np.testing.assert_allclose(model(x), inner((x - mean) / np.sqrt(variance)), rtol=1e-4, atol=1e-5)
    assert np.abs(model(x) - inner(x)).max() > 1e-2


def test_one_training_step_moves_every_kernel():
    model = residual_cnn(8, **SMALL)
    before = values(model)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.train_on_batch(images(4, 8, 8, 3), np.arange(4))
    for name, kernel in values(model).items():
        assert np.abs(kernel - before[name]).max() > 1e-6, name


def test_a_net_deeper_than_pythons_recursion_limit_is_built_modulated_saved_and_loaded(tmp_path):
    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(1000)
        model = plain_cnn(410, input_shape=(4, 4, 1), num_classes=3, width=2, regularizer=None, initializer="he_normal", seed=0)
        modulate(model)
        model.save(tmp_path / "deep.keras")
        sys.setrecursionlimit(1000)
        loaded = load_model(tmp_path / "deep.keras")
    finally:
        sys.setrecursionlimit(limit)
    x = images(2, 4, 4, 1)
    np.testing.assert_array_equal(loaded(x), model(x))
    assert sum(isinstance(layer, (layers.Conv2D, layers.Dense)) for layer in loaded.layers) == 410
