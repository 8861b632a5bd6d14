"""Images that stay on the disk: which part is decoded, in which order, and what happens to those that do not decode."""

import io

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds
from image_files import corrupt, encoded, ramp, turned, write_photographs
from loaded import as_numpy, assert_equal_batches, prepare, refusal
from PIL import Image, ImageOps

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data import BatchSettings, DiskSplit, MemorySplit, evaluation_batches, load_data, training_batches
from ortho_keras.trainer.data.crops import read_image
from ortho_keras.trainer.data.disk import ImageFiles

SIZE = 16


def split_of(tmp_path, contents, labels=None, size=SIZE):
    """A split of files with these contents (`None`: no such file), by default labelled by their numbers."""
    paths = [tmp_path / f"{number:03d}.jpg" for number in range(len(contents))]
    for path, content in zip(paths, contents):
        if content is not None:
            path.write_bytes(content)
    return DiskSplit(ImageFiles("--dataset test", tmp_path, paths, labels or range(len(paths))), size)


def flat(value, size=20):
    return encoded(np.full((size, size, 3), value, np.uint8), "PNG")


def batches_of(split, batch_size, start, stop, replicas=1, own=(0,), augment="resized_crop"):
    return as_numpy(training_batches(split, BatchSettings(batch_size, augment, 3), start, stop, replicas, own))


def central(width, height, size):
    """What the central part of a ramp is, resized: the values at the middles of `size` equal parts of its square."""
    side = round(0.875 * min(width, height))
    values = []
    for length in (width, height):
        first = (length - side) // 2
        values.append(240 * (first + (np.arange(size) + 0.5) / size * side) / length)
    return np.stack(np.meshgrid(*values), -1)


@pytest.mark.parametrize(
    ("kind", "width", "height", "size"),
    [("JPEG", 60, 40, 16), ("PNG", 40, 60, 16), ("JPEG", 500, 375, 64), ("JPEG", 640, 1000, 30), ("JPEG", 33, 31, 48)],
)
def test_evaluation_takes_the_middle(tmp_path, kind, width, height, size):
    content = encoded(ramp(width, height), kind)
    decoded = np.asarray(Image.open(io.BytesIO(content)), np.float64)
    lossy = np.abs(decoded - ramp(width, height)).max()
    [(images, _, _)] = as_numpy(evaluation_batches(split_of(tmp_path, [content], size=size), 1))
    inside = slice(2, -2)  # where a small image is enlarged, its border's pixels repeat
    gap = images[0, inside, inside, :2] - central(width, height, size)[inside, inside]
    assert np.abs(gap).max() < lossy + 1 and np.abs(gap.mean((0, 1))).max() < 0.15  # nor is it shifted by part of a pixel
    np.testing.assert_allclose(images[..., 2], 120, atol=lossy + 1)


def test_training_takes_random_parts(tmp_path):
    """The corners of the part are read off the ramp: its area, its aspect and whether it is mirrored."""
    split = split_of(tmp_path, [encoded(ramp(240, 180), "PNG")] * 4, size=64)
    images = np.concatenate([images for images, _ in batches_of(split, 4, 0, 100)])
    red, green = images[..., 0], images[..., 1]
    widths, heights = (red[:, :, -2] - red[:, :, 1]).mean(1), (green[:, -2] - green[:, 1]).mean(1)
    widths, heights = widths / 240 * 64 / 61, heights / 240 * 64 / 61
    areas, aspects = np.abs(widths) * heights, np.abs(widths) * 240 / (heights * 180)
    assert heights.min() > 0 and red.min() >= 0 and red.max() <= 240
    assert 0.075 < areas.min() < 0.15 and 0.8 < areas.max() <= 1.01
    assert 0.72 < aspects.min() < 0.85 and 1.2 < aspects.max() < 1.37
    assert 0.4 < np.mean(widths < 0) < 0.6 and np.std(red.min((1, 2))) > 20


def test_a_part_at_a_reduced_resolution_is_that_part(tmp_path):
    """A large JPEG decodes at an eighth of its resolution, a PNG file at its own: the same part."""
    [(fine, _)], [(coarse, _)] = (
        batches_of(split_of(tmp_path, [encoded(ramp(1600, 1200), kind)], size=32), 1, 0, 1) for kind in ("PNG", "JPEG")
    )
    np.testing.assert_allclose(coarse, fine, atol=2.5)


