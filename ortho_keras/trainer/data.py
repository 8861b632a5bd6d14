"""Images and labels: from TFDS, a folder or scikit-learn to a tf.data pipeline that is a function of the seed alone."""

import dataclasses
import functools
import hashlib

import numpy as np
import tensorflow as tf

from ortho_keras.method.errors import InputError
from ortho_keras.trainer.sources import SPLIT_SEED, read_digits, read_folder, read_tfds, stream_folder, stream_tfds
from ortho_keras.trainer.streaming import StreamedSplit

HELD_SHARE = 0.1
_CENTRES = 1 << 62  # tells the seed of the squares that are cut out from that of crop and flip


@dataclasses.dataclass(frozen=True)
class Split:
    images: np.ndarray  # uint8 (n, height, width, channels)
    labels: np.ndarray  # int64 (n,)
    skipped = ()  # names of images that cannot be decoded: none gets this far

    def __len__(self):
        return len(self.labels)

    @property
    def image_shape(self):
        return self.images.shape[1:]

    def sample(self, count=None):
        """Returns the first `count` images and their labels; all of them by default."""
        return self.images[:count], self.labels[:count]

    def take(self, indices):
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A data set, with the split that chooses (validation, if any) apart from the one that judges (test)."""

    train: Split | StreamedSplit
    validation: Split | StreamedSplit | None
    test: Split | StreamedSplit
    class_names: tuple

    @property
    def image_shape(self):
        return self.train.image_shape

    @property
    def skipped(self):
        """Names of the images that did not decode so far."""
        return [name for split in (self.train, self.validation, self.test) if split for name in split.skipped]

    @functools.cached_property
    def channel_statistics(self):
        """Mean and variance of the training split's pixels by channel, two lists of floats; from a sample of streamed ones."""
        pixels = self.train.sample()[0].reshape(-1, self.image_shape[-1])
        chunks = [chunk.astype(np.float64) for chunk in np.array_split(pixels, max(1, len(pixels) // 1_000_000))]
        mean = sum(chunk.sum(0) for chunk in chunks) / len(pixels)
        variance = sum(np.square(chunk - mean).sum(0) for chunk in chunks) / len(pixels)
        return mean.tolist(), np.maximum(variance, 1e-12).tolist()

    @functools.cached_property
    def fingerprint(self):
        """SHA-256, hexadecimal, of all images and labels in any order, held out or not; `None` of streamed ones.

        Two runs with the same one had the same pixels to learn from and were judged by the same ones.
        """
        if isinstance(self.train, StreamedSplit):
            return None
        whole = hashlib.sha256(str(self.image_shape).encode())
        for splits in ((self.train, self.validation), (self.test,)):
            pairs = [pair for split in splits if split for pair in zip(split.images, split.labels)]
            digests = (hashlib.sha256(label.astype("<i8").tobytes() + image.tobytes()).digest() for image, label in pairs)
            whole.update(b"".join(sorted(digests)))
        return whole.hexdigest()


def load_data(name, data_dir=None, image_size=0, hold_out=True, stream=False):
    """Loads a data set into memory, or finds its images and leaves them on the disk.

    Args:
        name: `"digits"` (scikit-learn's 1,797 handwritten digits, 8x8), `"folder:PATH"`, or a TFDS name. A folder holds either
            one folder for each class, or `train` and `test` (and `val`) with one folder for each class in each.
        data_dir: TFDS's folder of prepared data. Defaults to TFDS's own, `~/tensorflow_datasets`.
        image_size: int. Resizes to this many pixels a side; 0 keeps the size, which must then be the same for all images.
        hold_out: bool. Whether a data set without a validation split gets one.
        stream: bool. Whether the images stay on the disk, in their own sizes, of which parts are decoded and resized to
            `image_size` when they are needed (`StreamedSplit`). A folder or a TFDS set.

    Returns:
        An `ImageData`. What the data set does not come with is cut off the training split, the same at every run: a tenth for
        the test of a folder without `test`, then, with `hold_out`, a tenth for validation. A TFDS set that has a validation
        split and no test split is tested on the former.

    Raises:
        InputError: If the data set is unknown, cannot be had or read, or holds no images of one size.
    """
    flag = f"--dataset {name}"
    if stream:
        splits, class_names = _streamed(name, data_dir, image_size)
        return _with_cuts(splits, class_names, flag, hold_out)
    if name == "digits":
        arrays, class_names = read_digits(image_size)
    elif name.startswith("folder:"):
        arrays, class_names = read_folder(name.removeprefix("folder:"), image_size)
    else:
        arrays, class_names = read_tfds(name, data_dir, image_size)
    splits = {key: Split(*pair) for key, pair in arrays.items()}
    shapes = {key: split.images.shape[1:] for key, split in splits.items()}
    if len(set(shapes.values())) > 1:
        raise InputError(f"{flag} must hold images of one size, or --image_size must be given. Received: {shapes}")
    return _with_cuts(splits, class_names, flag, hold_out)


def _streamed(name, data_dir, image_size):
    if name == "digits":
        raise InputError("--dataset must be a folder or a TFDS set with --augment resized_crop. Received: 'digits'")
    folder = name.startswith("folder:")
    sources, names = stream_folder(name.removeprefix("folder:")) if folder else stream_tfds(name, data_dir)
    return {key: StreamedSplit(source, image_size) for key, source in sources.items()}, names


def _with_cuts(splits, class_names, flag, hold_out):
    """An `ImageData` of these splits, what is missing cut off the training split."""
    cuts = [key for key in ("test", "validation") if key not in splits and (hold_out or key == "test")]
    if len(splits["train"]) < 1 + len(cuts):
        raise InputError(
            f"{flag} must have at least {1 + len(cuts)} training images, to hold out {' and '.join(cuts)}. "
            f"Received: {len(splits['train'])}"
        )
    for key in cuts:
        splits["train"], splits[key] = _cut(splits["train"])
    return ImageData(splits["train"], splits.get("validation"), splits["test"], tuple(class_names))


def training_batches(
    split, batch_size, augment, seed, start=0, stop=None, pad=0.0, border=0, replicas=1, own=(0,), cutout=0, fill=0.0
):
    """Returns a `tf.data.Dataset` of training steps `start` to `stop` of the run that `seed` names.

    Step s is a function of the seed and s alone: the order is a new permutation in each epoch (of `len(split) // batch_size`
    whole batches), augmentation draws from the step's own seed. So a run that resumes at step s sees what it would have seen.

    Args:
        split: `Split` or `StreamedSplit`, at least one batch.
        batch_size: int.
        augment: `"none"`; `"crop"`, a window of the image's size out of the padded image; `"crop_flip"`, the same and half
            of the images mirrored; `"resized_crop"`, what a `StreamedSplit` always does.
        seed: int.
        start: int, the first step.
        stop: int, the step after the last one, or `None` for an endless dataset.
        pad: Pixel value by channel that pads an image, or `"symmetric"`, which mirrors its border. The mean of the
            pixels is what He et al. 2016 pad with (zeros, behind a subtraction of the mean).
        border: int, pixels to pad by on each side, at most the shorter side of an image; 0 for an eighth of each side (4 of 32,
            as He et al. 2016).
        replicas: int, how many replicas share each batch; divides `batch_size`.
        own: The replicas, from 0, whose shares are wanted. Their shares of step `start` come first, in turn, then those
            of the next step. The shares of all replicas together are the batch that one replica would see.
        cutout: int, pixels a side of a square that is cut out of each image that is cropped, its centre anywhere in the
            image (DeVries and Taylor 2017, arXiv 1708.04552); 0 for none.
        fill: Pixel value by channel that the square gets; the mean, in that paper.

    Returns:
        Dataset of `(images, labels)`: float32 `(share, height, width, channels)` of 0 to 255, int64 `(share,)`, where
        `share = batch_size / replicas`.
    """
    if isinstance(split, StreamedSplit):
        return split.training_batches(batch_size, seed, start, stop, replicas, own)
    steps = len(split) // batch_size
    share = batch_size // replicas
    replica_of = tf.constant(own, tf.int64)
    with tf.device("CPU:0"):
        images, labels = tf.constant(split.images), tf.constant(split.labels)

    def batch(number):
        step, replica = number // len(own), replica_of[number % len(own)]
        epoch, within = step // steps, step % steps
        key = tf.constant(seed, tf.int64)
        draws = tf.random.stateless_uniform((batch_size, 3), tf.stack([key, step]))  # the whole batch's, whatever the share
        mine = replica * share + tf.range(share, dtype=tf.int64)
        # index_shuffle would be lighter, but sees only 8 bits of each part of its seed (TensorFlow 2.21).
        permutation = tf.random.experimental.stateless_shuffle(tf.range(len(split), dtype=tf.int64), tf.stack([key, epoch]))
        indices = tf.gather(permutation, within * batch_size + mine)
        x = _augmented(tf.cast(tf.gather(images, indices), tf.float32), augment, tf.gather(draws, mine), pad, border)
        if cutout and augment != "none":
            centres = tf.random.stateless_uniform((batch_size, 2), tf.stack([key + _CENTRES, step]))
            x = _cut_out(x, tf.gather(centres, mine), cutout, fill)
        return x, tf.gather(labels, indices)

    last = np.iinfo(np.int64).max if stop is None else stop * len(own)
    order = tf.data.Dataset.range(start * len(own), last)
    return order.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def evaluation_batches(split, batch_size, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the whole split in order, in batches of one size.

    Args:
        split: `Split` or `StreamedSplit`.
        batch_size: int.
        replicas: See `training_batches`.
        own: See `training_batches`.

    Returns:
        Dataset of `(images, labels, weights)`, as in `training_batches`; float32 weights are 1, and 0 for the images that
        fill up the last batch.
    """
    if isinstance(split, StreamedSplit):
        return split.evaluation_batches(batch_size, replicas, own)
    share = batch_size // replicas
    replica_of = tf.constant(own, tf.int64)
    with tf.device("CPU:0"):
        images, labels = tf.constant(split.images), tf.constant(split.labels)

    def batch(number):
        start = number // len(own) * batch_size + replica_of[number % len(own)] * share
        positions = start + tf.range(share, dtype=tf.int64)
        real = positions < len(split)
        indices = tf.where(real, positions, 0)
        return tf.cast(tf.gather(images, indices), tf.float32), tf.gather(labels, indices), tf.cast(real, tf.float32)

    order = tf.data.Dataset.range(-(-len(split) // batch_size) * len(own))
    return order.map(batch, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)


def _augmented(images, augment, draws, pad, border):
    """Crops and mirrors by three uniform draws for each image, `(batch, 3)`."""
    if augment == "none":
        return images
    height, width = images.shape[1:3]
    pad_y, pad_x = border or max(1, height // 8), border or max(1, width // 8)
    margins = [[0, 0], [pad_y, pad_y], [pad_x, pad_x], [0, 0]]
    padded = tf.pad(images, margins, pad) if isinstance(pad, str) else tf.pad(images - pad, margins) + pad
    top = tf.cast(draws[:, 0] * (2 * pad_y + 1), tf.int32)[:, tf.newaxis] + tf.range(height)
    left = tf.cast(draws[:, 1] * (2 * pad_x + 1), tf.int32)[:, tf.newaxis] + tf.range(width)
    if augment == "crop_flip":
        left = tf.where(draws[:, 2:] < 0.5, left, left[:, ::-1])
    rows = tf.gather(padded, top, axis=1, batch_dims=1)
    columns = tf.gather(rows, left, axis=2, batch_dims=1)
    return tf.ensure_shape(columns, images.shape)


def _cut_out(images, centres, side, fill):
    """Fills a square of `side` pixels in each image, as far as it lies in it; its centre by two uniform draws, `(batch, 2)`."""
    inside = []
    for axis in (0, 1):
        length = images.shape[1 + axis]
        first = tf.cast(centres[:, axis] * length, tf.int32)[:, tf.newaxis] - side // 2
        places = tf.range(length)
        inside.append((first <= places) & (places < first + side))
    square = inside[0][:, :, tf.newaxis, tf.newaxis] & inside[1][:, tf.newaxis, :, tf.newaxis]
    return tf.where(square, tf.cast(fill, images.dtype), images)


def _cut(split):
    """Cuts the held-out share off a split, at least one image. The same images whatever the run's seed."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(split))
    held = max(1, round(HELD_SHARE * len(split)))
    return split.take(np.sort(order[held:])), split.take(np.sort(order[:held]))
