"""The named variants against their formulas in float64 NumPy; the convolutional one against the convolution's own matrix."""

import keras
import numpy as np
import pytest
import references
import tensorflow as tf

import ortho_keras
from ortho_keras import (
    ConvOrthogonalRegularizer,
    DeltaOrthonormalInitializer,
    DoubleSoftOrthogonalRegularizer,
    MutualCoherenceRegularizer,
    OrthonormalInitializer,
    SRIPRegularizer,
)

VARIANTS = [DoubleSoftOrthogonalRegularizer, MutualCoherenceRegularizer, SRIPRegularizer, ConvOrthogonalRegularizer]


def random_kernel(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape) / np.sqrt(shape[0])


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3, 3, 4, 6), "standard"), ((1, 1, 4, 19), "standard"), ((3, 9, 2), "transposed"), ((5, 3, 2), "depthwise")],
)
def test_mutual_coherence_spectral_norm_and_double_soft_orthogonality_equal_their_formulas(shape, layout):
    kernel = random_kernel(shape)
    expected = references.related_penalties(kernel, layout)
    coherence = MutualCoherenceRegularizer(0.25, layout)(tf.constant(kernel))
    np.testing.assert_allclose(coherence, 0.25 * expected["coherence"], rtol=1e-10)
    spectral = SRIPRegularizer(0.25, layout, iterations=2000)(tf.constant(kernel))
    np.testing.assert_allclose(spectral, 0.25 * expected["spectral"], rtol=1e-6)
    few = SRIPRegularizer(0.25, layout)(tf.constant(kernel))
    assert 0 < few <= spectral * (1 + 1e-9)
    double = DoubleSoftOrthogonalRegularizer(0.25, layout)(tf.constant(kernel))
    np.testing.assert_allclose(double, 0.25 * expected["double_soft"], rtol=1e-10)


def test_two_steps_of_the_power_iteration_by_hand():
    kernel = random_kernel((6, 4))
    deviation = kernel.T @ kernel - np.eye(4)
    vector = np.random.default_rng(5).normal(size=4)
    vector = deviation @ (deviation @ vector)
    image = deviation @ vector
    expected = np.linalg.norm(image) / np.linalg.norm(vector)
    variable = tf.Variable(kernel)
    with tf.GradientTape() as tape:
        penalty = SRIPRegularizer(2.0, seed=5)(variable)
    np.testing.assert_allclose(penalty, 2 * expected, rtol=1e-10)
    by_deviation = np.outer(image, vector) / (np.linalg.norm(image) * np.linalg.norm(vector))
    gradient = 2 * kernel @ (by_deviation + by_deviation.T)  # of W^T W - I, times the factor
    np.testing.assert_allclose(tape.gradient(penalty, variable), gradient, rtol=1e-9)


@pytest.mark.parametrize("iterations", [1, 2, 50])
def test_the_spectral_norm_where_eigenvalues_have_both_signs(iterations):
    """As near every orthonormal kernel: here W^T W - I is diag(0.5, -0.5)."""
    kernel = tf.constant(np.diag(np.sqrt([1.5, 0.5])))
    np.testing.assert_allclose(SRIPRegularizer(1.0, iterations=iterations)(kernel), 0.5, rtol=1e-12)
    rng = np.random.default_rng(0)
    noisy = np.linalg.qr(rng.normal(size=(288, 32)))[0] + 0.01 * rng.normal(size=(288, 32))
    norm = np.linalg.norm(noisy.T @ noisy - np.eye(32), 2)
    assert 0.5 * norm < SRIPRegularizer(1.0, iterations=iterations)(tf.constant(noisy)) <= norm * (1 + 1e-9)
    flat = tf.Variable(np.eye(3))
    with tf.GradientTape() as tape:
        penalty = SRIPRegularizer(1.0)(flat)
    assert penalty == 0 and not np.any(tape.gradient(penalty, flat))  # and no NaN


