"""Photographs from the disk: which part is decoded, in which order, and what does not decode."""

import io
import logging

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from loaded import refusal
from photographs import HIGH, WIDE, corrupt, encoded, ramp, write_photographs
from PIL import Image

from ortho_keras.trainer.data import evaluation_batches, load_data, training_batches
from ortho_keras.trainer.streaming import ImageFiles, StreamedSplit

SIZE = 16


@pytest.fixture(autouse=True)
def fresh_state():
    """Nothing: no test here makes a layer, and clearing Keras takes longer than most of them."""


def split_of(tmp_path, contents, size=SIZE):
    """A split of files with these contents, labelled by their numbers."""
    paths = []
    for number, content in enumerate(contents):
        paths.append(tmp_path / f"{number:03d}.jpg")
        if content is not None:
            paths[-1].write_bytes(content)
    return StreamedSplit(ImageFiles("--dataset test", tmp_path, paths, range(len(paths))), size)


def flat(value, size=20):
    return encoded(np.full((size, size, 3), value, np.uint8), "PNG")


def labels_of(split, batch_size, start, stop, **shares):
    return [labels.numpy() for _, labels in training_batches(split, batch_size, "resized_crop", 3, start, stop, **shares)]


def central(width, height, size):
    """What the central part of a ramp is, resized: the values at the middles of `size` equal parts of its square."""
    side = round(0.875 * min(width, height))
    values = []
    for length in (width, height):
        first = (length - side) // 2
        values.append(240 * (first + (np.arange(size) + 0.5) / size * side) / length)
    return np.stack(np.meshgrid(*values), -1)


def expected_area(width, height, count=100_000):
    """The mean area of random parts: width over height uniform, then the height, as far as both fit."""
    rng = np.random.default_rng(0)
    aspects = rng.uniform(3 / 4, 4 / 3, count)
    least, most = (np.sqrt(share * width * height / aspects) for share in (0.08, 1))
    heights = least + rng.uniform(size=count) * (np.minimum(most, np.minimum(height, width / aspects)) - least)
    return np.mean(heights**2 * aspects) / (width * height)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(
    ("width", "height", "size"),
    [(WIDE, HIGH, 16), (HIGH, WIDE, 16), (500, 375, 64), (640, 1000, 30), (33, 31, 48), (320, 320, 40)],
)
def test_evaluation_takes_the_middle(tmp_path, kind, width, height, size):
    content = encoded(ramp(width, height), kind)
    decoded = np.asarray(Image.open(io.BytesIO(content)), np.float64)
    lossy = np.abs(decoded - ramp(width, height)).max()
    split = split_of(tmp_path, [content], size)
    (images, labels, weights), *rest = evaluation_batches(split, 1)
    assert not rest and labels.numpy() == [0] and weights.numpy() == [1] and images.shape == (1, size, size, 3)
    inside = slice(2, -2)  # where a small image is enlarged, its border's pixels repeat
    np.testing.assert_allclose(images[0, inside, inside, :2], central(width, height, size)[inside, inside], atol=lossy + 1)
    np.testing.assert_allclose(images[..., 2], 120, atol=lossy + 1)


def test_training_takes_random_parts(tmp_path):
    """The corners of the part are read off the ramp: its area, its aspect and whether it is mirrored."""
    split = split_of(tmp_path, [encoded(ramp(240, 180), "PNG")] * 4, 64)
    areas, aspects, mirrored, lefts = [], [], [], []
    for images, _ in training_batches(split, 4, "resized_crop", 0, 0, 100):
        for red, green, _ in np.moveaxis(images.numpy(), -1, 1):
            width, height = (red[:, -2].mean() - red[:, 1].mean()) / 240, (green[-2].mean() - green[1].mean()) / 240
            width, height = width * 64 / 61, height * 64 / 61
            assert height > 0 and red.min() >= 0 and red.max() <= 240
            mirrored.append(width < 0)
            areas.append(abs(width) * height)
            aspects.append(abs(width) * 240 / (height * 180))
            lefts.append(min(red[:, 0].mean(), red[:, -1].mean()))
    assert 0.075 < min(areas) < 0.15 and 0.8 < max(areas) <= 1.01
    assert 0.72 < min(aspects) < 0.85 and 1.2 < max(aspects) < 1.37
    assert 0.4 < np.mean(mirrored) < 0.6 and np.std(lefts) > 20
    assert abs(np.mean(areas) - expected_area(240, 180)) < 0.03


