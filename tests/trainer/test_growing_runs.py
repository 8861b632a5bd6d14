"""Runs that grow: the same wherever they are stopped, on any number of replicas; callbacks see the net that trains."""

import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from PIL import Image
from test_run import RECIPE as SHALLOW
from test_run import StopAt

from ortho_keras import ErrorModulation, grow
from ortho_keras.diagnosis import monitor as callbacks
from ortho_keras.diagnosis.monitor import read_signals
from ortho_keras.method.errors import Interrupted
from ortho_keras.method.state import steps_taken
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer.run import run
from ortho_keras.trainer.runtime import Runtime

RECIPE = dataclasses.replace(
    SHALLOW,
    modulation="off",
    width=4,
    start_depth=8,
    grow_epoch=2,
    depth=20,
    epochs=4,
    batch_size=128,
    learning_rate=0.02,
    rate_depth=44,
)


@pytest.mark.parametrize(
    ("precision", "modulation", "relu_shift", "stops"),
    [("float32", "anchor", -1.0, (3, 18, 27)), ("mixed_float16", "off", 1.0, (13, 22))],
)
def test_a_growing_run_and_one_stopped_in_both_nets_are_the_same(tmp_path, precision, modulation, relu_shift, stops):
    recipe = dataclasses.replace(RECIPE, precision=precision, modulation=modulation, relu_shift=relu_shift)
    finals, histories = [], []
    for name, points in (("whole", ()), ("stopped", stops)):  # 18 is seen in step 20, after which it grows
        lines = []
        for step in points:
            with pytest.raises(Interrupted, match=f"stopped after step {step + 2} of 40"):
                run(recipe, tmp_path / name, callbacks=[StopAt(step, False)], log=lines.append)
        result = run(recipe, tmp_path / name, log=lines.append)
        assert lines.count("plain8 has become plain20") == 1 and not any("cannot be used" in line for line in lines)
        finals.append(keras.models.load_model(tmp_path / name / "final.keras"))
        histories.append(json.loads((tmp_path / name / "history.json").read_text()))
    for mine, expected in zip(*(final.get_weights() for final in finals), strict=True):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)
    for row, expected in zip(*histories, strict=True):
        assert row["accuracy"] == pytest.approx(expected["accuracy"], abs=1e-6)
    history = histories[0]
    assert [row["step"] for row in history] == [10, 20, 30, 40] and result["steps"] == 40
    # Half a cosine over all steps, at the rate of each depth: 0.02 * 44 / 8, then 0.02 * 44 / 20.
    share = [0.5 * (1 + np.cos(np.pi * step / 40)) for step in (10, 20, 30, 40)]
    rates = np.array([5.5, 5.5, 2.2, 2.2]) * 0.02 * share
    np.testing.assert_allclose([row["learning_rate"] for row in history], rates, rtol=1e-5, atol=1e-9)
    assert sum(isinstance(layer, layers.Conv2D) for layer in finals[0].layers) == 19
    assert history[2]["crossentropy"] < history[1]["crossentropy"]  # nothing was lost


def test_a_run_that_ends_early_still_gives_the_net_that_was_asked_for(tmp_path):
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    result = run(RECIPE, tmp_path, callbacks=[Stop()], log=lambda line: None)
    assert result["steps"] == 10
    final = keras.models.load_model(tmp_path / "final.keras")
    assert final.name == "plain20"
    kernels = [layer.kernel for layer in final.layers if isinstance(layer, layers.Conv2D)]
    ones = [tf.reduce_sum(tf.abs(kernel)) == kernel.shape[-1] for kernel in kernels]
    assert sum(bool(one) for one in ones) == 12