@pytest.mark.parametrize("augment", ["resized_crop", "crop_flip"])
def test_augmentation_is_that_of_images_in_memory(tmp_path, augment):
    """Random parts of the same files; crops and flips of the same central parts (each of one value, so they are the file)."""
    images = np.random.default_rng(0).integers(0, 256, (6, SIZE, SIZE, 3), dtype=np.uint8)
    if augment == "crop_flip":
        images[:] = images[:, :1, :1]
    batches = [
        batches_of(split, 4, 0, 4, augment=augment)
        for split in (split_of(tmp_path, [encoded(image, "PNG") for image in images]), MemorySplit(images, np.arange(6)))
    ]
    for (found, labels), (expected, same) in zip(*batches, strict=True):
        np.testing.assert_array_equal(labels, same)
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_step_is_a_function_of_the_seed_alone(tmp_path):
    """Resumed anywhere, or shared between replicas, also where images do not decode."""
    broken = (0, 7, 8, 20)
    split = split_of(tmp_path, [encoded(ramp()) if number not in broken else b"none" for number in range(25)])
    whole = batches_of(split, 6, 0, 9)
    for start in (1, 4, 6):
        assert_equal_batches(batches_of(split, 6, start, 9), whole[start:])
    expected = [tuple(part[2 * r : 2 * r + 2] for part in batch) for batch in whole[2:5] for r in (1, 2)]
    assert_equal_batches(batches_of(split, 6, 2, 5, 3, (1, 2)), expected)
    assert not {label for _, labels in whole for label in labels} & set(broken)


def test_what_does_not_decode_is_replaced_by_the_next_that_does(tmp_path):
    good = encoded(ramp())
    contents = [good, *(corrupt(good, kind) for kind in range(5)), None, good, flat(3)[:60], good]
    split, whole = split_of(tmp_path, contents), MemorySplit(np.zeros((10, SIZE, SIZE, 3), np.uint8), np.arange(10))
    takes = {0: 0} | dict.fromkeys(range(1, 8), 7) | {8: 9, 9: 9}
    for (_, labels), (_, wanted) in zip(batches_of(split, 5, 0, 4), batches_of(whole, 5, 0, 4), strict=True):
        assert labels.tolist() == [takes[number] for number in wanted]
    assert sorted(split.skipped) == [f"{number:03d}.jpg" for number in (1, 2, 3, 4, 5, 6, 8)]


def test_a_long_run_of_files_that_do_not_decode(tmp_path):
    """As where a whole class is damaged; where all are, the run ends."""
    split = split_of(tmp_path, [flat(9)] + [b"none"] * 20 + [flat(9)])
    labels = np.concatenate([labels for _, labels in batches_of(split, 11, 0, 2)])
    assert set(labels) == {0, 21} and np.sum(labels == 0) == 1 and len(split.skipped) == 20
    split = split_of(tmp_path, [b"none"] * 4)
    with pytest.raises(InputError, match=r"--dataset test must contain images that decode. Received: 4 that do not"):
        split.sample()
    with pytest.raises(tf.errors.InvalidArgumentError, match="no image decodes"):
        batches_of(split, 2, 0, 1)


def test_what_does_not_decode_does_not_count_in_an_evaluation(tmp_path):
    split = split_of(tmp_path, [flat(50), b"", flat(90), b"none", flat(120), encoded(ramp()) + b"a note" * 9])
    (first, labels, weights), (last, _, final) = as_numpy(evaluation_batches(split, 4))
    assert weights.tolist() == [1, 0, 1, 0] and final.tolist() == [1, 1, 0, 0]  # bytes after a file's end do not matter
    np.testing.assert_allclose(first.mean((1, 2, 3)), [50, 0, 90, 0], atol=1e-4)
    assert labels.tolist() == [0, 0, 2, 0] and abs(last[0].mean() - 120) < 1e-4
    assert sorted(split.skipped) == ["001.jpg", "003.jpg"]
    images, labels = split.sample(2)
    assert images.dtype == np.uint8 and images.shape == (2, SIZE, SIZE, 3) and set(labels) < {0, 2, 4, 5}
    assert sorted(split.sample()[1]) == [0, 2, 4, 5]


