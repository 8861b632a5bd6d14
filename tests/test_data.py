import os
import time

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from ortho_keras.data import ImageData, Split, evaluation_batches, load_data, training_batches
from ortho_keras.errors import InputError


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def random_split(n=64, shape=(32, 16, 3), seed=0):
    """Random images; an image's label is its index."""
    return Split(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n))


def as_numpy(dataset):
    return [tuple(part.numpy() for part in batch) for batch in dataset]


def assert_equal_batches(ours, expected):
    assert len(ours) == len(expected) > 0
    for batch, other in zip(ours, expected):
        for part, other_part in zip(batch, other, strict=True):
            np.testing.assert_array_equal(part, other_part, strict=True)


def epoch_order(split, seed, epoch):
    """The labels that an epoch of batches of 5 goes through."""
    steps = len(split) // 5
    batches = training_batches(split, 5, "none", seed, epoch * steps, (epoch + 1) * steps)
    return tuple(label for _, labels in as_numpy(batches) for label in labels)


def refusal(name, data_dir=None, image_size=0):
    """The message with which `load_data` refuses: one line that names the flag, what was expected and what came."""
    with pytest.raises(InputError) as caught:
        load_data(name, data_dir, image_size)
    message = str(caught.value)
    assert message.startswith("--dataset") and " must " in message and "Received: " in message and "\n" not in message
    return message


# --- The digits


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_digits_are_split_once_and_completely(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    where = {np.rint(image / 16 * 255).astype("uint8").tobytes(): i for i, image in enumerate(source.images)}
    assert len(where) == 1797  # no two digits are alike, so an image tells its index
    splits = (digits.train, digits.validation, digits.test)
    assert [len(split) for split in splits] == [1293, 144, 360]
    found = [where[image.tobytes()] for split in splits for image in split.images]
    assert sorted(found) == list(range(1797))
    np.testing.assert_array_equal(np.concatenate([split.labels for split in splits]), source.target[found])
    assert digits.image_shape == (8, 8, 1) and digits.class_names == tuple("0123456789")
    for split in splits:
        assert split.images.dtype == np.uint8 and split.labels.dtype == np.int64


def test_digits_test_split_is_stratified(digits):
    whole = np.bincount(np.concatenate([digits.train.labels, digits.validation.labels, digits.test.labels]))
    assert np.all(np.abs(np.bincount(digits.test.labels) - whole * 360 / 1797) < 1)
    assert np.all(np.bincount(digits.validation.labels, minlength=10) > 0)


def test_digits_are_the_same_at_every_load(digits):
    keras.utils.set_random_seed(1)  # the run's own seed must not matter
    again = load_data("digits")
    for name in ("train", "validation", "test"):
        np.testing.assert_array_equal(getattr(again, name).images, getattr(digits, name).images)
        np.testing.assert_array_equal(getattr(again, name).labels, getattr(digits, name).labels)


@pytest.mark.parametrize("size", [4, 5, 8, 20])
def test_image_size_resizes_by_the_antialiased_triangle_filter(digits, size):
    data = load_data("digits", image_size=size)
    scale = 8 / size
    centers = (np.arange(size)[:, np.newaxis] + 0.5) * scale
    weights = np.maximum(0, 1 - np.abs(np.arange(8) + 0.5 - centers) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    expected = weights @ digits.test.images[..., 0] @ weights.T
    assert data.image_shape == (size, size, 1) and data.test.images.dtype == np.uint8
    assert np.abs(data.test.images[..., 0] - expected).max() < 0.501  # rounded to the nearest
    np.testing.assert_array_equal(data.train.labels, digits.train.labels)


def test_channel_statistics_equal_those_of_whole_numbers():
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(low, high, (2100, 32, 32)) for low, high in ((0, 256), (250, 256), (7, 8))], -1)
    train = Split(images.astype(np.uint8), np.zeros(2100, np.int64))  # 2.15 million pixels
    other = Split(255 - train.images[:1], np.zeros(1, np.int64))
    mean, variance = ImageData(train, other, other, ("one",)).channel_statistics()
    n, sums, squares = 2100 * 32 * 32, images.sum((0, 1, 2)).tolist(), np.square(images).sum((0, 1, 2)).tolist()  # exact
    assert mean == [total / n for total in sums]
    np.testing.assert_allclose(variance[:2], [(n * sq - total**2) / n**2 for total, sq in zip(sums[:2], squares)], rtol=1e-11)
    assert 0 < variance[2] < 1e-9  # a constant channel can be divided by
    assert all(type(value) is float for value in mean + variance)


