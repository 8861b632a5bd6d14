"""Learning rates worked out by hand, and Muon against NumPy in float64."""

import keras
import numpy as np
import pytest
import tensorflow as tf

import ortho_keras
from ortho_keras import AllReplicaLossScaleOptimizer, LearningRate, Muon

L = keras.layers


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (LearningRate(0.5, 8, "step"), [0.5] * 4 + [0.05] * 2 + [0.005] * 4),
        (LearningRate(0.5, 6, "thirds"), [0.5] * 2 + [0.05] * 2 + [0.005] * 4),
        (LearningRate(0.25, 5, "constant"), [0.25] * 9),
        (LearningRate(0.5, 6, "cosine"), [0.5, (2 + 3**0.5) / 8, 0.375, 0.25, 0.125, (2 - 3**0.5) / 8, 0, 0, 0]),
        (LearningRate(1.0, 8, "step", 10), [0.1, 0.2, 0.3, 0.4, 0.05, 0.06, 0.007, 0.008, 0.009, 0.01]),  # through both drops
        (LearningRate(1.0, 4, "cosine", 3), [1 / 3, (2 + 2**0.5) / 4 * 2 / 3, 0.5, (2 - 2**0.5) / 4, 0]),
    ],
)
def test_learning_rates_by_hand(schedule, expected):
    np.testing.assert_allclose(schedule(np.arange(len(expected))), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("total", [1, 2, 3, 7, 63999, 64001, 3_000_000])
def test_drops_fall_on_the_exact_step(total):
    steps = np.arange(total)
    for shape, first, second, parts in (("step", 2, 3, 4), ("thirds", 1, 2, 3)):
        drops = [parts * steps < share * total for share in (first, second)]  # in whole numbers
        expected = np.where(drops[0], 1.0, np.where(drops[1], 0.1, 0.01))
        np.testing.assert_allclose(LearningRate(1.0, total, shape)(steps), expected, rtol=1e-6)


@pytest.mark.parametrize("shape", ["cosine", "step", "constant"])
def test_a_second_optimizer_continues_the_shape_and_warms_up_again(shape):
    whole, second = LearningRate(0.5, 20, shape), LearningRate(0.5, 20, shape, 4, first_step=7)
    expected = whole(np.arange(7, 21)) * np.minimum(np.arange(1, 15) / 4, 1)
    np.testing.assert_allclose(second(np.arange(14)), expected, rtol=1e-6)


def orthonormal(gradient):
    """Five iterations of Jordan et al.'s quintic on the singular values of a matrix of norm 1, in float64."""
    u, values, v = np.linalg.svd(gradient.reshape(-1, gradient.shape[-1]), full_matrices=False)
    values = values / np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return ((u * values) @ v).reshape(gradient.shape)


@pytest.mark.parametrize("shape", [(3, 3, 4, 8), (7, 7), (2, 2, 2, 3, 5), (1, 1, 3, 64)])
def test_a_step_is_orthonormal_whatever_the_size_of_the_gradient(shape):
    gradient = np.random.default_rng(0).normal(size=shape)
    scales = (1.0, 1e-30, 1e30, 0.0)
    kernels = [keras.Variable(np.zeros(shape, "float32")) for _ in scales]
    Muon(0.5, momentum=0).apply([tf.constant(gradient * scale, tf.float32) for scale in scales], kernels)
    expected = -0.5 * orthonormal(gradient)
    for kernel in kernels[:3]:
        np.testing.assert_allclose(kernel, expected, atol=2e-5)
    np.testing.assert_array_equal(kernels[3], 0)
    values = np.linalg.svd(2 * np.asarray(kernels[0]).reshape(-1, shape[-1]), compute_uv=False)
    assert values[-1] > 0.3 and values[0] < 1.135


@pytest.mark.parametrize(
    ("layer", "read"),
    [
        (L.Conv2DTranspose(2, 3, use_bias=False), lambda w: [w.transpose(0, 1, 3, 2).reshape(-1, 2)]),
        (L.DepthwiseConv2D(3, depth_multiplier=2, use_bias=False), lambda w: [w[:, :, c].reshape(9, 2) for c in range(6)]),
        (L.Conv2D(4, 3, groups=2, use_bias=False), lambda w: [w[..., :2].reshape(-1, 2), w[..., 2:].reshape(-1, 2)]),
        (L.EinsumDense("abcd,def->abcef", (None, None, 2, 3)), lambda w: [w.reshape(6, 6)]),
    ],
)
def test_a_step_is_orthonormal_in_the_layout_that_orthonormalize_finds(layer, read):
    model = keras.Sequential([keras.Input((5, 5, 6)), layer])
    ortho_keras.orthonormalize(model, 0, verbose=False)
    before, gradient = layer.kernel.numpy(), np.random.default_rng(0).normal(size=layer.kernel.shape)
    if isinstance(layer, L.DepthwiseConv2D):
        gradient[:, :, 0] *= 1e-25  # each channel is a matrix of its own
    Muon(0.5, momentum=0).apply([tf.constant(gradient, tf.float32)], [layer.kernel])
    for found, matrix in zip(read(layer.kernel.numpy() - before), read(gradient), strict=True):
        np.testing.assert_allclose(found, -0.5 * orthonormal(matrix), atol=2e-5)


@pytest.mark.parametrize("name", ["last", "last/kernel"])
def test_adam_trains_layers_that_are_excluded(name):
    model = keras.Sequential([keras.Input((6,)), *(L.Dense(6, use_bias=False, name=own) for own in ("last1", "last"))])
    before = model.get_weights()
    gradients = np.random.default_rng(0).normal(size=(2, 6, 6))
    Muon(0.01, exclude=[name]).apply(list(tf.constant(gradients, tf.float32)), model.trainable_variables)
    muon, adam = (after - start for after, start in zip(model.get_weights(), before))
    np.testing.assert_allclose(muon, -0.01 * orthonormal(1.9 * gradients[0]), atol=1e-6)
    np.testing.assert_allclose(adam, -0.01 * np.sign(gradients[1]), atol=1e-6)  # Adam's first step
    with pytest.raises(ValueError, match="names or paths .* Received: exclude=.'lst',., where no variable has the name 'lst'"):
        Muon(exclude=["lst"]).build(model.trainable_variables)


def test_two_optimizers_are_numbered_as_keras_numbers_them():
    keras.backend.clear_session()
    assert [Muon().name, Muon().name, Muon(name="mine").name] == ["muon", "muon_1", "mine"]


def test_steps_equal_numpy():
    rng = np.random.default_rng(1)
    kernel, bias = keras.Variable(rng.normal(size=(2, 3, 2))), keras.Variable(rng.normal(size=(2,)))
    w, b = kernel.numpy().astype(np.float64), bias.numpy().astype(np.float64)
    optimizer = Muon(0.1, momentum=0.8, vector_rate=0.5, beta_2=0.9, epsilon=1e-2)
    m, first, second = np.zeros_like(w), np.zeros_like(b), np.zeros_like(b)
    for step in range(1, 5):
        g, h = rng.normal(size=w.shape), 0.01 * rng.normal(size=b.shape)
        optimizer.apply([tf.constant(g, tf.float32), tf.constant(h, tf.float32)], [kernel, bias])
        m = 0.8 * m + g
        w -= 0.1 * orthonormal(g + 0.8 * m)
        first, second = 0.8 * first + 0.2 * h, 0.9 * second + 0.1 * h**2
        b -= 0.1 * 0.5 * first / (1 - 0.8**step) / (np.sqrt(second / (1 - 0.9**step)) + 1e-2)
        np.testing.assert_allclose(kernel.numpy(), w, atol=1e-5)
        np.testing.assert_allclose(bias.numpy(), b, atol=1e-6)
    # Momenta first, then Adam's squares: the order in which checkpoints of earlier versions hold them.
    assert [tuple(v.shape) for v in optimizer.variables] == [(), (), (2, 3, 2), (2,), (2,)]


def test_adam_trains_embeddings_whose_gradient_is_sparse():
    start, gradient = np.random.default_rng(0).normal(size=(2, 5, 3)).astype("float32")
    gradient[[0, 3]] = 0
    slices = tf.IndexedSlices(tf.constant(gradient[[1, 2, 4]]), tf.constant([1, 2, 4]), tf.constant([5, 3]))
    found = []
    for given in (tf.constant(gradient), slices):
        table = keras.Variable(start, name="embeddings")
        optimizer = Muon(0.01)
        optimizer.apply([given], [table])
        found.append(np.asarray(table))
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)
    np.testing.assert_allclose(found[0], start - 0.01 * np.sign(gradient), atol=1e-6)  # Adam's first step


