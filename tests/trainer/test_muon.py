"""Muon against NumPy in float64, and in a net whose gradients differ a millionfold."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras
from ortho_keras.trainer.muon import orthonormal_factor


def polynomial(values):
    """Five turns of the quintic on singular values of a matrix of norm 1."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (3, 3, 2, 30), (7, 7), (2, 2, 2, 3, 5), (1, 1, 3, 64)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_orthonormal_factor_is_the_polynomial_of_the_singular_values(shape, scale):
    kernel = np.random.default_rng(0).normal(size=shape)
    u, values, v = np.linalg.svd(kernel.reshape(-1, shape[-1]), full_matrices=False)
    expected = (u * polynomial(values / np.linalg.norm(values))) @ v
    found = orthonormal_factor(tf.constant(kernel * scale, tf.float32)).numpy()
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=2e-5)
    if values[-1] > 0.01 * np.linalg.norm(values):
        reached = np.linalg.svd(found.reshape(expected.shape), compute_uv=False)
        assert reached[-1] > 0.68 and reached[0] < 1.135


def test_nothing_comes_of_nothing():
    np.testing.assert_array_equal(orthonormal_factor(tf.zeros((3, 3, 2, 2))), 0)


def test_steps_equal_numpy():
    rng = np.random.default_rng(1)
    kernel, bias = keras.Variable(rng.normal(size=(3, 2))), keras.Variable(rng.normal(size=(2,)))
    w, b = kernel.numpy().astype(np.float64), bias.numpy().astype(np.float64)
    optimizer = ortho_keras.Muon(0.1, momentum=0.8, vector_rate=0.5, beta_2=0.9, epsilon=1e-6)
    m, first, second = np.zeros_like(w), np.zeros_like(b), np.zeros_like(b)
    for step in range(1, 5):
        g, h = rng.normal(size=w.shape), rng.normal(size=b.shape)
        optimizer.apply([tf.constant(g, tf.float32), tf.constant(h, tf.float32)], [kernel, bias])
        m = 0.8 * m + g
        u, values, v = np.linalg.svd(g + 0.8 * m, full_matrices=False)
        w -= 0.1 * (u * polynomial(values / np.linalg.norm(values))) @ v
        first, second = 0.8 * first + 0.2 * h, 0.9 * second + 0.1 * h**2
        b -= 0.1 * 0.5 * first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-6)
        np.testing.assert_allclose(kernel.numpy(), w, atol=1e-5)
        np.testing.assert_allclose(bias.numpy(), b, atol=1e-5)


def test_every_layer_of_an_exploding_net_moves_as_far():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(32, 8, 8, 1)).astype("float32"), rng.integers(10, size=32)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def moved(optimizer):
        model = ortho_keras.plain_cnn(44, (8, 8, 1), regularizer=None, seed=0)
        before = [layer.kernel.numpy() for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        model.compile(optimizer, loss)
        model.train_on_batch(x, y)
        after = [layer.kernel.numpy() for layer in model.layers if isinstance(layer, keras.layers.Conv2D)]
        return np.array([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(after, before)])[1:]

    muon, sgd = moved(ortho_keras.Muon(0.01)), moved(keras.optimizers.SGD(0.01))
    assert sgd.max() / sgd.min() > 100
    assert muon.max() / muon.min() < 1.5 and 0.006 < muon.min() < muon.max() < 0.012


def test_biases_and_embeddings_of_rank_2_are_moved_by_adam():
    inputs = keras.Input((3,), dtype="int32")
    x = keras.layers.Embedding(7, 4)(inputs)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    model = keras.Model(inputs, keras.layers.Dense(10)(keras.layers.Flatten()(x)))
    optimizer = ortho_keras.Muon(0.01)
    optimizer.build(model.trainable_variables)
    adam = {v.path for v, squares in zip(model.trainable_variables, optimizer._squares) if squares is not None}
    assert adam == {v.path for v in model.trainable_variables if v.name in ("bias", "embeddings")} and len(adam) == 6


def test_a_sparse_gradient_moves_an_embedding_as_a_dense_one_does():
    words, y = np.array([[1, 5, 1], [0, 2, 5]]), np.array([[0.5, -1.0], [2.0, 0.0]])

    def trained(first):
        keras.utils.set_random_seed(0)
        model = keras.Sequential([keras.Input((3,), dtype="int32"), first, keras.layers.Flatten(), keras.layers.Dense(2)])
        model.compile(ortho_keras.Muon(0.01, exclude=("bias", "embeddings", "kernel")), "mse")
        model.layers[0].set_weights([np.random.default_rng(0).normal(size=(7, 4))])
        model.fit(words, y, epochs=3, verbose=0)
        return model.get_weights()

    class OneHot(keras.layers.Embedding):
        def call(self, inputs):
            return keras.ops.one_hot(inputs, 7) @ self.embeddings

    for sparse, dense in zip(trained(keras.layers.Embedding(7, 4)), trained(OneHot(7, 4))):
        np.testing.assert_allclose(sparse, dense, atol=1e-6)


def test_float16_without_gradients_stays_finite():
    bias = keras.Variable(np.ones(3), dtype="float16")
    optimizer = ortho_keras.Muon(0.01)
    optimizer.apply([tf.zeros((3,), "float16")], [bias])
    np.testing.assert_array_equal(bias, np.ones(3))
    optimizer.apply([tf.fill((3,), tf.constant(1e-4, "float16"))], [bias])  # its square is 0 in float16
    assert 0.9 < np.asarray(bias).min() < 1


def test_two_replicas_step_as_one(two_replicas):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 8, 8, 1)).astype("float32"), rng.integers(10, size=16)

    def trained():
        model = ortho_keras.plain_cnn(8, (8, 8, 1), bn_synchronized=True, seed=0)
        model.compile(ortho_keras.Muon(0.01), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    alone = trained()
    with two_replicas.scope():
        shared = trained()
    for model in (alone, shared):
        model.fit(x, y, batch_size=16, epochs=2, shuffle=False, verbose=0)
    for mine, theirs in zip(alone.get_weights(), shared.get_weights()):
        np.testing.assert_allclose(mine, theirs, atol=2e-4)


def test_it_saves_and_loads(tmp_path):
    model = ortho_keras.plain_cnn(8, (8, 8, 1), seed=0)
    model.compile(ortho_keras.Muon(0.01, momentum=0.7), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = np.random.default_rng(0).normal(size=(8, 8, 8, 1)).astype("float32"), np.arange(8)
    model.fit(x, y, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = ortho_keras.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(x, y, verbose=0)
    for mine, theirs in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"momentum": 1.0}, "`momentum` must be at least 0 and below 1. Received: momentum=1.0"),
        ({"beta_2": -0.1}, "`beta_2` must be at least 0 and below 1"),
        ({"vector_rate": -1}, "`vector_rate` must be at least 0"),
        ({"momentum": "a"}, "`momentum` must be at least 0 and below 1. Received: momentum='a'"),
        ({"vector_rate": None}, "`vector_rate` must be at least 0"),
        ({"epsilon": 0}, "`epsilon` above 0"),
        ({"exclude": "embeddings"}, "`exclude` must be a list or tuple of names of variables. Received: exclude='embeddings'"),
        ({"exclude": None}, "`exclude` must be a list or tuple of names of variables. Received: exclude=None"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ortho_keras.Muon(**arguments)
