"""Exported files, read back by the programs that they are for."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from command_lines import TINY, invoke

from ortho_keras import ErrorModulation, load_model, modulate, plain_cnn
from ortho_keras.method.errors import InputError
from ortho_keras.trainer.export import check_export, deploy


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A file of a modulated bfloat16 network after a few steps, images, and a float32 network's outputs with its weights."""
    path = tmp_path_factory.mktemp("trained") / "final.keras"
    rng = np.random.default_rng(0)
    images, labels = rng.random((32, 8, 8, 1)).astype("float32"), rng.integers(10, size=32)
    full = plain_cnn(8, (8, 8, 1), width=4, relu_shift=1.0, seed=0)
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = modulate(plain_cnn(8, (8, 8, 1), width=4, relu_shift=1.0, seed=0))
    keras.config.set_dtype_policy("float32")
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, verbose=0)
    model.save(path)
    full.set_weights([w for layer in model.layers for w in layer.get_weights() if not isinstance(layer, ErrorModulation)])
    return path, images, full.predict(images, verbose=0)


def test_every_format_gives_the_same_outputs(trained, tmp_path):
    path, images, expected = trained
    for name in ("net.keras", "net.tflite", "net"):
        line = deploy(path, tmp_path / name)
        assert line.startswith(f"{tmp_path / name}: 7 of 7 BatchNormalization layers folded, outputs differ by ")
    outputs = [load_model(tmp_path / "net.keras").predict(images, verbose=0)]
    saved = tf.saved_model.load(str(tmp_path / "net"))  # whose variables live as long as it does
    outputs.append(saved.serve(images).numpy())
    interpreter = tf.lite.Interpreter(str(tmp_path / "net.tflite"))
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    interpreter.resize_tensor_input(taken["index"], images.shape)
    interpreter.allocate_tensors()
    interpreter.set_tensor(taken["index"], images)
    interpreter.invoke()
    outputs.append(interpreter.get_tensor(given["index"]))
    for mine in outputs:
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_train_exports_a_run_and_later_the_finished_one(tmp_path, capsys):
    for name in ("first.keras", "second.keras"):
        paths = (f"--workdir={tmp_path / 'run'}", f"--export={tmp_path / 'new' / name}")
        status, out, _ = invoke(capsys, *TINY, "--max_steps=3", *paths)
        assert status == 0
        assert f"{name}: 7 of 7 BatchNormalization layers folded, outputs differ by " in out.splitlines()[-1]
    first, second = (load_model(tmp_path / "new" / name) for name in ("first.keras", "second.keras"))
    for mine, theirs in zip(first.get_weights(), second.get_weights()):
        np.testing.assert_array_equal(mine, theirs)


def test_what_is_refused(trained, tmp_path):
    path = trained[0]
    (tmp_path / "file.keras").write_text("no model")
    (tmp_path / "link.keras").symlink_to("/no_such_folder/net.keras")
    (tmp_path / "a.classes.json").mkdir()
    for model, output, message in (
        (path, "net.onnx", "--export must end in .keras or .tflite, or have no suffix"),
        (path, ".", "--export must be a folder that does not exist"),
        (path, "file.keras/net.keras", "--export must be a folder that can be written"),
        (path, "link.keras", "--export must be a file that can be written. Received: .*a dangling link"),
        (path, "a.tflite", "the file for the classes next to --export must be a file that can be written"),
        (path, "a", "the file for the classes next to --export must be a file that can be written"),
        (tmp_path / "file.keras", "net.keras", "the model must be an intact Functional or Sequential one in a .keras file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            deploy(model, tmp_path / output)
        assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} == {"file.keras", "link.keras", "a.classes.json"}
    own = ("", "..", "checkpoints", "tensorboard/net", "final.keras", "final.keras/net.keras", "best.keras")
    for output in (tmp_path / "run" / name for name in own):  # of a run that has not begun
        if output.suffix != "" or not output.exists():
            with pytest.raises(InputError, match="--export must be another path than those of the run's own files"):
                check_export(output, tmp_path / "run" / "final.keras")
    check_export(tmp_path / "run" / "net.keras", tmp_path / "run" / "final.keras")


def test_a_full_disk_is_named(trained, tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        for name in ("net.keras", "net.tflite"):
            with pytest.raises(InputError, match="--export must be on a disk with space for the model. Received: .*net"):
                deploy(trained[0], tmp_path / name)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []
