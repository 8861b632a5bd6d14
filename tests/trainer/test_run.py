"""Runs in this process: their files, that the loop computes what a plain Keras loop does, and that a stop changes nothing."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import types

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_lines import invoke
from PIL import Image

from ortho_keras import load_model, orthonormality_error, plain_cnn, plain_imagenet
from ortho_keras.diagnosis.monitor import read_signals
from ortho_keras.method.errors import InputError, Interrupted
from ortho_keras.method.files import only_one
from ortho_keras.trainer import loop, progress, runtime
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer.build import build_model, compiled_model, make_optimizer
from ortho_keras.trainer.data import load_data, training_batches
from ortho_keras.trainer.loop import Trainer
from ortho_keras.trainer.recipe import OPTIMIZERS
from ortho_keras.trainer.recipes import find_preset
from ortho_keras.trainer.result import by_class, hardware
from ortho_keras.trainer.run import run
from ortho_keras.trainer.steps import score_function

RECIPE = dataclasses.replace(
    find_preset("digits").recipe,
    image_size=0,
    depth=8,
    width=4,
    epochs=4,
    batch_size=128,
    learning_rate=0.05,
    rate_depth=0,
    warmup_steps=0,
    bn_batches=2,
    modulation="anchor",
    evaluate_every=3,
)


def silent(line):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    lines = []

    def log(line):
        lines.append(line)
        for step in re.findall("^epoch .* step (\\d+) ", line):  # whose checkpoint is written first
            assert (workdir / "checkpoints" / f"step-{int(step):09d}.npz").exists()

    return workdir, run(RECIPE, workdir, name="digits", log=log), lines


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


def test_a_damaged_finished_run_is_named_and_evaluates_again(tmp_path, finished, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir, ignore=shutil.ignore_patterns("tensorboard"))
    result, lines = workdir / "result.json", []
    again = "delete its result.json, and the same command evaluates the last checkpoint again, or give another --workdir"
    for content in ("", "[]", "{}", result.read_text()[:200], result.read_text().replace('"steps": 40', '"steps": "40"')):
        result.write_text(content)
        with pytest.raises(InputError, match=f"{again}. Received: '{result}'"):
            run(RECIPE, workdir, log=lines.append)
    assert lines == []
    shutil.copy(finished[0] / "result.json", result)
    model = (workdir / "final.keras").read_bytes()
    (workdir / "final.keras").write_bytes(model[: len(model) // 2])
    status, _, err = invoke(
        capsys, f"--recipe_file={workdir}/run.json", f"--workdir={workdir}", f"--export={tmp_path}/net.keras"
    )
    assert status == 2 and err.count("\n") == 1 and again in err and str(workdir / "final.keras") in err
    result.unlink()
    assert run(RECIPE, workdir, log=lines.append)["test_accuracy"] == finished[1]["test_accuracy"]
    assert "resuming after step 40 of 40" in lines and not any(line.startswith("epoch ") for line in lines)
    assert load_model(workdir / "final.keras").count_params() == finished[1]["parameters"]


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


@pytest.mark.parametrize(("regularizer", "smoothing"), [("orthonormal", 0.0), ("l2", 0.2)])
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
    plain, _ = compiled_model(recipe, data)
    plain.set_weights(model.get_weights())
    trainer = Trainer(model, recipe, data, tmp_path, total_steps, log=silent)
    (row,) = trainer.run()
    crossentropies, smoothed = [], []
    for images, labels in training_batches(data.train, trainer.settings, 0, 3):
        with tf.GradientTape() as tape:
            logits = plain(images, training=True)
            targets = (1 - smoothing) * tf.one_hot(labels, 10) + smoothing / 10
            losses = -tf.reduce_sum(targets * tf.math.log(tf.nn.softmax(logits)), -1)
            smoothed.append(float(tf.reduce_mean(losses)))
            crossentropies.append(-np.mean(np.log(tf.nn.softmax(logits).numpy()[range(len(labels)), labels])))
            loss = tf.reduce_mean(losses) + sum(plain.losses)
        gradients = tape.gradient(loss, plain.trainable_variables)
        plain.optimizer.apply(gradients, plain.trainable_variables)
    assert row["crossentropy"] == pytest.approx(np.mean(crossentropies), rel=1e-4)
    assert row["loss"] - row["penalty"] == pytest.approx(np.mean(smoothed), rel=1e-4)
    for mine, expected in zip(model.get_weights(), plain.get_weights()):
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)


def test_l2_factor_is_that_of_weight_decay():
    model = build_model(dataclasses.replace(RECIPE, regularizer="l2", factor=0.3, modulation="off"), load_data("digits"))
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    expected = 0.3 / 2 * sum(np.sum(np.square(kernel, dtype=np.float64)) for kernel in kernels)
    assert float(sum(model.losses)) == pytest.approx(expected, rel=1e-5)


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
    assert re.fullmatch(r"tracing the first step \(about \d+ s for 8 layers\)", lines[3])
    values, left = (
        r" - loss [\d.]+ - crossentropy [\d.]+ - accuracy [\d.]+ - penalty [\d.e-]+",
        r" - images/s [\d.e+]+ - about \d:\d\d:\d\d left",
    )
    for line, expected in zip(lines[4:6], ("step 1 of 8" + values, "step 2 of 8" + values + left)):  # the first step traces
        assert re.fullmatch(expected, line)
    assert lines[6] == "evaluated 144 of 144 images" and lines[-1] == "evaluated 360 of 360 images"


def test_a_bar_is_shown_on_a_terminal_and_after_a_while_only(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    now, lines, machine = [0.0], [], runtime.Runtime(tf.distribute.get_strategy())
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    bar = progress.Progress(machine, lines.append, 100, quiet=3.0)
    for now[0], done in ((2.0, 40), (4.0, 70), (5.0, 100)):
        bar.update(done, "a line")
        shown = capsys.readouterr().out
        assert (f"{done}/100" in shown) == (done > 40)
    assert lines == [] and shown.endswith("\n")
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    log = progress.Progress(machine, lines.append, 100)
    for now[0], done in ((34.0, 10), (36.0, 20), (60.0, 30), (67.0, 40)):
        log.update(done, f"{done} of 100")
    assert lines == ["20 of 100", "40 of 100"] and capsys.readouterr().out == ""


class StopAt(keras.callbacks.Callback):
    """Ends the run within a step's end: by a signal, which leaves a checkpoint at the next step, or hard, which leaves none."""

    def __init__(self, step, hard=False):
        super().__init__()
        self.step, self.hard = step, hard

    def on_train_batch_end(self, batch, logs=None):
        if batch == self.step:
            if self.hard:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_stopped_at_any_point_equals_one_that_was_not(tmp_path):
    """With an optimizer's slots, a loss scale, and images that are mirrored, of which both views are evaluated."""
    recipe = dataclasses.replace(
        RECIPE, width=2, epochs=3, optimizer="adamw", precision="mixed_float16", learning_rate=0.002, augment="crop_flip"
    )
    whole = run(recipe, tmp_path / "whole", log=silent)
    stops = {2: "stopped after step 4 of 30", 8: "stopped after step 10 of 30"}  # within an epoch, and in its last step
    for step, message in stops.items():
        with pytest.raises(Interrupted, match=message):
            run(recipe, tmp_path / "stopped", callbacks=[StopAt(step)], log=silent)
    assert len(json.loads((tmp_path / "stopped" / "history.json").read_text())) == 1
    assert (tmp_path / "stopped" / "curves.png").exists() and not (tmp_path / "stopped" / "result.json").exists()
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path / "stopped", callbacks=[StopAt(23, hard=True)], checkpoint_minutes=1e-9, log=silent)
    lines = []
    stopped = run(recipe, tmp_path / "stopped", keep_checkpoints=3, log=lines.append)
    assert "resuming after step 23 of 30" in lines  # within the third epoch
    histories = [json.loads((tmp_path / name / "history.json").read_text()) for name in ("stopped", "whole")]
    for row, expected in zip(*histories, strict=True):
        for key in expected.keys() - {"seconds", "images/s"}:
            assert row[key] == pytest.approx(expected[key], rel=1e-3)
    states = []
    for name, count in (("stopped", 3), ("whole", 2)):
        checkpoints = sorted((tmp_path / name / "checkpoints").glob("*.npz"))
        assert len(checkpoints) == count
        with np.load(checkpoints[-1]) as file:
            states.append([file[key] for key in sorted(file.files) if key != "history"])
    for mine, expected in zip(*states, strict=True):  # weights, the optimizer's slots and the loss scale
        np.testing.assert_allclose(mine, expected, rtol=1e-3, atol=1e-5)
    assert stopped["test_crossentropy"] == pytest.approx(whole["test_crossentropy"], rel=1e-3)

    test, model = load_data("digits").test, keras.models.load_model(tmp_path / "whole" / "final.keras")
    views = [np.float64(model.predict(view.astype("float32"), verbose=0)) for view in (test.images, test.images[:, :, ::-1])]
    alone, both = ((logits.argmax(-1) == test.labels).mean() for logits in (views[0], sum(views)))
    assert whole["test_accuracy"] == pytest.approx(alone, abs=1 / 360)
    assert whole["test_mirrored_accuracy"] == pytest.approx(both, abs=1 / 360)