@pytest.mark.parametrize(("kind", "endian"), [("JPEG", "<"), ("PNG", ">")])
def test_images_are_turned_as_viewers_show_them(tmp_path, kind, endian):
    """All orientations, whole, in evaluation and in training; of a large JPEG file only the part is decoded."""
    image = ramp(500, 375)
    files = [turned(image, orientation, kind, endian) for orientation in range(1, 9)]
    for content in files:
        shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))), np.int64)
        assert np.abs(read_image(content) - shown).max() <= (4 if kind == "JPEG" else 0) and shown.shape == image.shape
    split, keys = split_of(tmp_path, files, size=64), tf.constant([[3, 5]] * 8, tf.int64)
    for seeds in (None, keys, keys + 1):
        images, _, decoded = tf.function(split.read)(tf.range(8, dtype=tf.int64), seeds)
        np.testing.assert_allclose(images, images[:1].numpy().repeat(8, 0), atol=4)
        assert np.all(decoded)
    assert np.array_equal(read_image(tmp_path / "005.jpg"), read_image(files[5]))


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA"])
def test_other_kinds_of_colour(tmp_path, mode):
    image = np.full((30, 40, 3), (200, 120, 40), np.uint8)
    data = encoded(image, "JPEG" if mode in ("L", "CMYK") else "PNG", mode)
    [(images, _, weights)] = as_numpy(evaluation_batches(split_of(tmp_path, [data]), 1))
    expected = np.asarray(Image.fromarray(image).convert(mode).convert("RGB"), np.float64).mean((0, 1))
    assert weights == [1]
    np.testing.assert_allclose(images.mean((0, 1, 2)), expected, atol=3)


def test_folder(tmp_path):
    """Files come class by class, of which a sample has all."""
    names = write_photographs(tmp_path, {"train": 12, "val": 2, "test": 2}, classes=3, broken=0.1)
    (tmp_path / "train" / ".hidden").mkdir()
    data = load_data(f"folder:{tmp_path}", image_size=SIZE, storage="disk")
    assert (len(data.train), len(data.validation), len(data.test)) == (36, 6, 6)
    assert data.class_names == ("class00", "class01", "class02") and data.image_shape == (SIZE, SIZE, 3)
    batches = [as_numpy(evaluation_batches(split, 4)) for split in (data.train, data.validation, data.test)]
    images, labels, weights = map(np.concatenate, zip(*batches[0], *batches[1], *batches[2]))
    means = [images[(labels == label) & (weights == 1)].mean() for label in range(3)]
    assert np.all(np.diff(means) > 40) and weights.sum() == 48 - len(names) and sorted(data.skipped) == sorted(names)
    (images, labels), (again, _) = data.train.sample(12), data.train.sample(12)
    np.testing.assert_array_equal(images, again)
    assert set(labels) == {0, 1, 2} and labels.dtype == np.int64
    pixels = data.train.sample()[0].reshape(-1, 3).astype(float)
    np.testing.assert_allclose(data.channel_statistics, [pixels.mean(0), pixels.var(0)], rtol=1e-9)


def test_folder_without_a_test_split_is_cut(tmp_path):
    write_photographs(tmp_path, {".": 20}, classes=2)
    first, again = (load_data(f"folder:{tmp_path}", image_size=SIZE, storage="disk") for _ in range(2))
    parts, same = ([part.numbers.tolist() for part in (one.train, one.validation, one.test)] for one in (first, again))
    assert [len(part) for part in parts] == [32, 4, 4] and sorted(np.concatenate(parts)) == list(range(40))
    assert parts == same


def test_the_fingerprint_of_files_is_their_names_sizes_and_labels(tmp_path):
    write_photographs(tmp_path / "data", {".": 5}, classes=3)
    first, third = (tmp_path / "data" / name for name in ("class00", "class02"))
    found = []

    def fingerprint():
        found.append(load_data(f"folder:{next(tmp_path.iterdir())}", image_size=SIZE, storage="disk").fingerprint)
        return found[-1]

    before = fingerprint()
    (tmp_path / "data").rename(tmp_path / "moved")
    assert fingerprint() == before
    (tmp_path / "moved").rename(tmp_path / "data")
    first.rename(tmp_path / "data" / "other")  # the labels of the two are exchanged
    third.rename(first)
    (tmp_path / "data" / "other").rename(third)
    fingerprint()
    (third / "0.jpg").write_bytes((third / "0.jpg").read_bytes() + b"more")
    fingerprint()
    (third / "0.jpg").rename(third / "9.jpg")
    fingerprint()
    first.rename(tmp_path / "data" / "class01b")  # a class that is between the others
    fingerprint()
    assert len(set(found)) == 5 and all(len(one) == 64 for one in found)
    digests = {(*split_of(tmp_path, [b"one", b"two"], labels).digests(),) for labels in ([0, 1], [1, 0])}
    assert len(digests) == 2