def test_float16_without_gradients_stays_finite():
    variables, optimizer = [keras.Variable(np.ones(shape), dtype="float16") for shape in ((3,), (2, 2))], Muon(0.01)
    for gradient, least, most in ((0, 1, 1), (1e-4, 0.9, 0.999)):  # the square of 1e-4 is 0
        optimizer.apply([tf.fill(v.shape, tf.constant(gradient, "float16")) for v in variables], variables)
        assert all(least <= np.asarray(v).min() <= most for v in variables)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_trains_nearly_as_float32_does(policy):
    def losses(optimizer):
        model, x, y = small(optimizer)
        return [float(model.train_on_batch(x, y)) for _ in range(5)]

    inner, expected = Muon(0.05), losses(Muon(0.05))
    keras.config.set_dtype_policy(policy)
    found = losses(AllReplicaLossScaleOptimizer(inner, 2.0**4) if policy == "mixed_float16" else inner)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert expected[-1] < 0.9 * expected[0]


def small(optimizer):
    """A compiled net and a batch."""
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    layers = [L.Conv2D(3, 3, use_bias=False), L.BatchNormalization(synchronized=True), L.ReLU(), L.Flatten(), L.Dense(10)]
    model = keras.Sequential([keras.Input((6, 6, 1)), *layers])
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, rng.normal(size=(16, 6, 6, 1)).astype("float32"), rng.integers(10, size=16)


