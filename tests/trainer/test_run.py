"""Runs in this process: their files, and that the loop computes what a plain Keras loop does."""

import dataclasses
import gc
import json
import re
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from small_runs import RECIPE, silent
from tensorflow.python.framework.func_graph import FuncGraph

from ortho_keras import orthonormality_error
from ortho_keras.diagnosis.monitor import read_signals
from ortho_keras.trainer import loop, progress, runtime
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer.build import build_model, compiled_model, make_optimizer
from ortho_keras.trainer.data import load_data, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.recipe import OPTIMIZERS
from ortho_keras.trainer.result import by_class, hardware
from ortho_keras.trainer.run import run
from ortho_keras.trainer.steps import score_function


def test_result_history_log_and_summaries(finished):
    workdir, result, lines = finished
    assert result == json.loads((workdir / "result.json").read_text())
    assert result["recipe"] == RECIPE.to_json() and result["recipe_name"] == "digits" and result["seed"] == 0
    assert result["steps"] == 4 * (1293 // 128) and result["test_mirrored_accuracy"] is None
    assert result["test_accuracy"] > 0.5 and result["validation_accuracy"] > 0.5
    assert result["versions"]["tensorflow"] == tf.__version__ and result["seconds"] > 0 and result["images_per_second"] > 0
    convolutions = [f"stage{stage}_conv{conv:02d}" for stage in (1, 2, 3) for conv in (1, 2)]
    assert list(result["orthonormality_error"]) == [f"{name}/kernel" for name in ("stem_conv", *convolutions, "classifier")]
    device = result["device"] | {"cpu_cores": 2, "processor": "Abacus 3"}
    assert hardware(device) == "2 core(s) of Abacus 3" and hardware(device | {"type": ["G", "G"]}) == "G, G"

    history = json.loads((workdir / "history.json").read_text())
    assert [row["epoch"] for row in history] == [1, 2, 3, 4]
    assert [row["epoch"] for row in history if "validation_accuracy" in row] == [3, 4]
    assert all(row["loss"] == pytest.approx(row["crossentropy"] + row["penalty"]) for row in history)
    shown = [line for line in lines if line.startswith("epoch ")]
    assert len(shown) == 4 and all("images/s" in line and "penalty" in line for line in shown)
    unexpected = ("step ", "evaluated ", "tracing ")  # of long runs
    assert not any(line.startswith(unexpected) or "is slow here" in line for line in lines)
    with Image.open(workdir / "curves.png") as picture:
        colors = np.asarray(picture.convert("RGB")).reshape(-1, 3)
        assert picture.size[0] > 900 and len(np.unique(colors, axis=0)) > 50
    (log,) = (workdir / "tensorboard").glob("events.*")
    events = [tf.compat.v1.Event.FromString(record.numpy()) for record in tf.data.TFRecordDataset(str(log))]
    tags = {value.tag for event in events for value in event.summary.value}
    assert {"crossentropy", "penalty", "accuracy", "validation/accuracy", "learning_rate"} <= tags


def test_final_model_reproduces_the_reported_metrics(finished):
    workdir, result, _ = finished
    test = load_data("digits").test
    model = keras.models.load_model(workdir / "final.keras", safe_mode=True)
    logits = np.float64(model.predict(test.images.astype("float32"), verbose=0))
    assert np.mean(logits.argmax(-1) == test.labels) == pytest.approx(result["test_accuracy"], abs=1e-9)
    matrix = np.zeros((10, 10), int)
    np.add.at(matrix, (test.labels, logits.argmax(-1)), 1)
    assert result["test_confusion_matrix"] == matrix.tolist() and result["class_names"] == [str(digit) for digit in range(10)]
    assert result["test_accuracy_by_class"] == dict(zip(result["class_names"], matrix.diagonal() / matrix.sum(1)))
    log_sums = np.log(np.exp(logits).sum(-1))
    crossentropy = np.mean(log_sums - logits[np.arange(len(test)), test.labels])
    assert crossentropy == pytest.approx(result["test_crossentropy"], rel=1e-4)
    assert float(sum(model.losses)) == pytest.approx(result["penalty"], rel=1e-5)
    for path, error in result["orthonormality_error"].items():
        assert orthonormality_error(model.get_layer(path.split("/")[0]).kernel) == pytest.approx(error, rel=1e-5)


def test_the_signal_is_measured_and_nothing_else_changes(tmp_path, finished):
    lines = []
    result = run(RECIPE, tmp_path / "run", name="digits", signal_every=25, log=lines.append)
    metrics = ("test_accuracy", "validation_accuracy", "test_crossentropy", "training_accuracy", "penalty")
    assert [result[name] for name in metrics] == [finished[1][name] for name in metrics]
    assert {row["step"] for row in read_signals(tmp_path / "run" / "signals.csv")} == {0, 25, 40}
    with Image.open(tmp_path / "run" / "signals.png") as picture:
        assert picture.size[0] > 900
    assert sum("signals.csv and signals.png took" in line for line in lines) == 1


def test_a_slow_precision_is_logged_and_a_run_may_hold_out_no_images(tmp_path, monkeypatch, finished):
    asked, lines = [], []
    monkeypatch.setattr(experiment, "slowdown", lambda dtype: asked.append(dtype) or 7.6)
    recipe = dataclasses.replace(RECIPE, precision="mixed_bfloat16", max_steps=1, hold_out=False, modulation="off")
    result = run(recipe, tmp_path, log=lines.append)
    assert asked == ["bfloat16"]
    expected = (
        "--precision=mixed_bfloat16 is slow here: a convolution's gradients take 8 times as long as in --precision=float32"
    )
    assert [line for line in lines if "is slow here" in line] == [expected]
    assert result["validation_accuracy"] is None and any("1437 training, 0 validation and 360 test" in line for line in lines)
    assert result["data_sha256"] == finished[1]["data_sha256"] == load_data("digits").fingerprint
    (row,) = json.loads((tmp_path / "history.json").read_text())
    assert not any(name.startswith("validation") for name in row)


def test_slowdown_is_the_ratio_of_the_shortest_times(monkeypatch):
    durations = [9, 5, 3, 6, 8, 2, 4, 7]  # four times in the type, then four in float32
    clock = iter(np.cumsum([value for duration in durations for value in (1, duration)]))
    monkeypatch.setattr(runtime, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    assert runtime.slowdown("bfloat16") == 3 / 2


@pytest.mark.gpu
@pytest.mark.parametrize(("regularizer", "smoothing", "every"), [("orthonormal", 0.0, 2), ("l2", 0.2, 0)])
def test_training_step_equals_a_plain_loop(tmp_path, regularizer, smoothing, every):
    recipe = dataclasses.replace(
        RECIPE,
        regularizer=regularizer,
        factor=0.1,
        penalty_every=every,
        label_smoothing=smoothing,
        crop_border=2,
        cutout=3,
        max_steps=3,
        bn_batches=0,
        schedule="constant",
    )
    data = load_data("digits")
    model, total_steps = compiled_model(recipe, data)
    plain, _ = compiled_model(recipe, data)
    plain.set_weights(model.get_weights())
    trainer = Trainer(model, recipe, data, tmp_path, total_steps, log=silent)
    (row,) = trainer.run()
    crossentropies, smoothed = [], []
    penalties = [every or 1, 0 if every else 1, every or 1]  # with `every` 2, the second step has none
    for (images, labels), times in zip(training_batches(data.train, trainer.settings, 0, 3), penalties):
        with tf.GradientTape() as tape:
            logits = plain(images, training=True)
            targets = (1 - smoothing) * tf.one_hot(labels, 10) + smoothing / 10
            losses = -tf.reduce_sum(targets * tf.math.log(tf.nn.softmax(logits)), -1)
            smoothed.append(float(tf.reduce_mean(losses)))
            crossentropies.append(-np.mean(np.log(tf.nn.softmax(logits).numpy()[range(len(labels)), labels])))
            penalty = sum(plain.losses)
            loss = tf.reduce_mean(losses) + times * penalty
        gradients = tape.gradient(loss, plain.trainable_variables)
        plain.optimizer.apply(gradients, plain.trainable_variables)
    assert row["crossentropy"] == pytest.approx(np.mean(crossentropies), rel=1e-4)
    assert row["penalty"] == pytest.approx(float(penalty), rel=1e-4)
    assert row["loss"] - row["penalty"] == pytest.approx(np.mean(smoothed), rel=1e-4)
    for mine, expected in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)


def test_l2_factor_is_that_of_weight_decay():
    model = build_model(dataclasses.replace(RECIPE, regularizer="l2", factor=0.3, modulation="off"), load_data("digits"))
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    expected = 0.3 / 2 * sum(np.sum(np.square(kernel, dtype=np.float64)) for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_lowers_the_loss(name):
    rate = {"adadelta": 20.0, "adagrad": 0.05, "sgd": 0.1, "nesterov": 0.1, "muon": 0.1}.get(name, 0.01)
    optimizer = make_optimizer(dataclasses.replace(RECIPE, optimizer=name, learning_rate=rate, schedule="cosine"), 30)
    variable = keras.Variable(np.ones(3, "float32"))
    for _ in range(30):
        optimizer.apply([2 * variable.value], [variable])
    assert float(tf.reduce_sum(tf.square(variable.value))) < 0.9 * 3


def test_callbacks_are_called_as_fit_does_and_the_files_grow_by_the_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "DRAW_EVERY", -1.0)
    monkeypatch.setattr(loop, "DEEP", 8)
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    calls, rows, lines = [], [], []

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
            rows.append((len(json.loads((tmp_path / "history.json").read_text())), (tmp_path / "curves.png").exists()))

    recipe = dataclasses.replace(RECIPE, batch_size=640, evaluate_every=1)
    assert run(recipe, tmp_path, callbacks=[Recorder()], log=lines.append)["steps"] == 4
    assert calls == [
        ("begin", "plain8"),
        *[("epoch", 0), ("batch", 0, True), ("batch", 1, True), ("end", 0, True)],
        *[("epoch", 1), ("batch", 2, True), ("batch", 3, True), ("end", 1, True)],
    ]
    assert rows == [(1, True), (2, True)]
    assert lines[3] == "each call of the graph takes one step, not several, because of callbacks at each step: Recorder"
    assert re.fullmatch(r"tracing the first step \(about \d+ s for 8 layers\)", lines[4])
    values = r"step {} of 8 - loss [\d.]+ - accuracy [\d.]+{} - crossentropy [\d.]+ - penalty [\d.e-]+{}"
    rest = r" - images/s [\d.e+]+", r" - about \d:\d\d:\d\d left"
    for line, expected in zip(lines[5:7], (values.format(1, "", ""), values.format(2, *rest))):  # the first step traces
        assert re.fullmatch(expected, line)
    assert lines[7].startswith("tracing the evaluation (about ")
    assert lines[8] == "evaluated 144 of 144 images" and lines[-1] == "evaluated 360 of 360 images"


def test_a_bar_is_shown_on_a_terminal_and_after_a_while_only(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    now, lines, machine = [0.0], [], runtime.Runtime(tf.distribute.get_strategy())
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    bar = progress.Progress(machine, lines.append, 100, quiet=3.0)
    values = [("loss", 2.3), ("accuracy", 0.1), ("images/s", 4692.1234)]
    for now[0], done, columns in ((2.0, 40, 80), (4.0, 70, 80), (5.0, 100, 120)):
        monkeypatch.setenv("COLUMNS", str(columns))
        bar.update(done, "a line", values)
        shown = re.sub(r"\x1b\[\d+m", "", capsys.readouterr().out)
        assert (f"{done}/100" in shown and "accuracy: " in shown) == (done > 40)
        assert ("images/s" in shown) == (done == 100) and len(shown.rpartition("\r")[2]) < columns
    assert lines == [] and shown.endswith("\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    log = progress.Progress(machine, lines.append, 100)
    for now[0], done in ((34.0, 10), (36.0, 20), (60.0, 30), (67.0, 40)):
        log.update(done, f"{done} of 100")
    assert lines == ["20 of 100", "40 of 100"] and capsys.readouterr().out == ""


def test_a_run_leaves_no_graph_behind(tmp_path):
    """TensorFlow registers each traced custom gradient for good, and with it its graph."""

    def graphs():
        keras.backend.clear_session()
        gc.collect()
        return sum(isinstance(one, FuncGraph) for one in gc.get_objects())

    before = graphs()
    run(dataclasses.replace(RECIPE, width=2, max_steps=1), tmp_path, log=silent)
    assert graphs() == before


def test_mirror_images_by_hand():
    """Logits `(a, 2b)` for pixels `a, b`; with the mirror image's `(b, 2a)` the second class always wins."""
    model = keras.Sequential([keras.layers.Input((1, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(2, use_bias=False)])
    model.layers[-1].kernel.assign([[1.0, 0.0], [0.0, 2.0]])
    images = np.float32([[5, 1], [1, 1], [1, 5], [5, 1]])[:, None, :, None]
    score = score_function(model, runtime.Runtime(tf.distribute.get_strategy()), mirrored=True, confusion=True)
    _, alone, _, weight, *matrix, both = score(images, np.int64([1, 1, 0, 1]), np.float32([2, 1, 1, 0])).numpy()
    assert (alone, both, weight) == (1, 3, 4) and matrix == [0, 1, 2, 1]


def test_results_by_class_without_images_and_of_many_classes():
    few = by_class("abc", np.array([[2, 2, 0], [0, 0, 0], [0, 0, 1]]))
    assert few["test_accuracy_by_class"] == {"a": 0.5, "b": None, "c": 1.0} and few["test_confusion_matrix"][0] == [2, 2, 0]
    assert by_class([*map(str, range(101))], np.eye(101, dtype=int))["test_confusion_matrix"] is None