def test_a_part_at_a_reduced_resolution_is_that_part(tmp_path):
    """A large JPEG decodes at an eighth of its resolution, a PNG file at its own: the same part."""
    image = ramp(1600, 1200)
    (fine, _), (coarse, _) = (
        next(iter(training_batches(split_of(tmp_path, [encoded(image, kind)], 32), 1, "resized_crop", 5)))
        for kind in ("PNG", "JPEG")
    )
    np.testing.assert_allclose(coarse, fine, atol=2.5)


def test_an_epoch_has_each_image_once_and_the_next_another_order(tmp_path):
    split = split_of(tmp_path, [flat(10 * value) for value in range(25)])
    batches = labels_of(split, 6, 0, 8)
    first, second = np.concatenate(batches[:4]), np.concatenate(batches[4:])
    assert len(set(first)) == len(set(second)) == 24 and np.any(first != second)
    for images, labels in training_batches(split, 6, "resized_crop", 3, 0, 4):
        np.testing.assert_allclose(images.numpy().mean((1, 2, 3)), 10 * labels.numpy(), atol=1e-3)


@pytest.mark.parametrize("broken", [(), (0, 7, 8, 20)])
def test_a_step_is_a_function_of_the_seed_alone(tmp_path, broken):
    """Resumed anywhere, or shared between replicas, also where images do not decode."""
    contents = [encoded(ramp()) if number not in broken else b"none" for number in range(25)]
    split = split_of(tmp_path, contents)

    def batches(start, stop, **shares):
        made = training_batches(split, 6, "resized_crop", 3, start, stop, **shares)
        return [(images.numpy(), labels.numpy()) for images, labels in made]

    whole = batches(0, 9)
    for start in (1, 4, 6):
        for (images, labels), (again, same) in zip(whole[start:], batches(start, 9), strict=True):
            np.testing.assert_array_equal(images, again)
            np.testing.assert_array_equal(labels, same)
    shared = batches(2, 5, replicas=3, own=(1, 2))
    for number, (images, labels) in enumerate(shared):
        step, replica = 2 + number // 2, 1 + number % 2
        np.testing.assert_array_equal(images, whole[step][0][2 * replica : 2 * replica + 2])
        np.testing.assert_array_equal(labels, whole[step][1][2 * replica : 2 * replica + 2])
    assert not set(np.concatenate([labels for _, labels in whole])) & set(broken)


def test_what_does_not_decode_is_replaced_by_the_next_that_does(tmp_path):
    good = encoded(ramp())
    contents = [good, *(corrupt(good, kind) for kind in range(5)), None, good, flat(3)[:60], good]  # None: no such file
    split = split_of(tmp_path, contents)
    takes = dict.fromkeys(range(10)) | {number: 7 for number in range(1, 7)} | {0: 0, 7: 7, 8: 9, 9: 9}
    order = labels_of(split_of(tmp_path, [flat(number) for number in range(10)]), 5, 0, 4)
    split_of(tmp_path, contents)
    (tmp_path / "006.jpg").unlink()
    for labels, wanted in zip(labels_of(split, 5, 0, 4), order, strict=True):
        assert labels.tolist() == [takes[number] for number in wanted]
    assert sorted(split.skipped) == [f"{number:03d}.jpg" for number in (1, 2, 3, 4, 5, 6, 8)]


def test_a_long_run_of_files_that_do_not_decode(tmp_path):
    """As where a whole class is damaged."""
    split = split_of(tmp_path, [flat(9)] + [b"none"] * 150 + [flat(9)])
    labels = np.concatenate(labels_of(split, 76, 0, 2))
    assert set(labels) == {0, 151} and np.sum(labels == 0) == 1 and len(split.skipped) == 150