# --- Training batches


@pytest.mark.parametrize(("n", "batch_size"), [(37, 8), (5, 5), (7, 1), (64, 10), (1, 1)])
def test_an_epoch_visits_each_image_at_most_once(n, batch_size):
    split, steps = random_split(n, (2, 2, 1)), n // batch_size
    batches = as_numpy(training_batches(split, batch_size, "none", 3, stop=40 * steps))
    assert len(batches) == 40 * steps
    for epoch in range(40):
        labels = np.concatenate([labels for _, labels in batches[epoch * steps : (epoch + 1) * steps]])
        assert len(labels) == len(set(labels)) == steps * batch_size
    assert {label for _, labels in batches for label in labels} == set(range(n))  # none is left out for good
    for images, labels in batches:
        assert images.dtype == np.float32 and labels.dtype == np.int64
        np.testing.assert_array_equal(images, split.images[labels])  # "none" changes nothing


def test_every_epoch_has_an_order_of_its_own():
    split = random_split(40, (1, 1, 1))
    orders = [epoch_order(split, 0, epoch) for epoch in (*range(8), 255, 256, 257, 512, 65536)]
    assert len(set(orders)) == len(orders)


def test_every_seed_has_an_order_of_its_own():
    split = random_split(40, (1, 1, 1))
    orders = [epoch_order(split, seed, 0) for seed in (*range(8), 255, 256, 257, 512, 65536, 2**31 - 1)]
    assert len(set(orders)) == len(orders)


def test_orders_are_uniform():
    split = random_split(5, (1, 1, 1))
    batches = as_numpy(training_batches(split, 5, "none", 0, stop=256))  # 256 epochs of one batch
    counts = sum(np.eye(5)[labels] for _, labels in batches)
    statistic = np.sum((counts - 256 / 5) ** 2) / (256 / 5)
    assert statistic < 39.3  # chi-squared of 16 degrees of freedom: one in a thousand is larger


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_run_is_a_function_of_its_seed(augment):
    split = random_split(20)
    batches = as_numpy(training_batches(split, 6, augment, 1, stop=9))
    assert_equal_batches(as_numpy(training_batches(split, 6, augment, 1, stop=9)), batches)
    other = as_numpy(training_batches(split, 6, augment, 2, stop=9))
    assert not any(np.array_equal(a[1], b[1]) for a, b in zip(batches, other))


@pytest.mark.parametrize("start", [1, 3, 7])  # within the first epoch, between two, within the third
def test_a_run_that_resumes_sees_what_it_would_have_seen(start):
    split = random_split(20)
    batches = as_numpy(training_batches(split, 6, "crop_flip", 1, stop=9))
    assert_equal_batches(as_numpy(training_batches(split, 6, "crop_flip", 1, start, 9)), batches[start:])
    assert_equal_batches(as_numpy(training_batches(split, 6, "crop_flip", 1, start).take(2)), batches[start : start + 2])


@pytest.mark.parametrize("own", [(0,), (1, 2), (3, 0), (0, 1, 2, 3)])
def test_replicas_share_the_batch_of_one(own):
    split = random_split(20)
    batches = as_numpy(training_batches(split, 8, "crop_flip", 1, 1, 5, 7.0))
    shares = as_numpy(training_batches(split, 8, "crop_flip", 1, 1, 5, 7.0, 4, own))
    expected = [tuple(part[2 * r : 2 * r + 2] for part in batch) for batch in batches for r in own]
    assert_equal_batches(shares, expected)


