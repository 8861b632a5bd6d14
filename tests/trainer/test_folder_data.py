"""Folders of images: what is read, and what is refused and how."""

import os

import numpy as np
import pytest
import tensorflow as tf
from loaded import refusal, values

from ortho_keras.trainer.data import load_data


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def write_image(path, value, shape=(4, 6, 3), encode=tf.io.encode_png):
    """Writes an image of one value, and returns it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.full(shape, value, np.uint8)
    path.write_bytes(encode(image).numpy())
    return image


def write_classes(root, classes, start=0):
    """Writes a folder for each class, `{name: number of images}`; every image has a value of its own, from `start` on."""
    for name, count in classes.items():
        for i in range(count):
            write_image(root / name / f"{i}.png", start)
            start += 1
    return start


def test_folder_of_classes(tmp_path):
    write_classes(tmp_path, {"cat": 20, "ant": 10, "bee": 11})
    data = load_data(f"folder:{tmp_path}")
    assert data.class_names == ("ant", "bee", "cat") and data.image_shape == (4, 6, 3)
    assert (len(data.test), len(data.validation), len(data.train)) == (4, 4, 33)  # a tenth of 41, of the 37 left
    found = values(data.train) + values(data.validation) + values(data.test)
    labels = np.concatenate([data.train.labels, data.validation.labels, data.test.labels])
    assert sorted(found) == list(range(41))
    assert labels.tolist() == [2 if value < 20 else 0 if value < 30 else 1 for value in found]
    again = load_data(f"folder:{tmp_path}")
    assert [values(s) for s in (again.train, again.validation, again.test)] == [
        values(s) for s in (data.train, data.validation, data.test)
    ]


def test_folder_with_train_and_test(tmp_path):
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "test", {"b": 3, "a": 2}, 100)
    data = load_data(f"folder:{tmp_path}")
    assert data.class_names == ("a", "b")
    assert dict(zip(values(data.test), data.test.labels.tolist())) == {100: 1, 101: 1, 102: 1, 103: 0, 104: 0}
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert sorted(values(data.train) + values(data.validation)) == list(range(20))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_folder_with_its_own_validation(tmp_path, name):
    write_classes(tmp_path / "train", {"a": 2, "b": 1})
    write_classes(tmp_path / name, {"a": 1, "b": 1}, 50)
    write_classes(tmp_path / "test", {"a": 1, "b": 2}, 100)
    data = load_data(f"folder:{tmp_path}")
    assert [sorted(values(s)) for s in (data.train, data.validation, data.test)] == [[0, 1, 2], [50, 51], [100, 101, 102]]


def test_folder_where_a_class_is_called_train(tmp_path):
    write_classes(tmp_path, {"bus": 2, "train": 2})
    assert load_data(f"folder:{tmp_path}").class_names == ("bus", "train")


def test_hidden_folders_are_no_classes(tmp_path):
    write_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert load_data(f"folder:{tmp_path}").class_names == ("a", "b")


def test_folder_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for names in ({"a": 2, "b": 2}, {"train/a": 2, "test/a": 2}):
        root = tmp_path / f"of{len(names)}{min(names)[0]}"
        write_classes(root, names)
        assert len(load_data(f"folder:~/{root.name}").train) >= 1


def test_formats_and_channels_are_read_as_rgb(tmp_path):
    jpeg = tf.io.encode_jpeg
    files = [("0.png", 1, jpeg), ("1.jpg", 1, jpeg), ("2.JPEG", 3, jpeg)]  # a JPEG that is called PNG is read too
    files += [("3.png", 1, tf.io.encode_png), ("4.PNG", 3, tf.io.encode_png), ("5.png", 4, tf.io.encode_png)]
    for split in ("train", "test"):
        for i, (name, channels, encode) in enumerate(files):
            write_image(tmp_path / split / "a" / name, 40 * i, (4, 6, channels), encode)
    color = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    (tmp_path / "test" / "b").mkdir()
    (tmp_path / "test" / "b" / "color.png").write_bytes(tf.io.encode_png(color).numpy())
    data = load_data(f"folder:{tmp_path}")
    assert data.image_shape == (4, 6, 3)
    assert sorted(values(data.test.take(data.test.labels == 0))) == [0, 40, 80, 120, 160, 200]
    np.testing.assert_array_equal(data.test.images[data.test.labels == 1], [color])


def test_folder_of_many_sizes_needs_image_size(tmp_path):
    for i, shape in enumerate([(4, 6, 3), (5, 5, 3), (8, 8, 3), (1, 1, 3)]):
        write_image(tmp_path / "a" / f"{i}.png", i, shape)
    assert "--image_size" in refusal(f"folder:{tmp_path}")
    data = load_data(f"folder:{tmp_path}", image_size=7)
    assert data.image_shape == (7, 7, 3)
    assert sorted(values(data.train) + values(data.validation) + values(data.test)) == [0, 1, 2, 3]


def test_splits_of_different_sizes_need_image_size(tmp_path):
    for i in range(4):
        write_image(tmp_path / "train" / "a" / f"{i}.png", i, (4, 6, 3))
        write_image(tmp_path / "test" / "a" / f"{i}.png", i, (6, 4, 3))
    assert "--image_size" in refusal(f"folder:{tmp_path}")
    assert load_data(f"folder:{tmp_path}", image_size=5).test.images.shape == (4, 5, 5, 3)


def test_missing_folder(tmp_path):
    assert f"'{tmp_path}/nowhere'" in refusal(f"folder:{tmp_path}/nowhere")
    assert "''" in refusal("folder:")


def test_file_instead_of_a_folder(tmp_path):
    write_image(tmp_path / "image.png", 0)
    assert "image.png" in refusal(f"folder:{tmp_path}/image.png")


@pytest.mark.parametrize("folders", [(), ("a", "b"), ("train", "test"), ("train/a", "train/b", "test/a"), ("test/a",)])
def test_folders_without_images(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    assert "no image" in refusal(f"folder:{tmp_path}")


def test_images_outside_a_class_folder(tmp_path):
    write_image(tmp_path / "image.png", 0)
    assert "one folder" in refusal(f"folder:{tmp_path}")


def test_other_formats_are_not_promised(tmp_path):
    write_classes(tmp_path, {"a": 4})
    for file in (tmp_path / "a").iterdir():
        file.rename(file.with_suffix(".bmp"))
    message = refusal(f"folder:{tmp_path}")
    assert "JPEG" in message and "PNG" in message and "BMP" not in message and "GIF" not in message


@pytest.mark.parametrize("kind", ["garbage", "empty", "truncated", "folder", "dangling link"])
def test_damaged_image_is_named(tmp_path, kind):
    write_classes(tmp_path, {"a": 5, "b": 5})
    bad = tmp_path / "b" / "bad.png"
    if kind == "folder":
        bad.mkdir()
    elif kind == "dangling link":
        bad.symlink_to(tmp_path / "gone.png")
    else:
        whole = tf.io.encode_png(np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)).numpy()
        bad.write_bytes({"garbage": b"no image\n", "empty": b"", "truncated": whole[:-30]}[kind])
    assert "b/bad.png" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize("which", ["..", ".", "a", "a/0.png"])
def test_unreadable_path(tmp_path, which):
    root = tmp_path / "above" / "data"
    write_classes(root, {"a": 5, "b": 5})
    closed = (root / which).resolve()
    closed.chmod(0)
    try:
        if os.access(closed, os.R_OK):
            pytest.skip("this user may read everything")
        assert "ermission denied" in refusal(f"folder:{root}")
    finally:
        closed.chmod(0o700)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_images_to_hold_any_out(tmp_path, count):
    write_classes(tmp_path, {"a": count})
    message = refusal(f"folder:{tmp_path}")
    assert "at least 3" in message and message.endswith(f"Received: {count}")


def test_one_image_with_a_test_split(tmp_path):
    write_classes(tmp_path / "train", {"a": 1})
    write_classes(tmp_path / "test", {"a": 1})
    message = refusal(f"folder:{tmp_path}")
    assert "at least 2" in message and message.endswith("Received: 1")


def test_smallest_folders(tmp_path):
    write_classes(tmp_path / "one", {"a": 3})
    data = load_data(f"folder:{tmp_path / 'one'}")
    assert sorted(values(data.train) + values(data.validation) + values(data.test)) == [0, 1, 2]
    for split in ("train", "val", "test"):
        write_classes(tmp_path / "three" / split, {"a": 1})
    data = load_data(f"folder:{tmp_path / 'three'}")
    assert [len(split) for split in (data.train, data.validation, data.test)] == [1, 1, 1]
