import os
import shutil
import tracemalloc
import zipfile

import keras
import numpy as np
import pytest

from ortho_keras import OrthonormalRegularizer, load_model, modulate, orthonormalize, plain_cnn

pytestmark = pytest.mark.every_backend


def test_our_models_load(tmp_path):
    model = modulate(plain_cnn(8, input_shape=(8, 8, 3), seed=0))
    orthonormalize(model, verbose=False)
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype("float32")
    np.testing.assert_array_equal(loaded(x), model(x))
    assert isinstance(loaded.get_layer("stem_conv").kernel_regularizer, OrthonormalRegularizer)


def test_marshalled_code_is_refused_and_does_not_run(tmp_path):
    flag = tmp_path / "ran"
    code = keras.layers.Lambda(lambda x, path=str(flag): (open(path, "w").close(), x)[1])
    keras.Sequential([keras.Input((2,)), code]).save(tmp_path / "hostile.keras")
    os.remove(flag)  # building the model ran it once
    keras.config.enable_unsafe_deserialization()
    with pytest.raises(ValueError, match="hostile.keras', refused because it holds a Lambda layer") as caught:
        load_model(tmp_path / "hostile.keras")
    assert "\n" not in str(caught.value) and not flag.exists()


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "assets/../../outside.txt", "..\\outside.txt", "run.py"])
def test_an_archive_with_a_path_outside_is_refused(tmp_path, name):
    path = tmp_path / "inner" / "model.keras"
    path.parent.mkdir()
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(name, "gone")
    with pytest.raises(ValueError, match="refused because it holds"):
        load_model(path)
    assert not list(tmp_path.rglob("outside.txt"))


def test_archives_that_are_not_unpacked(tmp_path):
    keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]).save(tmp_path / "model.keras")
    for name in ("zeros", "encrypted", "damaged"):
        shutil.copy(tmp_path / "model.keras", tmp_path / f"{name}.keras")
    with zipfile.ZipFile(tmp_path / "zeros.keras", "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("assets/zeros", bytes(101 * 10**6))
    with zipfile.ZipFile(tmp_path / "encrypted.keras", "a") as archive:
        archive.writestr("assets/word", "")
        archive.infolist()[-1].flag_bits |= 1
    content = (tmp_path / "model.keras").read_bytes()
    (tmp_path / "damaged.keras").write_bytes(content.replace(b'"build_config"', b'"build-config"'))
    content, size = (tmp_path / "zeros.keras").read_bytes(), 101 * 10**6
    (tmp_path / "false_size.keras").write_bytes(content.replace(size.to_bytes(4, "little"), (10).to_bytes(4, "little")))
    reasons = {"zeros": r"its \d+ bytes unpack to 101\d+", "encrypted": "it is encrypted"}
    reasons |= {"damaged": "its 'config.json' is damaged", "false_size": "its 'assets/zeros' is damaged"}
    tracemalloc.start()
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}.keras', refused because {reason}") as caught:
            load_model(tmp_path / f"{name}.keras")
        assert "\n" not in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()


def test_what_is_no_model(tmp_path):
    (tmp_path / "text.keras").write_text("model")
    link = zipfile.ZipInfo("assets/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "empty.keras", "w"), zipfile.ZipFile(tmp_path / "link.keras", "w") as archive:
        archive.writestr(link, "/etc/hostname")
    reasons = {"text": "not a zip archive", "empty": "", "none": "there is no such file", "link": "it holds 'assets/link'"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=f"{name}.keras', refused because .*{reason}"):
            load_model(tmp_path / f"{name}.keras")


def test_a_class_that_is_not_known_is_named(tmp_path):
    class Unregistered(keras.layers.Layer):
        def call(self, x):
            return x

    keras.Sequential([keras.Input((3,)), Unregistered()]).save(tmp_path / "own.keras")
    with pytest.raises(ValueError, match=r"its class 'Unregistered' is unknown: decorate it with @keras"):
        load_model(tmp_path / "own.keras")
