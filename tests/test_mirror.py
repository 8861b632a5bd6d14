"""Mirror symmetry: against weights mirrored one by one, and against the answers to mirror images."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

from ortho_keras import (
    BatchNormalizationEstimator,
    MirrorConstraint,
    Muon,
    OrthonormalDecay,
    OrthonormalInitializer,
    grow,
    orthonormality_error,
    plain_cnn,
    residual_cnn,
    symmetrize,
)


def partner(channel):
    return channel + 1 if channel % 2 == 0 else channel - 1


def mirrored(kernel, inputs=True, outputs=True):
    """The kernel that gives, of a mirror image, the mirror image of what `kernel` gives of the image; number by number."""
    found = np.empty_like(kernel)
    for row, column, before, after in np.ndindex(kernel.shape):
        source = (
            row,
            kernel.shape[1] - 1 - column,
            partner(before) if inputs else before,
            partner(after) if outputs else after,
        )
        found[row, column, before, after] = kernel[source]
    return found


def assert_symmetric(model):
    """Each weight is its own mirror image, but for the first one's inputs and the last one's outputs."""
    kernels = [layer for layer in model.layers if hasattr(layer, "kernel")]
    for layer in model.layers:
        for variable in layer.trainable_variables:
            ends = layer is not kernels[0], layer is not kernels[-1]
            value = np.asarray(variable, np.float64)
            shaped = value.reshape((1,) * (4 - value.ndim) + value.shape)
            np.testing.assert_allclose(
                shaped, mirrored(shaped, ends[0] and value.ndim > 1, ends[1]), atol=1e-6, err_msg=variable.path
            )


def three_stage_net(normalized=True, **settings):
    model = keras.Sequential([keras.Input((7, 9, 3))])
    for filters in (6, 6, 10):
        model.add(layers.Conv2D(filters, 3, padding="same", **settings))
        if normalized:
            model.add(layers.BatchNormalization())
        model.add(layers.ReLU())
    model.add(layers.GlobalAveragePooling2D())
    model.add(layers.Dense(4))
    return model


def images(count=40, shape=(7, 9, 3), seed=0):
    return np.random.default_rng(seed).normal(size=(count, *shape)).astype("float32")


def net_of(*between, width=8, channels=3, classes=4):
    """The layers between an image and a Dense layer behind pooling."""
    ends = [layers.GlobalAveragePooling2D(), layers.Dense(classes)] if classes else []
    return keras.Sequential([keras.Input((6, width, channels)), *between, *ends])


def test_the_constraint_by_hand():
    np.testing.assert_allclose(MirrorConstraint()(np.array([1.0, 3, 5, 10])), [2, 2, 7.5, 7.5])
    dense = np.array([[1.0, 2, 3], [5, 6, 7]])
    np.testing.assert_allclose(MirrorConstraint(outputs=False)(dense), [[3, 4, 5], [3, 4, 5]])
    stem = np.zeros((1, 3, 1, 2))
    stem[0, :, 0, 0] = [1, 2, 3]
    np.testing.assert_allclose(MirrorConstraint(inputs=False)(stem)[0, :, 0].numpy().T, [[0.5, 1, 1.5], [1.5, 1, 0.5]])


@pytest.mark.parametrize("seed", range(8))
def test_the_nearest_symmetric_kernel(seed):
    rng = np.random.default_rng(seed)
    inputs, outputs = (bool(value) for value in rng.integers(0, 2, 2))
    shape = (*rng.integers(1, 5, 2), *(2 * rng.integers(1, 4, 2)))
    kernel, other = rng.normal(size=shape), rng.normal(size=shape)
    held = MirrorConstraint(inputs, outputs)(kernel).numpy()
    np.testing.assert_allclose(held, mirrored(held, inputs, outputs), atol=1e-12)
    other = other + mirrored(other, inputs, outputs)  # whatever is symmetric is at a right angle to what was taken away
    assert abs(np.sum((kernel - held) * other)) < 1e-10


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "muon"])
def test_an_image_and_its_mirror_image_get_one_answer_after_training_too(optimizer):
    model = three_stage_net()
    symmetrize(model)
    made = {"sgd": keras.optimizers.SGD(0.1, 0.9), "adam": keras.optimizers.Adam(0.01), "muon": Muon()}
    model.compile(made[optimizer], keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, before = images(), model.get_weights()
    model.fit(x, np.arange(40) % 4, batch_size=10, epochs=3, verbose=0)
    assert max(np.abs(mine - old).max() for mine, old in zip(model.get_weights(), before)) > 0.01
    assert_symmetric(model)
    BatchNormalizationEstimator(model)([x])
    new = images(seed=1)
    answers, of_mirror_images = model.predict(new, verbose=0), model.predict(new[:, :, ::-1], verbose=0)
    assert answers.std(0).max() > 0.01
    np.testing.assert_allclose(of_mirror_images, answers, rtol=1e-3, atol=1e-5)


def test_it_trains_as_on_both_views_of_every_image():
    """Plain SGD: the symmetric net's step is that of a free net, as symmetric at the start, on images and mirror images."""
    symmetric, free = three_stage_net(normalized=False), three_stage_net(normalized=False)
    free.set_weights([weight + 0.1 for weight in symmetric.get_weights()])
    symmetric.set_weights(free.get_weights())
    symmetrize(symmetric)
    free.set_weights(symmetric.get_weights())
    x, y = images(), np.arange(40) % 4
    for model, pair in ((symmetric, (x, y)), (free, (np.concatenate([x, x[:, :, ::-1]]), np.tile(y, 2)))):
        model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        for _ in range(3):
            model.train_on_batch(*pair)
    for mine, expected in zip(symmetric.get_weights(), free.get_weights(), strict=True):
        np.testing.assert_allclose(mine, expected, atol=2e-5)


