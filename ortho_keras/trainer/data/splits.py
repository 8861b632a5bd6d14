"""A data set in its splits: training, validation and test."""

import dataclasses
import functools
import hashlib

import numpy as np

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.data.disk import DiskSplit
from ortho_keras.trainer.data.memory import MemorySplit

HELD_SHARE = 0.1
SPLIT_SEED = 0  # fixed: every run has the same validation and test images, whatever its own seed


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set, in which the images for model selection (validation, if any) are separate from those of the test.

    `MemorySplit` and `DiskSplit` have the same interface: `len`, `image_shape`, `read`, `sample`, `take` and `skipped`.
    """

    train: MemorySplit | DiskSplit
    validation: MemorySplit | DiskSplit | None
    test: MemorySplit | DiskSplit
    class_names: tuple

    @property
    def image_shape(self):
        return self.train.image_shape

    @property
    def skipped(self):
        """Names of the images that could not be decoded so far."""
        return [name for split in (self.train, self.validation, self.test) if split for name in list(split.skipped)]

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
        """SHA-256, hexadecimal, of the images and labels in memory, whatever their order; `None` for images on the disk.

        Two runs with the same fingerprint had the same pixels for training (and validation) and the same for the test.
        """
        if isinstance(self.train, DiskSplit):
            return None
        whole = hashlib.sha256(str(self.image_shape).encode())
        for splits in ((self.train, self.validation), (self.test,)):
            pairs = [pair for split in splits if split for pair in zip(split.images, split.labels)]
            digests = (hashlib.sha256(label.astype("<i8").tobytes() + image.tobytes()).digest() for image, label in pairs)
            whole.update(b"".join(sorted(digests)))
        return whole.hexdigest()


def with_held_out(splits, class_names, flag, hold_out):
    """Returns an `ImageData` in which a missing test split and, with `hold_out`, validation split are cut off the training."""
    missing = [key for key in ("test", "validation") if key not in splits and (hold_out or key == "test")]
    train = splits["train"]
    if len(train) < 1 + len(missing):
        raise InputError(
            f"{flag} must have at least {1 + len(missing)} training images, to hold out {' and '.join(missing)}. "
            f"Received: {len(train)}"
        )
    for key in missing:
        order = np.random.default_rng(SPLIT_SEED).permutation(len(train))
        count = max(1, round(HELD_SHARE * len(train)))
        splits[key], train = train.take(np.sort(order[:count])), train.take(np.sort(order[count:]))
    return ImageData(train, splits.get("validation"), splits["test"], tuple(class_names))
