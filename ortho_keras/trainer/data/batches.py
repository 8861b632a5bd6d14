"""Batches of training and evaluation images as tf.data pipelines: each is a function of the seed and the step alone."""

import dataclasses

import numpy as np
import tensorflow as tf

CUTOUT_SEED = 1 << 62  # added to the seed of the crops, so that the squares are independent of them


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """What a run's training batches are: their size, order and augmentation.

    Args:
        batch_size: int.
        augment: `"none"`; `"crop"`, a window of the image's size out of the padded image; `"crop_flip"`, the same and half
            of the images mirrored; `"resized_crop"`, a random part of the image (Szegedy et al. 2015), resized to the size of
            the split's images, and half of them mirrored.
        seed: int, of the order and of the augmentation.
        padding: `"mean"` pads an image with `mean` before the crop, as He et al. 2016 do (by zeros, after subtracting the
            mean); `"symmetric"` mirrors its border.
        crop_border: int, pixels to pad by on each side, at most the shorter side of an image; 0 for an eighth of each side
            (4 of 32, as He et al. 2016).
        cutout: int, pixels a side of a square that is filled with `mean` in each cropped image, its centre anywhere in the
            image (DeVries and Taylor 2017, arXiv 1708.04552); 0 for none.
        mean: Pixel value of each channel, or one for all.
    """

    batch_size: int
    augment: str = "none"
    seed: int = 0
    padding: str = "mean"
    crop_border: int = 0
    cutout: int = 0
    mean: np.ndarray | float = 0.0


def training_batches(split, settings, start=0, stop=None, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the batches of training steps `start` to `stop`.

    Step s is a function of the seed and s alone: the order is a new permutation in each epoch (of `len(split) // batch_size`
    whole batches), and augmentation draws from the step's own seed. So a run that resumes at step s gets the batches that it
    would have got without the interruption. An image that cannot be decoded is replaced by the next one that can.

    Args:
        split: `MemorySplit` or `DiskSplit` of at least one batch.
        settings: `BatchSettings`.
        start: int, the first step.
        stop: int, the step after the last one, or `None` for an endless dataset.
        replicas: int, how many replicas share each batch; divides `batch_size`.
        own: The replicas, from 0, whose shares are returned. Their shares of step `start` come first, in turn, then those
            of the next step. The shares of all replicas together are the batch that one replica would get.

    Returns:
        Dataset of `(images, labels)`: float32 `(share, height, width, channels)` of 0 to 255, int64 `(share,)`, where
        `share = batch_size / replicas`.
    """
    batch_size, seed = settings.batch_size, settings.seed
    steps, share, turns = len(split) // batch_size, batch_size // replicas, len(own)
    replica_of = tf.constant(own, tf.int64)

    def epoch_shares(epoch):
        """Step, replica and images' indices of every share of an epoch, from step `start` on."""
        # index_shuffle would need less memory, but uses only 8 bits of each part of its seed (TensorFlow 2.21).
        key = tf.stack([tf.constant(seed, tf.int64), epoch])
        order = tf.random.experimental.stateless_shuffle(tf.range(len(split), dtype=tf.int64), key)
        order = tf.reshape(order[: steps * batch_size], (steps, replicas, share))
        turn = tf.range(tf.maximum(start - epoch * steps, 0) * turns, steps * turns, dtype=tf.int64)
        within, replica = turn // turns, tf.gather(replica_of, turn % turns)
        indices = tf.gather_nd(order, tf.stack([within, replica], 1))
        return tf.data.Dataset.from_tensor_slices((epoch * steps + within, replica, indices))

    def batch(step, replica, indices):
        mine, keys = replica * share + tf.range(share, dtype=tf.int64), None
        if settings.augment == "resized_crop":
            keys = tf.stack([tf.fill((share,), tf.constant(seed, tf.int64)), step * batch_size + mine], 1)
        images, labels, _ = split.read(indices, keys, replace=True)
        if settings.augment.startswith("crop"):
            images = _cropped(images, settings, step, mine)
        return images, labels

    shares = tf.data.Dataset.range(start // steps, np.iinfo(np.int64).max).flat_map(epoch_shares)
    if stop is not None:
        shares = shares.take((stop - start) * turns)
    return _parallel(shares, batch, split)


def evaluation_batches(split, batch_size, replicas=1, own=(0,)):
    """Returns a `tf.data.Dataset` of the whole split in order, in batches of one size, without augmentation.

    Args:
        split: `MemorySplit` or `DiskSplit`.
        batch_size: int.
        replicas, own: See `training_batches`.

    Returns:
        Dataset of `(images, labels, weights)`, as in `training_batches`; float32 weights are 1, and 0 for images that could
        not be decoded and for those that fill up the last batch.
    """
    share, turns = batch_size // replicas, len(own)
    replica_of = tf.constant(own, tf.int64)

    def batch(turn):
        places = turn // turns * batch_size + replica_of[turn % turns] * share + tf.range(share, dtype=tf.int64)
        real = places < len(split)
        images, labels, decoded = split.read(tf.where(real, places, 0))
        return images, labels, tf.cast(real & decoded, tf.float32)

    return _parallel(tf.data.Dataset.range(-(-len(split) // batch_size) * turns), batch, split)


def _parallel(dataset, function, split):
    calls = split.parallel_batches
    return dataset.map(function, num_parallel_calls=calls, deterministic=True).prefetch(calls)


def _cropped(images, settings, step, mine):
    """Crops, mirrors and cuts out, by uniform draws for the whole batch of a step, of which `mine` are the rows used."""
    height, width = images.shape[1:3]
    seed = tf.constant(settings.seed, tf.int64)
    draws = tf.gather(tf.random.stateless_uniform((settings.batch_size, 3), tf.stack([seed, step])), mine)
    pad_y, pad_x = settings.crop_border or max(1, height // 8), settings.crop_border or max(1, width // 8)
    margins = [[0, 0], [pad_y, pad_y], [pad_x, pad_x], [0, 0]]
    if settings.padding == "mean":
        padded = tf.pad(images - settings.mean, margins) + settings.mean
    else:
        padded = tf.pad(images, margins, settings.padding)
    top = tf.cast(draws[:, 0] * (2 * pad_y + 1), tf.int32)[:, tf.newaxis] + tf.range(height)
    left = tf.cast(draws[:, 1] * (2 * pad_x + 1), tf.int32)[:, tf.newaxis] + tf.range(width)
    if settings.augment == "crop_flip":
        left = tf.where(draws[:, 2:] < 0.5, left, left[:, ::-1])
    rows = tf.gather(padded, top, axis=1, batch_dims=1)
    cropped = tf.ensure_shape(tf.gather(rows, left, axis=2, batch_dims=1), images.shape)
    if not settings.cutout:
        return cropped
    centres = tf.random.stateless_uniform((settings.batch_size, 2), tf.stack([seed + CUTOUT_SEED, step]))
    return _cut_out(cropped, tf.gather(centres, mine), settings.cutout, settings.mean)


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
