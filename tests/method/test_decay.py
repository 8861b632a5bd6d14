"""OrthonormalDecay: what it does to kernels, and when."""

import contextlib
import copy

import keras
import numpy as np
import pytest
import references
from layout_models import LAYOUTS, small_model, weights

from ortho_keras import OrthonormalDecay, SRIPRegularizer

pytestmark = pytest.mark.every_backend


def still(model, learning_rate=0.1, **settings):
    """Compiles a model so that nothing but the decay moves its kernels: the loss has no gradient."""
    model.compile(keras.optimizers.SGD(learning_rate), lambda y, prediction: 0 * keras.ops.sum(prediction), **settings)
    return model


def dense(kernel, **settings):
    model = keras.Sequential([keras.Input((kernel.shape[0],)), keras.layers.Dense(kernel.shape[1], use_bias=False)])
    model.set_weights([kernel])
    return still(model, **settings)


def fit(model, decay, steps):
    x, y = np.zeros((2 * steps, *model.input_shape[1:])), np.zeros(2 * steps)
    model.fit(x, y, batch_size=2, callbacks=[decay], verbose=0)


def test_every_layout_equals_the_oracle_and_a_frozen_kernel_stays():
    model = still(small_model())
    model.get_layer("classifier").trainable = False
    before = {path: weights(model)[path].numpy() for path in LAYOUTS}
    fit(model, OrthonormalDecay(0.02, every=1), steps=1)
    for path, layout in LAYOUTS.items():
        gradient = references.penalty_and_gradient(before[path], layout, 0.02)[1] * (path != "classifier/kernel")
        np.testing.assert_allclose(weights(model)[path], before[path] - 0.1 * gradient, rtol=1e-5, atol=1e-7, err_msg=path)


def test_a_case_done_by_hand():
    # W = 2: W - 2 * 0.25 * 0.1 * W (W^2 - 1) = 2 - 0.05 * 6. 100 times that is limited to half of W = 2; for W = 1.2 to the
    # Newton-Schulz step, 1.2 - 1.2 * 0.44 / 2.
    for factor, start, end in ((0.25, 2.0, 1.7), (25.0, 2.0, 1.0), (25.0, 1.2, 0.936)):
        model = dense(np.array([[start]]))
        fit(model, OrthonormalDecay(factor, every=1), steps=1)
        np.testing.assert_allclose(model.get_weights(), [[[end]]], rtol=1e-6, atol=1e-6)


def test_no_singular_value_moves_away_from_one():
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, size=12).tolist()
    model = keras.Sequential([keras.Input((5,)), *(keras.layers.Dense(size, use_bias=False) for size in sizes)])
    for rate, factor in np.exp(rng.uniform(-6, [3, 6], size=(8, 2))):
        kernels = [np.exp(rng.uniform(-3, 1.5)) * rng.normal(size=kernel.shape) for kernel in model.weights]
        model.set_weights(kernels)
        fit(still(model, float(rate)), OrthonormalDecay(float(factor), every=1), steps=1)
        for kernel, moved in zip(kernels, model.get_weights(), strict=True):
            if kernel.shape[0] >= kernel.shape[1]:  # of a wide kernel, each group of columns moves by itself
                before, after = (np.linalg.svd(w, compute_uv=False) for w in (kernel, moved))
                excess = np.sort(np.abs(after**2 - 1)) - np.sort(np.abs(before**2 - 1))
                assert excess.max() < 1e-5 * (1 + before.max() ** 2), (before, after)
                assert after.min() > 0.499 * min(before.min(), 1), (before, after)