@pytest.mark.parametrize(
    ("shape", "strides", "sizes"),
    [
        ((3, 3, 2, 4), (1, 1), (6, 7)),
        ((3, 3, 2, 9), (2, 2), (6, 6)),  # more outputs than the 8 that the stride leaves
        ((4, 2, 1, 3), (2, 1), (8, 5)),
        ((5, 3, 2), (3,), (12,)),
        ((2, 2, 3, 1, 2), (1, 2, 1), (3, 4, 5)),
        ((2, 2, 2, 3), (3, 3), (6, 6)),  # windows that do not meet
    ],
)
def test_the_convolutional_penalty_is_that_of_the_convolutions_matrix(shape, strides, sizes):
    kernel = random_kernel(shape)
    penalty = ConvOrthogonalRegularizer(0.75, strides)(tf.constant(kernel))
    np.testing.assert_allclose(penalty, 0.75 * references.convolutional_penalty(kernel, sizes, strides), rtol=1e-10)
    if len(set(strides)) == 1:
        assert float(ConvOrthogonalRegularizer(0.75, strides[0])(tf.constant(kernel))) == float(penalty)


def test_what_is_orthogonal_costs_nothing():
    delta = tf.cast(DeltaOrthonormalInitializer(seed=1)((3, 3, 4, 4)), tf.float64)
    assert float(ConvOrthogonalRegularizer(1.0)(delta)) < 1e-10
    kernel = tf.cast(OrthonormalInitializer(seed=1)((3, 3, 4, 4)), tf.float64)
    assert float(ConvOrthogonalRegularizer(1.0)(kernel)) > 0.1  # orthonormal filters that overlap when they are shifted
    square = tf.cast(OrthonormalInitializer(seed=1)((9, 9)), tf.float64)
    for variant, by_hand in zip(VARIANTS, (90, 3, 3)):
        assert float(variant(1.0)(square)) < 1e-5
        assert float(variant(1.0)(2 * tf.eye(5))) == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "strides", "groups", "most"),
    [  # Achour et al.: where M <= C S^2, C k^2 filters at most; where M >= C S^2, S <= k
        ((3, 3, 8, 129), 4, 1, 72),
        ((3, 3, 8, 128), 4, 1, 72),
        ((3, 3, 8, 73), 4, 1, 72),
        ((3, 3, 8, 72), 4, 1, None),
        ((3, 3, 8, 129), 3, 1, None),
        ((1, 1, 1, 2), 2, 1, 1),
        ((2, 1, 4), 3, 2, None),
        ((2, 1, 6), 3, 2, 4),
        ((3, 1, 2, 3), (1, 4), 1, 2),  # along the second axis, pixels are left out; the first has no more than 2 x 1 dimensions
        ((1, 4), 1, 1, None),
    ],
)
def test_where_no_orthogonal_convolution_exists(shape, strides, groups, most):
    regularizer = ConvOrthogonalRegularizer(1.0, strides, groups)
    kernel = tf.cast(OrthonormalInitializer(seed=1, groups=groups)(shape), tf.float64)
    if most is None:
        assert regularizer.obstacle(shape) == ""
        return
    with pytest.warns(UserWarning, match=f"cannot be orthogonal: at most {most} filters, or strides of at most the kernel's"):
        assert float(regularizer(kernel)) > 0.9
    assert regularizer.obstacle((*shape[:-1], most)) == ""


@pytest.mark.parametrize("shape", [(7, 3), (3, 7)])
def test_a_dense_kernel_is_a_convolution_of_one_pixel(shape):
    w = random_kernel(shape)
    gram = w.T @ w if shape[1] <= shape[0] else w @ w.T
    penalty = ConvOrthogonalRegularizer(0.5, strides=2)(tf.constant(w))  # of the convolutions beside it
    np.testing.assert_allclose(penalty, 0.5 * np.sum((gram - np.eye(len(gram))) ** 2), rtol=1e-10)


