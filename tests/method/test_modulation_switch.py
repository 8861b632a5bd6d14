"""switch_modulation and ModulationSwitch in a real `fit`: the step after a switch follows it, also on replicas and resumed."""

import contextlib

import chains
import keras
import numpy as np
import pytest
import tensorflow as tf
from chains import batch, dense_chain, modulations

from ortho_keras import ModulationSwitch, modulate, switch_modulation


class SwitchOff(keras.callbacks.Callback):
    """Turns modulation off after the first step, and keeps the weights as they were before and after every step."""

    def on_train_begin(self, logs=None):
        self.weights = [self.model.get_weights()]

    def on_train_batch_end(self, step, logs=None):
        self.weights.append(self.model.get_weights())
        switch_modulation(self.model, False)


def assert_steps_follow(steps, model, batches, tolerances):
    """Each SGD step of rate 1 is the mean of the oracle's gradients over that step's per-replica batches."""
    for before, after, tolerance in zip(steps, steps[1:], tolerances):
        model.set_weights(before)
        found = [chains.modulated_gradients(model, x, y, "abc", tolerance, 1000.0, "anchor")[0] for x, y in batches]
        for variable, old, new in zip(model.trainable_variables, before, after, strict=True):
            expected = np.mean([gradient[variable.path] for gradient in found], axis=0)
            np.testing.assert_allclose(old - new, expected, 1e-4, 5e-6, err_msg=variable.path)  # weights up to 20


@pytest.mark.parametrize("settings", [{}, {"run_eagerly": True}, {"jit_compile": True}], ids=str)
def test_switch_during_fit(settings):
    model = dense_chain()
    modulated = modulate(model, tolerance=1.0)
    traces = []

    def loss(y, logits):
        traces.append(1)
        return chains.mean_crossentropy(tf.cast(y, tf.int64), logits)

    modulated.compile(keras.optimizers.SGD(1.0), loss, **settings)
    x, y = batch(8, 6)
    for repeated, tolerances in ((3, [1.0, 1e9, 1e9]), (1, [1.0])):
        switch_modulation(modulated, True)
        switch = SwitchOff()
        modulated.fit(np.tile(x, (repeated, 1)), np.tile(y, repeated), 8, shuffle=False, verbose=0, callbacks=[switch])
        assert_steps_follow(switch.weights, model, [(x, y)], tolerances)
        assert not any(layer.enabled for layer in modulations(modulated))
    assert settings.get("run_eagerly") or len(traces) <= 2  # Keras builds once, and traces once


@pytest.mark.parametrize("synchronized", [False, True])
def test_a_mirrored_strategy(two_replicas, synchronized):
    with two_replicas.scope():
        modulated = modulate(dense_chain(), tolerance=1.0, synchronized=synchronized)
        modulated.compile(keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    x, y = batch(8, 6)
    x[4:] *= 5  # so that the replicas' moments differ
    switch = SwitchOff()
    modulated.fit(np.tile(x, (2, 1)), np.tile(y, 2), batch_size=8, shuffle=False, verbose=0, callbacks=[switch])
    model = dense_chain()
    whole, replicas = [(x, y)], [(x[:4], y[:4]), (x[4:], y[4:])]
    right, wrong = (whole, replicas) if synchronized else (replicas, whole)
    assert_steps_follow(switch.weights, model, right, [1.0, 1e9])
    with pytest.raises(AssertionError, match="a/kernel"):
        assert_steps_follow(switch.weights, model, wrong, [1.0])


@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_run_is_not_modulated_a_step_too_long(tmp_path, first):
    """Six steps with modulation, killed at 14, resumed at 8: the switch sees step 8 before the first batch."""
    seen, (x, y) = [], batch(64, 6)

    def modulated():
        model = modulate(dense_chain())
        model.compile(keras.optimizers.SGD(0.05), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        return model

    class Seen(keras.callbacks.Callback):
        def __init__(self, killed):
            super().__init__()
            self.killed = killed

        def on_train_batch_begin(self, batch, logs=None):
            step = int(self.model.optimizer.iterations)
            if step == self.killed:
                raise KeyboardInterrupt
            seen.append((step, *{layer.enabled for layer in modulations(self.model)}))

    for killed in (14, None):
        model = modulated()
        switch, backup = ModulationSwitch(6), keras.callbacks.BackupAndRestore(tmp_path)
        callbacks = [switch, backup] if first else [backup, switch]
        with contextlib.suppress(KeyboardInterrupt):
            model.fit(x, y, batch_size=8, epochs=3, callbacks=[*callbacks, Seen(killed)], verbose=0)
    assert seen == [(step, step < 6) for step in [*range(14), *range(8, 24)]]
    model = modulated()
    model.fit(x[:48], y[:48], batch_size=8, callbacks=[ModulationSwitch(6)], verbose=0)
    assert not any(layer.enabled for layer in modulations(model))  # after the last of its steps


def test_what_is_refused():
    with pytest.raises(ValueError, match="must have ErrorModulation layers: call modulate first"):
        switch_modulation(dense_chain(), True)
    with pytest.raises(ValueError, match="`steps` must be an integer, at least 1. Received: steps=0"):
        ModulationSwitch(0)