def test_what_does_not_decode_does_not_count_in_an_evaluation(tmp_path):
    split = split_of(tmp_path, [flat(50), b"", flat(90), b"none", flat(120)])
    (first, labels, weights), (last, _, final) = evaluation_batches(split, 3)
    assert weights.numpy().tolist() == [1, 0, 1] and final.numpy().tolist() == [0, 1, 0]
    np.testing.assert_allclose(first.numpy().mean((1, 2, 3)), [50, 0, 90], atol=1e-4)
    assert labels.numpy().tolist() == [0, 0, 2] and last[1].numpy().mean() == 120
    assert sorted(split.skipped) == ["001.jpg", "003.jpg"]
    images, labels = split.sample(2)
    pairs = set(zip(images.mean((1, 2, 3)).tolist(), labels.tolist()))
    assert images.dtype == np.uint8 and len(pairs) == 2 and pairs < {(50, 0), (90, 2), (120, 4)}
    images, labels = split.sample()
    assert sorted(zip(images.mean((1, 2, 3)).tolist(), labels.tolist())) == [(50, 0), (90, 2), (120, 4)]


def test_nothing_that_decodes(tmp_path):
    split = split_of(tmp_path, [b"none"] * 4)
    with pytest.raises(Exception, match=r"--dataset test must hold images that decode. Received: 4 that do not"):
        split.sample()
    with pytest.raises(tf.errors.InvalidArgumentError, match="no image decodes"):
        labels_of(split, 2, 0, 1)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P"])
def test_other_kinds_of_colour(tmp_path, mode):
    kind = "JPEG" if mode in ("L", "CMYK") else "PNG"
    image = np.full((30, 40, 3), (200, 120, 40), np.uint8)
    data = encoded(image, kind, mode)
    (images, _, weights), *_ = evaluation_batches(split_of(tmp_path, [data]), 1)
    expected = np.asarray(Image.fromarray(image).convert(mode).convert("RGB"), np.float64).mean((0, 1))
    assert weights.numpy() == [1]
    np.testing.assert_allclose(images.numpy().mean((0, 1, 2)), expected, atol=3)


def test_something_behind_the_end_of_a_file_is_no_harm(tmp_path):
    split = split_of(tmp_path, [encoded(ramp()), encoded(ramp()) + b"a note" * 9])
    (images, _, weights), *_ = evaluation_batches(split, 2)
    assert weights.numpy().tolist() == [1, 1]
    np.testing.assert_allclose(images[0], images[1], atol=3)


def test_folder(tmp_path):
    names = write_photographs(tmp_path, {"train": 10, "val": 3, "test": 2}, classes=3, broken=0.1)
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_data(f"folder:{tmp_path}", image_size=SIZE, stream=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (30, 9, 6)
    assert data.class_names == ("class00", "class01", "class02") and data.image_shape == (SIZE, SIZE, 3)
    means, counts = np.zeros(3), np.zeros(3)
    for split in (data.train, data.validation, data.test):
        for images, labels, weights in evaluation_batches(split, 4):
            for image, label, weight in zip(images.numpy(), labels.numpy(), weights.numpy()):
                means[label] += weight * image.mean()
                counts[label] += weight
    assert np.all(np.diff(means / counts) > 40) and counts.sum() == 45 - len(names)
    assert sorted(data.skipped) == sorted(names)
    mean, _ = data.channel_statistics
    assert np.allclose(mean, data.train.sample()[0].astype(float).mean((0, 1, 2)))


def test_a_sample_is_of_all_classes_and_always_the_same(tmp_path):
    """Files come class by class: dark ones first."""
    for name, level in (("dark", 40), ("light", 200)):
        (tmp_path / name).mkdir()
        for number in range(40):
            Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / name / f"{number}.png")
    data = load_data(f"folder:{tmp_path}", image_size=8, stream=True)
    images, labels = data.train.sample(24)
    assert 6 < labels.sum() < 18 and set(images[labels == 1].ravel()) == {200}
    for again, first in zip(data.train.sample(24), (images, labels)):
        np.testing.assert_array_equal(again, first)
    every = data.train.sample()[1]
    assert len(every) == len(data.train)
    (mean, variance), share = data.channel_statistics, every.mean()
    np.testing.assert_allclose(mean, 40 + 160 * share, rtol=1e-6)
    np.testing.assert_allclose(variance, 160**2 * share * (1 - share), rtol=1e-6)