def test_groups_are_convolutions_of_their_own():
    kernel = random_kernel((3, 3, 2, 6))
    for variant in VARIANTS:
        parts = sum(float(variant(1.0)(tf.constant(part))) for part in np.split(kernel, 2, axis=-1))
        assert float(variant(1.0, groups=2)(tf.constant(kernel))) == pytest.approx(parts, rel=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_finite_differences(variant):
    regularizer = variant(0.5, **({"iterations": 3000} if variant is SRIPRegularizer else {}))
    variable = tf.Variable(random_kernel((2, 2, 3, 5), seed=3))
    with tf.GradientTape() as tape:
        penalty = regularizer(variable)
    gradient = tape.gradient(penalty, variable).numpy()
    direction = np.random.default_rng(4).normal(size=variable.shape)
    ahead, behind = (float(regularizer(tf.constant(variable.numpy() + s * 1e-6 * direction))) for s in (1, -1))
    np.testing.assert_allclose((ahead - behind) / 2e-6, np.sum(gradient * direction), rtol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_precision_and_graphs(variant):
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        kernel = tf.cast(random_kernel((3, 3, 2, 4)), dtype)
        eager = variant(0.1)(kernel)
        assert eager.shape == () and eager.dtype == (tf.float64 if dtype == "float64" else tf.float32)
    regularizer = variant(0.1)
    graph = tf.function(regularizer, jit_compile=True)
    np.testing.assert_allclose(graph(kernel), eager, rtol=1e-5)
    regularizer.factor = 0.2
    np.testing.assert_allclose(graph(kernel), 2 * eager, rtol=1e-5)


def test_layers_with_them_train_and_come_back_from_a_file(tmp_path):
    made = [variant(1e-3) for variant in VARIANTS[:2]]
    made += [SRIPRegularizer(1e-3, iterations=100, seed=7), ConvOrthogonalRegularizer(1e-3, strides=(2, 1))]
    layers = [keras.layers.Conv2D(4, 3, padding="same", kernel_regularizer=regularizer) for regularizer in made]
    layers[-1].strides = (2, 1)
    model = keras.Sequential([keras.Input((8, 8, 2)), *layers])
    model.compile("sgd", "mse")
    before = np.array(model.losses)
    model.fit(np.zeros((8, 8, 8, 2)), np.zeros((8, 4, 8, 4)), epochs=2, verbose=0)  # outputs are 0: only the penalties act
    assert np.all(np.array(model.losses) < before)
    model.save(tmp_path / "model.keras")
    loaded = ortho_keras.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded.losses, model.losses, rtol=1e-6)
    for layer, regularizer in zip(loaded.layers, made):
        assert type(layer.kernel_regularizer) is type(regularizer)
        assert layer.kernel_regularizer.get_config() == regularizer.get_config()


def test_what_is_refused():
    for make, message in [
        (lambda: SRIPRegularizer(iterations=0), "`iterations` must be an integer, at least 1. Received: iterations=0"),
        (lambda: SRIPRegularizer(seed=0.5), "`seed` must be an integer, at least 0. Received: seed=0.5"),
        (lambda: ConvOrthogonalRegularizer(strides=()), "`strides` must be an integer, at least 1. Received: strides=()"),
        (lambda: ConvOrthogonalRegularizer(strides=(1, 2.0)), "`strides` must be an integer"),
        (lambda: ConvOrthogonalRegularizer()(tf.ones(3)), r"of rank 2 to 5.* Received: a kernel of shape \(3,\)"),
        (lambda: ConvOrthogonalRegularizer(strides=(1, 1))(tf.eye(3)), "one number for each axis"),
        (lambda: ConvOrthogonalRegularizer(groups=2)(tf.ones((3, 3, 2, 3))), "`groups` must divide the 3 outputs"),
    ]:
        with pytest.raises(ValueError, match=message):
            make()