@pytest.mark.parametrize("steps_per_execution", [1, 2] if keras.config.backend() != "torch" else [1])  # Keras refuses
def test_an_update_counts_the_steps_since_the_last(steps_per_execution):
    """Seven steps, every fourth: after 4, and at the end. The rate is 0 at the first step."""
    rate = keras.optimizers.schedules.PiecewiseConstantDecay([1], [0.0, 0.1])
    model = dense(np.array([[1.5]]), learning_rate=rate, steps_per_execution=steps_per_execution)
    value = 1.5
    for steps in (4, 3):
        value -= 2 * 0.1 * 0.1 * steps * value * (value**2 - 1)
    fit(model, OrthonormalDecay(0.1, every=4), steps=7)
    np.testing.assert_allclose(model.get_weights(), [[[value]]], rtol=1e-5)
    model.fit(np.zeros((2, 1)), np.zeros(2), epochs=0, callbacks=[OrthonormalDecay(1.0, every=1)], verbose=0)
    np.testing.assert_allclose(model.get_weights(), [[[value]]], rtol=1e-5)  # no step, no update


def test_accumulated_gradients_are_one_step():
    """Six batches are three steps: one update by hand."""
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = still(dense(np.array([[1.5]])))
    model.compile(optimizer, model.loss)
    fit(model, OrthonormalDecay(0.1, every=3), steps=6)
    np.testing.assert_allclose(model.get_weights(), [[[1.5 - 2 * 0.1 * 0.1 * 3 * 1.5 * 1.25]]], rtol=1e-5)


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_counts_its_own_steps_only(tmp_path, first):
    """Killed at step 7, resumed at 6: the same as eight steps in one run."""

    class Killed(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if self.model.optimizer.iterations == 7:
                raise KeyboardInterrupt

    kernel = np.array([[1.5]])
    expected = dense(kernel)
    fit(expected, OrthonormalDecay(0.1, every=2), steps=8)
    for last in ([Killed()], []):
        model, decay = dense(kernel), OrthonormalDecay(0.1, every=2)
        backup = keras.callbacks.BackupAndRestore(tmp_path)
        callbacks = [decay, backup] if first else [backup, decay]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(np.zeros((4, 1)), np.zeros(4), batch_size=2, epochs=4, callbacks=[*callbacks, *last], verbose=0)
    assert model.optimizer.iterations == 8
    np.testing.assert_allclose(model.get_weights(), expected.get_weights(), rtol=1e-6)


@pytest.mark.skipif(keras.config.backend() != "tensorflow", reason="of TensorFlow alone")
def test_a_mirrored_strategy(two_replicas):
    kernel = np.random.default_rng(1).normal(size=(5, 3)).astype("float32")
    with two_replicas.scope():
        mirrored = dense(kernel)
    single = dense(kernel)
    for model in (mirrored, single):
        fit(model, OrthonormalDecay(0.1, every=2), steps=3)
    np.testing.assert_allclose(mirrored.get_weights(), single.get_weights(), rtol=1e-6)
    np.testing.assert_array_equal(*(np.asarray(copied) for copied in mirrored.weights[0].value.values))


def test_training_ends_nearly_orthonormal():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(64, 12)).astype("float32")
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(6), keras.layers.Dense(3)])
    model.set_weights([rng.normal(size=weight.shape) / 3 for weight in model.weights])  # the same on each backend
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(x, rng.integers(3, size=64), epochs=20, callbacks=[OrthonormalDecay(30.0, every=2)], verbose=0)
    assert references.largest_deviation(model.layers[0].kernel, "standard") < 0.02


def test_copies_and_wrong_arguments():
    decay = copy.deepcopy(OrthonormalDecay(0.3, every=7, regularizer="srip"))
    assert (decay.factor, decay.every, decay.regularizer) == (0.3, 7, SRIPRegularizer)
    for name, value in {"factor": -1, "every": 0, "regularizer": "l2"}.items():
        with pytest.raises(ValueError, match=rf"`{name}` must be .* Received: {name}={value!r}"):
            OrthonormalDecay(**{name: value})
    model = still(keras.Sequential([keras.Input((2,)), keras.layers.LayerNormalization()]))
    with pytest.raises(ValueError, match="`model` must have a trainable kernel for OrthonormalRegularizer"):
        fit(model, OrthonormalDecay(), steps=1)
