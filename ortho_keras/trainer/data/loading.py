"""Loads a data set by its name, in its splits (training, validation, test): into memory, or as images on the disk."""

import dataclasses
import functools
import hashlib
import itertools
import math

import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError, first_line
from ortho_keras.trainer.data.crops import resized_crop
from ortho_keras.trainer.data.disk import DiskSplit
from ortho_keras.trainer.data.sources import SOURCES, TfdsDataset

RESIZED_AT_ONCE = 1 << 24  # bytes of images
HELD_SHARE = 0.1
SPLIT_SEED = 0  # fixed: every run has the same validation and test images, whatever its own seed


@dataclasses.dataclass(frozen=True)
class MemorySplit:
    """Images of one split as arrays: uint8 `(n, height, width, channels)`, and int64 labels `(n,)`."""

    images: np.ndarray
    labels: np.ndarray
    skipped: tuple = ()  # names of images that could not be read or decoded; `images` lacks them
    parallel_batches = tf.data.AUTOTUNE

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        return self.images.shape[1:]

    def sample(self, count=None):
        """Returns the first `count` images and their labels; all of them by default."""
        return self.images[:count], self.labels[:count]

    @property
    def known_labels(self):
        return self.labels

    def take(self, indices):
        return MemorySplit(self.images[indices], self.labels[indices], self.skipped)

    def digests(self):
        """Yields a SHA-256 for each image and its label."""
        pairs = zip(self.images, self.labels)
        return (hashlib.sha256(label.astype("<i8").tobytes() + image.tobytes()).digest() for image, label in pairs)

    def read(self, indices, keys=None, replace=False):
        """Returns float32 images, labels, and that each was decoded; the arguments are those of `DiskSplit.read`."""
        images, labels = (tf.gather(values, indices) for values in self._tensors)
        if keys is not None:
            shape, signature = images.shape, tf.TensorSpec(self.image_shape)
            images = tf.map_fn(lambda pair: resized_crop(*pair, shape[1:3]), (images, keys), fn_output_signature=signature)
        return tf.cast(images, tf.float32), labels, tf.ones_like(labels, tf.bool)

    @functools.cached_property
    def _tensors(self):
        with tf.init_scope(), tf.device("CPU:0"):  # outside of any graph, which takes them by reference
            return tf.constant(self.images), tf.constant(self.labels)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set, in which the images for model selection (validation, if any) are separate from those of the test.

    `MemorySplit` and `DiskSplit` have the same interface: `len`, `image_shape`, `read`, `sample`, `take` and `skipped`.
    """

    train: MemorySplit | DiskSplit
    validation: MemorySplit | DiskSplit | None
    test: MemorySplit | DiskSplit
    class_names: tuple
    notes: tuple = ()  # lines for the log, on what was left out or is missing

    @property
    def image_shape(self):
        return self.train.image_shape

    @property
    def skipped(self):
        """Names of the images that could not be decoded so far."""
        names = [name for split in (self.train, self.validation, self.test) if split for name in list(split.skipped)]
        return list(dict.fromkeys(names))

    @functools.cached_property
    def channel_statistics(self):
        """Mean and variance of each channel over the training images (a sample of those on the disk): two lists of floats."""
        pixels = self.train.sample()[0].reshape(-1, self.image_shape[-1])
        chunks = [chunk.astype(np.float64) for chunk in np.array_split(pixels, max(1, len(pixels) // 1_000_000))]
        mean = sum(chunk.sum(0) for chunk in chunks) / len(pixels)
        variance = sum(np.square(chunk - mean).sum(0) for chunk in chunks) / len(pixels)
        return mean.tolist(), np.maximum(variance, 1e-12).tolist()

    @functools.cached_property
    def fingerprint(self):
        """SHA-256, hexadecimal, of the images and labels, whatever their order.

        Two runs with the same fingerprint had the same pixels for training (and validation) and the same for the test. Images
        on the disk are not read: files count by relative name, size and label, records of TFDS by length and checksum.
        """
        whole = hashlib.sha256(str(self.image_shape).encode())
        for splits in ((self.train, self.validation), (self.test,)):
            whole.update(b"".join(sorted(digest for split in splits if split for digest in split.digests())))
        return whole.hexdigest()


def read_into_memory(examples, image_size, flag):
    """Returns `{split: MemorySplit}` of `{split: pairs of a uint8 image and a label}`, resized unless `image_size` is 0."""
    stacks = {split: list(_stacks(pairs, image_size)) for split, pairs in examples.items()}
    shapes = sorted({images.shape[1:] for found in stacks.values() for images, _ in found})
    if len(shapes) > 1:
        raise InputError(f"{flag} must have images of one size, or --image_size must be given. Received: {shapes[:4]}")
    empty = [split for split, found in stacks.items() if not found]
    if empty:
        raise InputError(f"{flag} must have images in each split. Received: none in {', '.join(empty)}")
    return {split: MemorySplit(*map(np.concatenate, zip(*found))) for split, found in stacks.items()}


def _stacks(pairs, image_size):
    """Arrays of images and of labels: one by one, small images would take longer to pass on than to resize."""
    for shape, group in itertools.groupby(pairs, key=lambda pair: pair[0].shape):
        while found := list(itertools.islice(group, max(1, RESIZED_AT_ONCE // math.prod(shape)))):
            images, labels = map(np.stack, zip(*found))
            if image_size and shape[:2] != (image_size, image_size):
                images = resized(images, (image_size, image_size))
            yield images, labels.astype(np.int64)


def resized(images, size):
    """Returns uint8 images `(..., height, width, channels)` at another `size`, `(height, width)`."""
    return np.clip(np.round(tf.image.resize(images, size, antialias=True)), 0, 255).astype(np.uint8)


def load_data(name, data_dir=None, image_size=0, hold_out=True, storage="memory"):
    """Loads a data set for image classification.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8), `"folder:PATH"`, or the name of a TFDS data set. A
            folder contains either one folder for each class, or `train` and `test` (and `val`) with one for each class in each.
        data_dir: Path of TFDS's folder of prepared data. Defaults to TFDS's own, `~/tensorflow_datasets`.
        image_size: int. Resizes to this many pixels a side; 0 keeps the size, which must then be the same for all images.
        hold_out: bool. Whether a data set without a validation split gets one.
        storage: `"memory"`, or `"disk"`: the images of a folder or of a TFDS set stay on the disk, in their own sizes, and the
            parts of them that a step uses are decoded and resized to `image_size` when they are needed (`DiskSplit`).

    Returns:
        An `ImageData`. A split that the data set lacks is cut off the training split, the same at every run and for both kinds
        of storage: a tenth for the test of a folder without `test`, then, with `hold_out`, a tenth for validation; of a
        folder, a tenth of each class, so that a class of at least three images is in all parts. A TFDS set that has a
        validation split and no test split is tested on the former.

    Raises:
        InputError: If the data set is unknown, cannot be downloaded or read, or its images differ in size.
    """
    try:
        source = SOURCES.get("".join(name.partition(":")[:2]), TfdsDataset)(name, data_dir)
        if storage == "disk":
            splits = {key: DiskSplit(images, image_size) for key, images in source.on_disk().items()}
        else:
            splits = read_into_memory(source.examples(), image_size, source.flag)
            for key, names in source.skipped.items():
                splits[key] = dataclasses.replace(splits[key], skipped=tuple(names.values()))
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        expected = f"--dataset {name} must fit the machine's memory and disk at --image_size={image_size}"
        raise InputError(f"{expected}. Received: {first_line(error)}") from error
    except (OSError, tf.errors.OpError) as error:
        raise InputError(f"--dataset {name} must be complete and readable. Received: {first_line(error)}") from error
    notes = list(source.notes)
    if {"test", "validation"} <= splits.keys() and np.all(splits["test"].known_labels < 0):
        splits["test"] = splits.pop("validation")  # as ImageNet's, whose test labels are not public
        notes.append("the test split has no labels; the validation split takes its place")
    for key, split in splits.items():
        if np.any(split.known_labels < 0):
            raise InputError(f"{source.flag} must have a label for each image. Received: label -1 in the {key} split")
    missing = [key for key in ("test", "validation") if key not in splits and (hold_out or key == "test")]
    train, needed = splits["train"], 1 + len(missing)
    if len(train) < needed:
        expected = f"at least {needed} training images, to hold out {' and '.join(missing)}"
        raise InputError(f"{source.flag} must have {expected}. Received: {len(train)}")
    labels, skipped = source.train_labels, [*source.skipped.get("train", ())]
    left = np.arange(len(train) + len(skipped))  # also images that do not decode: both kinds of storage have one split
    numbers, whole = np.delete(left, skipped), train  # of the images in `whole`
    for still_missing, key in zip(range(len(missing), 0, -1), missing):
        held = left[_held_out(len(left), None if labels is None else labels[left], still_missing)]
        left = np.setdiff1d(left, held)
        splits[key] = whole.take(np.flatnonzero(np.isin(numbers, held)))
    splits["train"] = train = whole.take(np.flatnonzero(np.isin(numbers, left))) if missing else train
    empty = [key for key, split in splits.items() if not len(split)]
    if empty:
        raise InputError(f"{source.flag} must have images that decode in each split. Received: none in {', '.join(empty)}")
    if labels is not None:
        absent = [name for label, name in enumerate(source.class_names) if label not in labels[left]]
        notes += [f"no training image is of class {', '.join(absent)}"] if absent else []
    return ImageData(train, splits.get("validation"), splits["test"], tuple(source.class_names), tuple(notes))


def _held_out(count, labels, parts):
    """Returns the sorted indices of a tenth of the images, of each class where labels are known.

    `parts` is how many parts are still to be cut off: a class keeps an image for each of them and one for training.
    """
    rng = np.random.default_rng(SPLIT_SEED)
    if labels is None:
        return np.sort(rng.permutation(count)[: max(1, round(HELD_SHARE * count))])
    held = []
    for label in np.unique(labels):
        own = rng.permutation(np.flatnonzero(labels == label))
        held += own[: max(1, round(HELD_SHARE * len(own)))].tolist() if len(own) > parts else []
    return np.sort(held or rng.permutation(count)[:1])