def test_two_replicas_step_as_one(two_replicas):
    alone, x, y = small(Muon(0.01))
    with two_replicas.scope():
        shared, _, _ = small(Muon(0.01))
    for model in (alone, shared):
        model.fit(x, y, batch_size=16, epochs=3, shuffle=False, verbose=0)
    for mine, theirs in zip(alone.get_weights(), shared.get_weights()):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_saved_model_trains_on_as_the_one_in_memory(tmp_path):
    model, x, y = small(Muon(LearningRate(0.5, 4, "step", 2), momentum=0.7))
    for _ in range(3):
        model.train_on_batch(x, y)
    model.save(tmp_path / "model.keras")
    loaded = ortho_keras.load_model(tmp_path / "model.keras")
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    config = loaded.optimizer.get_config()["learning_rate"]["config"]
    assert config == {"peak": 0.5, "total_steps": 4, "shape": "step", "warmup_steps": 2, "first_step": 0}
    assert loaded.train_on_batch(x, y) == model.train_on_batch(x, y)
    for mine, theirs in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(mine, theirs, atol=1e-6)


def test_weight_decay_applies_to_kernels_and_vectors():
    optimizer = Muon(0.01, weight_decay=0.1)
    before = [np.full((2, 2), 3.0), np.full(2, 3.0)]
    variables = [keras.Variable(value) for value in before]
    optimizer.apply([tf.zeros((2, 2)), tf.zeros(2)], variables)
    for variable, value in zip(variables, before):  # the gradient is 0
        np.testing.assert_allclose(variable, value * (1 - 0.1 * 0.01), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"momentum": 1.0}, "`momentum` must be a finite number, at least 0 and below 1. Received: momentum=1.0"),
        ({"beta_2": -0.1}, "`beta_2` must be"),
        ({"epsilon": 0}, "`epsilon` must be"),
        ({"exclude": "embeddings"}, "`exclude` must be a list or tuple of names. Received: exclude='embeddings'"),
        ({"peak": 0.1, "total_steps": 9, "shape": "linear"}, "`shape` must be one of .* Received: shape='linear'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        (LearningRate if "shape" in arguments else Muon)(**arguments)
