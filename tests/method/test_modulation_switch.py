"""ModulationSwitch in a real `fit`: modulated for its steps and not one more."""

import contextlib

import keras
import numpy as np
import pytest
from chains import batch, dense_chain

import ortho_keras

X, Y = batch(64, 6)


def modulated():
    keras.utils.set_random_seed(2)
    return compiled(ortho_keras.modulate(dense_chain(), tolerance=1.0))


def compiled(model):
    model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def fit(model, *callbacks, epochs=2):
    """Eight steps an epoch."""
    keras.utils.set_random_seed(3)
    model.fit(X, Y, batch_size=8, epochs=epochs, callbacks=list(callbacks), verbose=0)


class Killed(keras.callbacks.Callback):
    def on_train_batch_end(self, batch, logs=None):
        if self.model.optimizer.iterations == 14:
            raise KeyboardInterrupt


def test_modulation_is_switched_off_after_its_steps_also_in_a_resumed_run():
    def weights(model):
        return np.concatenate([weight.ravel() for weight in model.get_weights()])

    expected = modulated()
    fit(expected, epochs=1)  # 8 steps with modulation
    ortho_keras.switch_modulation(expected, False)
    fit(expected, epochs=1)
    in_one, in_two, always = modulated(), modulated(), modulated()
    keras.utils.set_random_seed(3)
    switch = ortho_keras.ModulationSwitch(8)
    in_one.fit(X, Y, batch_size=8, epochs=1, callbacks=[switch], verbose=0)
    assert not any(layer.enabled for layer in in_one.layers if isinstance(layer, ortho_keras.ErrorModulation))
    for _ in range(2):
        ortho_keras.switch_modulation(in_two, True)
        fit(in_two, ortho_keras.ModulationSwitch(8), epochs=1)
        fit(always, epochs=1)
    np.testing.assert_array_equal(weights(in_two), weights(expected))
    assert np.abs(weights(always) - weights(expected)).max() > 1e-3


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_is_not_modulated_a_step_too_long(tmp_path, first):
    """Six steps with modulation, killed at 14, resumed at 8: the switch sees step 8 before the first batch."""
    seen = []

    class Seen(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            enabled = {layer.enabled for layer in self.model.layers if isinstance(layer, ortho_keras.ErrorModulation)}
            seen.append((int(self.model.optimizer.iterations), *enabled))

    for last in ([Killed()], []):
        model = modulated()
        switch, backup = ortho_keras.ModulationSwitch(6), keras.callbacks.BackupAndRestore(tmp_path)
        callbacks = [switch, backup] if first else [backup, switch]
        with contextlib.suppress(KeyboardInterrupt):
            fit(model, *callbacks, Seen(), *last, epochs=3)
    assert seen == [(step, step < 6) for step in [*range(14), *range(8, 24)]]


def test_switching_what_is_not_there():
    with pytest.raises(ValueError, match="must have ErrorModulation layers"):
        fit(compiled(dense_chain()), ortho_keras.ModulationSwitch(3))
    with pytest.raises(ValueError, match="`steps` must be an integer, at least 1. Received: steps=0"):
        ortho_keras.ModulationSwitch(0)