def prepare_photos(data_dir, **splits):
    features = {"image": tfds.features.Image(encoding_format="jpeg"), "label": tfds.features.ClassLabel(names=["a", "b", "c"])}
    prepare(data_dir, "photos", {split: zip(*pairs) for split, pairs in splits.items()}, **features)


def test_records_are_read_as_files_are(tmp_path):
    rng = np.random.default_rng(0)
    pairs = [(encoded(ramp(*rng.integers(30, 90, 2))), int(rng.integers(3))) for _ in range(8)]
    prepare_photos(tmp_path, train=[*pairs, (pairs[0][0][:99], 1)], validation=pairs[:5], test=[(pairs[0][0], -1)])
    data = load_data("photos", tmp_path, SIZE, hold_out=False, storage="disk")
    # A test split without labels, as ImageNet's, gives way to the validation split.
    assert data.class_names == ("a", "b", "c") and data.validation is None and len(data.test) == 5
    files = split_of(tmp_path, *zip(*pairs))
    found, expected = (
        {image.tobytes(): label for image, label, weight in zip(*batch) if weight}
        for split in (data.train, files)
        for batch in as_numpy(evaluation_batches(split, 9))
    )
    assert found == expected and len(found) == 8
    (name,) = data.skipped
    assert name.startswith("photos-train.tfrecord-00000-of-00001, record at byte ")
    assert data.notes == ("the test split has no labels; the validation split takes its place",)


def test_records_without_labels(tmp_path):
    good = [(encoded(ramp()), number % 3) for number in range(4)]
    unlabelled = [(content, -1) for content, _ in good]
    for name, splits in {"test": (good, unlabelled), "train": (unlabelled, good)}.items():
        prepare_photos(tmp_path / name, **dict(zip(("train", "test"), splits)))
        for storage in ("memory", "disk"):
            message = refusal("photos", tmp_path / name, SIZE, hold_out=False, storage=storage)
            assert message.endswith(f"must have a label for each image. Received: label -1 in the {name} split")
    prepare_photos(tmp_path / "some", train=[*good, unlabelled[0], *good], test=good)
    assert "label -1 in the train split" in refusal("photos", tmp_path / "some", SIZE)
    split = load_data("photos", tmp_path / "some", SIZE, hold_out=False, storage="disk").train
    assert sorted(split.sample()[1]) == sorted(2 * [0, 1, 2, 0]) and len(split.skipped) == 1


def test_images_of_tfds_are_upright_and_changes_of_a_label_are_noticed(tmp_path):
    fingerprints = set()
    for label in (1, 2):
        data_dir = tmp_path / str(label)
        prepare_photos(
            data_dir, train=[(turned(ramp(40, 40), 6), 0)] * 4 + [(encoded(ramp()), label)], test=[(encoded(ramp()), 0)]
        )
        for storage in ("memory", "disk"):
            data = load_data("photos", data_dir, 40, hold_out=False, storage=storage)
            images, labels = data.train.sample()
            fingerprints.add(data.fingerprint)
            gaps = images[labels == 0].astype(float)[..., :2] - images[labels == 0][..., :2].astype(float)[:, ::-1]
            assert np.all(gaps[:, 0, 20, 1] < -150) and len(gaps) == 4  # green grows downwards
    assert len(fingerprints) == 4


def test_what_cannot_stay_on_the_disk(tmp_path):
    options = {"image_size": SIZE, "storage": "disk"}
    assert "--storage memory" in refusal("digits", **options)
    prepare_photos(tmp_path, train=[(encoded(ramp()), 0)] * 4, test=[(encoded(ramp()), 1)] * 3)
    (record,) = tmp_path.glob("photos/1.0.0/photos-train.tfrecord*")
    whole = record.read_bytes()
    record.write_bytes(whole[:-40])
    message = refusal("photos", tmp_path, **options)
    assert "photos must be complete" in message and str(record) in message
    record.write_bytes(whole[: len(whole) // 2])  # of four equal records
    assert "2 of the 4 examples of the split 'train'" in refusal("photos", tmp_path, **options)
    assert "photos must be complete" in refusal("photos", tmp_path, SIZE)
    record.write_bytes(b"\xff" * 99)
    assert "photos must be complete" in refusal("photos", tmp_path, **options)