def test_a_run_begins_with_the_weights_of_another_that_fit(tmp_path, finished, monkeypatch):
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    lines, path = [], str(finished[0] / "final.keras")
    recipe = dataclasses.replace(RECIPE, initial_weights=path, modulation="off", max_steps=1, learning_rate=1e-9)
    run(recipe, tmp_path / "next", log=lines.append)
    evaluated = [line for line in lines if line.startswith("evaluated")]
    assert evaluated[:3] == [f"evaluated {part} images" for part in ("128 of 144", "144 of 144", "128 of 360")]
    for mine, expected in zip(load_model(tmp_path / "next/final.keras").trainable_weights, load_model(path).trainable_weights):
        np.testing.assert_allclose(mine, expected, atol=1e-6)
    recipe = dataclasses.replace(recipe, initial_weights=str(shutil.copy(path, tmp_path / "moved.keras")), max_steps=20)
    with pytest.raises(Interrupted):
        run(recipe, tmp_path / "stopped", callbacks=[StopAt(2)], log=silent)
    os.remove(tmp_path / "moved.keras")  # of which a resumed run needs nothing
    assert run(recipe, tmp_path / "stopped", log=silent)["steps"] == 20
    for wrong in ({"depth": 14}, {"width": 2}, {"initial_weights": __file__}, {"start_depth": 8, "depth": 14, "grow_epoch": 1}):
        with pytest.raises(InputError, match="^--initial_weights must be .*Received: '"):
            run(dataclasses.replace(recipe, **wrong), tmp_path / "wrong", log=silent)
        assert not (tmp_path / "wrong").exists()