def test_callbacks_see_the_net_that_trains(tmp_path, monkeypatch):
    seen, maps = [], []
    monkeypatch.setattr(callbacks, "plot_heat_map", lambda steps, names, *rest: maps.append((steps, names)))

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            enabled = {layer.enabled for layer in self.model.layers if isinstance(layer, ErrorModulation)}
            seen.append((self.model.name, steps_taken(self.model), enabled))

    recipe = dataclasses.replace(RECIPE, modulation="anchor", modulation_steps=15)
    run(recipe, tmp_path, callbacks=[Watch()], signal_every=15, log=lambda line: None)
    assert seen == [("plain8", 10, {True}), ("plain8", 20, {False}), ("plain20", 30, {False}), ("plain20", 40, {False})]
    rows = read_signals(tmp_path / "signals.csv")
    names = {step: [row["name"] for row in rows if row["step"] == step] for step in {row["step"] for row in rows}}
    assert {step: len(of_step) for step, of_step in names.items()} == {0: 8, 15: 8, 20: 20, 35: 20, 40: 20}
    assert all(of_step[0] == "stem_conv" and of_step[-1] == "classifier" for of_step in names.values())
    assert [steps for steps, _ in maps] == [[0, 15, 20], [0, 15, 20, 35, 40]]
    assert maps[0][1] == names[15] and maps[1][1] == names[40]  # in the order of the net as it is then


def test_adam_begins_anew_where_the_net_has_grown(tmp_path):
    """Its first steps are no longer than the rate, which they are where moments at 0 meet a count of steps that is not."""
    longest = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            self.before = self.model.get_weights()

        def on_train_batch_end(self, batch, logs=None):
            moved = [np.abs(v - w).max() for v, w in zip(self.model.trainable_variables, self.trainable_before())]
            longest.append(max(moved) / float(self.model.optimizer.learning_rate))

        def trainable_before(self):
            return [w for v, w in zip(self.model.weights, self.before) if any(v is t for t in self.model.trainable_variables)]

    recipe = dataclasses.replace(RECIPE, optimizer="adam", learning_rate=0.001, rate_depth=0, schedule="constant", max_steps=30)
    run(dataclasses.replace(recipe, epochs=3), tmp_path, callbacks=[Watch()], log=lambda line: None)
    assert len(longest) == 30 and 0.9 < longest[20] < 1.01 and max(longest[20:]) < 2


def test_the_new_layers_see_images_of_all_classes(tmp_path, monkeypatch):
    """A folder's images are in the order of its classes."""
    seen = []
    monkeypatch.setattr(experiment, "grow", lambda model, deeper, x: (seen.append(x), grow(model, deeper, x)))
    rng = np.random.default_rng(0)
    for label, level in enumerate((40, 120, 200)):
        folder = tmp_path / "data" / str(label)
        folder.mkdir(parents=True)
        for number in range(60):
            pixels = np.clip(rng.normal(level, 30, size=(8, 8)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(folder / f"{number}.png")
    recipe = dataclasses.replace(RECIPE, dataset=f"folder:{tmp_path / 'data'}", augment="none", batch_size=16)
    run(recipe, tmp_path / "run", log=lambda line: None)
    (images,) = seen
    classes = np.bincount(np.digitize(images.mean((1, 2, 3)), [80, 160]), minlength=3)
    assert len(images) == 144 and classes.min() > 30  # the first epoch's nine batches of 146 images


def test_a_run_grows_on_two_replicas_as_on_one(tmp_path, two_replicas):
    recipe = dataclasses.replace(RECIPE, depth=14, grow_epoch=1, epochs=2)
    for name, runtime in (("one", Runtime()), ("two", Runtime(two_replicas))):
        run(recipe, tmp_path / name, runtime=runtime, log=lambda line: None)
    one, two = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("one", "two"))
    for mine, expected in zip(one, two, strict=True):
        assert mine["crossentropy"] == pytest.approx(expected["crossentropy"], rel=1e-3)


def test_a_damaged_checkpoint_of_the_deep_net_gives_way_to_the_shallow_one(tmp_path):
    with pytest.raises(Interrupted):
        run(RECIPE, tmp_path, callbacks=[StopAt(22, False)], keep_checkpoints=1, log=lambda line: None)
    (newest,) = (tmp_path / "checkpoints").glob("*.npz")
    newest.write_bytes(newest.read_bytes()[:1000])
    lines = []
    result = run(RECIPE, tmp_path, log=lines.append)
    assert sum("cannot be used" in line for line in lines) == 1 and "plain8 has become plain20" in lines
    assert "resuming after step 20 of 40" in lines and result["steps"] == 40
