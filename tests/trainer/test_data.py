"""The digits, and the batches that a split in memory is served in."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from loaded import as_numpy, assert_equal_batches

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data import BatchSettings, ImageData, MemorySplit, evaluation_batches, load_data, training_batches


def random_split(n=64, shape=(16, 8, 3), seed=0):
    """Random images; an image's label is its index."""
    return MemorySplit(np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8), np.arange(n))


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def test_digits_are_split_once_and_completely_at_every_load(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    where = {np.rint(image / 16 * 255).astype("uint8").tobytes(): i for i, image in enumerate(source.images)}
    assert len(where) == 1797  # no two digits are alike, so an image tells its index

    def found(*splits):
        return [where[image.tobytes()] for split in splits for image in split.images]

    splits = (digits.train, digits.validation, digits.test)
    assert [len(split) for split in splits] == [1293, 144, 360] and sorted(found(*splits)) == list(range(1797))
    np.testing.assert_array_equal(np.concatenate([split.labels for split in splits]), source.target[found(*splits)])
    assert digits.image_shape == (8, 8, 1) and digits.class_names == tuple("0123456789")
    assert all(split.images.dtype == np.uint8 and split.labels.dtype == np.int64 for split in splits)
    assert np.all(np.abs(np.bincount(digits.test.labels) - np.bincount(source.target) * 360 / 1797) < 1)  # stratified
    keras.utils.set_random_seed(1)  # the run's own seed must not matter
    again, whole = load_data("digits"), load_data("digits", hold_out=False)
    assert found(again.train, again.validation, again.test) == found(*splits)
    assert whole.validation is None and found(whole.test) == found(digits.test)
    assert sorted(found(whole.train)) == sorted(found(digits.train, digits.validation))


@pytest.mark.parametrize("error", [MemoryError("10 GiB"), tf.errors.ResourceExhaustedError(None, None, "10 GiB")])
def test_images_that_do_not_fit_the_memory(monkeypatch, error):
    def resize(*args, **kwargs):
        raise error

    monkeypatch.setattr(tf.image, "resize", resize)
    expected = "^--dataset digits must fit the machine's memory and disk at --image_size=9. Received: 10 GiB$"
    with pytest.raises(InputError, match=expected):
        load_data("digits", image_size=9)


def test_the_fingerprint_is_the_images_and_labels_whatever_their_order():
    whole, test = random_split(7), random_split(5, seed=1)
    order = np.random.default_rng(2).permutation(7)
    cut = ImageData(whole.take(order[:4]), whole.take(order[4:]), test.take(np.arange(5)[::-1]), ())
    assert cut.fingerprint == ImageData(whole, None, test, ()).fingerprint
    pixel, swapped = whole.images.copy(), whole.labels.copy()
    pixel[3, 2, 1, 0] ^= 1
    swapped[[2, 4]] = swapped[[4, 2]]
    others = [
        ImageData(MemorySplit(pixel, whole.labels), None, test, ()),
        ImageData(MemorySplit(whole.images, swapped), None, test, ()),
        ImageData(whole.take([0, 1, 2, 3, 4, 5, 6, 6]), None, test, ()),
        ImageData(test, None, whole, ()),
        ImageData(*(MemorySplit(split.images.reshape(-1, 8, 16, 3), split.labels) for split in (whole, whole, test)), ()),
    ]
    assert len({cut.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_channel_statistics_equal_those_of_whole_numbers():
    rng = np.random.default_rng(0)
    images = np.stack([rng.integers(low, high, (2100, 32, 32)) for low, high in ((0, 256), (250, 256), (7, 8))], -1)
    train = MemorySplit(images.astype(np.uint8), np.zeros(2100, np.int64))  # 2.15 million pixels
    mean, variance = ImageData(train, train.take([0]), train.take([1]), ("one",)).channel_statistics
    n, sums, squares = 2100 * 32 * 32, images.sum((0, 1, 2)).tolist(), np.square(images).sum((0, 1, 2)).tolist()  # exact
    assert mean == [total / n for total in sums]
    np.testing.assert_allclose(variance[:2], [(n * sq - total**2) / n**2 for total, sq in zip(sums[:2], squares)], rtol=1e-11)
    assert 0 < variance[2] < 1e-9  # a constant channel can be divided by
    assert all(type(value) is float for value in mean + variance)


@pytest.mark.parametrize(("n", "batch_size"), [(37, 8), (1, 1)])
def test_an_epoch_visits_each_image_at_most_once(n, batch_size):
    split, steps = random_split(n, (2, 2, 1)), n // batch_size
    batches = as_numpy(training_batches(split, BatchSettings(batch_size, seed=3), stop=40 * steps))
    epochs = np.reshape([labels for _, labels in batches], (40, -1))
    assert all(len(set(labels)) == steps * batch_size for labels in epochs)
    assert set(epochs.ravel()) == set(range(n))  # none is left out for good
    for images, labels in batches:
        assert images.dtype == np.float32 and labels.dtype == np.int64
        np.testing.assert_array_equal(images, split.images[labels])  # "none" changes nothing


def test_every_epoch_and_every_seed_has_an_order_of_its_own():
    split, orders = random_split(40, (1, 1, 1)), set()
    numbers = (*range(8), 255, 256, 257, 512, 65536)
    for seed, epoch in [(0, number) for number in numbers] + [(number, 0) for number in numbers[1:]]:
        [(_, labels)] = training_batches(split, BatchSettings(40, seed=seed), epoch, epoch + 1)
        orders.add(tuple(labels.numpy()))
    assert len(orders) == 2 * len(numbers) - 1


def test_orders_are_uniform():
    batches = training_batches(random_split(5, (1, 1, 1)), BatchSettings(5), stop=256)  # 256 epochs of one batch
    counts = sum(np.eye(5)[labels] for _, labels in as_numpy(batches))
    statistic = np.sum((counts - 256 / 5) ** 2) / (256 / 5)
    assert statistic < 39.3  # chi-squared of 16 degrees of freedom: one in a thousand is larger


@pytest.mark.parametrize("augment", ["none", "crop_flip", "resized_crop"])
def test_a_step_is_a_function_of_the_seed_alone(augment):
    """Resumed anywhere (in the first epoch, between two, in the third), or shared between replicas."""
    split, settings = random_split(20), BatchSettings(6, augment, 1, cutout=3, mean=7.0)
    whole = as_numpy(training_batches(split, settings, stop=9))
    for start in (0, 1, 3, 7):
        assert_equal_batches(as_numpy(training_batches(split, settings, start, 9)), whole[start:])
    assert_equal_batches(as_numpy(training_batches(split, settings, 4).take(2)), whole[4:6])  # endless
    for own in ((0,), (1, 2), (2, 0), (0, 1, 2)):
        expected = [tuple(part[2 * r : 2 * r + 2] for part in batch) for batch in whole[1:5] for r in own]
        assert_equal_batches(as_numpy(training_batches(split, settings, 1, 5, 3, own)), expected)
    other = as_numpy(training_batches(split, BatchSettings(6, augment, 2), stop=9))
    assert not any(np.array_equal(a[1], b[1]) for a, b in zip(whole, other))


@pytest.mark.parametrize(
    ("augment", "padding", "border", "expected"),
    [("crop", "mean", 0, (2, 1)), ("crop_flip", "symmetric", 1, (1, 1)), ("crop_flip", "mean", 3, (3, 3))],
)  # 0: an eighth of 16 x 8
def test_crops_are_uniform_windows_of_the_padded_image(augment, padding, border, expected):
    split, mean = random_split(24), np.float32([10.5, 128.25, 249.75])
    images, around = split.images.astype(np.float32), ((0, 0), *((side, side) for side in expected), (0, 0))
    padded = np.pad(images, around, padding) if padding == "symmetric" else np.pad(images - mean, around) + mean
    rows, columns = (range(2 * side + 1) for side in expected)
    windows = [padded[:, y : y + 16, x : x + 8] for y in rows for x in columns]
    windows = np.stack([*windows, *(window[:, :, ::-1] for window in windows)], axis=1)
    found = []
    for images, labels in training_batches(split, BatchSettings(24, augment, 5, padding, border, mean=mean), stop=150):
        gap = np.abs(windows[labels] - images.numpy()[:, np.newaxis]).max((2, 3, 4))
        assert np.all((gap < 1e-3).sum(1) == 1)  # random pixels: no other window is near
        found.append(gap.argmin(1))
    sides = 2 if augment == "crop_flip" else 1
    counts = np.bincount(np.concatenate(found), minlength=sides * len(rows) * len(columns)).reshape(sides, -1)
    share = 3600 / counts.size
    assert np.all(np.abs(counts - share) < 5 * np.sqrt(share))  # all offsets, both sides, all alike
    assert abs(counts[-1].sum() - 3600 / sides) < 5 * np.sqrt(900)
    assert len({tuple(places) for places in found}) == 150  # each step draws anew
    assert all(len(set(places)) > min(7, counts.size // 2) for places in found)  # for each image


@pytest.mark.parametrize("side", [4, 5])
def test_cutout_fills_a_square_around_any_pixel(side):
    split, mean, found = random_split(16, (12, 10, 3)), np.float32([10.5, 128.25, 249.75]), []
    y, x = np.ogrid[:12, :10]
    begins = [(row - side // 2, column - side // 2) for row in range(12) for column in range(10)]
    squares = np.stack([(a <= y) & (y < a + side) & (b <= x) & (x < b + side) for a, b in begins])
    settings = [BatchSettings(8, "crop_flip", 5, "symmetric", 2, cutout, mean) for cutout in (0, side)]
    for (images, labels), cut in zip(*(as_numpy(training_batches(split, values, stop=300)) for values in settings)):
        np.testing.assert_array_equal(cut[1], labels)
        filled = np.all(cut[0] == mean, -1)
        np.testing.assert_array_equal(cut[0][~filled], images[~filled])
        fits = (squares == filled[:, np.newaxis]).all((2, 3))
        assert np.all(fits.sum(1) == 1)
        found.append(fits.argmax(1))
    assert len({tuple(places) for places in found}) == 300  # each step draws anew
    counts = np.bincount(np.concatenate(found), minlength=120)
    assert len(counts) == 120 and np.all(np.abs(counts - 20) < 5 * np.sqrt(20))  # every pixel, all alike


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (8, 4), (3, 8)])
def test_evaluation_batches_are_the_split_in_order(n, batch_size):
    split = random_split(n, (3, 2, 1))
    batches = as_numpy(evaluation_batches(split, batch_size))
    images, labels, weights = map(np.concatenate, zip(*batches, strict=True))
    assert (images.dtype, labels.dtype, weights.dtype) == (np.float32, np.int64, np.float32)
    np.testing.assert_array_equal(weights, np.arange(-(-n // batch_size) * batch_size) < n)  # what fills up counts nothing
    np.testing.assert_array_equal(images[:n], split.images)
    np.testing.assert_array_equal(labels[:n], split.labels)
    for own in ((0, 1), (1,)):
        half = batch_size // 2
        expected = [tuple(part[half * r : half * r + half] for part in batch) for batch in batches for r in own]
        assert_equal_batches(as_numpy(evaluation_batches(split, batch_size, 2, own)), expected)
