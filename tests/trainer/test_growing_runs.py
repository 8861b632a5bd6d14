"""Runs that grow: the same wherever they are stopped, on any number of replicas; callbacks see the net that trains."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from small_runs import RECIPE as SHALLOW
from small_runs import StopAt, silent

from ortho_keras import ErrorModulation, grow
from ortho_keras.diagnosis.monitor import read_signals
from ortho_keras.method.errors import Interrupted
from ortho_keras.method.state import steps_taken
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer.data import BatchSettings, load_data, training_batches
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import Runtime

RECIPE = dataclasses.replace(
    SHALLOW, width=2, start_depth=8, grow_epoch=2, depth=14, learning_rate=0.02, rate_depth=44, relu_shift=-1.0
)
SMALL = dataclasses.replace(RECIPE, modulation="off", batch_size=640, relu_shift=1.0)  # two steps an epoch


def history_of(workdir):
    return json.loads((workdir / "history.json").read_text())


class Watch(keras.callbacks.Callback):
    """Records the net, its steps and its modulation after each epoch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def on_epoch_end(self, epoch, logs=None):
        enabled = {layer.enabled for layer in self.model.layers if isinstance(layer, ErrorModulation)}
        self.seen.append((self.model.name, steps_taken(self.model), enabled))


def test_a_growing_run_and_one_stopped_in_both_nets_are_the_same(tmp_path):
    """Also where the deep net's only checkpoint is damaged: the run resumes from the shallow one's last."""
    recipe, watch = dataclasses.replace(RECIPE, modulation_steps=15), Watch()
    result = run(recipe, tmp_path / "whole", callbacks=[watch], signal_every=15, log=silent)
    assert watch.seen == [("plain8", 10, {True}), ("plain8", 20, {False}), ("plain14", 30, {False}), ("plain14", 40, {False})]
    rows = read_signals(tmp_path / "whole" / "signals.csv")
    names = {step: [row["name"] for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    assert {step: len(of_step) for step, of_step in names.items()} == {0: 8, 15: 8, 20: 8, 30: 14, 40: 14}
    assert all(of_step[0] == "stem_conv" and of_step[-1] == "classifier" for of_step in names.values())

    lines, stopped = [], tmp_path / "stopped"
    for step in (3, 18, 27):  # 18 is noticed in step 20, after which the net grows
        with pytest.raises(Interrupted, match=f"stopped after step {step + 2} of 40"):
            run(recipe, stopped, callbacks=[StopAt(step)], keep_checkpoints=1, log=lines.append)
    assert lines.count("plain8 has become plain14") == 1 and not any("cannot be used" in line for line in lines)
    (newest,) = (stopped / "checkpoints").glob("*.npz")
    newest.write_bytes(newest.read_bytes()[:1000])
    run(recipe, stopped, log=lines.append)
    assert sum("cannot be used" in line for line in lines) == 1 and "resuming after step 20 of 40" in lines
    weights = [keras.models.load_model(folder / "final.keras").get_weights() for folder in (stopped, tmp_path / "whole")]
    for mine, expected in zip(*weights, strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)
    history = history_of(tmp_path / "whole")
    assert [row["accuracy"] for row in history_of(stopped)] == pytest.approx([row["accuracy"] for row in history], abs=1e-6)
    assert [row["step"] for row in history] == [10, 20, 30, 40] and result["steps"] == 40
    # Half a cosine over all steps, at the rate of each depth: 0.02 * 44 / 8, then 0.02 * 44 / 14.
    share = 0.5 * (1 + np.cos(np.pi * np.array([10, 20, 30, 40]) / 40))
    rates = 0.02 * 44 / np.array([8, 8, 14, 14]) * share
    np.testing.assert_allclose([row["learning_rate"] for row in history], rates, rtol=1e-5, atol=1e-9)
    assert history[2]["crossentropy"] < history[1]["crossentropy"]  # nothing was lost


def test_a_run_that_ends_early_still_gives_the_net_that_was_asked_for(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    result = run(SMALL, tmp_path, callbacks=[Stop()], log=silent)
    final = keras.models.load_model(tmp_path / "final.keras")
    kernels = [layer.kernel for layer in final.layers if isinstance(layer, layers.Conv2D)]
    identities = [tf.reduce_sum(tf.abs(kernel)) == kernel.shape[-1] for kernel in kernels]
    assert (result["steps"], final.name, len(kernels), sum(map(bool, identities))) == (2, "plain14", 13, 6)


class Longest(keras.callbacks.Callback):
    """Records the longest step of a weight, over the learning rate, and where the weights were first."""

    def __init__(self):
        super().__init__()
        self.steps = []

    def on_train_batch_begin(self, batch, logs=None):
        self.before = [variable.numpy() for variable in self.model.trainable_variables]

    def on_train_batch_end(self, batch, logs=None):
        moved = [np.abs(v - w).max() for v, w in zip(self.model.trainable_variables, self.before)]
        self.steps.append(max(moved) / float(self.model.optimizer.learning_rate))


def test_on_two_replicas_as_on_one_the_optimizer_restarts_and_new_layers_see_training_batches(
    tmp_path, monkeypatch, two_replicas
):
    """Adam's first steps are no longer than the rate, which they are where moments at 0 meet a count of steps that is not."""
    seen, longest = [], Longest()
    monkeypatch.setattr(experiment, "grow", lambda model, deeper, x: (seen.append(x), grow(model, deeper, x)))
    recipe = dataclasses.replace(SMALL, optimizer="adam", learning_rate=0.001, rate_depth=0, schedule="constant", max_steps=6)
    run(recipe, tmp_path / "one", callbacks=[longest], log=silent)
    assert len(longest.steps) == 6 and 0.9 < longest.steps[4] < 1.01 and longest.steps[5] < 2
    run(recipe, tmp_path / "two", runtime=Runtime(two_replicas), checkpoint_minutes=1e-9, log=silent)
    assert [path.name for path in sorted((tmp_path / "two" / "checkpoints").glob("*.npz"))] == [
        f"step-{step:09d}.npz" for step in (5, 6)
    ]  # 5 is within an epoch
    one, two = ([row["crossentropy"] for row in history_of(tmp_path / name)] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-3)

    data = load_data("digits")
    names = ("batch_size", "augment", "seed", "padding", "crop_border", "cutout")
    settings = BatchSettings(**{name: getattr(recipe, name) for name in names})
    (batch, _), *_ = training_batches(data.train, settings, 0, 1)
    for images in seen:  # of all classes, in the order of training
        np.testing.assert_array_equal(images, batch[:512])