class Forget(keras.callbacks.Callback):
    """Sets all weights to 0 after the second epoch."""

    def on_epoch_end(self, epoch, logs=None):
        for variable in self.model.trainable_variables if epoch == 1 else ():
            variable.assign(tf.zeros_like(variable))


def test_the_best_epoch_is_kept(tmp_path):
    """Also where the run was stopped after it."""
    recipe = dataclasses.replace(RECIPE, width=2, epochs=3, evaluate_every=1, modulation="off")
    with pytest.raises(Interrupted, match="stopped after step 25 of 30"):
        run(recipe, tmp_path, callbacks=[Forget(), StopAt(23)], log=silent)
    result = run(recipe, tmp_path, log=silent)
    first, second, last = [row["validation_accuracy"] for row in json.loads((tmp_path / "history.json").read_text())]
    assert second > first > last == result["validation_accuracy"]
    assert (result["best_epoch"], result["best_validation_accuracy"]) == (2, second)
    validation = load_data("digits").validation
    best, final = (load_model(tmp_path / f"{name}.keras") for name in ("best", "final"))
    logits = best.predict(validation.images.astype("float32"), verbose=0)
    assert np.mean(logits.argmax(-1) == validation.labels) == pytest.approx(second)
    assert np.abs(final.get_layer("stem_conv").kernel).max() < 0.1 < np.abs(best.get_layer("stem_conv").kernel).max()


def test_mirror_images_by_hand():
    """Logits `(a, 2b)` for pixels `a, b`; with the mirror image's `(b, 2a)` the second class always wins."""
    model = keras.Sequential([keras.layers.Input((1, 2, 1)), keras.layers.Flatten(), keras.layers.Dense(2, use_bias=False)])
    model.layers[-1].kernel.assign([[1.0, 0.0], [0.0, 2.0]])
    images = np.float32([[5, 1], [1, 1], [1, 5], [5, 1]])[:, None, :, None]
    score = score_function(model, runtime.Runtime(tf.distribute.get_strategy()), mirrored=True, confusion=True)
    _, alone, _, weight, *matrix, both = score(images, np.int64([1, 1, 0, 1]), np.float32([1, 1, 1, 0])).numpy()
    assert (alone, both, weight) == (1, 2, 3) and matrix == [0, 1, 1, 1]


