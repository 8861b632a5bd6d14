"""Folders of images in memory: what is read, and what is refused and how."""

import os

import numpy as np
import pytest
import tensorflow as tf
from loaded import refusal, values
from PIL import Image

from ortho_keras.trainer.data import load_data


def write_image(path, value, shape=(4, 6, 3), encode=tf.io.encode_png):
    """Writes an image of one value."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(np.full(shape, value, np.uint8)).numpy())


def write_classes(root, classes, start=0):
    """Writes a folder for each class, `{name: number of images}`; every image has a value of its own, from `start` on."""
    for name, count in classes.items():
        for i in range(count):
            write_image(root / name / f"{i}.png", start)
            start += 1


def test_folder_of_classes(tmp_path):
    write_classes(tmp_path, {"cat": 20, "ant": 10, "bee": 11})
    (tmp_path / ".ipynb_checkpoints").mkdir()  # hidden folders are not classes
    data = load_data(f"folder:{tmp_path}")
    splits = (data.train, data.validation, data.test)
    assert data.class_names == ("ant", "bee", "cat") and data.image_shape == (4, 6, 3)
    assert [len(split) for split in splits] == [33, 4, 4]  # a tenth of 41, of the 37 left
    found = values(*splits)
    assert sorted(found) == list(range(41)) and found != sorted(found)
    labels = np.concatenate([split.labels for split in splits])
    assert labels.tolist() == [2 if value < 20 else 0 if value < 30 else 1 for value in found]
    assert len(set(data.train.labels[:8])) > 1  # not class by class


def test_folder_with_splits(tmp_path, monkeypatch):
    write_classes(tmp_path / "train", {"a": 10, "b": 10})
    write_classes(tmp_path / "test", {"b": 3, "a": 2}, 100)
    data = load_data(f"folder:{tmp_path}")
    assert data.class_names == ("a", "b")
    assert dict(zip(values(data.test), data.test.labels.tolist())) == {100: 1, 101: 1, 102: 1, 103: 0, 104: 0}
    assert sorted(values(data.train, data.validation)) == [*range(20)] and len(data.validation) == 2
    for name in ("val", "validation"):
        write_classes(tmp_path / name, {"a": 1, "b": 1}, 50)
        data = load_data(f"folder:{tmp_path}")
        assert (len(data.train), sorted(values(data.validation))) == (20, [50, 51])
    monkeypatch.setenv("HOME", str(tmp_path))
    write_classes(tmp_path / "set", {"bus": 2, "train": 2})  # a class called train
    assert load_data("folder:~/set").class_names == ("bus", "train")


def test_formats_and_channels_are_read_as_rgb(tmp_path):
    jpeg, png = tf.io.encode_jpeg, tf.io.encode_png
    files = [("0.png", 1, jpeg), ("1.jpg", 1, jpeg), ("2.JPEG", 3, jpeg)]  # a JPEG that is called PNG is read too
    files += [("3.png", 1, png), ("4.PNG", 3, png), ("5.png", 4, png)]
    for i, (name, channels, encode) in enumerate(files):
        write_image(tmp_path / "train" / "a" / name, 40 * i, (4, 6, channels), encode)
    write_image(tmp_path / "test" / "a" / "0.png", (9, 18, 27))
    data = load_data(f"folder:{tmp_path}", hold_out=False)
    assert data.image_shape == (4, 6, 3) and sorted(values(data.train)) == [0, 40, 80, 120, 160, 200]
    assert np.all(data.test.images == [9, 18, 27])


def test_many_sizes_need_image_size(tmp_path):
    for i, shape in enumerate([(4, 6, 3), (5, 5, 3), (8, 8, 3), (1, 1, 3)]):
        write_image(tmp_path / "a" / f"{i}.png", i, shape)
    assert "--image_size" in refusal(f"folder:{tmp_path}")
    data = load_data(f"folder:{tmp_path}", image_size=5, hold_out=False)
    assert data.image_shape == (5, 5, 3) and set(values(data.train, data.test)) == {0, 1, 2, 3}


@pytest.mark.parametrize("folders", [("a", "b"), ("train/a", "test/a"), ("test/a",)])
def test_folders_without_images(tmp_path, folders):
    for folder in folders:
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "image.png").touch()  # in no class's folder
    (tmp_path / folders[0] / "image.bmp").touch()
    message = refusal(f"folder:{tmp_path}")
    assert "one folder of JPEG or PNG images for each class" in message and "no image" in message


def test_what_is_no_folder_or_no_image(tmp_path):
    write_classes(tmp_path, {"a": 5, "b": 5})
    for path in (tmp_path / "nowhere", "", tmp_path / "a" / "0.png"):
        assert f"Received: '{path}'" in refusal(f"folder:{path}")
    for name in "ab":
        for path in (tmp_path / name).iterdir():
            path.write_bytes(b"no image\n")
    assert "must have images in each split. Received: none in train" in refusal(f"folder:{tmp_path}")


def test_what_cannot_be_read_is_skipped_by_name_whatever_the_storage(tmp_path):
    """The other images are in the same splits, in memory and on the disk."""
    write_classes(tmp_path, {"a": 20, "b": 20})
    (tmp_path / "a" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "cut.png").write_bytes((tmp_path / "a" / "0.png").read_bytes()[:-30])
    (tmp_path / "b" / "text.jpg").write_bytes(b"no image\n")
    first = Image.new("RGB", (6, 4), (200, 200, 200))
    first.save(tmp_path / "a" / "moving.png", "GIF", save_all=True, append_images=[Image.new("RGB", (6, 4))])
    memory, disk = (load_data(f"folder:{tmp_path}", image_size=4, storage=storage) for storage in ("memory", "disk"))
    for split in ("train", "validation", "test"):
        pairs = [zip(*getattr(data, split).sample(100)) for data in (memory, disk)]
        found, expected = (sorted((int(image[0, 0, 0]), int(label)) for image, label in one) for one in pairs)
        assert found == expected
    assert sorted(memory.skipped) == sorted(disk.skipped) == ["a/gone.png", "b/cut.png", "b/text.jpg"]
    assert sum(map(len, (memory.train, memory.validation, memory.test))) == 41


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_what_is_left_out_is_listed(tmp_path, storage):
    write_classes(tmp_path / "train", {"a": 4, "b": 4})
    (tmp_path / "test").mkdir()
    write_classes(tmp_path / "val", {"a": 1, "c": 1})
    os.mkfifo(tmp_path / "train" / "a" / "pipe.png")
    write_image(tmp_path / "train" / "a" / "more" / "0.png", 1)
    (tmp_path / "train" / "b" / "._0.png").write_bytes(b"of macOS")
    (tmp_path / "train" / "b" / ".DS_Store").touch()  # not listed
    for path in ("loose.png", "train/loose.jpg", "more/a/0.png"):
        write_image(tmp_path / path, 1)
    data = load_data(f"folder:{tmp_path}", image_size=4, storage=storage)
    assert (len(data.train), len(data.validation), len(data.test)) == (6, 2, 2) and data.class_names == ("a", "b", "c")
    listed = "train/a/more, train/a/pipe.png, train/b/._0.png"
    assert data.notes == (
        f"3 entries of class folders are not JPEG or PNG files and were left out: {listed}",
        "no image is in test/",
        "outside of class folders, and left out: loose.png, more, train/loose.jpg",
        "no training image is of class c",
    )


@pytest.mark.parametrize("storage", ["memory", "disk"])
def test_names_that_are_not_utf8(tmp_path, storage):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_classes(tmp_path, {"a": 5, folder.name: 5})
    (folder / os.fsdecode(b"\xff.jpg")).write_bytes(b"no image")
    (folder / "0.png").rename(folder / os.fsdecode(b"\xfe.png"))
    data = load_data(f"folder:{tmp_path}", image_size=4, hold_out=False, storage=storage)
    images, labels = map(np.concatenate, zip(data.train.sample(), data.test.sample()))
    assert data.class_names == ("a", r"caf\xe9") and sorted(images[labels == 1][:, 0, 0, 0]) == [5, 6, 7, 8, 9]
    assert data.skipped == [r"caf\xe9/\xff.jpg"] and len(data.fingerprint) == 64


def test_the_smallest_folders(tmp_path):
    write_classes(tmp_path / "classes", {"a": 2})
    message = refusal(f"folder:{tmp_path / 'classes'}")
    assert "at least 3 training images, to hold out test and validation. Received: 2" in message
    write_classes(tmp_path / "classes", {"a": 3})
    data = load_data(f"folder:{tmp_path / 'classes'}")
    assert sorted(values(data.train, data.validation, data.test)) == [0, 1, 2]
    write_classes(tmp_path / "classes", {"a": 5})
    [number] = values(load_data(f"folder:{tmp_path / 'classes'}").test)
    (tmp_path / "classes" / "a" / f"{number}.png").write_bytes(b"no image")
    assert "must have images that decode in each split. Received: none in test" in refusal(f"folder:{tmp_path / 'classes'}")
    for split in ("train", "test"):
        write_classes(tmp_path / "one" / split, {"a": 1})
    assert "at least 2 training images" in refusal(f"folder:{tmp_path / 'one'}")


def test_one_split_stratified_by_class_whatever_the_storage(tmp_path):
    """Classes of 60, 30, 3, 2 and 1 images; an empty folder, and files of other kinds."""
    color = 0  # of all pixels of an image, by which it is known again
    for name, count in {"cat": 60, "dog": 30, "few": 3, "rare": 2, "once": 1, "empty": 0}.items():
        (tmp_path / name).mkdir()
        for number in range(count):
            color += 1
            pixels = np.full((8, 8, 3), color, np.uint8)
            (tmp_path / name / f"{number}.png").write_bytes(tf.io.encode_png(pixels).numpy())
    (tmp_path / "dog" / "a.webp").write_bytes(b"")
    memory, disk = (load_data(f"folder:{tmp_path}", image_size=8, storage=storage) for storage in ("memory", "disk"))
    assert memory.class_names == disk.class_names == ("cat", "dog", "few", "once", "rare")
    counts = {"train": [49, 24, 1, 1, 1], "validation": [5, 3, 1, 0, 1], "test": [6, 3, 1, 0, 0]}
    seen = set()
    for part, expected in counts.items():
        pairs = []
        for data in (memory, disk):
            images, labels = getattr(data, part).sample(100)
            assert np.bincount(labels, minlength=5).tolist() == expected
            pairs.append({(int(image[4, 4, 0]), int(label)) for image, label in zip(images, labels)})
        assert pairs[0] == pairs[1] and not pairs[0] & seen
        seen |= pairs[0]
    assert len(seen) == 96
    left_out = "1 entries of class folders are not JPEG or PNG files and were left out: dog/a.webp"
    assert memory.notes == disk.notes == (left_out, "folders without images are no classes: empty")