def test_folder_without_a_test_split_is_cut(tmp_path):
    write_photographs(tmp_path, {".": 20}, classes=2)
    first, again = (load_data(f"folder:{tmp_path}", image_size=SIZE, stream=True) for _ in range(2))
    parts = [split.numbers.tolist() for split in (first.train, first.validation, first.test)]
    assert [len(part) for part in parts] == [32, 4, 4] and sorted(np.concatenate(parts)) == list(range(40))
    assert parts == [split.numbers.tolist() for split in (again.train, again.validation, again.test)]


def prepare(data_dir, name, splits):
    """Prepares a TFDS set of encoded images: `{split: [(bytes, label), ...]}`."""
    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=["a", "b", "c"])}
    )
    examples = {
        split: [(number, {"image": content, "label": label}) for number, (content, label) in enumerate(pairs)]
        for split, pairs in splits.items()
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name=name, version="1.0.0", features=features, split_datasets=examples, data_dir=data_dir
    )


def as_files(tmp_path, pairs):
    paths = []
    for number, (content, _) in enumerate(pairs):
        paths.append(tmp_path / f"{number}.jpg")
        paths[-1].write_bytes(content)
    return StreamedSplit(ImageFiles("", tmp_path, paths, [label for _, label in pairs]), SIZE)


def test_records_are_read_as_files_are(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(encoded(ramp(*rng.integers(30, 90, 2))), int(rng.integers(3))) for _ in range(20)]
    prepare(tmp_path, "photos", {"train": pairs, "validation": pairs[:5]})
    data = load_data("photos", tmp_path, SIZE, hold_out=False, stream=True)
    assert data.class_names == ("a", "b", "c") and data.validation is None and len(data.test) == 5
    found = {}
    for images, labels, weights in evaluation_batches(data.train, 4):
        assert np.all(weights == 1)
        found |= {image.tobytes(): label for image, label in zip(images.numpy(), labels.numpy())}
    for images, labels, _ in evaluation_batches(as_files(tmp_path, pairs), 4):
        for image, label in zip(images.numpy(), labels.numpy()):
            assert found.pop(image.tobytes()) == label
    assert not found
    images, _ = next(iter(training_batches(data.train, 8, "resized_crop", 0)))
    assert images.shape == (8, SIZE, SIZE, 3)


def test_a_record_that_does_not_decode_is_named(tmp_path):
    good = encoded(ramp())
    prepare(tmp_path, "photos", {"train": [(good, 0)] * 4 + [(good[:99], 1)] * 2, "test": [(good, 0)] * 2})
    data = load_data("photos", tmp_path, SIZE, hold_out=False, stream=True)
    weights = np.concatenate([weights for *_, weights in evaluation_batches(data.train, 3)])
    assert weights.sum() == 4
    for name, number in zip(data.skipped, np.flatnonzero(weights == 0), strict=True):
        assert name.startswith(f"photos-train.tfrecord-00000-of-00001, record {number} (byte ")


def test_a_test_split_without_labels_gives_way_to_the_validation_split(tmp_path):
    good = encoded(ramp())
    prepare(tmp_path, "photos", {"train": [(good, 0)] * 4, "validation": [(good, 1)] * 3, "test": [(good, -1)] * 2})
    data = load_data("photos", tmp_path, SIZE, hold_out=False, stream=True)
    assert (len(data.train), data.validation, len(data.test)) == (4, None, 3)


def test_what_cannot_be_streamed(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    assert "Received: 'digits'" in refusal("digits", image_size=SIZE, stream=True)
    assert "must name a folder that exists" in refusal(f"folder:{tmp_path}/none", image_size=SIZE, stream=True)
    (tmp_path / "a").mkdir()
    assert "no image in 1 folder(s)" in refusal(f"folder:{tmp_path}", image_size=SIZE, stream=True)
    good = encoded(ramp())
    prepare(tmp_path, "photos", {"train": [(good, 0)] * 4, "test": [(good, 1)] * 3})
    (record,) = tmp_path.glob("photos/1.0.0/photos-train.tfrecord*")
    record.write_bytes(record.read_bytes()[:-40])
    message = refusal("photos", tmp_path, image_size=SIZE, stream=True)
    assert "photos must be whole" in message and str(record) in message
    record.unlink()
    assert "photos must be whole" in refusal("photos", tmp_path, image_size=SIZE, stream=True)