def test_results_by_class_without_images_and_of_many_classes():
    few = by_class("abc", np.array([[2, 2, 0], [0, 0, 0], [0, 0, 1]]))
    assert few["test_accuracy_by_class"] == {"a": 0.5, "b": None, "c": 1.0} and few["test_confusion_matrix"][0] == [2, 2, 0]
    assert by_class([*map(str, range(101))], np.eye(101, dtype=int))["test_confusion_matrix"] is None


def test_files_and_folders_in_each_others_place_and_a_checkpoint_beyond_the_end(tmp_path, finished):
    workdir = tmp_path / "run"
    shutil.copytree(finished[0], workdir)
    (workdir / "result.json").unlink()
    shutil.copy(workdir / "checkpoints" / "step-000000040.npz", workdir / "checkpoints" / "step-000000041.npz")
    with pytest.raises(InputError, match="^--workdir must hold checkpoints of a run of 40 steps. Received: .* one of step 41$"):
        run(RECIPE, workdir, log=silent)
    for name, kind in (
        ("final.keras", "dangling link"),
        ("final.keras", "folder"),
        ("checkpoints/step-000000040.npz", "folder"),
        ("tensorboard", "dangling link"),
        ("tensorboard", "file"),
        ("checkpoints", "file"),
    ):
        path = workdir / name
        if path.exists():
            (shutil.rmtree if path.is_dir() else os.remove)(path)
        path.mkdir() if kind == "folder" else path.touch() if kind == "file" else path.symlink_to(tmp_path / "nowhere")
        with pytest.raises(InputError, match=f"^--workdir must hold files and folders .* Received: {path}, a {kind}$"):
            run(RECIPE, workdir, log=silent)
        path.rmdir() if kind == "folder" else path.unlink()


def test_the_bound_on_the_memory_is_below_what_networks_need():
    for network, depth, width in ((plain_cnn, 8, 64), (plain_cnn, 44, 4), (plain_imagenet, 34, 4), (plain_imagenet, 101, 4)):
        least = experiment.LAYER_WEIGHTS * depth * width**2
        parameters = network(depth, (32, 32, 3), width=width, initializer="he_normal").count_params()
        assert least <= parameters and (depth > 8 or least > 0.98 * parameters)


def test_what_ran_out_is_named(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for error, message in (
        (tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor"), "--batch_size=128 .*--width=4 .*OOM"),
        (
            tf.errors.ResourceExhaustedError(None, None, f"x; {full.strerror}"),
            "the disk of --workdir must have space; ",
        ),
        (full, "the disk of --workdir must have space; "),
        (RuntimeError(f"unable to close file, errno = 28, error message = '{full.strerror}'"), "the disk of --workdir must"),
    ):
        with pytest.raises(InputError, match=message), experiment._resource_errors(RECIPE, runtime.Runtime(), tmp_path):
            raise error
    with pytest.raises(FileNotFoundError), experiment._resource_errors(RECIPE, runtime.Runtime(), tmp_path):
        raise FileNotFoundError(errno.ENOENT, "no such file")


def test_a_run_in_half_precision_is_asked_for_by_its_own_flag(tmp_path):
    keras.config.set_floatx("bfloat16")
    try:
        with pytest.raises(InputError, match="^Keras's floatx must be float32; use --precision instead. Received: 'bfloat16'$"):
            run(RECIPE, tmp_path, log=silent)
    finally:
        keras.config.set_floatx("float32")
    assert not list(tmp_path.iterdir())


def test_a_workdir_of_another_run_or_process_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, width=2)
    own, content = tmp_path / "run.json", {"recipe": recipe.to_json(), "data_sha256": "0123456789abcdef" * 4}
    expected = r"which holds another: data_sha256='(0123456789abcdef){4}' there, '[0-9a-f]{64}' here"
    for held, message in (
        (json.dumps(content), expected),
        ("{", "hold a run with an intact run.json. .*run.json' .Expecting property name"),
        ('{"recipe": {}, "data_sha256": 3}', "run.json' .data_sha256 is 3, expected a string or null"),
        ('{"recipe": {"colour": 3}}', "hold this very run.* no such value: {'colour': 3}"),
    ):
        own.write_text(held)
        with pytest.raises(InputError, match=f"--workdir must be .*{message}"):
            run(recipe, tmp_path, log=silent)
        assert own.read_text() == held
    own.unlink()
    with only_one(tmp_path), pytest.raises(InputError, match="--workdir is in use by another process"):
        run(recipe, tmp_path, log=silent)
    assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])
