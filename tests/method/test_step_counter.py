"""Callbacks that count steps: by the optimizer that trains, by batches where another one does, and between executions."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers

import ortho_keras

X = np.random.default_rng(0).normal(size=(64, 6)).astype("float32")
Y = np.zeros((64, 2), "float32")


def net(units=2):
    return keras.Sequential([keras.Input((6,)), layers.Dense(6), layers.Dense(6), layers.Dense(units)])


class OtherOptimizer(keras.Model):
    """A model whose `train_step` uses an optimizer that Keras does not know of, as a GAN does."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.own = inner, keras.optimizers.SGD(0.01)

    def call(self, x):
        return self.inner(x)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.inner(x, training=True) - y))
        self.own.apply(tape.gradient(loss, self.inner.trainable_weights), self.inner.trainable_weights)
        return {"loss": loss}


class Switches(keras.callbacks.Callback):
    """Records after each batch whether modulation is on."""

    def __init__(self):
        super().__init__()
        self.on = []

    def on_train_batch_end(self, batch, logs=None):
        (first, *_) = [layer for layer in self.model.inner.layers if isinstance(layer, ortho_keras.ErrorModulation)]
        self.on.append(first.enabled)


def test_the_switch_counts_batches_where_another_optimizer_trains():
    model, seen = OtherOptimizer(ortho_keras.modulate(net())), Switches()
    model.compile()
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[ortho_keras.ModulationSwitch(5), seen])
    assert int(model.optimizer.iterations) == 0 and seen.on == 4 * [True] + 12 * [False]


@pytest.mark.parametrize("compiled", [{}, {"optimizer": None}])
def test_the_decay_refuses_a_model_whose_learning_rate_it_cannot_know(compiled):
    model = OtherOptimizer(net())
    model.compile(**compiled)
    with pytest.raises(ValueError, match="OrthonormalDecay needs the learning rate of the model's optimizer.*Received: model="):
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[ortho_keras.OrthonormalDecay(1.0)])


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("steps", lambda number, folder: ortho_keras.ModulationSwitch(number)),
        ("every", lambda number, folder: ortho_keras.OrthonormalDecay(0.1, every=number)),
        ("every", lambda number, folder: ortho_keras.SignalMonitor(X, Y, folder, every=number)),
    ],
)
def test_steps_between_executions_are_refused(name, make, tmp_path):
    model = ortho_keras.modulate(net())
    model.compile("sgd", "mse", steps_per_execution=4)
    with pytest.raises(ValueError, match=f"`{name}` must be a multiple .* steps_per_execution, 4.*Received: {name}=6"):
        model.fit(X, Y, batch_size=8, verbose=0, callbacks=[make(6, tmp_path)])
    model.fit(X, Y, batch_size=8, verbose=0, callbacks=[make(4, tmp_path)])


def test_a_switch_between_executions_is_exact():
    def weights(per, steps):
        model = ortho_keras.modulate(net(), tolerance=1.0)
        model.set_weights([np.random.default_rng(1).normal(size=w.shape) for w in model.get_weights()])
        model.compile(keras.optimizers.SGD(0.001), "mse", steps_per_execution=per)
        callback = ortho_keras.ModulationSwitch(steps)
        model.fit(X, Y, batch_size=8, shuffle=False, verbose=0, callbacks=[callback])
        return np.concatenate([w.ravel() for w in model.get_weights()])

    np.testing.assert_allclose(weights(4, 4), weights(1, 4), rtol=1e-6)
    assert np.abs(weights(1, 8) - weights(1, 4)).max() > 1e-6


class Stop(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        if epoch == 1:
            raise RuntimeError


@pytest.mark.parametrize("every", [1, 3, 5])
def test_a_run_restored_by_keras_equals_one_that_was_not_stopped(every, tmp_path):
    def trained(*callbacks):
        keras.utils.set_random_seed(0)
        model = net()
        model.compile(keras.optimizers.SGD(0.05), "mse")
        model.fit(X, Y, batch_size=16, epochs=6, shuffle=False, verbose=0, callbacks=list(callbacks))
        return model.get_weights()

    def decay():
        return ortho_keras.OrthonormalDecay(0.5, every=every)

    expected = trained(decay())
    with pytest.raises(RuntimeError):
        trained(keras.callbacks.BackupAndRestore(tmp_path / "backup"), decay(), Stop())
    resumed = trained(keras.callbacks.BackupAndRestore(tmp_path / "backup"), decay())
    for one, other in zip(resumed, expected):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-7)