# --- Augmentation


@pytest.mark.parametrize("pad", [np.float32([10.5, 128.25, 249.75]), "symmetric"], ids=["mean", "symmetric"])
@pytest.mark.parametrize("augment", ["crop", "crop_flip"])
def test_crops_are_uniform_windows_of_the_padded_image(augment, pad):
    split = random_split(24)
    images, around = split.images.astype(np.float32), ((0, 0), (4, 4), (2, 2), (0, 0))  # an eighth of 32 x 16
    padded = np.pad(images, around, pad) if isinstance(pad, str) else np.pad(images - pad, around) + pad
    windows = [padded[:, y : y + 32, x : x + 16] for y in range(9) for x in range(5)]
    windows = np.stack([*windows, *(window[:, :, ::-1] for window in windows)], axis=1)
    found = []
    for images, labels in training_batches(split, 24, augment, 5, stop=150, pad=pad):
        gap = np.abs(windows[labels] - images.numpy()[:, np.newaxis]).max((2, 3, 4))
        assert np.all((gap < 1e-3).sum(1) == 1)  # random pixels: no other window is near
        found += [tuple(place) for place in gap.argmin(1).reshape(-1, 24)]
    counts = np.bincount(np.concatenate(found), minlength=90).reshape(2, 45)
    if augment == "crop":
        assert counts[1].sum() == 0
        counts = counts[:1]
    expected = 3600 / counts.size
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected))  # all offsets, both sides, all alike
    assert abs(counts[-1].sum() - 3600 / len(counts)) < 5 * np.sqrt(900)
    assert len(set(found)) == 150  # each step draws anew
    assert all(len(set(places)) > 8 for places in found)  # for each image


def test_padding_is_black_by_default():
    split = Split(np.full((1, 8, 8, 1), 200, np.uint8), np.zeros(1, np.int64))
    values = {float(value) for images, _ in training_batches(split, 1, "crop", 0, stop=20) for value in np.unique(images)}
    assert values == {0, 200}


def test_images_of_one_pixel_can_be_cropped():
    split = Split(np.full((3, 1, 1, 1), 9, np.uint8), np.arange(3))
    images = np.concatenate([images for images, _ in as_numpy(training_batches(split, 3, "crop_flip", 0, stop=60))])
    assert images.shape == (180, 1, 1, 1) and 5 < np.count_nonzero(images) < 40  # one offset of nine is the pixel


