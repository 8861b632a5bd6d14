"""Predictions for image files, by a run and by its exports, against the run's own evaluation and by hand."""

import dataclasses
import io
import json

import numpy as np
import pytest
import tensorflow as tf
from image_files import encoded, write_photographs
from PIL import Image

from ortho_keras import load_model
from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data import load_data
from ortho_keras.trainer.export import deploy
from ortho_keras.trainer.predict import main, predict
from ortho_keras.trainer.recipe import Recipe
from ortho_keras.trainer.run import run

SMALL = Recipe(depth=8, width=2, epochs=2, batch_size=8, learning_rate=0.05, image_size=16, bn_batches=1, hold_out=False)


@pytest.fixture(scope="module", params=["memory", "disk"])
def trained(request, tmp_path_factory):
    """A run on a folder of three classes and its result, and the folder."""
    folder = tmp_path_factory.mktemp(request.param)
    write_photographs(folder / "data", {"train": 8, "test": 6}, 3)
    recipe = dataclasses.replace(SMALL, dataset=f"folder:{folder / 'data'}", storage=request.param)
    return folder / "run", run(recipe, folder / "run", log=lambda line: None), folder / "data"


def test_the_test_folder_gets_the_runs_own_test_accuracy_by_class(trained):
    workdir, result, data = trained
    found = list(predict(workdir, [data / "test"], top=3))
    assert [path for path, _ in found] == sorted(path for path in (data / "test").rglob("*.*"))
    for name, accuracy in result["test_accuracy_by_class"].items():
        best = [classes[0][0] for path, classes in found if path.parent.name == name]
        assert len(best) == 6 and np.mean([one == name for one in best]) == pytest.approx(accuracy)
    for _, classes in found:
        names, probabilities = zip(*classes)
        assert sorted(names) == result["class_names"] and sum(probabilities) == pytest.approx(1, abs=1e-5)
        assert sorted(probabilities, reverse=True) == list(probabilities)


def test_probabilities_are_those_of_the_pixels_of_an_evaluation(trained):
    workdir, result, data = trained
    test = load_data(f"folder:{data}", image_size=16, hold_out=False, storage=result["recipe"]["storage"]).test
    pixels, labels, _ = test.read(tf.range(len(test), dtype=tf.int64))
    logits = np.float64(load_model(workdir / "final.keras", compile=False)(pixels, training=False))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    mine = [sorted(classes) for _, classes in predict(workdir, [data / "test"])]
    found = np.array([[probability for _, probability in classes] for classes in mine])
    order = lambda rows: rows[np.lexsort(rows.T)]  # noqa: E731 - the split's order is another
    np.testing.assert_allclose(order(found), order(expected), atol=1e-4)
    assert labels.shape == (18,)


def test_exports_and_the_command(trained, tmp_path, capsys):
    workdir, result, data = trained
    expected = dict(predict(workdir, [data / "test"], top=1))
    assert dict(predict(workdir / "final.keras", [data / "test"], top=1)) == expected
    for name in ("net.keras", "net.tflite", "net"):
        deploy(workdir / "final.keras", tmp_path / name, result)
        for path, ((best, probability),) in predict(tmp_path / name, [data / "test"], top=1):
            ((own, likely),) = expected[path]
            assert probability == pytest.approx(likely, abs=2e-3) and (best == own or likely < 0.5)
    turned = io.BytesIO()
    image = Image.open(next((data / "test" / "class00").glob("*.jpg"))).convert("RGB")
    image.transpose(Image.Transpose.ROTATE_90).save(
        turned, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    )
    (tmp_path / "turned.png").write_bytes(turned.getvalue())
    (tmp_path / "none.jpg").write_bytes(encoded(np.zeros((9, 9, 3), np.uint8))[:-40])
    capsys.readouterr()
    assert main([str(tmp_path / "net.keras"), str(tmp_path / "turned.png"), str(tmp_path / "none.jpg"), "--top=2"]) == 1
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path}/turned.png: class0") and first.count("class0") == 2
    assert second == f"{tmp_path}/none.jpg: does not decode"


def test_what_is_refused(trained, tmp_path, capsys):
    workdir, result, data = trained
    old = tmp_path / "old"
    old.mkdir()
    (old / "result.json").write_text(json.dumps({**result, "class_names": None}))
    (tmp_path / "net.classes.json").write_text(json.dumps(result))
    (tmp_path / "net.keras").write_text("no model")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "run.json").write_text("{}")
    for arguments, message in (
        ([old, data], "result.json' (class_names is None, expected a list)"),
        (
            [tmp_path / "net.keras", data],
            "the model must be a finished run's workdir, a model in it, or an exported model. ",
        ),
        ([tmp_path / "none", data], f", with none.classes.json next to it. Received: '{tmp_path}/none'"),
        ([tmp_path / "begun", data], "/begun', a run that is not finished: its command resumes it"),
        ([workdir, tmp_path / "begun"], "a folder of images must hold JPEG or PNG files. Received: "),
        ([workdir, tmp_path / "none"], "each image must be a file or a folder that exists. Received: "),
        ([workdir, data, "--top=0"], "`top` must be an integer, at least 1. Received: top=0"),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("ortho_keras.trainer.predict: ") and message in error and error.count("\n") == 1
    with pytest.raises(InputError):
        next(predict(workdir, [tmp_path / "none"]))
