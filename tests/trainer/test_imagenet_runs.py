"""The recipes for photographs, run: a few steps and an evaluation on a generated folder."""

import dataclasses

import numpy as np
import pytest
from photographs import write_photographs

from ortho_keras import load_model
from ortho_keras.method.errors import InputError
from ortho_keras.trainer import run as experiment
from ortho_keras.trainer.build import build_model
from ortho_keras.trainer.recipes import RECIPES
from ortho_keras.trainer.report import write_report

METHODS = [f"{net}_imagenet" for net in ("plain34", "plain44", "plain101", "resnet34", "resnet101")]
CLASSES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write_photographs(root, {"train": 4, "test": 1}, CLASSES)
    return root


def small(name, folder, **values):
    values = {"max_steps": 3, "batch_size": 4, "bn_batches": 0, "warmup_steps": 0, "learning_rate": 0.01} | values
    return dataclasses.replace(RECIPES[name].recipe, dataset=f"folder:{folder}", image_size=64, **values)


@pytest.mark.parametrize(
    ("name", "precision"),
    [(name, precision) for name in METHODS for precision in ("float32", "mixed_bfloat16")]
    + [("plain34_imagenet_l2", "float32"), ("resnet34_imagenet_l2", "mixed_bfloat16")],
)
def test_three_steps_and_an_evaluation(folder, tmp_path, name, precision):
    width = 64 if precision == "float32" else 16  # bfloat16 is slow on many processors
    recipe = small(name, folder, precision=precision, width=width)
    result = experiment.run(recipe, tmp_path, name=name, log=lambda line: None)
    assert result["steps"] == 3 and result["skipped_images"] == 0 and result["validation_accuracy"] is None
    assert result["data_sha256"] is None
    assert 0 <= result["test_accuracy"] <= result["test_top5_accuracy"] <= 1
    assert np.isfinite([result["test_crossentropy"], result["penalty"]]).all()


def test_principal_patches_in_the_first_convolution(folder):
    recipe = small("plain34_imagenet", folder, stem_initializer="pca", width=8)
    kernel = build_model(recipe, experiment.load_recipe_data(recipe)).get_layer("stem_conv").kernel.numpy()
    assert kernel.shape == (7, 7, 3, 8)
    matrix = kernel.reshape(-1, 8)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(8), atol=1e-5)


def test_one_class_is_nothing_to_tell_apart(tmp_path):
    write_photographs(tmp_path / "data", {"train": 8, "test": 2}, 1)
    with pytest.raises(InputError, match=r"must have at least 2 classes. Received: \w+$"):
        experiment.run(small("plain34_imagenet", tmp_path / "data"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_top_five_and_what_is_skipped(tmp_path):
    """A folder with corrupt files trains to the end, and the log names each; top-5 is what NumPy finds."""
    root = tmp_path / "photographs"
    names = write_photographs(root, {"train": 10, "val": 2, "test": 3}, CLASSES, broken=0.05)
    assert len(names) > 5
    lines = []
    recipe = small("plain34_imagenet_smoke", root, max_steps=0, epochs=2, batch_size=16, width=8)
    result = experiment.run(recipe, tmp_path / "run", log=lines.append)
    assert result["steps"] == 14 and result["skipped_images"] == len(names)
    told = [line.removeprefix("skipped, as it does not decode: ") for line in lines if line.startswith("skipped")]
    assert sorted(told) == sorted(names)

    model, data = load_model(tmp_path / "run" / "final.keras"), experiment.load_recipe_data(recipe)
    (images, labels), top, count = data.test.sample(1000), 0, 0
    # The evaluation reads the images as they are, a sample rounds them: near ties aside, the order is the same.
    for scores, label in zip(model.predict(images.astype("float32"), verbose=0), labels):
        top += label in np.argsort(scores)[-5:]
        count += 1
    assert count == 3 * CLASSES - sum(name.startswith("test") for name in names)
    assert abs(result["test_top5_accuracy"] - top / count) <= 1 / count
    assert any("validation_top5_accuracy" in line for line in lines)


def test_a_run_that_was_stopped_goes_on_with_the_same_images(folder, tmp_path):
    recipe = small("plain34_imagenet_smoke", folder, max_steps=6, width=8, batch_size=8, epochs=2)
    lines = []
    whole = experiment.run(recipe, tmp_path / "whole", log=lines.append)

    class Stop(experiment.keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        experiment.run(recipe, tmp_path / "parts", callbacks=[Stop()], log=lines.append)
    parts = experiment.run(recipe, tmp_path / "parts", log=lines.append)
    assert parts["test_crossentropy"] == pytest.approx(whole["test_crossentropy"], rel=1e-4)
    assert parts["training_accuracy"] == whole["training_accuracy"]


def test_the_report_has_top_five_and_what_was_skipped(folder, tmp_path):
    (folder / "train" / "class00" / "broken.jpg").write_bytes(b"none")
    recipe = small("plain34_imagenet_smoke", folder, max_steps=1, width=8)
    result = experiment.run(recipe, tmp_path / "run", log=lambda line: None)
    write_report([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"<td>test top-5 accuracy</td><td>{result['test_top5_accuracy']:.4f}</td>" in page
    assert f"<td>test accuracy with mirror images</td><td>{result['test_mirrored_accuracy']:.4f}</td>" in page
    assert "<td>images skipped</td><td>1</td>" in page
