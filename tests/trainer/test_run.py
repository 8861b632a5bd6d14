"""A whole run in this process: what it leaves behind, and that the loop computes what a plain Keras loop computes."""

import dataclasses
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from ortho_keras import orthonormality_error
from ortho_keras.diagnosis.monitor import read_signals
from ortho_keras.method.errors import Interrupted
from ortho_keras.trainer import loop as training
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer import runtime
from ortho_keras.trainer.build import build_model, compiled_model, make_optimizer
from ortho_keras.trainer.data import BatchSettings, load_data, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.recipe import OPTIMIZERS
from ortho_keras.trainer.recipes import find_preset
from ortho_keras.trainer.result import hardware
from ortho_keras.trainer.run import run
from ortho_keras.trainer.steps import score_function

RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    depth=8,
    epochs=8,
    batch_size=64,
    learning_rate=0.05,
    rate_depth=0,
    modulation="anchor",
    warmup_steps=0,
    evaluate_every=3,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    lines = []
    result = run(RECIPE, workdir, name="digits", log=lines.append)
    return workdir, result, lines


def test_result_says_what_was_run_and_what_came_out(finished):
    workdir, result, _ = finished
    assert result == json.loads((workdir / "result.json").read_text())
    assert result["recipe"] == RECIPE.to_json() and result["recipe_name"] == "digits" and result["seed"] == 0
    assert result["steps"] == 8 * (1293 // 64) and result["test_mirrored_accuracy"] is None
    assert result["test_accuracy"] > 0.9 and result["validation_accuracy"] > 0.9
    assert result["versions"]["tensorflow"] == tf.__version__ and result["device"]["cpu_cores"] >= 1
    assert result["seconds"] > 0 and result["images_per_second"] > 0
    assert list(result["orthonormality_error"]) == [
        "stem_conv/kernel",
        *[f"stage{stage}_conv{conv:02d}/kernel" for stage in (1, 2, 3) for conv in (1, 2)],
        "classifier/kernel",
    ]


def test_final_model_reproduces_the_reported_figures(finished):
    workdir, result, _ = finished
    test = load_data("digits").test
    model = keras.models.load_model(workdir / "final.keras", safe_mode=True)
    logits = model.predict(test.images.astype("float32"), verbose=0)
    assert np.mean(logits.argmax(-1) == test.labels) == pytest.approx(result["test_accuracy"], abs=1e-9)
    shifted = logits.astype("float64") - logits.max(-1, keepdims=True)
    log_likelihood = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    crossentropy = -np.mean(log_likelihood[np.arange(len(test)), test.labels])
    assert crossentropy == pytest.approx(result["test_crossentropy"], rel=1e-4)
    assert float(sum(model.losses)) == pytest.approx(result["penalty"], rel=1e-5)
    for path, error in result["orthonormality_error"].items():
        assert orthonormality_error(model.get_layer(path.split("/")[0]).kernel) == pytest.approx(error, rel=1e-5)


def test_final_model_needs_nothing_but_the_import(finished):
    workdir, _, _ = finished
    script = (
        "import keras, ortho_keras, sys\n"
        "model = keras.models.load_model(sys.argv[1])\n"
        "print(len([layer for layer in model.layers if isinstance(layer, ortho_keras.ErrorModulation)]))"
    )
    done = subprocess.run([sys.executable, "-c", script, workdir / "final.keras"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "7", done.stderr


def test_history_and_log(finished):
    workdir, _, lines = finished
    history = json.loads((workdir / "history.json").read_text())
    assert [row["epoch"] for row in history] == list(range(1, 9))
    assert [row["epoch"] for row in history if "validation_accuracy" in row] == [3, 6, 8]
    for row in history:
        assert row["loss"] == pytest.approx(row["crossentropy"] + row["penalty"])
    shown = [line for line in lines if line.startswith("epoch ")]
    assert len(shown) == 8 and all("images/s" in line and "penalty" in line for line in shown)


@pytest.mark.parametrize(
    ("precision", "times", "jit", "asks", "told"),
    [
        ("mixed_bfloat16", 7.6, False, 1, 1),
        ("mixed_bfloat16", 1.9, False, 1, 0),
        ("mixed_bfloat16", 7.6, True, 0, 0),
        ("float32", 7.6, False, 0, 0),
    ],
)
def test_a_slow_precision_is_told(tmp_path, monkeypatch, precision, times, jit, asks, told):
    asked = []
    monkeypatch.setattr(experiment, "slowdown", lambda dtype: asked.append(dtype) or times)
    lines = []
    recipe = dataclasses.replace(RECIPE, precision=precision, width=2, max_steps=1, bn_batches=1)
    run(recipe, tmp_path, runtime=runtime.Runtime(jit_compile=jit), log=lines.append)
    assert asked == asks * ["bfloat16"]
    shown = [line for line in lines if "is slow here" in line]
    assert shown == told * [
        "--precision=mixed_bfloat16 is slow here: a convolution's gradients take 8 times as long as in --precision=float32"
    ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_slowdown_is_the_ratio_of_the_shortest_times(monkeypatch, dtype):
    durations = [9, 5, 3, 6, 8, 2, 4, 7]  # four times in the type, then four in float32
    clock = iter(np.cumsum([value for duration in durations for value in (1, duration)]))
    monkeypatch.setattr(runtime, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert runtime.slowdown(dtype) == 3 / 2


def test_the_pace_is_told_once_where_an_epoch_is_long(tmp_path, monkeypatch, finished):
    assert not any("s a step" in line for line in finished[2])
    monkeypatch.setattr(training, "PACE_AFTER", 0.0)
    lines = []
    run(dataclasses.replace(RECIPE, epochs=2, bn_batches=1), tmp_path, log=lines.append)
    (shown,) = [line for line in lines if "s a step" in line]
    seconds, left, hours, minutes, rest = re.fullmatch(
        r"(.+) s a step: the (\d+) steps that are left take about (\d+):(\d\d):(\d\d)", shown
    ).groups()
    assert int(left) == 40 - 2  # told after the second step: the first one traces
    about = datetime.timedelta(hours=int(hours), minutes=int(minutes), seconds=int(rest)).total_seconds()
    assert about == pytest.approx(38 * float(seconds), rel=0.01, abs=0.5)


def test_curves_are_a_picture(finished):
    workdir, _, _ = finished
    with Image.open(workdir / "curves.png") as picture:
        colors = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert picture.size[0] > 1000 and len(np.unique(colors, axis=0)) > 50


def test_hardware_is_told_by_what_computed(finished):
    device = finished[1]["device"]
    assert hardware(device | {"type": ["CPU"], "cpu_cores": 2, "processor": "Abacus 3"}) == "2 core(s) of Abacus 3"
    assert hardware(device | {"type": ["Abacus G", "Abacus G"], "cpu_cores": 2}) == "Abacus G, Abacus G"
    assert hardware(device) == f"{device['cpu_cores']} core(s) of {device['processor']}"  # no GPU in these tests


def test_tensorboard_has_loss_and_penalty_apart(finished):
    workdir, _, _ = finished
    (log,) = (workdir / "tensorboard").glob("events.*")
    tags = set()
    for record in tf.data.TFRecordDataset(str(log)):
        event = tf.compat.v1.Event.FromString(record.numpy())
        tags |= {value.tag for value in event.summary.value}
    assert {"crossentropy", "penalty", "accuracy", "validation/accuracy", "learning_rate"} <= tags


@pytest.mark.parametrize(("regularizer", "smoothing"), [("orthonormal", 0.0), ("l2", 0.2), ("none", 0.0)])
def test_training_step_equals_a_plain_loop(tmp_path, regularizer, smoothing):
    recipe = dataclasses.replace(
        RECIPE,
        regularizer=regularizer,
        factor=0.1,
        label_smoothing=smoothing,
        crop_border=2,
        cutout=3,
        max_steps=3,
        bn_batches=0,
        schedule="constant",
    )
    data = load_data("digits")
    model, total_steps = compiled_model(recipe, data)
    by_hand, _ = compiled_model(recipe, data)
    by_hand.set_weights(model.get_weights())
    history = Trainer(model, recipe, data, tmp_path, total_steps, log=lambda line: None).run()
    crossentropies, smoothed = [], []
    settings = BatchSettings(64, recipe.augment, recipe.seed, "symmetric", 2, 3, data.channel_statistics[0])
    for images, labels in training_batches(data.train, settings, 0, 3):
        with tf.GradientTape() as tape:
            logits = by_hand(images, training=True)
            targets = (1 - smoothing) * tf.one_hot(labels, 10) + smoothing / 10
            losses = -tf.reduce_sum(targets * tf.math.log(tf.nn.softmax(logits)), -1)
            smoothed.append(float(tf.reduce_mean(losses)))
            crossentropies.append(-np.mean(np.log(tf.nn.softmax(logits).numpy()[range(64), labels])))
            penalty = sum(by_hand.losses) if by_hand.losses else 0.0
            loss = tf.reduce_mean(losses) + penalty
        gradients = tape.gradient(loss, by_hand.trainable_variables)
        by_hand.optimizer.apply(gradients, by_hand.trainable_variables)
    assert history[0]["crossentropy"] == pytest.approx(np.mean(crossentropies), rel=1e-4)
    assert history[0]["loss"] - history[0]["penalty"] == pytest.approx(np.mean(smoothed), rel=1e-4)
    for mine, expected in zip(model.get_weights(), by_hand.get_weights()):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)


def test_l2_factor_is_that_of_weight_decay():
    data = load_data("digits")
    model = build_model(dataclasses.replace(RECIPE, regularizer="l2", factor=0.3, modulation="off"), data)
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    expected = 0.3 / 2 * sum(np.sum(np.square(kernel, dtype=np.float64)) for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    rate = {"adadelta": 20.0, "adagrad": 0.05, "sgd": 0.1, "nesterov": 0.1, "muon": 0.1}.get(name, 0.01)
    optimizer = make_optimizer(dataclasses.replace(RECIPE, optimizer=name, learning_rate=rate, schedule="cosine"), 30)
    variable = keras.Variable(np.ones(3, "float32"))
    before = float(tf.reduce_sum(tf.square(variable.value)))
    for _ in range(30):
        optimizer.apply([2 * variable.value], [variable])
    assert float(tf.reduce_sum(tf.square(variable.value))) < 0.9 * before


def test_callbacks_are_called_as_fit_does(tmp_path):
    calls = []

    class Recorder(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            calls.append(("begin", self.model.name))

        def on_epoch_begin(self, epoch, logs=None):
            calls.append(("epoch", epoch))

        def on_train_batch_end(self, batch, logs=None):
            calls.append(("batch", batch, np.isfinite(logs["loss"])))

        def on_epoch_end(self, epoch, logs=None):
            calls.append(("end", epoch, "validation_accuracy" in logs))
            self.model.stop_training = epoch == 1

    recipe = dataclasses.replace(RECIPE, batch_size=640, evaluate_every=1)
    result = run(recipe, tmp_path / "run", callbacks=[Recorder()], log=lambda line: None)
    assert calls == [
        ("begin", "plain8"),
        *[("epoch", 0), ("batch", 0, True), ("batch", 1, True), ("end", 0, True)],
        *[("epoch", 1), ("batch", 2, True), ("batch", 3, True), ("end", 1, True)],
    ]
    assert result["steps"] == 4


class StopAt(keras.callbacks.Callback):
    """Ends the run within a step's end: by a signal, which leaves a checkpoint at the next step, or hard, which leaves none."""

    def __init__(self, step, hard):
        super().__init__()
        self.step, self.hard = step, hard

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            if self.hard:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize(("optimizer", "precision"), [("sgd", "float32"), ("adamw", "mixed_float16")])
def test_a_run_stopped_at_any_points_equals_one_that_was_not(tmp_path, optimizer, precision):
    recipe = dataclasses.replace(
        RECIPE, width=4, optimizer=optimizer, precision=precision, learning_rate=0.002, batch_size=128, epochs=4, image_size=0
    )
    weights, states = [], []
    points = np.random.default_rng(len(precision)).choice(np.arange(2, 36, 4), 3, replace=False)
    for name, stops in (("whole", []), ("stopped", sorted(points))):
        workdir = tmp_path / name
        for index, step in enumerate(stops):
            with pytest.raises((KeyboardInterrupt, Interrupted)):
                run(recipe, workdir, callbacks=[StopAt(step, index == 1)], log=lambda line: None)
        run(recipe, workdir, keep_checkpoints=3, log=lambda line: None)
        weights.append(keras.models.load_model(workdir / "final.keras").get_weights())
        newest = sorted((workdir / "checkpoints").glob("*.npz"))
        assert len(newest) == 3
        with np.load(newest[-1]) as file:
            states.append([file[key] for key in sorted(file.files) if key != "history"])
    for mine, expected in zip(*weights):
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-6)
    assert len(states[0]) == len(states[1])
    for mine, expected in zip(*states):  # the optimizer's slots and the loss scale too
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)


def test_a_stop_at_an_epochs_last_step_keeps_the_epoch(tmp_path):
    recipe = dataclasses.replace(RECIPE, width=4, learning_rate=0.002, batch_size=128, epochs=3, evaluate_every=1)
    for name, stops in (("whole", []), ("stopped", [8])):  # noticed in the tenth step, the epoch's last
        for step in stops:
            with pytest.raises(Interrupted, match="stopped after step 10 of 30"):
                run(recipe, tmp_path / name, callbacks=[StopAt(step, False)], log=lambda line: None)
        run(recipe, tmp_path / name, log=lambda line: None)
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("whole", "stopped")]
    for expected, row in zip(*histories, strict=True):
        for key in expected.keys() - {"seconds", "images/s"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-4)


def test_a_run_that_mirrors_images_is_also_judged_by_both_views(tmp_path):
    result = run(dataclasses.replace(RECIPE, augment="crop_flip", crop_border=1, epochs=2), tmp_path, log=lambda line: None)
    test, model = load_data("digits").test, keras.models.load_model(tmp_path / "final.keras")
    views = [np.float64(model.predict(view.astype("float32"), verbose=0)) for view in (test.images, test.images[:, :, ::-1])]
    alone, both = ((logits.argmax(-1) == test.labels).mean() for logits in (views[0], sum(views)))
    assert result["test_accuracy"] == pytest.approx(alone) and result["test_mirrored_accuracy"] == pytest.approx(both)


def test_mirror_images_by_hand():
    """Logits `(a, 2b)` for pixels `a, b`; with the mirror image's `(b, 2a)` the second class always wins."""
    model = keras.Sequential([keras.layers.Input((1, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(2, use_bias=False)])
    model.layers[-1].kernel.assign([[1.0, 0.0], [0.0, 2.0]])
    images = np.float32([[5, 1], [1, 1], [1, 5], [5, 1]])[:, None, :, None]
    score = score_function(model, runtime.Runtime(tf.distribute.get_strategy()), mirrored=True)
    _, alone, _, weight, both = score(images, np.int64([1, 1, 0, 1]), np.float32([1, 1, 1, 0])).numpy()
    assert (alone, both, weight) == (1, 2, 3)


def test_a_run_without_held_out_images(tmp_path, finished):
    lines = []
    result = run(dataclasses.replace(RECIPE, hold_out=False, epochs=2), tmp_path / "run", log=lines.append)
    assert result["validation_accuracy"] is None and result["steps"] == 2 * (1437 // 64) and result["test_accuracy"] > 0.2
    assert result["data_sha256"] == finished[1]["data_sha256"] == load_data("digits").fingerprint
    history = json.loads((tmp_path / "run" / "history.json").read_text())
    assert len(history) == 2 and not any(name.startswith("validation") for row in history for name in row)
    assert any("1437 training, 0 validation and 360 test images" in line for line in lines)
    assert (tmp_path / "run" / "curves.png").exists()


def test_the_signal_is_watched_and_nothing_else_changes(tmp_path, finished):
    lines = []
    result = run(RECIPE, tmp_path / "run", name="digits", signal_every=50, log=lines.append)
    figures = ("test_accuracy", "validation_accuracy", "test_crossentropy", "training_accuracy", "penalty")
    assert [result[name] for name in figures] == [finished[1][name] for name in figures]
    steps = {row["step"] for row in read_signals(tmp_path / "run" / "signals.csv")}
    assert {0, result["steps"]} <= steps
    with Image.open(tmp_path / "run" / "signals.png") as picture:
        assert picture.size[0] > 1000
    assert sum("signals.csv and signals.png took" in line for line in lines) == 1