@pytest.mark.parametrize("build", [plain_cnn, residual_cnn])
def test_how_it_starts(build):
    model = build(14, (8, 8, 3), width=4, initializer="dirac", regularizer=None)
    kept = {layer.name: np.asarray(layer.kernel) for layer in model.layers if hasattr(layer, "kernel")}
    symmetrize(model)
    assert_symmetric(model)
    for layer in model.layers:
        if isinstance(layer, layers.Conv2D):
            assert orthonormality_error(layer.kernel) < 1e-5
            if layer.kernel.shape[2] == layer.kernel.shape[3]:
                np.testing.assert_allclose(layer.kernel, kept[layer.name], atol=1e-6)  # the identity
    x = images(6, (8, 8, 3))
    stage = keras.Model(model.input, model.get_layer("stage1_conv04_relu").output)
    maps, of_mirror_images = np.asarray(stage(x)), np.asarray(stage(x[:, :, ::-1]))
    np.testing.assert_allclose(of_mirror_images[:, :, ::-1, [1, 0, 3, 2]], maps, atol=1e-4)
    odd = build(14, (9, 9, 3), width=4, initializer="dirac", regularizer=None)  # its strides keep the same columns of both
    symmetrize(odd)
    x = images(6, (9, 9, 3))
    np.testing.assert_allclose(odd(x[:, :, ::-1]), odd(x), atol=1e-5)


def test_other_kernels_keep_their_norm():
    model = three_stage_net(kernel_initializer="he_normal", bias_initializer="ones")
    before = [np.linalg.norm(weight) for weight in model.get_weights()]
    symmetrize(model)
    np.testing.assert_allclose([np.linalg.norm(weight) for weight in model.get_weights()], before, rtol=1e-5)


def test_orthonormal_kernels_stay_so_times_their_factor():
    model = net_of(*(layers.Conv2D(8, 3, kernel_initializer=OrthonormalInitializer(gain=1.5)) for _ in range(2)))
    symmetrize(model)
    for layer in model.layers[:2]:
        singular_values = np.linalg.svd(np.asarray(layer.kernel).reshape(-1, 8), compute_uv=False)
        np.testing.assert_allclose(singular_values, 1.5, rtol=1e-5)


def test_muon_moves_by_what_is_symmetric_of_the_gradient():
    kernel = keras.Variable(np.zeros((3, 3, 8, 6), "float32"))
    kernel.constraint = MirrorConstraint()
    optimizer = Muon(learning_rate=1.0, momentum=0.0)
    gradient = np.random.default_rng(0).normal(size=(3, 3, 8, 6)).astype("float32")
    optimizer.apply([tf.constant(gradient)], [kernel])
    np.testing.assert_allclose(kernel, mirrored(np.asarray(kernel)), atol=1e-6)
    singular_values = np.linalg.svd(np.asarray(kernel).reshape(-1, 6), compute_uv=False)
    assert singular_values.min() > 0.68 and singular_values.max() < 1.14


def test_the_decoupled_penalty_keeps_it():
    model = net_of(layers.Conv2D(40, 3), layers.ReLU())  # of 27 inputs: the penalty's first group ends between partners
    symmetrize(model)
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    decay = OrthonormalDecay(factor=1.0, every=1)
    model.fit(images(40, (6, 8, 3)), np.arange(40) % 4, batch_size=20, verbose=0, callbacks=[decay])
    assert_symmetric(model)


def test_a_compiled_model_and_a_saved_one_keep_it(tmp_path):
    x, y = images(), np.arange(40) % 4
    model = three_stage_net()
    model.compile(keras.optimizers.SGD(0.1), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(x, y, verbose=0)
    symmetrize(model)
    model.fit(x, y, verbose=0)
    assert_symmetric(model)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(x, y, verbose=0)
    assert_symmetric(loaded)
    assert loaded.layers[0].kernel.constraint.get_config() == {"inputs": False, "outputs": True}


def test_a_symmetric_net_grows_into_a_symmetric_one():
    model, deeper = (plain_cnn(depth, (7, 9, 3), width=4, relu_shift=1.0, seed=depth) for depth in (8, 20))
    for net in (model, deeper):
        symmetrize(net)
    x = images()
    BatchNormalizationEstimator(model)([x])
    grow(model, deeper, x)
    assert_symmetric(deeper)
    np.testing.assert_allclose(deeper(x), model(x), atol=1e-4)
    free, before = plain_cnn(8, (7, 9, 3), width=4, relu_shift=1.0), deeper.get_weights()
    with pytest.raises(ValueError, match="constraints that the weights of `model` do not meet.* with MirrorConstraint"):
        grow(free, deeper, x)
    for mine, expected in zip(deeper.get_weights(), before, strict=True):
        np.testing.assert_array_equal(mine, expected)


def test_weights_that_the_constraint_does_not_take():
    with pytest.raises(ValueError, match=r"rank 1, 2 or 4. Received: one of shape \(2, 2, 2\)"):
        MirrorConstraint()(np.zeros((2, 2, 2)))
    with pytest.raises(ValueError, match="`inputs` must be True or False. Received: inputs='no'"):
        MirrorConstraint(inputs="no")
    with pytest.raises(ValueError, match=r"even number of channels along axis 1. Received: a weight of shape \(2, 3\)"):
        MirrorConstraint()(np.zeros((2, 3)))
