"""Runs that are stopped and resumed, that begin with another's weights, and the best epoch's model."""

import dataclasses
import json
import os
import shutil
import signal

import keras
import numpy as np
import pytest
import tensorflow as tf
from small_runs import RECIPE, StopAt, silent

from ortho_keras import load_model
from ortho_keras.method.errors import InputError, Interrupted
from ortho_keras.trainer import progress
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.run import run


def test_a_run_stopped_at_any_point_equals_one_that_was_not(tmp_path):
    """With an optimizer's slots, a loss scale, and images that are mirrored, of which both views are evaluated."""
    recipe = dataclasses.replace(
        RECIPE, width=2, epochs=3, optimizer="adamw", precision="mixed_float16", learning_rate=0.002, augment="crop_flip"
    )
    recipe = dataclasses.replace(recipe, factor=0.1, penalty_every=3)  # of which a stop comes in between
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


def test_an_evaluation_that_is_stopped_costs_no_step(tmp_path, monkeypatch):
    """Of the validation after the first epoch, and then of the test."""
    monkeypatch.setattr(progress, "LINE_EVERY", -1.0)
    recipe = dataclasses.replace(RECIPE, width=2, epochs=2, evaluate_every=1, modulation="off")
    lines = []

    def log(line):
        lines.append(line)
        if line in ("evaluated 128 of 144 images", "evaluated 128 of 360 images") and lines.count(line) == 1:
            signal.raise_signal(signal.SIGTERM)

    for _ in range(2):
        with pytest.raises(Interrupted, match="^stopped in an evaluation$"):
            run(recipe, tmp_path / "run", log=log)
    result, whole = run(recipe, tmp_path / "run", log=log), run(recipe, tmp_path / "whole", log=silent)
    assert [line for line in lines if line.startswith("resuming")] == [f"resuming after step {step} of 20" for step in (10, 20)]
    assert result["test_accuracy"] == pytest.approx(whole["test_accuracy"], abs=1 / 360)
    rows, expected = (json.loads((tmp_path / name / "history.json").read_text()) for name in ("run", "whole"))
    assert [row["step"] for row in rows] == [10, 20]
    for row, one in zip(rows, expected, strict=True):
        assert row["validation_crossentropy"] == pytest.approx(one["validation_crossentropy"], rel=1e-3)
        assert row["crossentropy"] == pytest.approx(one["crossentropy"], rel=1e-3)


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