# --- Evaluation batches


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_evaluation_batches_are_the_split_in_order(n, batch_size):
    split = random_split(n, (3, 2, 1))
    images, labels, weights = zip(*as_numpy(evaluation_batches(split, batch_size)), strict=True)
    assert {part.shape[0] for part in (*images, *labels, *weights)} == {batch_size}
    images, labels, weights = map(np.concatenate, (images, labels, weights))
    assert (images.dtype, labels.dtype, weights.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_array_equal(weights, np.arange(-(-n // batch_size) * batch_size) < n)  # what fills up counts nothing
    np.testing.assert_array_equal(images[:n], split.images)
    np.testing.assert_array_equal(labels[:n], split.labels)
    assert np.isfinite(images).all()


def test_replicas_share_an_evaluation():
    split = random_split(10, (3, 2, 1))
    batches = as_numpy(evaluation_batches(split, 4))
    for own in ((0, 1), (1,)):
        expected = [tuple(part[2 * r : 2 * r + 2] for part in batch) for batch in batches for r in own]
        assert_equal_batches(as_numpy(evaluation_batches(split, 4, 2, own)), expected)


# --- Folders


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


def values(split):
    """The value of each image, and that it is the same in the whole image."""
    flat = split.images.reshape(len(split), -1)
    assert np.all(flat == flat[:, :1])
    return flat[:, 0].tolist()


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


# --- TFDS


def prepare(data_dir, name, splits, shape=(4, 6, 1), dtype=np.uint8, **features):
    """Prepares a TFDS data set without code: `splits` maps names to `(images, labels)`."""
    features = features or {
        "image": tfds.features.Image(shape=shape, dtype=dtype),
        "label": tfds.features.ClassLabel(names=["a", "b"]),
    }
    first, second = features
    examples = {
        split: [(i, {first: image, second: label}) for i, (image, label) in enumerate(zip(*content, strict=True))]
        for split, content in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", features=tfds.features.FeaturesDict(features), split_datasets=examples, data_dir=data_dir
    )


def gradients(n, channels=1, start=0, size=(4, 6)):
    """`n` images that differ, with labels 0, 1, 0, ..."""
    index = start + np.arange(n)
    return (index[:, np.newaxis, np.newaxis, np.newaxis] + np.zeros((1, *size, channels))).astype(np.uint8), index % 2


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("test", ["test", "validation"])
def test_tfds_data(tmp_path, channels, test):
    splits = {"train": gradients(20, channels), test: gradients(5, channels, 100)}
    prepare(tmp_path, "tiny", splits, (4, 6, channels))
    data = load_data("tiny", tmp_path)
    assert data.image_shape == (4, 6, channels) and data.class_names == ("a", "b")
    assert sorted(values(data.test)) == [100, 101, 102, 103, 104]
    assert (len(data.train), len(data.validation)) == (18, 2)
    assert sorted(values(data.train) + values(data.validation)) == list(range(20))
    for split in (data.train, data.validation, data.test):
        assert split.labels.tolist() == [value % 2 for value in values(split)]
    again = load_data("tiny:1.0.0", tmp_path)
    assert values(again.train) == values(data.train) and values(again.validation) == values(data.validation)
    assert load_data("tiny", tmp_path, 9).image_shape == (9, 9, channels)


def test_tfds_validation_is_used_where_there_is_one(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(20), "validation": gradients(3, 1, 50), "test": gradients(4, 1, 100)})
    data = load_data("tiny", tmp_path)
    assert [sorted(values(s)) for s in (data.train, data.validation, data.test)] == [
        list(range(20)), [50, 51, 52], [100, 101, 102, 103],
    ]  # fmt: skip


def test_tfds_of_many_sizes_needs_image_size(tmp_path):
    mixed = [*gradients(2)[0], *gradients(2, size=(5, 5))[0]]
    prepare(tmp_path, "mixed", {"train": (mixed, [0, 1, 0, 1]), "test": gradients(2)}, (None, None, 1))
    assert "--image_size" in refusal("mixed", tmp_path)
    assert load_data("mixed", tmp_path, 6).image_shape == (6, 6, 1)
    prepare(tmp_path, "apart", {"train": gradients(4), "test": gradients(2, size=(5, 5))}, (None, None, 1))
    assert "--image_size" in refusal("apart", tmp_path)


def test_tfds_without_a_test_split(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(4)})
    assert "'tiny' with the splits ['train']" in refusal("tiny", tmp_path)


def test_tfds_images_of_16_bits_are_not_wrapped_round(tmp_path):
    wide = (np.full((4, 4, 6, 1), 256 * 100 + 3, np.uint16), [0, 1, 0, 1])
    prepare(tmp_path, "wide", {"train": wide, "test": wide}, dtype=np.uint16)
    assert "uint16" in refusal("wide", tmp_path)


def test_tfds_without_images_or_classes(tmp_path):
    image, label = tfds.features.Image(shape=(4, 6, 1)), tfds.features.ClassLabel(names=["a", "b"])
    texts = {"train": (["one", "two"], [0, 1]), "test": (["one"], [0])}
    prepare(tmp_path, "reviews", texts, text=tfds.features.Text(), label=label)
    assert "class label" in (message := refusal("reviews", tmp_path)) and "'text'" in message
    prepare(tmp_path, "pictures", {"train": gradients(3), "test": gradients(3)}, image=image, label=np.int64)
    assert "class label" in refusal("pictures", tmp_path)


def test_damaged_tfds_data(tmp_path):
    prepare(tmp_path, "tiny", {"train": gradients(20), "test": gradients(5)})
    (record,) = tmp_path.glob("tiny/1.0.0/tiny-train.tfrecord*")
    record.write_bytes(record.read_bytes()[:-40])
    assert "tiny" in refusal("tiny", tmp_path)
    record.unlink()
    assert "tiny" in refusal("tiny", tmp_path)


class GeneratedTiny(tfds.core.GeneratorBasedBuilder):
    """A data set with code, that prepares itself without a download."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"image": tfds.features.Image(shape=(4, 6, 1)), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10, 0), "test": self._generate_examples(4, 100)}

    def _generate_examples(self, n, start):
        for image, label in zip(*gradients(n, start=start)):
            yield int(image[0, 0, 0]), {"image": image, "label": label}


class MissingTiny(GeneratedTiny):
    """Its source is not there."""

    def _split_generators(self, dl_manager):
        dl_manager.download("file:///nowhere/tiny.tar.gz")


UNREACHABLE = {
    "http://localhost:9/tiny.tar.gz": tfds.core.download.checksums.UrlInfo(tfds.core.utils.Size(9), "00" * 32, "tiny.tar.gz")
}


class UnreachableTiny(GeneratedTiny):
    """Its source is on a port where nothing listens."""

    url_infos = UNREACHABLE

    def _split_generators(self, dl_manager):
        dl_manager.download(*UNREACHABLE)


class BrokenTiny(GeneratedTiny):
    """Fails half-way through preparing."""

    def _generate_examples(self, n, start):
        yield from super()._generate_examples(n, start)
        raise OSError(28, "No space left on device\nand a second line")


class GeneratedTexts(GeneratedTiny):
    """No images; the download, if tried, fails."""

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["a", "b"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        dl_manager.download("file:///nowhere/texts.tar.gz")


def files_below(path):
    return [file for file in path.rglob("*") if not file.is_dir()]


def test_tfds_data_is_prepared_once(tmp_path):
    data = load_data("generated_tiny", tmp_path)
    assert sorted(values(data.train) + values(data.validation)) == list(range(10))
    assert sorted(values(data.test)) == [100, 101, 102, 103]
    before = {file: file.stat().st_mtime_ns for file in files_below(tmp_path)}
    again = load_data("generated_tiny", tmp_path)
    assert values(again.train) == values(data.train)
    assert {file: file.stat().st_mtime_ns for file in files_below(tmp_path)} == before


@pytest.mark.parametrize("name", ["missing_tiny", "broken_tiny"])
def test_tfds_data_that_cannot_be_prepared(tmp_path, name):
    message = refusal(name, tmp_path)
    assert str(tmp_path / name / "1.0.0") in message and "--data_dir" in message
    assert ("nowhere/tiny.tar.gz" if name == "missing_tiny" else "No space left on device") in message
    assert files_below(tmp_path) == []


def test_tfds_data_without_images_is_refused_before_the_download(tmp_path):
    assert "class label" in (message := refusal("generated_texts", tmp_path)) and "'text'" in message
    assert files_below(tmp_path) == []


@pytest.mark.parametrize(
    "name",
    [
        "nosuchset",
        "",
        "no such set",
        "Folder",
        "generated_tiny:9.9.9",
        "generated_tiny/none",
        "generated_tiny/a=3",
        "huggingface:x",
    ],
)
def test_unknown_tfds_name(tmp_path, name):
    assert repr(name) in refusal(name, tmp_path)
    assert files_below(tmp_path) == []


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file") in refusal("generated_tiny", tmp_path / "file")


@pytest.mark.parametrize("used", [False, True])  # whether other data has been downloaded there before
def test_unreachable_host_is_told_soon(tmp_path, used):
    before = [tmp_path / "downloads" / "other.tar.gz"] if used else []
    for file in before:
        file.parent.mkdir()
        file.touch()
    started = time.monotonic()
    message = refusal("unreachable_tiny", tmp_path)
    assert time.monotonic() - started < 30
    assert "connection" in message.lower() and str(tmp_path / "unreachable_tiny") in message
    assert files_below(tmp_path) == before
